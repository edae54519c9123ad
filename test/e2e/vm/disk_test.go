//go:build e2e

package vm

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

// A layer of erofs is persistent memory of the guest, its second after the guest's own image, and the writable layer is a
// disk.
func TestErofsLayers(t *testing.T) {
	n := node.WithDisks(t, "erofs")
	n.MustRun(t, []string{"--snapshotter", "erofs"}, "ls", "/sys/block").WantOutput(t, "pmem0\npmem1\nvda\n")
}

// What a container reads and writes of its own disk is in its metrics, each in its field.
func TestDiskMetrics(t *testing.T) {
	const read, written = 3 << 20, 8 << 20
	n := node.WithDisks(t, "blockfile")
	// Past the caches, so that the kernel sees whose it is.
	id := n.Detach(t, []string{"--snapshotter", "blockfile"}, "sh", "-c", fmt.Sprintf(`
		dd if=/dev/zero of=/file bs=1M count=%d oflag=direct 2>/dev/null
		dd if=/file of=/dev/null bs=1M count=%d iflag=direct 2>/dev/null
		exec sleep 1000`, written>>20, read>>20))
	var r, w uint64
	node.Until(t, "the metrics show what was read and written", func() bool {
		var m struct {
			IO struct {
				Usage []struct{ Rbytes, Wbytes uint64 }
			}
		}
		n.Metrics(t, id, &m)
		r, w = 0, 0
		for _, device := range m.IO.Usage {
			r, w = r+device.Rbytes, w+device.Wbytes
		}
		return r >= read && w >= written
	})
	// The program was read too, and the file system has its journal.
	if r > read+4<<20 || w > written+4<<20 {
		t.Errorf("%d bytes read, %d written", r, w)
	}
}

// A device that a guest has mounted the host cannot mount, by which it would damage it. Once the guest has gone, it can, and finds
// what the guest has written.
func TestDevmapperInUse(t *testing.T) {
	if !node.HasThinPools(t) {
		return
	}
	n := node.WithDisks(t, "devmapper")
	id := n.Detach(t, []string{"--snapshotter", "devmapper"}, "sh", "-c", "echo written >/file; exec sleep 1000")
	n.MustExec(t, id, nil, "sh", "-c", "until [ -s /file ]; do sleep 0.1; done")
	// Those of images are there only while they are made.
	devices, err := filepath.Glob("/dev/mapper/e2e*-snap-*")
	if err != nil || len(devices) != 1 {
		t.Fatalf("devices of snapshots: %q, %v", devices, err)
	}
	dir := t.TempDir()
	mount := func() error { return unix.Mount(devices[0], dir, "ext4", 0, "") }
	if err := mount(); err != unix.EBUSY {
		if err == nil {
			err = unix.Unmount(dir, 0)
		}
		t.Errorf("the host mounts it meanwhile: %v", err)
	}
	n.MustCtr(t, "tasks", "rm", "-f", id)
	if err := mount(); err != nil {
		t.Fatalf("the host mounts it afterwards: %v", err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	if b, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || string(b) != "written\n" {
		t.Errorf("the file has %q, %v", b, err)
	}
}
