package vsock

import (
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

// script is read as the steps of guest and host.
type script struct{ virtiotest.Script }

// number makes small, large and odd 32-bit numbers.
func (s *script) number() uint32 {
	b := s.Byte()
	switch b & 3 {
	case 0:
		return uint32(b >> 2)
	case 1:
		return uint32(b>>2) << 13
	case 2:
		return -uint32(b >> 2)
	default:
		return uint32(b)<<24 | uint32(s.Byte())<<16 | uint32(s.Byte())<<8 | uint32(s.Byte())
	}
}

// What a step can be, beside a packet of the guest.
const (
	stepRaw = iota + 200
	stepShort
	stepHostWrite
	stepHostClose
	stepHostCloseWrite
	stepHostRead
	stepHold
	stepRelease
)

// FuzzTransmit sends packets of every kind while the host does what it likes.
// Whatever the guest does: no panic, no more than the allowed connections and
// memory, the device goes on serving others, and a reset ends it.
func FuzzTransmit(f *testing.F) {
	packet := func(op, port, flags, length, bufAlloc, fwdCnt byte) []byte {
		return []byte{op, port, flags, length, bufAlloc, fwdCnt}
	}
	join := func(parts ...[]byte) (all []byte) {
		for _, p := range parts {
			all = append(all, p...)
		}
		return all
	}
	open := packet(opRequest, 1, 0, 0, 0xfd, 0)
	f.Add([]byte{})
	f.Add(join(open, packet(opRW, 1, 0, 0x40, 0xfd, 0), packet(opShutdown, 1, shutdownBoth, 0, 0, 0), packet(opReset, 1, 0, 0, 0, 0)))
	f.Add(join(open, packet(opRW, 1, 0, 0x21, 0xfd, 0), packet(opRW, 1, 0, 0x21, 0xfd, 0), packet(opRW, 1, 0, 0x21, 0xfd, 0)))
	f.Add(join(open, []byte{stepHostWrite, 0x81}, packet(opCreditUpdate, 1, 0, 0, 2, 2), packet(opCreditRequest, 1, 0, 0, 4, 8), []byte{stepHostClose}))
	f.Add(join(open, []byte{stepHold}, open, packet(opRequest, 2, 0, 0, 4, 0), []byte{stepHostWrite, 0xff, 1, 2, 3, stepRelease, stepHostCloseWrite}))
	f.Add(join(open, packet(opShutdown, 1, shutdownReceive, 0, 0, 0), []byte{stepHostWrite, 0x41, stepHostRead, 0x41}, packet(opShutdown, 1, shutdownSend, 0, 0, 0)))
	f.Add([]byte{stepShort, 43, stepShort, 0, stepRaw, 3, 0, 0, 0, 0, 0, 0, 0, 2})
	f.Add(join(packet(opResponse, 0x80, 0, 0, 0xfd, 0), packet(opReset, 0x80, 0, 0, 0xfd, 0), packet(77, 0x81, 0, 0, 0, 0)))

	const limit, maxSteps = 4, 100
	f.Fuzz(func(t *testing.T, data []byte) {
		var mu sync.Mutex
		var hosts []*net.UnixConn
		g := newGuest(t, Config{MaxConnections: limit, Accept: func(port uint32) (*os.File, error) {
			ours, theirs, err := socketpair()
			if err != nil {
				return nil, err
			}
			mu.Lock()
			defer mu.Unlock()
			hosts = append(hosts, unixConn(t, theirs))
			return ours, nil
		}})
		// The guest answers a dial, so that there is a connection of each kind.
		dialled, _ := dial(t, g, 1, g.listen(1))
		hosts = append(hosts, dialled)
		host := func() *net.UnixConn {
			mu.Lock()
			defer mu.Unlock()
			return hosts[len(hosts)-1]
		}
		var io_ sync.WaitGroup
		s := script{data}
		for range maxSteps {
			if len(s.Script) == 0 {
				break
			}
			switch step := s.Byte(); step {
			case stepRaw:
				raw := make([]byte, headerSize+int(s.Byte()))
				copy(raw, s.Bytes(len(raw)))
				g.sendRaw(raw)
			case stepShort:
				g.sendRaw(make([]byte, 1+int(s.Byte())%(headerSize-1)))
			case stepHostWrite:
				c, n := host(), int64(s.number()%(4<<20))
				io_.Go(func() { copyAll(c, stream(1, n)) })
			case stepHostRead:
				c, n := host(), int64(s.number()%(4<<20))
				io_.Go(func() { io.CopyN(io.Discard, c, n) })
			case stepHostClose:
				host().Close()
			case stepHostCloseWrite:
				host().CloseWrite()
			case stepHold:
				g.hold()
			case stepRelease:
				g.release()
			default:
				h := header{srcCID: testCID, dstCID: hostCID, kind: typeStream, op: uint16(step)}
				port := uint32(s.Byte())
				if h.srcPort, h.dstPort = port&0x7f, 1024; port&0x80 != 0 { // the dialled one
					h.dstPort = firstPort + port&0x3f
				}
				h.flags = uint32(s.Byte())
				payload := make([]byte, s.number()%(maxPayload+2))
				h.bufAlloc, h.fwdCnt = s.number(), s.number()
				g.send(h, payload)
			}
			for len(g.packets) > cap(g.packets)/2 {
				<-g.packets
			}
		}

		m := g.device.mux
		m.mu.Lock()
		if len(m.conns) > limit || len(m.listed) > limit || len(m.resets) > maxResets {
			t.Errorf("%d connections, %d listed, %d resets", len(m.conns), len(m.listed), len(m.resets))
		}
		conns := slices.Collect(maps.Keys(m.conns))
		m.mu.Unlock()
		for _, c := range conns {
			c.mu.Lock()
			if c.backlog.size > bufAlloc || len(c.backlog.chunks) > bufAlloc/chunkSize+1 {
				t.Errorf("a backlog of %d bytes in %d chunks", c.backlog.size, len(c.backlog.chunks))
			}
			c.mu.Unlock()
		}

		// It still answers.
		g.release()
		probe := header{srcCID: testCID, dstCID: hostCID, srcPort: 9999, dstPort: 9, kind: typeStream, op: opRW}
		g.send(probe, nil)
		for g.packet().dstPort != probe.srcPort {
		}
		g.reset()
		io_.Wait()
	})
}
