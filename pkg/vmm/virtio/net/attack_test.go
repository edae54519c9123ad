package net

import (
	"log/slog"
	"testing"
	"time"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

// attacked is a link on which the host sends all the time, and does not care for
// what it gets.
func attacked(t testing.TB) *link {
	t.Helper()
	l := newLink(t, 1)
	if err := l.ignoreAll(); err != nil {
		t.Fatal(err)
	}
	var frames [][]byte // made once: what the test allocates is not the device's
	for i := range 16 {
		frames = append(frames, tcp(i, i*i*250, 1448, hostHeader))
	}
	t.Cleanup(l.flood(100*time.Microsecond, func(i int) []byte { return frames[i%len(frames)] }))
	return l
}

func newVictim(device func(testing.TB, *slog.Logger) virtio.Device) *virtiotest.Victim {
	const rx, tx, control = 0, 1, 2
	return &virtiotest.Victim{
		New: device,
		Requests: []virtiotest.HostileRequest{
			{Queue: tx, Readable: plain(ethernet(1, 100))},
			{Queue: tx, Readable: tcp(1, 40000, 1448, headerSize)},
			{Queue: tx, Readable: make([]byte, headerSize)},
			{Queue: rx, Room: 1536}, {Queue: rx, Room: 64 << 10}, {Queue: rx, Room: headerSize},
			{Queue: control, Readable: []byte{classMQ, mqPairsSet, 1, 0}, Room: 1},
		},
		Works: func(t testing.TB, d *virtiotest.Driver) {
			d.Send(tx, [][]byte{plain(ethernet(1, 100))}, nil).Wait(t)
		},
	}
}

func TestHostileDriver(t *testing.T) {
	virtiotest.TestHostile(t, newVictim(func(t testing.TB, log *slog.Logger) virtio.Device {
		return newDevice(t, attacked(t), Config{Log: log})
	}))
}

func FuzzHostileDriver(f *testing.F) {
	device := newDevice(f, attacked(f), Config{Log: slog.New(slog.DiscardHandler)})
	device.changes = nil // no limit: all scripts have the same device
	virtiotest.FuzzHostile(f, newVictim(func(testing.TB, *slog.Logger) virtio.Device { return device }))
}
