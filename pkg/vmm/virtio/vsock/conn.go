package vsock

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/buffers"
)

// bufAlloc is the receive buffer we announce for a connection: how much the
// guest may have sent that its reader on the host has not taken. It is the size
// that Linux gives its own sockets (VSOCK_DEFAULT_BUFFER_SIZE), which caps what
// its sender uses of ours.
const bufAlloc = 256 << 10

// connState is where a connection is in its life.
type connState int

const (
	// connecting: a Dial has sent, or will send, opRequest.
	connecting connState = iota
	// accepting: the guest has sent opRequest and Config.Accept is running.
	accepting
	// open: data may flow, as far as the shutdown flags of both sides allow.
	open
	// closing: the host has closed its socket and the guest has been told;
	// it is to confirm with opReset.
	closing
	// closed: nothing is left but perhaps references.
	closed
)

// connKey names a connection within a device: the ports of both sides.
type connKey struct{ host, guest uint32 }

// conn is one connection: two independent flows of bytes between the guest and
// a socket, and the packets that open and close them.
//
//	guest → host: the tx goroutine (receive) writes to the socket and, once
//	that is full, to the backlog; the pump writes the backlog to the socket.
//	host → guest: the pump reads from the socket into buffers of the guest.
//
// The lock order is conn.mu, then mux.mu.
type conn struct {
	m   *mux
	id  uint64 // unique in m, never reused; names the socket to the poller
	key connKey

	queued bool // in m.ready; protected by m.mu

	// The pump's own.
	readable bool // the socket may have data, or its end
	hungUp   bool // nobody is left who could read or write the socket's peer
	starved  bool // in pump.waiting

	mu      sync.Mutex // protects what follows, and every use of fd
	state   connState
	fd      int         // our end of the socketpair; -1 when there is none
	reply   chan error  // of a connecting connection; takes one value
	timer   *time.Timer // of a closing connection
	opening uint16      // opRequest or opResponse that is still to be sent, or 0

	// What each side has shut down: flags of opShutdown.
	guestShut uint32 // received
	hostShut  uint32 // to be told
	toldShut  uint32 // sent
	wasReset  bool   // the guest has sent opReset: send it nothing any more

	// Guest → host. Counters are modulo 2^32, section 5.10.6.3.
	backlog    backlog // at most bufAlloc
	fwdCnt     uint32  // bytes that have left us
	toldFwd    uint32  // fwdCnt as last sent
	askedCount bool    // the guest has sent opCreditRequest
	watched    bool    // the poller watches fd
	wantWrite  bool    // ... also for room, because of the backlog
	shutRead   bool    // shutdown(2) was done on fd
	shutWrite  bool

	// Host → guest.
	txCnt        uint32 // bytes sent
	peerBufAlloc uint32 // of the last packet, whatever the guest says
	peerFwdCnt   uint32
	wantsCredit  bool // the pump waits for credit
}

// errReset ends connections when the device is reset.
var errReset = fmt.Errorf("the vsock device was reset: %w", unix.ECONNRESET)

// receive handles a packet of the guest. It reports false if the connection is
// gone, as if it had not been found.
func (c *conn) receive(h *header, payload [][]byte) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state == closed || c.wasReset {
		return false
	}
	c.peerBufAlloc, c.peerFwdCnt = h.bufAlloc, h.fwdCnt // in every packet
	if c.wantsCredit && c.credit() > 0 {
		c.wantsCredit = false
		c.m.schedule(c)
	}
	established := c.state == open || c.state == closing
	switch {
	case h.op == opReset:
		c.receiveReset()
	case h.op == opCreditUpdate:
	case h.op == opCreditRequest:
		c.askedCount = true
		c.m.schedule(c)
	case h.op == opResponse && c.state == connecting:
		c.state = open
		c.reply <- nil
		c.m.schedule(c)
	case h.op == opRW && established:
		c.receiveData(int(h.length), payload)
	case h.op == opShutdown && established:
		c.guestShut |= h.flags & shutdownBoth
		c.m.schedule(c)
	default:
		c.abort(fmt.Sprintf("operation %d in state %d", h.op, c.state))
	}
	return true
}

// receiveData handles opRW: n bytes go to the socket, or as many as it takes,
// and the rest to the backlog.
func (c *conn) receiveData(n int, payload [][]byte) {
	switch {
	case c.guestShut&shutdownSend != 0:
		c.abort("data after its end")
		return
	case n > bufAlloc-c.backlog.size:
		c.abort("more data than it has credit for")
		return
	case n == 0:
		return
	case c.hostShut&shutdownReceive != 0: // in flight when we told it
		c.fwdCnt += uint32(n)
	default:
		written := 0
		if c.backlog.size == 0 {
			var err error
			if written, err = writeSome(c.fd, payload); err != nil {
				c.stopReceiving()
				written = n
			}
			c.fwdCnt += uint32(written)
		}
		if written < n {
			c.backlog.write(buffers.Slice(nil, payload, uint64(written), uint64(n-written)))
		}
	}
	if c.creditDue() || c.hostShut != c.toldShut || (c.backlog.size > 0) != c.wantWrite {
		c.m.schedule(c)
	}
}

// receiveReset handles opReset. What the guest has sent before still goes to
// the host.
func (c *conn) receiveReset() {
	if c.state != open {
		c.close(unix.ECONNREFUSED)
		return
	}
	c.wasReset = true
	c.guestShut = shutdownBoth
	c.m.unlist(c)
	c.m.schedule(c)
}

// credit is how many bytes the guest has room for, section 5.10.6.3. The
// guest's counters may be nonsense: it hurts its own connection.
func (c *conn) credit() uint32 {
	inFlight := c.txCnt - c.peerFwdCnt
	if inFlight >= c.peerBufAlloc {
		return 0
	}
	return c.peerBufAlloc - inFlight
}

// creditDue says whether the guest is to be told how much it may send: when it
// has asked, and when it may have used half of what it knew of. Linux uses no
// more than its own buffer's size, which the guest may have made small.
//
// We need not ask the guest in turn: Linux tells when its reader has taken much
// or all of what we sent.
func (c *conn) creditDue() bool {
	return c.askedCount || c.fwdCnt-c.toldFwd >= max(min(bufAlloc, c.peerBufAlloc)/2, 1)
}

// stopReceiving notes that nobody on the host reads any more. What the guest
// has sent is dropped, and counts as taken, so that it does not wait for
// credit to learn of it.
func (c *conn) stopReceiving() {
	c.hostShut |= shutdownReceive
	c.fwdCnt += uint32(c.backlog.size)
	c.backlog.discard(c.backlog.size)
}

// abort ends the connection because the guest broke the protocol.
func (c *conn) abort(why string) {
	c.m.complain("vsock: connection reset", "hostPort", c.key.host, "guestPort", c.key.guest, "why", why)
	c.m.sendReset(reset{kind: typeStream, cid: hostCID, key: c.key})
	c.close(unix.EPROTO)
}

// close ends the connection without a word to the guest. err is for the Dial
// that waits for it, if one does.
func (c *conn) close(err error) {
	if c.state == closed {
		return
	}
	if c.state == connecting {
		c.reply <- err
	}
	if c.state == accepting {
		c.m.unlist(c) // it counts until Accept returns
	} else {
		c.m.forget(c)
	}
	c.state = closed
	c.closeSocket()
	c.backlog.discard(c.backlog.size)
	if c.timer != nil {
		c.timer.Stop()
	}
	c.m.schedule(c) // the pump forgets it, too
}

// closeSocket closes our end of the socketpair. The poller forgets it by that.
func (c *conn) closeSocket() {
	if c.fd >= 0 {
		unix.Close(c.fd)
		c.fd = -1
	}
}

// startClosing is for when the host has closed its socket and the guest has
// been told: it is to answer with opReset.
func (c *conn) startClosing(timeout time.Duration) {
	c.state = closing
	c.closeSocket()
	c.timer = time.AfterFunc(timeout, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.state == closing {
			c.m.sendReset(reset{kind: typeStream, cid: hostCID, key: c.key})
			c.close(nil)
		}
	})
}

// accepted is called with the result of Config.Accept: a non-blocking socket,
// which becomes the connection's, or an error.
func (c *conn) accepted(fd int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state == closed { // the guest gave up, or the device was reset
		if err == nil {
			unix.Close(fd)
		}
		c.m.forget(c)
		return
	}
	if err != nil {
		c.m.complain("vsock: connection of the guest refused", "hostPort", c.key.host, "err", err)
		c.m.sendReset(reset{kind: typeStream, cid: hostCID, key: c.key})
		c.close(err)
		c.m.forget(c)
		return
	}
	c.fd, c.state, c.opening = fd, open, opResponse
	c.m.schedule(c)
}

// cancel ends a Dial that has waited long enough. If the answer arrived at the
// last moment it does nothing.
func (c *conn) cancel(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state == connecting {
		c.m.sendReset(reset{kind: typeStream, cid: hostCID, key: c.key})
		c.close(err)
	}
}

// writeSome writes bufs to a non-blocking socket. Fewer bytes than bufs hold,
// and no error, means that it is full.
func writeSome(fd int, bufs [][]byte) (int, error) {
	for {
		n, err := unix.Writev(fd, bufs)
		switch {
		case err == nil:
			return n, nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return 0, nil
		default:
			return 0, err
		}
	}
}
