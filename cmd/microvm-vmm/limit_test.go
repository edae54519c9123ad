package main

import (
	"bytes"
	"encoding/binary"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/microvm-runtime/microvm/pkg/vmm/control"
	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit"
	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit/ratelimittest"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse/fusetest"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

// TestRateLimits has all disks and the share go by one limit, the NICs' sending
// by another, and nothing by that of the NICs' receiving.
func TestRateLimits(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	clock := ratelimittest.New()
	ten := ratelimit.Limits{Operations: ratelimit.Rate{PerSecond: 10, Burst: 10}}
	never := ratelimit.Limits{Operations: ratelimit.Rate{PerSecond: 1, Burst: 1}}
	limits, err := newLimiters(control.RateLimits{Disk: ten, NetworkTransmit: ten, NetworkReceive: never}, clock)
	if err != nil {
		t.Fatal(err)
	}
	var disks, nics []*virtiotest.Driver
	for i := range 2 {
		disk, err := limits.newDisk(control.Disk{}, tempFile(t, "disk", make([]byte, 512)), log)
		if err != nil {
			t.Fatal(err)
		}
		disks = append(disks, virtiotest.NewDriver(t, disk.device, virtiotest.Options{}))
		nic, err := limits.newNIC(control.NIC{MAC: "02:00:00:00:00:0" + string(rune('1'+i)), QueuePairs: 1}, openTaps(t, 1), log)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { nic.close() }) // after the driver's reset
		nics = append(nics, virtiotest.NewDriver(t, nic.device, virtiotest.Options{}))
	}
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	share, err := limits.newShare("shared", dir, nil, log)
	if err != nil {
		t.Fatal(err)
	}
	shared := virtiotest.NewDriver(t, share, virtiotest.Options{})
	guest := fusetest.New(t, func(readable, writable [][]byte) uint32 {
		var lens []int
		for _, b := range writable {
			lens = append(lens, len(b))
		}
		written, out := shared.Send(1, readable, lens).Wait(t)
		for i, b := range out {
			copy(writable[i], b)
		}
		return written
	})
	guest.Init()

	flush := binary.LittleEndian.AppendUint32(nil, 4) // VIRTIO_BLK_T_FLUSH
	flush = append(flush, make([]byte, 12)...)
	frame := make([]byte, 12+60)
	took := func(what string, want time.Duration, f func()) {
		t.Helper()
		ratelimittest.Took(t, what, clock.While(f), want, 0)
	}
	took("10 flushes, 10 of the other disk and 10 syncs of the share", 2*time.Second, func() {
		for range 10 {
			for _, d := range disks {
				d.Send(0, [][]byte{flush}, []int{1}).Wait(t)
			}
			if errno := guest.Syncfs(fuse.RootID); errno != 0 {
				t.Error(errno)
			}
		}
	})
	clock.Advance(time.Second)
	took("15 frames, and 15 of the other NIC", 2*time.Second, func() {
		for range 15 {
			for _, d := range nics {
				d.Send(1, [][]byte{frame}, nil).Wait(t)
			}
		}
	})
}

func TestBadRateLimits(t *testing.T) {
	bad := ratelimit.Limits{Bytes: ratelimit.Rate{PerSecond: 1}}
	for name, limits := range map[string]control.RateLimits{
		"disk: bytes:":             {Disk: bad},
		"network receive: bytes:":  {NetworkReceive: bad},
		"network transmit: bytes:": {NetworkTransmit: bad},
	} {
		log := slog.New(slog.NewTextHandler(&bytes.Buffer{}, nil))
		_, err := assemble(control.Config{RateLimits: limits}, map[string]*os.File{control.FileImage: tempFile(t, "image", make([]byte, 512))}, log, hooks{})
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s error %v", name, err)
		}
	}
}
