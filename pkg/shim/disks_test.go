package shim

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// image makes a file to be a disk.
func image(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestOpenDisk(t *testing.T) {
	sys, dev := t.TempDir(), t.TempDir()
	device := func(number, uevent string) {
		t.Helper()
		dir := filepath.Join(sys, "dev/block", number)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "uevent"), []byte(uevent), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	device("7:1", "MAJOR=7\nMINOR=1\nDEVNAME=changed\nDEVTYPE=disk\n")
	device("7:2", "MAJOR=7\nMINOR=2\nDEVNAME=gone\n")
	device("7:3", "MAJOR=7\nMINOR=3\n")
	device("7:4", "DEVNAME=../../etc/passwd\n")
	device("7:5", "DEVNAME=character\n")
	if err := os.WriteFile(filepath.Join(dev, "changed"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/dev/null", filepath.Join(dev, "character")); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(dev, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		disk hostDisk
		kind func(error) bool
		text string
	}{
		{"no such device", hostDisk{major: 7, minor: 9}, errdefs.IsNotFound, "7:9"},
		{"its node is a file", hostDisk{major: 7, minor: 1}, errdefs.IsFailedPrecondition, "is not the block device 7:1"},
		{"its node is another device", hostDisk{major: 7, minor: 5}, errdefs.IsFailedPrecondition, "is not the block device 7:5"},
		{"without a node", hostDisk{major: 7, minor: 2}, errdefs.IsNotFound, "gone"},
		{"without a name", hostDisk{major: 7, minor: 3}, errdefs.IsNotFound, "7:3"},
		{"with a path for a name", hostDisk{major: 7, minor: 4}, errdefs.IsNotFound, "7:4"},
		{"no such image", hostDisk{path: filepath.Join(dev, "none")}, errdefs.IsNotFound, "none"},
		{"a FIFO", hostDisk{path: fifo}, errdefs.IsInvalidArgument, "neither"},
		{"a directory", hostDisk{path: dev}, errdefs.IsInvalidArgument, "neither"},
		{"a character device", hostDisk{path: "/dev/null"}, errdefs.IsInvalidArgument, "neither"},
	} {
		file, _, _, err := openDisk(sys, dev, tc.disk)
		if err == nil {
			file.Close()
		}
		if !tc.kind(err) || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	path := image(t, "disk")
	link := filepath.Join(dev, "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	file, key, readOnly, err := openDisk(sys, dev, hostDisk{path: path, exclusive: true})
	if err != nil || readOnly {
		t.Fatalf("read-only %v, %v", readOnly, err)
	}
	defer file.Close()
	again, same, readOnly, err := openDisk(sys, dev, hostDisk{path: link, readOnly: true})
	if err != nil || !readOnly || same != key {
		t.Fatalf("%v and %v, read-only %v, %v", key, same, readOnly, err)
	}
	defer again.Close()
	if _, err := again.Write([]byte{1}); err == nil {
		t.Error("a read-only disk can be written")
	}
	if err := again.Chmod(0o666); !errors.Is(err, unix.EROFS) {
		t.Errorf("its mode can be changed: %v", err)
	}
}

// createOn makes a container whose root file system is in an image.
func (f *fixture) createOn(id, image string, options ...string) error {
	f.t.Helper()
	_, err := f.Create(f.t.Context(), &taskapi.CreateTaskRequest{
		ID: id, Bundle: f.bundle(nil, "sleep"),
		Rootfs: []*types.Mount{{Type: "ext4", Source: image, Options: append(options, "loop")}},
	})
	return err
}

func TestRootfsOnDisk(t *testing.T) {
	f := newFixture(t)
	first, second := image(t, "first"), image(t, "second")
	if err := f.createOn("c1", first, "rw"); err != nil {
		t.Fatal(err)
	}
	if err := f.createOn("c2", second, "ro"); err != nil {
		t.Fatal(err)
	}
	if got := f.machine().attached(); !slices.Equal(got, []fakeDisk{{first, false, true, false}, {second, true, false, false}}) {
		t.Errorf("disks %+v", got)
	}
	r := f.agent.Request("c1")
	if s := r.GetStorages(); len(s) != 1 || s[0].GetFstype() != "ext4" || !slices.Equal(s[0].GetOptions(), []string{"rw"}) ||
		!slices.Equal(s[0].GetPciAddresses(), []string{"0000:00:18.0"}) || s[0].GetMountpoint() != "/run/microvm/storage/c1/0" {
		t.Errorf("storages %v", s)
	}
	if got := f.agent.Spec("c1").Root.Path; got != "/run/microvm/storage/c1/0" {
		t.Errorf("root %s", got)
	}
	if !f.tree.added["c1"].InGuest {
		t.Errorf("in the shared directory: %+v", f.tree.added["c1"])
	}
	f.endAll("c1")
	if got := f.machine().attached(); !slices.Equal(got, []fakeDisk{{second, true, false, false}}) {
		t.Errorf("disks %+v", got)
	}
	calls := f.agent.Calls()
	if i := slices.Index(calls, "RemoveDevice"); i < slices.Index(calls, "DeleteProcess") {
		t.Errorf("calls %q", calls)
	}
	// Again, in the same place.
	if err := f.createOn("c1", first, "rw"); err != nil {
		t.Fatal(err)
	}
	f.endAll("c1", "c2")
	if got := f.machine().attached(); len(got) != 0 {
		t.Errorf("disks %+v", got)
	}
}

func TestDiskIsShared(t *testing.T) {
	f := newFixture(t)
	path := image(t, "disk")
	f.create("c0", "sleep")
	for _, step := range []struct {
		id, option string
		want       []fakeDisk
	}{
		{"c1", "ro", []fakeDisk{{path, true, false, false}}},
		{"c2", "ro", []fakeDisk{{path, true, false, false}}},
		{"c3", "rw", []fakeDisk{{path, true, false, false}, {path, false, true, false}}},
		{"c4", "ro", []fakeDisk{{path, true, false, false}, {path, false, true, false}}},
	} {
		if err := f.createOn(step.id, path, step.option); err != nil {
			t.Fatal(err)
		}
		if got := f.machine().attached(); !slices.Equal(got, step.want) {
			t.Errorf("%s: disks %+v, want %+v", step.id, got, step.want)
		}
	}
	f.endAll("c1", "c3")
	if got := f.machine().attached(); len(got) != 2 {
		t.Errorf("disks %+v are left of two that are in use", got)
	}
	f.endAll("c2", "c4", "c0")
	if got := f.machine().attached(); len(got) != 0 {
		t.Errorf("disks %+v are left", got)
	}
}

// Image layers are persistent memory where they can be, once for all containers.
func TestRootfsOfErofs(t *testing.T) {
	f := newFixture(t)
	f.create("c0", "sleep")
	lower, upper, other := image(t, "lower"), image(t, "upper"), image(t, "other")
	create := func(id, writable string) {
		t.Helper()
		_, err := f.Create(t.Context(), &taskapi.CreateTaskRequest{ID: id, Bundle: f.bundle(nil, "sleep"), Rootfs: []*types.Mount{
			{Type: "ext4", Source: writable, Options: []string{"rw", "loop"}},
			{Type: "erofs", Source: lower, Options: []string{"ro", "loop"}},
			{Type: "format/mkdir/overlay", Source: "overlay", Options: []string{"upperdir={{ mount 0 }}/upper", "workdir={{ mount 0 }}/work", "lowerdir={{ mount 1 }}"}},
		}})
		if err != nil {
			t.Fatal(err)
		}
	}
	create("c1", upper)
	create("c2", other)
	if got := f.machine().attached(); !slices.Equal(got, []fakeDisk{{upper, false, true, false}, {lower, true, false, true}, {other, false, true, false}}) {
		t.Errorf("disks %+v", got)
	}
	var addresses []string
	for _, s := range f.agent.Request("c2").GetStorages() {
		addresses = append(addresses, strings.Join(s.GetPciAddresses(), "+"))
	}
	if !slices.Equal(addresses, []string{"0000:00:1a.0", "0000:00:19.0", ""}) {
		t.Errorf("storages on %q", addresses)
	}
	f.endAll("c1", "c2")
	f.machine().pmemError = errors.New("no room")
	create("c3", upper)
	if got := f.machine().attached(); !slices.Equal(got, []fakeDisk{{upper, false, true, false}, {lower, true, false, false}}) {
		t.Errorf("disks %+v", got)
	}
	f.endAll("c3", "c0")
}

func TestDiskThatCannotBe(t *testing.T) {
	f := newFixture(t)
	var refuse atomic.Bool
	f.agent.SetIntercept(func(method string, _ any) (any, error) {
		if method == "CreateContainer" && refuse.Load() {
			return nil, errors.New("mount: no such file system")
		}
		return nil, nil
	})
	f.create("c0", "sleep")
	noDisks := func(when string) {
		t.Helper()
		if got := f.machine().attached(); len(got) != 0 || f.tree.left() != 1 {
			t.Errorf("%s: disks %+v, %d containers are left", when, got, f.tree.left())
		}
	}
	withDevice := func(spec *specs.Spec) {
		spec.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/data", Type: "b", Major: 4094, Minor: 7}}
	}
	_, err := f.Create(t.Context(), &taskapi.CreateTaskRequest{ID: "c1", Bundle: f.bundle(withDevice, "sleep")})
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "/dev/data") || !strings.Contains(err.Error(), "4094:7") {
		t.Errorf("a device that the host has not: %v", err)
	}
	noDisks("no such device")
	if err := f.createOn("c1", "/nowhere/disk"); !errdefs.IsNotFound(err) {
		t.Errorf("no such image: %v", err)
	}
	noDisks("no such image")
	m := f.machine()
	m.attachError = errors.New("PCI bus is full")
	if err := f.createOn("c1", image(t, "disk")); err == nil || !strings.Contains(err.Error(), "PCI bus is full") {
		t.Errorf("no place on the bus: %v", err)
	}
	m.attachError = nil
	noDisks("no place on the bus")
	refuse.Store(true)
	if err := f.createOn("c1", image(t, "disk")); err == nil {
		t.Error("the guest's error was lost")
	}
	refuse.Store(false)
	noDisks("the guest cannot")
	f.endAll("c0")
}

// A guest that does not let go of its disk loses it.
func TestGuestKeepsDisk(t *testing.T) {
	f := newFixture(t)
	f.agent.SetIntercept(func(method string, _ any) (any, error) {
		if method == "RemoveDevice" || method == "DeleteProcess" {
			return nil, errors.New("no")
		}
		return nil, nil
	})
	if err := f.createOn("c1", image(t, "disk")); err != nil {
		t.Fatal(err)
	}
	f.endAll("c1")
	if got := f.machine().attached(); len(got) != 0 {
		t.Errorf("disks %+v are left", got)
	}
}

// A creation that nobody waits for: the disk stays until the guest has let go of
// the container that it makes nevertheless.
func TestDiskOfAbandonedContainer(t *testing.T) {
	f := newFixture(t)
	asked, goOn := make(chan struct{}), make(chan struct{})
	f.agent.SetIntercept(func(method string, request any) (any, error) {
		if r, ok := request.(*agentproto.CreateContainerRequest); ok && r.GetId() == "c1" {
			close(asked)
			<-goOn
		}
		return nil, nil
	})
	f.create("c0", "sleep")
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error)
	go func() {
		_, err := f.Create(ctx, &taskapi.CreateTaskRequest{
			ID: "c1", Bundle: f.bundle(nil, "sleep"), Rootfs: []*types.Mount{{Type: "ext4", Source: image(t, "disk")}},
		})
		failed <- err
	}()
	<-asked
	cancel()
	if err := <-failed; err == nil {
		t.Error("a creation that was cancelled has succeeded")
	}
	if got := f.machine().attached(); len(got) != 1 {
		t.Errorf("disks %+v while the guest may use one", got)
	}
	close(goOn)
	for len(f.machine().attached()) > 0 {
		time.Sleep(time.Millisecond)
	}
	f.endAll("c0")
}
