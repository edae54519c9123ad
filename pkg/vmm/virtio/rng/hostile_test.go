package rng

import (
	"log/slog"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

var victim = virtiotest.Victim{
	New:      func(testing.TB, *slog.Logger) virtio.Device { return New(ones{}) },
	Requests: []virtiotest.HostileRequest{{Room: 64}, {Readable: []byte("x"), Room: maxRequest + 1}},
	Works: func(t testing.TB, d *virtiotest.Driver) {
		if written, _ := d.Send(0, nil, []int{16}).Wait(t); written != 16 {
			t.Errorf("%d bytes", written)
		}
	},
}

func TestHostileDriver(t *testing.T) { virtiotest.TestHostile(t, &victim) }
func FuzzHostileDriver(f *testing.F) { virtiotest.FuzzHostile(f, &victim) }
