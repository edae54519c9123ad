package vsock

import (
	"io"
	"log/slog"
	"os"
	"testing"

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
