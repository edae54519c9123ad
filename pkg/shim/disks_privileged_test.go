//go:build privileged

package shim

import (
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// loopDevice is a block device of the host, and its number.
func loopDevice(t *testing.T) (path string, major, minor int64) {
	t.Helper()
	file, err := mount.SetupLoop(image(t, "disk"), mount.LoopParams{Autoclear: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return file.Name(), int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
}

// withDevice gives a container a block device.
func withDevice(path string, major, minor int64, access string) func(*specs.Spec) {
	return func(spec *specs.Spec) {
		spec.Linux.Devices = []specs.LinuxDevice{{Path: path, Type: "b", Major: major, Minor: minor}}
		spec.Linux.Resources = &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{
			{Access: "rwm"}, {Allow: true, Type: "b", Major: &major, Minor: &minor, Access: access},
		}}
	}
}

func TestBlockVolume(t *testing.T) {
	f := newFixture(t)
	path, major, minor := loopDevice(t)
	create := func(id, access string) {
		t.Helper()
		_, err := f.Create(t.Context(), &taskapi.CreateTaskRequest{ID: id, Bundle: f.bundle(withDevice("/dev/xvda", major, minor, access), "sleep")})
		if err != nil {
			t.Fatal(err)
		}
	}
	create("c1", "rwm")
	create("c2", "r")
	if got := f.machine().attached(); !slices.Equal(got, []fakeDisk{{path, false, true, false}}) {
		t.Errorf("disks %+v", got)
	}
	d := f.agent.Request("c2").GetBlockDevices()
	if len(d) != 1 || d[0].GetMajor() != major || d[0].GetMinor() != minor || d[0].GetPciAddress() != "0000:00:18.0" {
		t.Errorf("block devices %v", d)
	}
	if got := f.agent.Spec("c2").Linux.Devices; len(got) != 1 || got[0].Path != "/dev/xvda" || got[0].Major != major {
		t.Errorf("devices %+v", got)
	}
	f.endAll("c1")
	if got := f.machine().attached(); len(got) != 1 {
		t.Errorf("disks %+v of a container that is left", got)
	}
	f.endAll("c2")
	if got := f.machine().attached(); len(got) != 0 {
		t.Errorf("disks %+v are left", got)
	}
	create("c3", "r")
	if got := f.machine().attached(); !slices.Equal(got, []fakeDisk{{path, true, false, false}}) {
		t.Errorf("disks %+v", got)
	}
	f.endAll("c3")
}

func TestOpenBlockDevice(t *testing.T) {
	path, major, minor := loopDevice(t)
	volume := hostDisk{major: major, minor: minor}
	root := hostDisk{path: path, exclusive: true}
	file, key, readOnly, err := openDisk("/sys", "/dev", volume)
	if err != nil || readOnly || file.Name() != path {
		t.Fatalf("%v, read-only %v, %v", file, readOnly, err)
	}
	defer file.Close()
	if err := file.Chmod(0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("the node's mode can be changed: %v", err)
	}
	rootFile, same, _, err := openDisk("/sys", "/dev", root)
	if err != nil || same != key {
		t.Fatalf("%v and %v, %v", key, same, err)
	}
	// The host can mount it no more, nor can another sandbox.
	if _, _, _, err := openDisk("/sys", "/dev", root); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "the host uses it") {
		t.Errorf("opened twice: %v", err)
	}
	rootFile.Close()

	// A node that has become another device's.
	dev := t.TempDir()
	if err := unix.Mknod(filepath.Join(dev, filepath.Base(path)), unix.S_IFBLK|0o600, int(unix.Mkdev(uint32(major), uint32(minor+1)))); err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := openDisk("/sys", dev, volume); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("another device: %v", err)
	}

	protect := func(on int) {
		t.Helper()
		if err := unix.IoctlSetPointerInt(int(file.Fd()), unix.BLKROSET, on); err != nil {
			t.Fatal(err)
		}
	}
	protect(1)
	defer protect(0) // the loop device would keep it
	protected, _, readOnly, err := openDisk("/sys", "/dev", volume)
	if err != nil || !readOnly {
		t.Fatalf("write-protected: read-only %v, %v", readOnly, err)
	}
	protected.Close()
	if name, err := blockDeviceName("/sys", major, minor); err != nil || name != filepath.Base(path) {
		t.Errorf("%q, %v", name, err)
	}
}
