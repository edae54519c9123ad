//go:build privileged

package guestspec

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// A block device that is bound, as hostPath does it, becomes a device of the container, with the rules that there are.
func TestBlockDeviceAsMount(t *testing.T) {
	node := makeNode(t, "/dev")
	spec := base()
	linux := spec.Linux
	linux.Devices = []specs.LinuxDevice{
		{Path: "/dev/null", Type: "c", Major: 1, Minor: 3},
		{Path: "/dev/sdx", Type: "b", Major: 4094, Minor: 1}, // as the host lists it
	}
	linux.Resources = &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}}
	spec.Mounts = []specs.Mount{
		{Destination: "/dev/sdx", Type: "bind", Source: node, Options: []string{"rbind", "ro"}},
		{Destination: "/proc", Type: "proc", Source: "proc"},
	}
	r := rewrite(t, spec, first)
	if len(r.Spec.Mounts) != 1 || r.Spec.Mounts[0].Type != "proc" {
		t.Errorf("mounts %+v", r.Spec.Mounts)
	}
	mode, root := os.FileMode(0o640), uint32(0)
	want := specs.LinuxDevice{Path: "/dev/sdx", Type: "b", Major: 4094, Minor: 1, FileMode: &mode, UID: &root, GID: &root}
	if len(linux.Devices) != 2 || !reflect.DeepEqual(linux.Devices[1], want) {
		t.Errorf("devices %+v, want %+v", linux.Devices, want)
	}
	if want := []Disk{{"/dev/sdx", 4094, 1, false}}; !slices.Equal(r.Disks, want) {
		t.Errorf("disks %+v, want %+v", r.Disks, want)
	}
}

// makeNode makes the node of a block device that there is not.
func makeNode(t *testing.T, dir string) string {
	t.Helper()
	node := filepath.Join(dir, fmt.Sprint("microvm-test-", os.Getpid()))
	if err := unix.Mknod(node, unix.S_IFBLK|0o640, int(unix.Mkdev(4094, 1))); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(node) })
	return node
}

// A node that a container may have made, on a volume, is not the host's device of
// that number.
func TestNodeOnAVolume(t *testing.T) {
	volume := t.TempDir()
	// As the kubelet binds a subPath.
	subPath := filepath.Join(t.TempDir(), "0")
	if err := os.WriteFile(subPath, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	node := makeNode(t, volume)
	if err := unix.Mount(node, subPath, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(subPath, unix.MNT_DETACH)
	link := filepath.Join(volume, "link")
	if err := os.Symlink(node, link); err != nil {
		t.Fatal(err)
	}
	for _, source := range []string{node, subPath, link} {
		for _, rules := range [][]specs.LinuxDeviceCgroup{nil, {{Allow: true, Access: "rwm"}}} {
			spec := base()
			spec.Linux.Resources = &specs.LinuxResources{Devices: rules}
			spec.Mounts = []specs.Mount{{Destination: "/data", Type: "bind", Source: source, Options: []string{"rbind"}}}
			r, err := Rewrite(spec, first)
			if !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "mount /data") {
				t.Errorf("%s: %v, disks %v", source, err, r)
			}
		}
	}
}
