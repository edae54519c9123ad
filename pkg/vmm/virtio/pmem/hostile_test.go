package pmem

import (
	"log/slog"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

var victim = virtiotest.Victim{
	New:      func(testing.TB, *slog.Logger) virtio.Device { return New(0, 1<<20, nil) },
	Requests: []virtiotest.HostileRequest{{Readable: le32(requestFlush), Room: 4}},
	Works: func(t testing.TB, d *virtiotest.Driver) {
		if written, _ := d.Send(0, [][]byte{le32(requestFlush)}, []int{4}).Wait(t); written != 4 {
			t.Errorf("%d bytes", written)
		}
	},
}

func TestHostileDriver(t *testing.T) { virtiotest.TestHostile(t, &victim) }
func FuzzHostileDriver(f *testing.F) { virtiotest.FuzzHostile(f, &victim) }
