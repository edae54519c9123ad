package vsock

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
	"golang.org/x/sys/unix"
)

// packetOf formats a packet whose header may say anything.
func packetOf(h header, payload ...byte) []byte {
	var raw [headerSize]byte
	h.format(&raw)
	return append(raw[:], payload...)
}

// raw opens a connection from the guest without a socket of the guest model
// behind it: what the device sends arrives at g.packets.
func (g *guest) raw(hostPort, guestPort, size uint32) header {
	g.t.Helper()
	h := header{srcCID: testCID, dstCID: hostCID, srcPort: guestPort, dstPort: hostPort, kind: typeStream, op: opRequest, bufAlloc: size}
	g.send(h, nil)
	g.want(opResponse, guestPort)
	return h
}

// want waits for a packet and checks it.
func (g *guest) want(op uint16, guestPort uint32) header {
	g.t.Helper()
	h := g.packet()
	for h.op == opReset && h.dstPort != guestPort {
		h = g.packet() // the late end of a connection that the guest has closed
	}
	if h.op != op || h.dstPort != guestPort {
		g.t.Fatalf("got %+v, want operation %d for port %d", h, op, guestPort)
	}
	return h
}

// echo checks that a connection works.
func echo(t *testing.T, host *net.UnixConn, s *socket) {
	t.Helper()
	p := make([]byte, 10)
	host.Write([]byte("ping"))
	if n, err := s.Read(p); err != nil || string(p[:n]) != "ping" {
		t.Fatalf("the other connection: %q, %v", p[:n], err)
	}
	s.Write([]byte("pong"))
	if n, err := host.Read(p); err != nil || string(p[:n]) != "pong" {
		t.Fatalf("the other connection: %q, %v", p[:n], err)
	}
}

// Packets that break the rules get opReset where that is possible. They end at
// most the connection they are for.
func TestBadPackets(t *testing.T) {
	const (
		victim = 700 // guest port of an open connection to host port 1024
		stray  = 701 // of none
		probe  = 702
	)
	good := header{srcCID: testCID, dstCID: hostCID, dstPort: 1024, kind: typeStream, bufAlloc: 1 << 18}
	with := func(port uint32, op uint16, change func(*header)) header {
		h := good
		h.srcPort, h.op = port, op
		if change != nil {
			change(&h)
		}
		return h
	}
	nothing, strayReset, victimReset := uint32(0), uint32(stray), uint32(victim)
	for _, tc := range []struct {
		name   string
		packet [][]byte
		answer uint32 // guest port of the reset that is the answer, or nothing
	}{
		{"one byte", [][]byte{{1}}, nothing},
		{"short header", [][]byte{make([]byte, headerSize-1)}, nothing},
		{"only zeros", [][]byte{make([]byte, headerSize)}, nothing},
		{"foreign source", [][]byte{packetOf(with(victim, opReset, func(h *header) { h.srcCID = 4 }))}, nothing},
		{"host as source", [][]byte{packetOf(with(victim, opReset, func(h *header) { h.srcCID = hostCID }))}, nothing},
		{"high bits in source", [][]byte{packetOf(with(victim, opReset, func(h *header) { h.srcCID |= 1 << 32 }))}, nothing},
		{"foreign destination", [][]byte{packetOf(with(stray, opRequest, func(h *header) { h.dstCID = 4 }))}, strayReset},
		{"high bits in destination", [][]byte{packetOf(with(stray, opRequest, func(h *header) { h.dstCID |= 1 << 32 }))}, strayReset},
		{"reset to a foreign destination", [][]byte{packetOf(with(victim, opReset, func(h *header) { h.dstCID = 4 }))}, nothing},
		{"seqpacket request", [][]byte{packetOf(with(stray, opRequest, func(h *header) { h.kind = 2 }))}, strayReset},
		{"seqpacket for a stream", [][]byte{packetOf(with(stray, opRW, func(h *header) { h.kind = 2 }))}, strayReset},
		{"unknown type", [][]byte{packetOf(with(stray, opRequest, func(h *header) { h.kind = 0xffff }))}, strayReset},
		{"operation 0 for none", [][]byte{packetOf(with(stray, 0, nil))}, strayReset},
		{"unknown operation for none", [][]byte{packetOf(with(stray, 8, nil))}, strayReset},
		{"response for none", [][]byte{packetOf(with(stray, opResponse, nil))}, strayReset},
		{"data for none", [][]byte{packetOf(with(stray, opRW, func(h *header) { h.length = 1 }), 1)}, strayReset},
		{"shutdown for none", [][]byte{packetOf(with(stray, opShutdown, nil))}, strayReset},
		{"credit for none", [][]byte{packetOf(with(stray, opCreditUpdate, nil))}, strayReset},
		{"reset for none", [][]byte{packetOf(with(stray, opReset, nil))}, nothing},
		{"port that nobody listens at", [][]byte{packetOf(with(stray, opRequest, func(h *header) { h.dstPort = 9 }))}, strayReset},
		{"request longer than its buffer", [][]byte{packetOf(with(stray, opRequest, func(h *header) { h.length = 1 }))}, strayReset},
		{"operation 0", [][]byte{packetOf(with(victim, 0, nil))}, victimReset},
		{"unknown operation", [][]byte{packetOf(with(victim, 0xffff, nil))}, victimReset},
		{"second request", [][]byte{packetOf(with(victim, opRequest, nil))}, victimReset},
		{"response to nothing", [][]byte{packetOf(with(victim, opResponse, nil))}, victimReset},
		{"data longer than its buffer", [][]byte{packetOf(with(victim, opRW, func(h *header) { h.length = 5 }), 1, 2, 3, 4)}, victimReset},
		{"length of 4 GiB", [][]byte{packetOf(with(victim, opRW, func(h *header) { h.length = 1<<32 - 1 }), 1, 2, 3, 4)}, victimReset},
		{"longer than a packet may be", [][]byte{packetOf(with(victim, opRW, func(h *header) { h.length = maxPayload + 1 }), make([]byte, maxPayload+1)...)}, victimReset},
		{"header in pieces", [][]byte{
			packetOf(with(stray, opRW, nil))[:1], packetOf(with(stray, opRW, nil))[1:20], packetOf(with(stray, opRW, nil))[20:],
		}, strayReset},
	} {
		t.Run(tc.name, func(t *testing.T) {
			accept, accepted := listenHost(t)
			g := newGuest(t, Config{Accept: func(port uint32) (*os.File, error) {
				if port != 1024 {
					return nil, errors.New("nobody listens")
				}
				return accept(port)
			}})
			host, s := connect(t, g, 1024, 1, accepted)
			g.raw(1024, victim, 1<<18)
			victimHost := unixConn(t, <-accepted)

			g.sendRaw(tc.packet...)
			if tc.answer != nothing {
				g.want(opReset, tc.answer)
			}
			g.send(with(probe, opRW, nil), nil)
			g.want(opReset, probe)
			echo(t, host, s)
			if tc.answer == victim {
				if _, err := victimHost.Read(make([]byte, 1)); err != io.EOF {
					t.Errorf("the host's end of the reset connection: %v", err)
				}
			} else {
				h := with(victim, opRW, func(h *header) { h.length = 4 })
				g.sendRaw(packetOf(h, 'l', 'i', 'v', 'e', 0, 0)) // a longer buffer is allowed
				p := make([]byte, 10)
				if n, err := victimHost.Read(p); err != nil || string(p[:n]) != "live" {
					t.Errorf("the victim got %q, %v", p[:n], err)
				}
			}
		})
	}
}

// A dialled connection that is answered with something else is refused.
func TestBadAnswers(t *testing.T) {
	for _, op := range []uint16{0, opRequest, opRW, opShutdown, 99} {
		t.Run(fmt.Sprint(op), func(t *testing.T) {
			g := newGuest(t, Config{})
			g.starve() // so that the guest model does not answer
			failed := make(chan error)
			go func() {
				_, err := g.device.Dial(t.Context(), 5)
				failed <- err
			}()
			waitFor(t, "the connection is there", func() bool { return g.connections() == 1 })
			g.send(header{srcCID: testCID, dstCID: hostCID, srcPort: 5, dstPort: firstPort, kind: typeStream, op: op}, nil)
			if err := <-failed; !errors.Is(err, unix.EPROTO) {
				t.Errorf("got %v", err)
			}
			g.release()
			g.want(opReset, 5)
		})
	}
}

// Data that the credit does not allow, and data after its end.
func TestGuestOverrunsCredit(t *testing.T) {
	accept, accepted := listenHost(t)
	g := newGuest(t, Config{Accept: accept})
	host, s := connect(t, g, 1024, 1, accepted)
	h := g.raw(1024, 700, 1<<18)
	victim := unixConn(t, <-accepted)
	h.op = opRW
	block := make([]byte, maxPayload)
	sent := 0
	for reset := false; !reset; {
		// Nobody reads: the socket takes some, then the backlog all it may.
		if sent += len(block); sent > 10<<20 {
			t.Fatal("10 MiB were taken, and nobody read them")
		}
		g.send(h, block)
		g.send(header{srcCID: testCID, dstCID: hostCID, srcPort: 9, kind: typeStream, op: opRW}, nil)
		for barrier := false; !barrier; {
			got := g.packet()
			barrier = got.dstPort == 9
			reset = reset || got.op == opReset && got.dstPort == 700
		}
	}
	echo(t, host, s)
	if n, err := copyAll(io.Discard, victim); err != nil || n > int64(sent) {
		t.Errorf("the host read %d bytes, %v", n, err)
	}

	h = g.raw(1024, 701, 1<<18)
	<-accepted
	h.op, h.flags = opShutdown, shutdownSend
	g.send(h, nil)
	h.op = opRW
	g.send(h, []byte("more"))
	g.want(opReset, 701)
	echo(t, host, s)
}

// The guest says that it has room for very little, or nonsense.
func TestTinyCredit(t *testing.T) {
	accept, accepted := listenHost(t)
	g := newGuest(t, Config{Accept: accept})
	for i, size := range []uint32{1, 2, 100, 5000} {
		s, err := g.connect(1024, uint32(i+1), size)
		if err != nil {
			t.Fatal(err)
		}
		host := unixConn(t, <-accepted)
		n := int64(size) * 50
		var wg sync.WaitGroup
		wg.Go(func() {
			copyAll(host, stream(1, n))
			host.CloseWrite()
		})
		wg.Go(func() {
			copyAll(s, stream(2, n))
			s.shutdown(shutdownSend)
		})
		wg.Go(func() { wantStream(t, "guest to host", host, 2, n) })
		wg.Go(func() { wantStream(t, "host to guest", s, 1, n) })
		wg.Wait()
		s.Close()
		s.waitGone()
	}

	host, s := connect(t, g, 1024, 99, accepted)
	h := g.raw(1024, 700, 0)
	victim := unixConn(t, <-accepted)
	victim.Write([]byte("0123456789"))
	for _, tc := range []struct {
		bufAlloc, fwdCnt uint32
		want             string
	}{
		{0, 0, ""},
		{3, 0, "012"},
		{0, 0, ""},                 // it takes the room back
		{1 << 20, 1 << 31, ""},     // it has read more than was sent
		{1<<32 - 1, 1<<32 - 1, ""}, // so that tx_cnt - fwd_cnt is 4
		{5, 3, "34567"},
		{1<<32 - 1, 0, "89"},
	} {
		h.op, h.bufAlloc, h.fwdCnt = opCreditUpdate, tc.bufAlloc, tc.fwdCnt
		if tc.bufAlloc == 1<<32-1 && tc.fwdCnt == 1<<32-1 {
			h.bufAlloc = 4
		}
		g.send(h, nil)
		if tc.want != "" {
			if got := g.want(opRW, 700); got.length != uint32(len(tc.want)) {
				t.Errorf("with room for %d after %d: got %d bytes, want %q", tc.bufAlloc, tc.fwdCnt, got.length, tc.want)
			}
		}
		h.op = opCreditRequest // answered at once, and the barrier of this test
		g.send(h, nil)
		if got := g.want(opCreditUpdate, 700); got.bufAlloc != bufAlloc || got.fwdCnt != 0 {
			t.Errorf("credit update: %+v", got)
		}
	}
	echo(t, host, s)
}

func TestCreditArithmetic(t *testing.T) {
	const top = 1<<32 - 1
	for _, tc := range []struct{ txCnt, bufAlloc, fwdCnt, want uint32 }{
		{0, 0, 0, 0},
		{0, 100, 0, 100},
		{60, 100, 0, 40},
		{100, 100, 0, 0},
		{101, 100, 0, 0},
		{100, 100, 40, 40},
		{5, 100, top - 4, 90}, // wrapped: 10 in flight
		{top, 100, top, 100},
		{0, 100, 1, 0}, // ahead of us
		{0, top, top, top - 1},
		{0, top, 0, top},
		{top, top, 0, 0},
	} {
		c := conn{txCnt: tc.txCnt, peerBufAlloc: tc.bufAlloc, peerFwdCnt: tc.fwdCnt}
		if got := c.credit(); got != tc.want {
			t.Errorf("%+v: %d", tc, got)
		}
	}
	for _, tc := range []struct {
		fwdCnt, told, bufAlloc uint32
		asked, want            bool
	}{
		{0, 0, top, false, false},
		{0, 0, 0, false, false},
		{0, 0, 0, true, true},
		{bufAlloc/2 - 1, 0, top, false, false},
		{bufAlloc / 2, 0, top, false, true},
		{5, top - 4, 20, false, true}, // wrapped: 10 not told
		{5, top - 4, 22, false, false},
		{1, 0, 1, false, true},
	} {
		c := conn{fwdCnt: tc.fwdCnt, toldFwd: tc.told, peerBufAlloc: tc.bufAlloc, askedCount: tc.asked}
		if got := c.creditDue(); got != tc.want {
			t.Errorf("%+v: %v", tc, got)
		}
	}
}

// Stray packets from a guest that gives no rx buffers cost a bounded number of
// resets, and connections in its other direction go on.
func TestRXStarved(t *testing.T) {
	accept, accepted := listenHost(t)
	g := newGuest(t, Config{Accept: accept})
	host, s := connect(t, g, 1024, 1, accepted)
	g.starve()
	stray := header{srcCID: testCID, dstCID: hostCID, srcPort: 9, dstPort: 9, kind: typeStream, op: opRW}
	for range 2 * maxResets {
		g.send(stray, nil)
	}
	// Guest to host needs no rx buffer, until the credit is used up.
	s.Write(make([]byte, 100000))
	if _, err := io.ReadFull(host, make([]byte, 100000)); err != nil {
		t.Fatal(err)
	}
	go copyAll(host, stream(6, 1<<20))
	g.device.mux.mu.Lock()
	if n := len(g.device.mux.resets); n != maxResets {
		t.Errorf("%d resets wait, want %d", n, maxResets)
	}
	g.device.mux.mu.Unlock()
	g.release()
	for range maxResets {
		g.want(opReset, 9)
	}
	wantStream(t, "host to guest", io.LimitReader(s, 1<<20), 6, 1<<20)
	echo(t, host, s)
}

// Connections that come and go while there are no rx buffers leave nothing.
func TestRXStarvedChurn(t *testing.T) {
	accept, accepted := listenHost(t)
	g := newGuest(t, Config{Accept: accept, MaxConnections: 4})
	g.starve()
	h := header{srcCID: testCID, dstCID: hostCID, srcPort: 9, dstPort: 1024, kind: typeStream}
	for range 200 {
		h.op = opRequest
		g.send(h, nil)
		host := <-accepted
		h.op = opReset
		g.send(h, nil)
		if _, err := host.Read(make([]byte, 1)); err != io.EOF {
			t.Fatalf("host's end: %v", err)
		}
		host.Close()
		waitFor(t, "no connection is left", func() bool { return g.connections() == 0 })
	}
	g.release()
	g.send(header{srcCID: testCID, dstCID: hostCID, srcPort: 10, dstPort: 10, kind: typeStream, op: opRW}, nil)
	g.want(opReset, 10) // and no response
}

// rx buffers may be in as many pieces as the queue has descriptors, and the
// header in several of them. readv(2) takes fewer at a time.
func TestScatteredRXBuffers(t *testing.T) {
	accept, accepted := listenHost(t)
	g := newGuest(t, Config{Accept: accept})
	table := g.memory.Alloc(t, dataQueueSize*dataQueueSize*virtiotest.DescSize)
	for i := range uint16(dataQueueSize) {
		at := table + memory.GuestAddress(int(i)*dataQueueSize*virtiotest.DescSize)
		const piece = rxBufferSize / dataQueueSize // the header is in two pieces
		for j := range uint16(dataQueueSize) {
			d := virtiotest.Desc{Addr: g.rxBuffers[i] + memory.GuestAddress(j)*piece, Len: piece, Flags: virtiotest.DescWrite}
			if j < dataQueueSize-1 {
				d.Flags, d.Next = d.Flags|virtiotest.DescNext, j+1
			}
			g.memory.SetDesc(at, j, d)
		}
		g.rx.SetDesc(i, virtiotest.Desc{Addr: at, Len: dataQueueSize * virtiotest.DescSize, Flags: virtiotest.DescIndirect})
	}
	host, s := connect(t, g, 1024, 1, accepted)
	const size = 4 << 20
	go func() {
		copyAll(host, stream(1, size))
		host.CloseWrite()
	}()
	wantStream(t, "host to guest", s, 1, size)
}

// rx buffers that no packet fits are handed back.
func TestBadRXBuffers(t *testing.T) {
	accept, accepted := listenHost(t)
	g := newGuest(t, Config{Accept: accept})
	host, s := connect(t, g, 1024, 1, accepted)
	for i, bad := range []virtiotest.Desc{
		{Len: rxBufferSize}, // for the device to read
		{Len: headerSize - 1, Flags: virtiotest.DescWrite},      // no room for a header
		{Len: headerSize, Flags: virtiotest.DescWrite},          // none for a payload
		{Len: 0, Flags: virtiotest.DescWrite},                   // none at all
		{Len: headerSize + 1, Flags: virtiotest.DescWrite},      // one byte is enough
		{Len: rxBufferSize - 1000, Flags: virtiotest.DescWrite}, // fine
	} {
		bad.Addr = g.rxBuffers[i]
		g.rx.SetDesc(uint16(i), bad)
	}
	g.raw(1024, 700, 1<<20)
	victim := unixConn(t, <-accepted)
	const size = 1 << 20 // more packets than there are buffers, so that each has its turn
	go victim.Write(make([]byte, size))
	for got := uint32(0); got < size; {
		p := g.packet()
		if p.op != opRW {
			continue
		}
		got += p.length
	}
	echo(t, host, s)
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.returned != 4 {
		t.Errorf("%d buffers came back empty, want 4", g.returned)
	}
}

func TestBrokenRings(t *testing.T) {
	for name, breakIt := range map[string]func(g *guest){
		"tx": func(g *guest) {
			g.tx.SetDesc(0, virtiotest.Desc{Addr: 1, Len: 1})
			g.tx.push(0)
		},
		"rx": func(g *guest) {
			for i := range uint16(dataQueueSize) {
				g.rx.SetDesc(i, virtiotest.Desc{Addr: 1, Len: 1, Flags: virtiotest.DescWrite})
			}
			for range dataQueueSize {
				g.send(header{srcCID: testCID, dstCID: hostCID, kind: typeStream, op: opRW}, nil)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, Config{})
			breakIt(g)
			if err := <-g.failed; err == nil {
				t.Error("no error")
			}
			g.reset()
			g.start()
			host, s := dial(t, g, 1, g.listen(1))
			echo(t, host, s)
		})
	}
}
