package node

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Tool runs a program of the host that has to succeed, and returns what it says.
func Tool(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// LoopDevice makes a file a block device of the host's until the end of the test.
func LoopDevice(t *testing.T, file string) string {
	t.Helper()
	device := Tool(t, "losetup", "--find", "--show", file)
	t.Cleanup(func() { Tool(t, "losetup", "--detach", device) })
	return device
}

// WithDisks returns a node of the test's own whose busybox containers have file systems of their own in images, by the
// snapshotter blockfile or erofs.
func WithDisks(t *testing.T, snapshotter string) *Node {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "e2e")
	if err != nil {
		t.Fatal(err)
	}
	scratch := filepath.Join(dir, "blockfile.ext4")
	Tool(t, "truncate", "--size", "32M", scratch)
	Tool(t, "mkfs.ext4", "-q", scratch)
	// The snapshotter does not load the module, if it is one.
	_ = exec.Command("modprobe", "erofs").Run()
	n := New(t, dir)
	n.Import(t, Busybox, snapshotter)
	return n
}
