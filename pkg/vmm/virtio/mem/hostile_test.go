package mem

import (
	"log/slog"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

// The machine behind the device checks that a block is plugged and unplugged in
// turn.
var victim = virtiotest.Victim{
	New: func(t testing.TB, _ *slog.Logger) virtio.Device {
		d, _ := newDevice(t)
		if err := d.Request(10 * testBlock); err != nil {
			t.Fatal(err)
		}
		return d
	},
	Requests: []virtiotest.HostileRequest{
		{Readable: request(requestPlug, at(0), 3), Room: responseSize},
		{Readable: request(requestUnplug, at(0), 3), Room: responseSize},
		{Readable: request(requestState, at(1), testCount-1), Room: responseSize},
		{Readable: request(requestUnplugAll, 0, 0), Room: responseSize},
	},
	Works: func(t testing.TB, d *virtiotest.Driver) {
		for _, kind := range []uint16{requestPlug, requestUnplug} {
			if got := ask(t, d, request(kind, at(5), 2)); got.status != responseACK {
				t.Errorf("request %d: %+v", kind, got)
			}
		}
	},
}

func TestHostileDriver(t *testing.T) { virtiotest.TestHostile(t, &victim) }
func FuzzHostileDriver(f *testing.F) { virtiotest.FuzzHostile(f, &victim) }
