package console

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

var victim = virtiotest.Victim{
	New: func(t testing.TB, _ *slog.Logger) virtio.Device {
		d := New(io.Discard)
		t.Cleanup(func() {
			if err := d.Close(context.Background()); err != nil {
				t.Error(err)
			}
		})
		return d
	},
	Requests: []virtiotest.HostileRequest{
		{Queue: transmitQueue, Readable: []byte("hello, world\n")},
		{Queue: transmitQueue, Readable: bytes.Repeat([]byte("x"), bufferSize+1)},
		{Queue: receiveQueue, Room: 4096},
	},
	Works: func(t testing.TB, d *virtiotest.Driver) { send(t, d, "x") },
}

func TestHostileDriver(t *testing.T) { virtiotest.TestHostile(t, &victim) }
func FuzzHostileDriver(f *testing.F) { virtiotest.FuzzHostile(f, &victim) }
