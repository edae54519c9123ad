//go:build privileged

package guestspec

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// A block device that is bound, as hostPath does it, becomes a device of the container, with the rules that there are.
func TestBlockDeviceAsMount(t *testing.T) {
	node := filepath.Join(t.TempDir(), "sdx")
	if err := unix.Mknod(node, unix.S_IFBLK|0o640, int(unix.Mkdev(4094, 1))); err != nil {
		t.Fatal(err)
	}
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
