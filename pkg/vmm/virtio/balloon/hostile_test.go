package balloon

import (
	"log/slog"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

var victim = virtiotest.Victim{
	New: func(_ testing.TB, log *slog.Logger) virtio.Device { return New(log) },
	Requests: []virtiotest.HostileRequest{
		{Queue: inflateQueue, Readable: pfns(0x100, 0x101, 0x1ff, 1<<32-1)},
		{Queue: deflateQueue, Readable: pfns(0x100)},
		{Queue: reportingQueue, Room: 2 * pageSize},
	},
	Works: func(t testing.TB, d *virtiotest.Driver) {
		addr, b := fill(t, d, 1)
		d.Send(inflateQueue, [][]byte{pfns(uint32(addr >> pageShift))}, nil).Wait(t)
		if got := zeroes(b); got != "1" {
			t.Error("not discarded")
		}
		d.Memory.Free(addr, pageSize)
	},
}

func TestHostileDriver(t *testing.T) { virtiotest.TestHostile(t, &victim) }
func FuzzHostileDriver(f *testing.F) { virtiotest.FuzzHostile(f, &victim) }
