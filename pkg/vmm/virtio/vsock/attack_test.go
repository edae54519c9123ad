package vsock

import (
	"io"
	"log/slog"
	"os"
	"runtime"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/internal/fdtest"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

// attackPacket is from port 1 of the guest to port 1024 of the host.
func attackPacket(op uint16, payload int) virtiotest.HostileRequest {
	h := header{srcCID: testCID, dstCID: hostCID, srcPort: 1, dstPort: 1024, kind: typeStream, op: op, flags: shutdownBoth, length: uint32(payload), bufAlloc: 1 << 18}
	return virtiotest.HostileRequest{Queue: txQueue, Readable: packetOf(h, make([]byte, payload)...)}
}

// The host echoes what it gets.
var victim = virtiotest.Victim{
	New: func(_ testing.TB, log *slog.Logger) virtio.Device {
		return New(Config{MaxConnections: 8, Log: log, Accept: func(uint32) (*os.File, error) {
			ours, theirs, err := socketpair()
			if err != nil {
				return nil, err
			}
			go func() {
				defer theirs.Close()
				io.CopyBuffer(plainWriter{theirs}, plainReader{theirs}, make([]byte, 1<<10))
			}()
			return ours, nil
		}})
	},
	Requests: []virtiotest.HostileRequest{
		attackPacket(opRequest, 0), attackPacket(opRW, 1000), attackPacket(opRW, maxPayload), attackPacket(opCreditRequest, 0),
		attackPacket(opCreditUpdate, 0), attackPacket(opShutdown, 0), attackPacket(opReset, 0), attackPacket(opResponse, 0),
		{Queue: rxQueue, Room: rxBufferSize}, {Queue: rxQueue, Room: headerSize}, {Queue: eventQueue, Room: 8},
	},
	// A packet for no connection is answered.
	Works: func(t testing.TB, d *virtiotest.Driver) {
		rx := d.Send(rxQueue, nil, []int{rxBufferSize})
		d.Send(txQueue, [][]byte{packetOf(header{srcCID: testCID, dstCID: hostCID, srcPort: 5, dstPort: 6, kind: typeStream, op: opRW})}, nil).Wait(t)
		if written, _ := rx.Wait(t); written != headerSize {
			t.Errorf("%d bytes", written)
		}
	},
	MaxLines: maxComplaints,
}

func TestHostileDriver(t *testing.T) { virtiotest.TestHostile(t, &victim) }
func FuzzHostileDriver(f *testing.F) { virtiotest.FuzzHostile(f, &victim) }

// TestHalfOpenFlood: connections that the guest opens, fills, half-closes and then
// forgets, while nobody on the host reads, cost two descriptors and one buffer each,
// up to the limit; and another guest's connections go on.
func TestHalfOpenFlood(t *testing.T) {
	const limit = 100
	usage := virtiotest.Measure(t)
	t.Run("flood", func(t *testing.T) {
		accept, accepted := listenHost(t)
		g := newGuest(t, Config{Accept: accept, MaxConnections: limit})
		otherAccept, otherAccepted := listenHost(t)
		other := newGuest(t, Config{Accept: otherAccept})
		host, s := connect(t, other, 1024, 1, otherAccepted)
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		goroutines, files := runtime.NumGoroutine(), fdtest.Count(t)
		payload := make([]byte, maxPayload)
		for i := range uint32(3 * limit) {
			h := header{srcCID: testCID, dstCID: hostCID, srcPort: 100 + i, dstPort: 1024, kind: typeStream, op: opRequest, bufAlloc: 1 << 18}
			g.send(h, nil)
			for op := (<-g.packets).op; op != opResponse && op != opReset; op = (<-g.packets).op {
			}
			h.op = opRW
			for range bufAlloc / maxPayload { // all the credit there is
				g.send(h, payload)
			}
			h.op, h.flags = opShutdown, shutdownSend
			g.send(h, nil)
			for len(g.packets) > 0 {
				<-g.packets
			}
		}
		echo(t, host, s)
		runtime.GC()
		runtime.ReadMemStats(&after)
		if n := g.connections(); n != limit {
			t.Errorf("%d connections", n)
		}
		if n := fdtest.Count(t); n > files+2*limit {
			t.Errorf("%d files are open, there were %d", n, files)
		}
		if n := runtime.NumGoroutine(); n > goroutines {
			t.Errorf("%d goroutines, there were %d", n, goroutines)
		}
		if after.HeapAlloc > before.HeapAlloc+limit*(bufAlloc+chunkSize)+4<<20 {
			t.Errorf("%d bytes are in use, there were %d", after.HeapAlloc, before.HeapAlloc)
		}
		for len(accepted) > 0 {
			(<-accepted).Close()
		}
		host.Close()
	})
	usage.Settle()
}
