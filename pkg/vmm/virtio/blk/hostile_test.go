package blk

import (
	"log/slog"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

var victim = virtiotest.Victim{
	New: func(t testing.TB, log *slog.Logger) virtio.Device {
		return newDevice(t, Config{File: memoryFile(t, pattern(testSectors*sectorSize)), Serial: "hostile", Log: log})
	},
	Requests: []virtiotest.HostileRequest{
		{Readable: header(typeIn, 1), Room: 4*sectorSize + 1},
		{Readable: append(header(typeOut, 1), make([]byte, 4*sectorSize)...), Room: 1},
		{Readable: header(typeFlush, 0), Room: 1},
		{Readable: header(typeGetID, 0), Room: 21},
		{Readable: append(header(typeDiscard, 0), segment(1, 2, 0)...), Room: 1},
		{Readable: append(header(typeWriteZeroes, 0), segment(0, testSectors, 1)...), Room: 1},
	},
	Works: func(t testing.TB, d *virtiotest.Driver) {
		if written, out := d.Send(0, [][]byte{header(typeIn, 3)}, []int{sectorSize, 1}).Wait(t); written != sectorSize+1 || out[0][0] != 4 {
			t.Errorf("%d bytes, the first is %d", written, out[0][0])
		}
	},
}

func TestHostileDriver(t *testing.T) { virtiotest.TestHostile(t, &victim) }
func FuzzHostileDriver(f *testing.F) { virtiotest.FuzzHostile(f, &victim) }
