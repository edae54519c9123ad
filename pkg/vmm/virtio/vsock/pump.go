package vsock

import (
	"errors"
	"slices"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/buffers"
	"golang.org/x/sys/unix"
)

// quantum is how much the pump reads from one socket before the next one has
// its turn, and into how many rx buffers. It is one system call: with Linux's
// buffers of 3.7 KiB it fills 18.
const (
	quantum        = 64 << 10
	quantumBuffers = 32

	// maxSegments keeps readv(2) below its IOV_MAX of 1024: a buffer may
	// consist of as many segments as the queue has descriptors.
	maxSegments = 512
)

// maxBadBuffers bounds the useless rx buffers that are skipped at a time.
const maxBadBuffers = dataQueueSize

// verdict is what became of a connection's turn.
type verdict int

const (
	idle    verdict = iota // nothing more to do until something happens
	again                  // there may be more to do
	starved                // an rx buffer is needed
)

// rxBuffer is a chain of the rx queue, with the room that is left in it beside
// the header.
type rxBuffer struct {
	chain *virtio.Chain
	room  int
}

// pump is the goroutine that serves the rx queue and the sockets. Connections
// that have something to do take turns.
type pump struct {
	m       *mux
	conns   map[uint64]*conn // that the poller watches, by id
	buffers []rxBuffer       // taken from the queue and not used yet
	dry     bool             // the queue had none left, and a kick will come
	broken  bool             // the queue cannot be used any more
	waiting []*conn          // starved ones, in turn
	unsent  bool             // completed buffers since the last Flush
	iov     [][]byte         // scratch
}

func newPump(m *mux) *pump {
	return &pump{m: m, conns: map[uint64]*conn{}}
}

func (p *pump) loop() {
	var events []event
	var round, rest []*conn
	for {
		var sleep, ok bool
		if round, sleep, ok = p.next(events, rest, round[:0]); !ok {
			return
		}
		rest = rest[:0]
		if !sleep {
			p.sendResets()
			for _, c := range round {
				if p.run(c) == again {
					rest = append(rest, c)
				}
				p.flush()
			}
		}
		var err error
		if events, err = p.m.poller.wait(sleep); err != nil {
			p.m.fail(err)
			return
		}
	}
}

// next appends to round the connections to run: those of events, those that
// others have scheduled, those of the last round that had more to do, and those
// for which there may be rx buffers again. If there is nothing to do at all it
// says to sleep: whoever schedules something wakes us. It reports false when
// the device is being reset.
func (p *pump) next(events []event, rest, round []*conn) (_ []*conn, sleep, ok bool) {
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	if p.m.stopped {
		return nil, false, false
	}
	for _, e := range events {
		if c := p.conns[e.id]; c != nil {
			c.readable = c.readable || e.flags&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0
			c.hungUp = c.hungUp || e.flags&unix.EPOLLHUP != 0
			p.m.enqueue(c)
		}
	}
	for _, c := range rest {
		p.m.enqueue(c)
	}
	if p.m.rxKicked.Swap(false) {
		p.dry = false
	}
	if p.hopeful() {
		for _, c := range p.waiting {
			c.starved = false
			p.m.enqueue(c)
		}
		p.waiting = p.waiting[:0]
	}
	round = append(round, p.m.ready...)
	for _, c := range round {
		c.queued = false
	}
	p.m.ready = p.m.ready[:0]
	p.m.asleep = len(round) == 0 && (len(p.m.resets) == 0 || !p.hopeful())
	return round, p.m.asleep, true
}

// hopeful says whether there may be rx buffers.
func (p *pump) hopeful() bool { return len(p.buffers) > 0 || !p.dry && !p.broken }

// run gives c its turn.
func (p *pump) run(c *conn) verdict {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state == open {
		p.watch(c)
	}
	if c.state == open {
		p.deliver(c)
	}
	if c.guestShut == shutdownBoth && c.backlog.size == 0 && c.state != closed {
		// The guest has closed its socket, and all it sent is delivered.
		if !c.wasReset {
			p.m.sendReset(reset{kind: typeStream, cid: hostCID, key: c.key})
		}
		c.close(nil)
	}
	if c.state == closed {
		delete(p.conns, c.id)
		if c.starved { // nobody may come to look at the list for long
			c.starved = false
			p.waiting = slices.DeleteFunc(p.waiting, func(o *conn) bool { return o == c })
		}
		return idle
	}
	if c.wasReset || c.state == accepting {
		return idle
	}
	v := p.answer(c)
	if v == starved && !c.starved {
		c.starved = true
		p.waiting = append(p.waiting, c)
	}
	return v
}

// watch gives the socket of a new connection to the poller.
func (p *pump) watch(c *conn) {
	if c.watched {
		return
	}
	if err := p.m.poller.add(c.fd, c.id, unix.EPOLLIN|unix.EPOLLRDHUP); err != nil {
		c.abort(err.Error())
		return
	}
	c.watched = true
	p.conns[c.id] = c
}

// deliver does what there is to do towards the host.
func (p *pump) deliver(c *conn) {
	if c.hungUp && c.hostShut&shutdownReceive == 0 {
		c.stopReceiving()
	}
	for c.backlog.size > 0 {
		p.iov = c.backlog.buffers(p.iov[:0])
		n, err := writeSome(c.fd, p.iov)
		if err != nil {
			c.stopReceiving()
			break
		}
		if n == 0 {
			break
		}
		c.backlog.discard(n)
		c.fwdCnt += uint32(n)
	}
	if full := c.backlog.size > 0; full != c.wantWrite {
		flags := uint32(unix.EPOLLIN | unix.EPOLLRDHUP)
		if full {
			flags |= unix.EPOLLOUT
		}
		if err := p.m.poller.modify(c.fd, c.id, flags); err != nil {
			c.abort(err.Error())
			return
		}
		c.wantWrite = full
	}
	if c.guestShut&shutdownSend != 0 && c.backlog.size == 0 && !c.shutWrite {
		c.shutWrite = true
		_ = unix.Shutdown(c.fd, unix.SHUT_WR) // fails only if there is nobody
	}
	if c.guestShut&shutdownReceive != 0 && !c.shutRead {
		// The writer on the host gets EPIPE. What it has written is dropped,
		// or closing the socket would look like an error to its reader
		// (unix(7): ECONNRESET when there was unread data).
		c.shutRead = true
		c.hostShut |= shutdownSend
		_ = unix.Shutdown(c.fd, unix.SHUT_RD)
		drop(c.fd)
	}
}

// drop reads and forgets what is left in a socket that nobody can write to any
// more.
func drop(fd int) {
	var scratch [4096]byte
	for {
		if n, err := unix.Read(fd, scratch[:]); n <= 0 && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// answer sends the guest what there is to send.
func (p *pump) answer(c *conn) verdict {
	if c.opening != 0 {
		if !p.send(c, c.opening, 0) {
			return starved
		}
		c.opening = 0
	}
	if c.state == connecting {
		return idle
	}
	v := idle
	if c.state == open && c.readable && c.hostShut&shutdownSend == 0 {
		if v = p.sendData(c); v == starved {
			return starved
		}
	}
	if c.hostShut != c.toldShut {
		if !p.send(c, opShutdown, c.hostShut) {
			return starved
		}
		c.toldShut = c.hostShut
		if c.toldShut == shutdownBoth {
			c.startClosing(p.m.shutdownTimeout)
			v = idle
		}
	}
	if c.creditDue() {
		if !p.send(c, opCreditUpdate, 0) {
			return starved
		}
		c.askedCount = false
	}
	return v
}

// sendData reads one quantum from the socket into rx buffers.
func (p *pump) sendData(c *conn) verdict {
	limit := min(int64(c.credit()), quantum)
	if limit == 0 {
		c.wantsCredit = true
		return idle
	}
	if p.take(quantumBuffers) == 0 {
		return starved
	}
	p.iov = p.iov[:0]
	left := int(limit)
	for _, b := range p.buffers {
		if left == 0 || len(p.iov) >= maxSegments {
			break
		}
		n := min(b.room, left)
		p.iov = buffers.Slice(p.iov, b.chain.Writable, headerSize, uint64(n))
		left -= n
	}
	n, err := unix.Readv(c.fd, p.iov)
	switch {
	case errors.Is(err, unix.EINTR):
	case errors.Is(err, unix.EAGAIN):
		c.readable = false
		return idle
	case err != nil || n == 0:
		// The end; ECONNRESET when the host closed its socket with data of the
		// guest's unread, EFAULT when the guest's memory cannot be written.
		c.hostShut |= shutdownSend
		return idle
	default:
		p.commit(c, n)
	}
	return again
}

// commit makes packets of the n bytes that were read into the first buffers.
func (p *pump) commit(c *conn, n int) {
	used := 0
	for ; n > 0; used++ {
		b := p.buffers[used]
		part := min(b.room, n)
		p.complete(b, p.header(c, opRW, 0), part)
		c.txCnt += uint32(part)
		n -= part
	}
	p.buffers = slices.Delete(p.buffers, 0, used)
}

// header makes the header of a packet of c.
func (p *pump) header(c *conn, op uint16, flags uint32) header {
	c.toldFwd = c.fwdCnt
	return header{
		srcCID: hostCID, dstCID: p.m.config.GuestCID,
		srcPort: c.key.host, dstPort: c.key.guest,
		kind: typeStream, op: op, flags: flags,
		bufAlloc: bufAlloc, fwdCnt: c.fwdCnt,
	}
}

// send sends a control packet of c. It reports false if there is no rx buffer.
func (p *pump) send(c *conn, op uint16, flags uint32) bool {
	if p.take(1) == 0 {
		return false
	}
	p.complete(p.pop(), p.header(c, op, flags), 0)
	return true
}

// sendResets sends what is waiting in m.resets, as far as there are buffers.
// It comes before any connection's turn: a new connection may have the ports
// of one that was reset.
func (p *pump) sendResets() {
	for p.take(1) > 0 {
		r, ok := p.m.nextReset()
		if !ok {
			break
		}
		p.complete(p.pop(), header{
			srcCID: r.cid, dstCID: p.m.config.GuestCID,
			srcPort: r.key.host, dstPort: r.key.guest,
			kind: r.kind, op: opReset,
		}, 0)
	}
	p.flush()
}

// take makes sure that there are n buffers if the guest has given as many, and
// returns how many there are.
func (p *pump) take(n int) int {
	for bad := 0; len(p.buffers) < n && !p.dry && !p.broken; {
		chain, err := p.m.rx.Next()
		switch {
		case err != nil:
			p.broken = true
			p.m.fail(err)
		case chain == nil:
			p.dry = true
		case len(chain.Readable) > 0 || chain.WritableLen() <= headerSize:
			// Of no use; Linux drops a packet shorter than its header.
			p.m.complain("vsock: bad rx buffer")
			p.m.rx.Complete(chain, 0)
			p.unsent = true
			if bad++; bad == maxBadBuffers {
				return len(p.buffers)
			}
		default:
			p.buffers = append(p.buffers, rxBuffer{chain, int(min(chain.WritableLen()-headerSize, maxPayload))})
		}
	}
	return len(p.buffers)
}

// pop takes one of the buffers that take promised.
func (p *pump) pop() rxBuffer {
	b := p.buffers[0]
	p.buffers = slices.Delete(p.buffers, 0, 1)
	return b
}

// complete gives a buffer back to the guest, with a packet in it of which the
// payload is in place.
func (p *pump) complete(b rxBuffer, h header, payload int) {
	var raw [headerSize]byte
	h.length = uint32(payload)
	h.format(&raw)
	b.chain.CopyOut(raw[:], 0)
	p.m.rx.Complete(b.chain, uint32(headerSize+payload))
	p.unsent = true
}

// flush interrupts the guest if it has got packets.
func (p *pump) flush() {
	if p.unsent {
		p.unsent = false
		p.m.rx.Flush()
	}
}
