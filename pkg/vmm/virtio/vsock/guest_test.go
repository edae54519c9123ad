package vsock

import (
	"errors"
	"io"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/microvm-runtime/microvm/pkg/vmm/eventfd"
	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

// hangs is how long a test waits for what must happen. It measures nothing.
const hangs = 5 * time.Minute

const (
	testCID      = 3
	rxBufferSize = 3776 // Linux's VIRTIO_VSOCK_DEFAULT_RX_BUF_SIZE + header, on amd64
	txSlots      = 32
	txSlotDescs  = 4
	txSlotSize   = headerSize + maxPayload + 64
)

// ring is the driver's side of one virtqueue.
type ring struct {
	*virtiotest.Ring
	device    *virtio.Queue
	kick      *eventfd.EventFD
	interrupt chan struct{}
	lastUsed  uint16
	pushing   sync.Mutex // one driver writes the available ring at a time
}

func newRing(t testing.TB, m *virtiotest.Memory, size uint16) *ring {
	t.Helper()
	kick, err := eventfd.New()
	if err != nil {
		t.Fatal(err)
	}
	r := &ring{Ring: virtiotest.NewRing(t, m, size), kick: kick, interrupt: make(chan struct{}, 1)}
	r.Clear()
	c := r.Config(virtiotest.RingFeatures)
	c.Kick = kick
	c.Interrupt = func() {
		select {
		case r.interrupt <- struct{}{}:
		default:
		}
	}
	if r.device, err = virtio.NewQueue(c); err != nil {
		t.Fatal(err)
	}
	return r
}

// push makes head available and kicks the device if it wants that. It may be
// called from any goroutine.
func (r *ring) push(head uint16) {
	r.pushing.Lock()
	defer r.pushing.Unlock()
	old := r.AvailIdx()
	r.Push(head)
	if old == r.AvailEvent() {
		_ = r.kick.Signal()
	}
}

// used takes the next used element; false if there is none, and an interrupt
// has been asked for.
func (r *ring) used() (head uint16, written int, ok bool) {
	if r.lastUsed == r.UsedIdx() {
		r.SetUsedEvent(r.lastUsed)
		if r.lastUsed == r.UsedIdx() {
			return 0, 0, false
		}
	}
	h, w := r.UsedElem(r.lastUsed)
	r.lastUsed++
	return uint16(h), int(w), true
}

// guest is the driver of a device and the sockets behind it, which count
// credit as Linux does (net/vmw_vsock/virtio_transport_common.c).
type guest struct {
	t      testing.TB
	device *Device
	memory *virtiotest.Memory
	failed chan error

	rx, tx    *ring
	rxBuffers []memory.GuestAddress // by head
	txBuffers []memory.GuestAddress // by slot
	stopRX    chan struct{}
	running   sync.WaitGroup

	// packets, if set, gets the packets that belong to no socket.
	packets chan header

	txMu   sync.Mutex // orders packets
	txFree chan uint16

	mu        sync.Mutex // protects the sockets
	changed   *sync.Cond
	sockets   map[connKey]*socket
	listeners map[uint32]chan *socket
	held      []uint16 // rx buffers kept from the device
	holding   bool
	returned  int // rx buffers that came back empty
	dead      bool
}

func newGuest(t testing.TB, c Config) *guest {
	t.Helper()
	c.GuestCID = testCID
	g := &guest{t: t, device: New(c), memory: virtiotest.NewMemory(t, 1<<20, 8<<20), packets: make(chan header, 4096)}
	g.device.dialTimeout, g.device.shutdownTimeout = hangs, hangs // a busy machine is no failure
	for range dataQueueSize {
		g.rxBuffers = append(g.rxBuffers, g.memory.Alloc(t, rxBufferSize))
	}
	for range txSlots {
		g.txBuffers = append(g.txBuffers, g.memory.Alloc(t, txSlotSize))
	}
	g.start()
	t.Cleanup(g.reset)
	return g
}

// start activates the device.
func (g *guest) start() {
	g.t.Helper()
	g.changed = sync.NewCond(&g.mu)
	g.sockets, g.listeners = map[connKey]*socket{}, map[uint32]chan *socket{}
	g.dead, g.held, g.holding = false, nil, false
	g.failed = make(chan error, 1)
	g.rx, g.tx = newRing(g.t, g.memory, dataQueueSize), newRing(g.t, g.memory, dataQueueSize)
	g.stopRX = make(chan struct{})
	g.txFree = make(chan uint16, txSlots)
	for i := range uint16(txSlots) {
		g.txFree <- i
	}
	if err := g.device.Activate(virtio.Activation{
		Memory:        g.memory.Guest,
		Queues:        []*virtio.Queue{g.rx.device, g.tx.device, nil},
		ConfigChanged: func() {},
		Fail: func(err error) {
			select {
			case g.failed <- err:
			default:
			}
		},
	}); err != nil {
		g.t.Fatal(err)
	}
	for i, addr := range g.rxBuffers {
		g.rx.SetDesc(uint16(i), virtiotest.Desc{Addr: addr, Len: rxBufferSize, Flags: virtiotest.DescWrite})
		g.rx.push(uint16(i))
	}
	g.running.Go(g.receive)
	g.running.Go(g.reapTX)
}

// reset resets the device, as the transport does, and stops the guest. Guest
// memory is overwritten: the race detector finds who still uses it.
func (g *guest) reset() {
	if g.rx == nil {
		return
	}
	g.rx.device.Close()
	g.tx.device.Close()
	g.device.Reset()
	close(g.stopRX)
	g.mu.Lock()
	g.dead = true
	g.changed.Broadcast()
	g.mu.Unlock()
	g.running.Wait()
	g.txMu.Lock() // whoever still wants to send finds tx gone
	defer g.txMu.Unlock()
	g.rx.kick.Close()
	g.tx.kick.Close()
	clear(g.memory.Bytes)
	g.rx, g.tx = nil, nil
	select {
	case err := <-g.failed:
		g.t.Errorf("the device says the driver broke the ring: %v", err)
	default:
	}
}

// reapTX takes back what the device has read.
func (g *guest) reapTX() {
	for {
		for head, _, ok := g.tx.used(); ok; head, _, ok = g.tx.used() {
			g.txFree <- head / txSlotDescs
		}
		select {
		case <-g.tx.interrupt:
		case <-g.stopRX:
			return
		}
	}
}

// sendRaw sends a packet of the given segments, at most txSlotDescs.
func (g *guest) sendRaw(segments ...[]byte) {
	g.txMu.Lock()
	defer g.txMu.Unlock()
	var slot uint16
	select {
	case slot = <-g.txFree:
	case <-g.stopRX:
		return
	}
	if g.tx == nil {
		return
	}
	addr, head := g.txBuffers[slot], slot*txSlotDescs
	for i, s := range segments {
		copy(g.memory.Slice(addr, len(s)), s)
		d := virtiotest.Desc{Addr: addr, Len: uint32(len(s))}
		if i < len(segments)-1 {
			d.Flags, d.Next = virtiotest.DescNext, head+uint16(i)+1
		}
		g.tx.SetDesc(head+uint16(i), d)
		addr += memory.GuestAddress(len(s))
	}
	g.tx.push(head)
}

// send sends a packet; the header's length is the payload's.
func (g *guest) send(h header, payload []byte) {
	h.length = uint32(len(payload))
	var raw [headerSize]byte
	h.format(&raw)
	if len(payload) == 0 {
		g.sendRaw(raw[:])
		return
	}
	g.sendRaw(raw[:], payload)
}

// hold keeps rx buffers from the device, once it has used those it has. Those
// of packets that have had an effect on the test before still go back to it.
func (g *guest) hold() {
	g.mu.Lock()
	g.holding = true
	g.mu.Unlock()
}

// release gives them back.
func (g *guest) release() {
	g.mu.Lock()
	g.holding = false
	held := g.held
	g.held = nil
	g.mu.Unlock()
	for _, head := range held {
		g.rx.push(head)
	}
}

// heldBuffers waits until n rx buffers are held.
func (g *guest) heldBuffers(n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for len(g.held) < n && !g.dead {
		g.changed.Wait()
	}
}

// starve leaves the device without rx buffers: packets that are for no
// connection make it use those it has, and they are held.
func (g *guest) starve() {
	g.t.Helper()
	g.hold()
	for range dataQueueSize {
		g.send(header{srcCID: testCID, dstCID: hostCID, kind: typeStream, op: opRW}, nil)
		g.packet()
	}
	g.heldBuffers(dataQueueSize)
}

// receive is the driver's rx worker.
func (g *guest) receive() {
	for {
		for head, written, ok := g.rx.used(); ok; head, written, ok = g.rx.used() {
			if written == 0 { // a bad buffer: it is not given to the device again
				g.mu.Lock()
				g.returned++
				g.mu.Unlock()
				continue
			}
			b := g.memory.Slice(g.rxBuffers[head], rxBufferSize)
			h := parseHeader((*[headerSize]byte)(b))
			if written != headerSize+int(h.length) {
				g.t.Errorf("packet of %d bytes says its payload is %d", written, h.length)
			}
			// Decided before the packet has an effect. After it, the test may have
			// called hold already, and count on a buffer more than there would be.
			g.mu.Lock()
			holding := g.holding
			g.mu.Unlock()
			g.dispatch(h, b[headerSize:written])
			g.mu.Lock()
			if holding = holding && g.holding; holding {
				g.held = append(g.held, head)
				g.changed.Broadcast()
			}
			g.mu.Unlock()
			if !holding {
				g.rx.push(head)
			}
		}
		select {
		case <-g.rx.interrupt:
		case <-g.stopRX:
			return
		}
	}
}

// dispatch does what virtio_transport_recv_pkt does.
func (g *guest) dispatch(h header, payload []byte) {
	if h.dstCID != testCID || h.srcCID != hostCID {
		g.packets <- h
		return
	}
	key := connKey{host: h.srcPort, guest: h.dstPort}
	g.mu.Lock()
	defer g.mu.Unlock()
	defer g.changed.Broadcast()
	s := g.sockets[key]
	if s == nil {
		if accept := g.listeners[h.dstPort]; accept != nil && h.op == opRequest {
			s = newSocket(g, key)
			s.peerBufAlloc, s.peerFwdCnt, s.connected = h.bufAlloc, h.fwdCnt, true
			s.control(opResponse, 0)
			accept <- s
			return
		}
		if h.op == opRequest { // virtio_transport_reset_no_sock
			g.send(header{srcCID: testCID, dstCID: hostCID, srcPort: h.dstPort, dstPort: h.srcPort, kind: typeStream, op: opReset}, nil)
			return
		}
		g.packets <- h
		return
	}
	s.peerBufAlloc, s.peerFwdCnt = h.bufAlloc, h.fwdCnt
	switch h.op {
	case opResponse:
		s.connected = true
	case opRW:
		if s.data.size+len(payload) > int(s.bufAlloc) {
			g.t.Errorf("the device sent %d bytes with %d in a buffer of %d", len(payload), s.data.size, s.bufAlloc)
		}
		s.data.write([][]byte{payload})
	case opCreditRequest:
		s.control(opCreditUpdate, 0)
	case opShutdown:
		s.peerShut |= h.flags
		if s.peerShut == shutdownBoth {
			if s.data.size == 0 {
				s.control(opReset, 0)
				s.gone = true
			}
			delete(g.sockets, key) // vsock_remove_sock
		}
	case opReset:
		s.gone, s.peerShut = true, shutdownBoth
		delete(g.sockets, key)
	case opCreditUpdate:
	default:
		g.t.Errorf("operation %d", h.op)
	}
}

// socket is a stream socket of the guest. Reads and writes block.
type socket struct {
	g   *guest
	key connKey

	connected, gone    bool
	peerShut           uint32  // flags received
	data               backlog // received and not read
	bufAlloc           uint32
	fwdCnt, lastFwdCnt uint32
	txCnt              uint32
	peerBufAlloc       uint32
	peerFwdCnt         uint32
}

func newSocket(g *guest, key connKey) *socket {
	s := &socket{g: g, key: key, bufAlloc: 256 << 10}
	g.sockets[key] = s
	return s
}

func (s *socket) header(op uint16, flags uint32) header {
	s.lastFwdCnt = s.fwdCnt
	return header{
		srcCID: testCID, dstCID: hostCID, srcPort: s.key.guest, dstPort: s.key.host,
		kind: typeStream, op: op, flags: flags, bufAlloc: s.bufAlloc, fwdCnt: s.fwdCnt,
	}
}

// control sends a control packet. g.mu is held.
func (s *socket) control(op uint16, flags uint32) { s.g.send(s.header(op, flags), nil) }

// listen makes the guest accept connections to a port.
func (g *guest) listen(port uint32) <-chan *socket {
	g.mu.Lock()
	defer g.mu.Unlock()
	accept := make(chan *socket, 4096)
	g.listeners[port] = accept
	return accept
}

var errGuestReset = errors.New("guest: connection reset")

// connect connects to a port of the host.
func (g *guest) connect(hostPort, guestPort, size uint32) (*socket, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := newSocket(g, connKey{host: hostPort, guest: guestPort})
	s.bufAlloc = size
	s.control(opRequest, 0)
	for !s.connected && !s.gone && !g.dead {
		g.changed.Wait()
	}
	if !s.connected {
		return nil, errGuestReset
	}
	return s, nil
}

// Read reads what there is, and says where Linux would that there is room.
func (s *socket) Read(p []byte) (int, error) {
	s.g.mu.Lock()
	defer s.g.mu.Unlock()
	for s.data.size == 0 {
		if s.peerShut&shutdownSend != 0 {
			return 0, io.EOF
		}
		if s.g.dead {
			return 0, errGuestReset
		}
		s.g.changed.Wait()
	}
	n := 0
	for _, b := range s.data.buffers(nil) {
		n += copy(p[n:], b)
	}
	s.data.discard(n)
	s.fwdCnt += uint32(n)
	// virtio_transport_stream_do_dequeue
	if delta := s.fwdCnt - s.lastFwdCnt; s.bufAlloc-delta < 64<<10 || s.data.size == 0 {
		if !s.gone {
			s.control(opCreditUpdate, 0)
		}
	}
	return n, nil
}

// Write writes all of p, as credit allows.
func (s *socket) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		s.g.mu.Lock()
		var room uint32
		for {
			if s.peerShut&shutdownReceive != 0 || s.gone || s.g.dead {
				s.g.mu.Unlock()
				return done, errGuestReset
			}
			// virtio_transport_has_space: at most the size of our own buffer.
			if used, size := s.txCnt-s.peerFwdCnt, min(s.peerBufAlloc, s.bufAlloc); used < size {
				room = size - used
				break
			}
			s.g.changed.Wait()
		}
		n := min(len(p)-done, int(room), maxPayload)
		s.txCnt += uint32(n)
		h := s.header(opRW, 0)
		s.g.mu.Unlock()
		s.g.send(h, p[done:done+n])
		done += n
	}
	return done, nil
}

// shutdown is shutdown(2).
func (s *socket) shutdown(flags uint32) {
	s.g.mu.Lock()
	defer s.g.mu.Unlock()
	s.control(opShutdown, flags)
}

// Close is close(2): it does not wait for the answer.
func (s *socket) Close() error {
	s.g.mu.Lock()
	defer s.g.mu.Unlock()
	switch {
	case s.gone:
	case s.peerShut == shutdownBoth:
		s.control(opReset, 0)
		s.gone = true
	default:
		s.control(opShutdown, shutdownBoth)
	}
	return nil
}

// waitFull waits until the device has used all the credit it has.
func (s *socket) waitFull() {
	s.g.mu.Lock()
	defer s.g.mu.Unlock()
	for s.data.size < int(s.bufAlloc) && !s.g.dead {
		s.g.changed.Wait()
	}
}

// waitGone waits until the device has confirmed that the connection is gone.
func (s *socket) waitGone() {
	s.g.mu.Lock()
	defer s.g.mu.Unlock()
	for !s.gone && !s.g.dead {
		s.g.changed.Wait()
	}
}

// packet waits for a packet that belongs to no socket.
func (g *guest) packet() header {
	g.t.Helper()
	select {
	case h := <-g.packets:
		return h
	case err := <-g.failed:
		g.t.Fatalf("the device says the driver broke the ring: %v", err)
		return header{}
	case <-time.After(hangs):
		g.t.Fatal("no packet arrived")
		return header{}
	}
}

// waitFor waits until what becomes true. It is for states that nothing tells
// of.
func waitFor(t testing.TB, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(hangs); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("still not: %s", what)
		}
	}
}

// connections counts those the device has.
func (g *guest) connections() int {
	g.device.mu.Lock()
	m := g.device.mux
	g.device.mu.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.conns)
}

// listenHost makes a Config.Accept that gives the other end of every
// connection to a channel.
func listenHost(t testing.TB) (accept func(uint32) (*os.File, error), accepted chan *os.File) {
	accepted = make(chan *os.File, 4096)
	return func(uint32) (*os.File, error) {
		ours, theirs, err := socketpair()
		if err != nil {
			return nil, err
		}
		accepted <- theirs
		return ours, nil
	}, accepted
}
