package node

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
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

// Tmpfs mounts one on the host until the end of the test. Whoever uses it, a pod or a node, must be made afterwards, so that it is
// removed before.
func Tmpfs(t *testing.T, dir, options string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
}

// WithDisks returns a node of the test's own whose busybox containers have file systems of their own, by the snapshotter blockfile,
// erofs or devmapper.
func WithDisks(t *testing.T, snapshotter string) *Node {
	t.Helper()
	n := New(t, DiskState(t, snapshotter))
	n.Import(t, Busybox, snapshotter)
	return n
}

// DiskState makes the state folder of a node that has such a snapshotter.
func DiskState(t *testing.T, snapshotter string) (dir string) {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "e2e")
	if err != nil {
		t.Fatal(err)
	}
	PrepareDisks(t, dir, snapshotter)
	return dir
}

// PrepareDisks puts into a node's state folder what such a snapshotter needs.
func PrepareDisks(t *testing.T, dir, snapshotter string) {
	t.Helper()
	switch snapshotter {
	case "blockfile":
		scratch := filepath.Join(dir, "blockfile.ext4")
		Tool(t, "truncate", "--size", "32M", scratch)
		Tool(t, "mkfs.ext4", "-q", scratch)
	case "erofs":
		// The snapshotter does not load the module, if it is one.
		_ = exec.Command("modprobe", "erofs").Run()
	case "devmapper":
		if err := os.WriteFile(filepath.Join(dir, "thinpool"), []byte(thinPool(t)), 0o644); err != nil {
			t.Fatal(err)
		}
	default:
		t.Fatalf("%s has no disks", snapshotter)
	}
}

// HasThinPools says whether this kernel has thin provisioning, without which there is no snapshotter devmapper, and logs that it
// has not.
func HasThinPools(t *testing.T) bool {
	t.Helper()
	_ = exec.Command("modprobe", "dm_thin_pool").Run() // it may be built in
	out, err := exec.Command("dmsetup", "targets").CombinedOutput()
	has := err == nil && strings.Contains(string(out), "thin-pool")
	if !has {
		t.Logf("this kernel has no thin provisioning, nothing was tested: %s", out)
	}
	return has
}

// thinPool makes a thin pool on loop devices that lasts until the end of the test.
func thinPool(t *testing.T) (name string) {
	t.Helper()
	if !Exists("/run/udev/control") {
		// dmsetup, containerd's too, leaves the nodes in /dev/mapper to udev, whether it runs or not.
		t.Setenv("DM_DISABLE_UDEV", "1")
	}
	dir := t.TempDir()
	var devices []string
	for _, part := range []struct{ name, size string }{{"metadata", "4M"}, {"data", "256M"}} {
		file := filepath.Join(dir, part.name)
		Tool(t, "truncate", "--size", part.size, file)
		devices = append(devices, LoopDevice(t, file))
	}
	name = fmt.Sprintf("e2e%d", os.Getpid())
	// Documentation/admin-guide/device-mapper/thin-provisioning.rst: sizes are in sectors of 512 bytes, blocks are of 64 KiB.
	Tool(t, "dmsetup", "create", name, "--table", fmt.Sprintf("0 %d thin-pool %s %s 128 1024", 256<<20/512, devices[0], devices[1]))
	t.Cleanup(func() { Tool(t, "dmsetup", "remove", "--retry", name) })
	return name
}

// WithMounts returns a node of the test's own whose containerd is in a mount namespace of its own, in which a shell script has
// mounted something: $STATE is the node's state folder, $SCRATCH a directory that goes with the test.
func WithMounts(t *testing.T, script string) *Node {
	t.Helper()
	state, err := os.MkdirTemp("/var/tmp", "e2e")
	if err != nil {
		t.Fatal(err)
	}
	variables := "STATE=" + state + " SCRATCH=" + t.TempDir() + "\n"
	return New(t, state, "unshare", "--mount", "sh", "-ec", variables+script+"\nexec \"$@\"", "sh")
}
