//go:build e2e

package task

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

// A block device of the host, read, written and discarded; taken away with the container, and given to the next one.
func TestBlockDevice(t *testing.T) {
	n := node.For(t)
	const size = 8 << 20
	file := filepath.Join(t.TempDir(), "disk")
	content := bytes.Repeat([]byte("host\n"), size/5+1)[:size]
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	device := node.LoopDevice(t, file)
	script := fmt.Sprintf(`set -e
		blockdev --getsize64 %[1]s
		head -c 5 %[1]s
		echo guest | dd of=%[1]s bs=6 seek=1 conv=notrunc 2>/dev/null
		blkdiscard -o $((4 << 20)) -l $((4 << 20)) %[1]s`, device)
	n.MustRun(t, []string{"--device", device}, "sh", "-c", script).WantOutput(t, fmt.Sprintf("%d\nhost\n", size))
	got, err := os.ReadFile(device)
	copy(content[6:], "guest\n")
	if err != nil || len(got) != size || !bytes.Equal(got[:size/2], content[:size/2]) {
		t.Errorf("the device has %d bytes, first %q, %v", len(got), got[:min(20, len(got))], err)
	}
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil || st.Blocks*512 > size*3/4 {
		t.Errorf("%d bytes are in use after half of them was discarded, %v", st.Blocks*512, err)
	}
	n.MustRun(t, []string{"--device", device}, "dd", "if="+device, "bs=6", "skip=1", "count=1").WantOutput(t, "guest\n")
	n.Run(t, nil, "dd", "if="+device, "count=1").WantError(t, device)
}

// useOwnDisk runs a container that writes to its root file system, and has a second task find what the first one wrote.
func useOwnDisk(t *testing.T, n *node.Node, snapshotter, fstype string) {
	t.Helper()
	id := n.ID(t)
	n.RemoveAtEnd(t, id)
	n.Ctr(t, n.RunArgs(node.Busybox, id, []string{"--snapshotter", snapshotter},
		"sh", "-c", "cat /kept 2>/dev/null; sed -n 's,^[^ ]* / \\([^ ]*\\) .*,\\1,p' /proc/mounts; echo kept >/kept; [ -x /bin/busybox ]")...).
		WantOutput(t, fstype+"\n")
	n.Ctr(t, "tasks", "start", "--fifo-dir", t.TempDir(), id).WantOutput(t, "kept\n"+fstype+"\n")
}

// The image of a root file system is left as one that was unmounted.
func TestBlockfile(t *testing.T) {
	n := node.WithDisks(t, "blockfile")
	before, err := filepath.Glob(n.Path("root/io.containerd.snapshotter.v1.blockfile/snapshots/*"))
	if err != nil {
		t.Fatal(err)
	}
	useOwnDisk(t, n, "blockfile", "ext4")
	after, err := filepath.Glob(n.Path("root/io.containerd.snapshotter.v1.blockfile/snapshots/*"))
	if err != nil || len(after) != len(before)+1 {
		t.Fatalf("snapshots %q, then %q, %v", before, after, err)
	}
	for _, image := range after {
		if state := node.Tool(t, "dumpe2fs", "-h", image); strings.Contains(state, "needs_recovery") {
			t.Errorf("%s was not unmounted: %s", image, state)
		}
		node.Tool(t, "e2fsck", "-fn", image)
	}
}

func TestErofs(t *testing.T) {
	n := node.WithDisks(t, "erofs")
	useOwnDisk(t, n, "erofs", "overlay")
}

func TestDevmapper(t *testing.T) {
	if node.HasThinPools(t) {
		useOwnDisk(t, node.WithDisks(t, "devmapper"), "devmapper", "ext4")
	}
}
