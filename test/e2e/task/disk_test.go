//go:build e2e

package task

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

func command(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// loopDevice makes a file a block device of the host's until the end of the test.
func loopDevice(t *testing.T, file string) string {
	t.Helper()
	device := command(t, "losetup", "--find", "--show", file)
	t.Cleanup(func() { command(t, "losetup", "--detach", device) })
	return device
}

// A block device of the host, read, written and discarded; taken away with the container, and given to the next one.
func TestBlockDevice(t *testing.T) {
	n := node.For(t)
	const size = 8 << 20
	file := filepath.Join(t.TempDir(), "disk")
	content := bytes.Repeat([]byte("host\n"), size/5+1)[:size]
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	device := loopDevice(t, file)
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

// diskNode is a node whose containers have file systems of their own in images, by the snapshotter blockfile or erofs.
func diskNode(t *testing.T, snapshotter string) *node.Node {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "e2e")
	if err != nil {
		t.Fatal(err)
	}
	scratch := filepath.Join(dir, "blockfile.ext4")
	command(t, "truncate", "--size", "32M", scratch)
	command(t, "mkfs.ext4", "-q", scratch)
	// The mount manager calls this one's mkfs, and the kernel's module is not loaded by a snapshotter.
	_ = exec.Command("modprobe", "erofs").Run()
	n := node.New(t, dir)
	n.Import(t, node.Busybox, snapshotter)
	return n
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
	n := diskNode(t, "blockfile")
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
		if state := command(t, "dumpe2fs", "-h", image); strings.Contains(state, "needs_recovery") {
			t.Errorf("%s was not unmounted: %s", image, state)
		}
		command(t, "e2fsck", "-fn", image)
	}
}

func TestErofs(t *testing.T) {
	n := diskNode(t, "erofs")
	useOwnDisk(t, n, "erofs", "overlay")
}
