package vsock

import (
	"context"
	"errors"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/buffers"
	"golang.org/x/sys/unix"
)

const (
	// firstPort is where the host's ports of dialled connections start. Ports
	// below are for programs that listen.
	firstPort = 1 << 30
	// anyPort is VMADDR_PORT_ANY, which names no port.
	anyPort = 1<<32 - 1

	// maxResets bounds the answers to stray packets that wait for rx buffers.
	// Only a guest that sends but does not receive has more to come; they are
	// dropped. The tx queue is served all the same (section 5.10.6.1): to stop
	// until the guest gives rx buffers could mean to wait for each other.
	maxResets = 1024

	// maxComplaints bounds the log lines of a device, over all activations: a guest
	// can reset it as often as it likes.
	maxComplaints = 20
)

// reset is an opReset to be sent that belongs to no connection (any more).
type reset struct {
	kind uint16
	cid  uint64 // that the guest sent to
	key  connKey
}

// mux is the device between one Activate and the Reset that follows.
type mux struct {
	config          *Config
	rx, tx          *virtio.Queue
	fail            func(error)
	poller          *poller
	shutdownTimeout time.Duration
	goroutines      sync.WaitGroup
	rxKicked        atomic.Bool    // the driver has added rx buffers
	complaints      *atomic.Uint64 // Device.complaints

	payload [][]byte // the tx goroutine's scratch

	mu       sync.Mutex // protects what follows
	stopped  bool
	listed   map[connKey]*conn  // connections that packets are for
	conns    map[*conn]struct{} // those, and what is left of others
	ready    []*conn            // the pump has something to do for them; in turn
	resets   []reset
	asleep   bool // the pump waits for events
	nextPort uint32
	nextID   uint64
}

func startMux(d *Device, a virtio.Activation) (*mux, error) {
	p, err := newPoller()
	if err != nil {
		return nil, err
	}
	m := &mux{
		config:          &d.config,
		rx:              a.Queues[rxQueue],
		tx:              a.Queues[txQueue],
		fail:            a.Fail,
		poller:          p,
		shutdownTimeout: d.shutdownTimeout,
		complaints:      &d.complaints,
		listed:          map[connKey]*conn{},
		conns:           map[*conn]struct{}{},
		nextPort:        firstPort,
		nextID:          wakeID + 1,
	}
	m.goroutines.Go(func() { virtio.Serve(m.tx, m.fail, m.transmitted) })
	m.goroutines.Go(m.watchRX)
	m.goroutines.Go(newPump(m).loop)
	return m, nil
}

// stop ends the goroutines, and then all connections. The queues are closed
// already. A Config.Accept that is running is left to end on its own.
func (m *mux) stop() {
	m.mu.Lock()
	m.stopped = true
	m.poller.wake()
	m.mu.Unlock()
	m.goroutines.Wait()
	m.poller.close()

	m.mu.Lock()
	conns := slices.Collect(maps.Keys(m.conns))
	m.mu.Unlock()
	for _, c := range conns {
		c.mu.Lock()
		c.close(errReset)
		c.mu.Unlock()
	}
}

// watchRX tells the pump when the driver has added rx buffers after it had
// found none.
func (m *mux) watchRX() {
	for {
		if err := m.rx.Wait(); err != nil {
			if !errors.Is(err, virtio.ErrClosed) {
				m.fail(err)
			}
			return
		}
		m.rxKicked.Store(true)
		m.poller.wake()
	}
}

// transmitted handles a chain of the tx queue.
func (m *mux) transmitted(chain *virtio.Chain) (written uint32, done bool) {
	var raw [headerSize]byte
	// Packets to the device have no writable buffers; if there are, nothing is
	// written to them.
	if chain.CopyIn(raw[:], 0) == headerSize {
		h := parseHeader(&raw)
		m.receive(&h, chain.Readable, chain.ReadableLen()-headerSize)
	} else {
		m.complain("vsock: packet is shorter than its header")
	}
	return 0, true
}

// receive handles a packet of the guest: h is its header, copied and not
// checked, and room the number of bytes in packet after it.
func (m *mux) receive(h *header, packet [][]byte, room uint64) {
	if h.srcCID != m.config.GuestCID {
		m.complain("vsock: packet has a foreign source", "cid", h.srcCID)
		return // there is nobody to answer to
	}
	if h.dstCID != hostCID || h.kind != typeStream {
		m.refuse(h)
		return
	}
	m.mu.Lock()
	c := m.listed[connKey{host: h.dstPort, guest: h.srcPort}]
	m.mu.Unlock()
	// A longer buffer than len is allowed (section 5.10.6).
	good := h.length <= maxPayload && uint64(h.length) <= room
	switch {
	case c == nil && h.op == opRequest && good:
		m.request(h)
	case c == nil:
		m.refuse(h)
	case !good:
		c.mu.Lock()
		c.abort("payload of wrong length")
		c.mu.Unlock()
	default:
		m.payload = buffers.Slice(m.payload[:0], packet, headerSize, uint64(h.length))
		if !c.receive(h, m.payload) {
			m.refuse(h)
		}
	}
}

// request handles opRequest: the guest connects to the host.
func (m *mux) request(h *header) {
	c := &conn{state: accepting, fd: -1, peerBufAlloc: h.bufAlloc, peerFwdCnt: h.fwdCnt}
	c.key = connKey{host: h.dstPort, guest: h.srcPort}
	if err := m.add(c); err != nil {
		m.complain("vsock: connection of the guest refused", "hostPort", h.dstPort, "err", err)
		m.refuse(h)
		return
	}
	go func() {
		fd, err := m.accept(c.key.host)
		c.accepted(fd, err)
	}()
}

// accept calls Config.Accept and takes the descriptor out of the file.
func (m *mux) accept(port uint32) (fd int, err error) {
	f, err := m.config.Accept(port)
	if err != nil {
		return -1, err
	}
	// A copy, because the file may be registered with the runtime's poller and
	// closes the descriptor when it is collected.
	defer f.Close()
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	cerr := raw.Control(func(old uintptr) {
		if fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0); err != nil {
			err = os.NewSyscallError("fcntl", err)
		} else if err = unix.SetNonblock(fd, true); err != nil {
			unix.Close(fd)
		}
	})
	return fd, errors.Join(cerr, err)
}

// dial connects fd, which becomes the connection's, to a port of the guest.
func (m *mux) dial(ctx context.Context, port uint32, fd int, timeout time.Duration) error {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return err
	}
	c := &conn{state: connecting, fd: fd, opening: opRequest, reply: make(chan error, 1)}
	c.key.guest = port
	if err := m.add(c); err != nil {
		unix.Close(fd)
		return err
	}
	m.schedule(c)
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case err := <-c.reply:
		return err
	case <-ctx.Done():
		c.cancel(ctx.Err())
	case <-timer.C:
		c.cancel(ErrNoAnswer)
	}
	return <-c.reply // what cancel made of it
}

// add lists c, and gives it a port of the host if it has none.
func (m *mux) add(c *conn) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stopped {
		return errReset
	}
	if len(m.conns) >= m.config.MaxConnections {
		return ErrTooManyConnections
	}
	for c.state == connecting {
		c.key.host = m.nextPort
		if m.nextPort++; m.nextPort == anyPort {
			m.nextPort = firstPort
		}
		if m.listed[c.key] == nil { // soon: there are fewer connections than ports
			break
		}
	}
	c.m, c.id = m, m.nextID
	m.nextID++
	m.listed[c.key] = c
	m.conns[c] = struct{}{}
	return nil
}

// unlist makes c's ports free for another connection.
func (m *mux) unlist(c *conn) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.listed[c.key] == c {
		delete(m.listed, c.key)
	}
}

// forget takes c out of the count, too.
func (m *mux) forget(c *conn) {
	m.unlist(c)
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.conns, c)
}

// schedule makes the pump look at c.
func (m *mux) schedule(c *conn) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.enqueue(c)
	m.wakePump()
}

// enqueue is schedule for the pump itself. mu is held.
func (m *mux) enqueue(c *conn) {
	if !c.queued {
		c.queued = true
		m.ready = append(m.ready, c)
	}
}

// wakePump ends the pump's wait for events, if it waits. mu is held.
func (m *mux) wakePump() {
	if m.asleep && !m.stopped {
		m.asleep = false
		m.poller.wake()
	}
}

// refuse answers a packet that is for no connection, section 5.10.6.5.
func (m *mux) refuse(h *header) {
	if h.op != opReset { // a reset is never answered with another
		m.sendReset(reset{kind: h.kind, cid: h.dstCID, key: connKey{host: h.dstPort, guest: h.srcPort}})
	}
}

// sendReset makes the pump send an opReset.
func (m *mux) sendReset(r reset) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.resets) < maxResets {
		m.resets = append(m.resets, r)
		m.wakePump()
	}
}

// nextReset takes the oldest reset there is to send.
func (m *mux) nextReset() (reset, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.resets) == 0 {
		return reset{}, false
	}
	r := m.resets[0]
	m.resets = m.resets[1:]
	return r, true
}

// complain logs, a bounded number of times, what the guest did wrong.
func (m *mux) complain(message string, args ...any) {
	switch n := m.complaints.Add(1); {
	case n < maxComplaints:
		m.config.Log.Warn(message, args...)
	case n == maxComplaints:
		m.config.Log.Warn("vsock: no more lines like this from this device")
	}
}
