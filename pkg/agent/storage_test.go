package agent

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// fakeSys is a sysfs with the given directories.
func fakeSys(t *testing.T, dirs ...string) string {
	t.Helper()
	sys := t.TempDir()
	for _, d := range append(dirs, "bus/pci/devices") {
		if err := os.MkdirAll(filepath.Join(sys, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(sys, "bus/pci/rescan"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	return sys
}

func TestBlockDevice(t *testing.T) {
	sys := fakeSys(t,
		"bus/pci/devices/0000:00:03.0/virtio1/block/vdb",
		"bus/pci/devices/0000:00:04.0/virtio2/ndbus1/region1/namespace1.0/block/pmem1",
		"bus/pci/devices/0000:00:05.0/virtio3/net/eth0",
	)
	for address, want := range map[string]string{"0000:00:03.0": "vdb", "0000:00:04.0": "pmem1"} {
		got, err := awaitDevice(sys, address, "block", blockPaths, 0)
		if err != nil || got != want {
			t.Errorf("%s is %q, %v", address, got, err)
		}
	}
	if rescan, _ := os.ReadFile(filepath.Join(sys, "bus/pci/rescan")); len(rescan) != 0 {
		t.Errorf("the bus was rescanned for a device that was there: %q", rescan)
	}
	// Another kind of device, and one that does not come.
	for _, address := range []string{"0000:00:05.0", "0000:00:06.0"} {
		if _, err := awaitDevice(sys, address, "block", blockPaths, 0); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), address) {
			t.Errorf("%s: %v", address, err)
		}
	}
	if rescan, _ := os.ReadFile(filepath.Join(sys, "bus/pci/rescan")); string(rescan) != "1" {
		t.Errorf("rescan %q", rescan)
	}
	for _, address := range []string{"", "..", "0000:00:03.0/../0000:00:04.0", "00:03.0", "0000:00:03.8", "0000:00:*", "0000:00:40.0"} {
		if _, err := awaitDevice(sys, address, "block", blockPaths, 0); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", address, err)
		}
	}
}

func TestBlockDeviceLate(t *testing.T) {
	sys := fakeSys(t)
	go func() {
		for {
			if rescan, _ := os.ReadFile(filepath.Join(sys, "bus/pci/rescan")); string(rescan) == "1" {
				break
			}
			time.Sleep(time.Millisecond)
		}
		os.MkdirAll(filepath.Join(sys, "bus/pci/devices/0000:00:07.0/virtio1/block/vdc"), 0o755)
	}()
	got, err := awaitDevice(sys, "0000:00:07.0", "block", blockPaths, time.Minute)
	if err != nil || got != "vdc" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestMountpointMustBeBelow(t *testing.T) {
	sys := fakeSys(t, "bus/pci/devices/0000:00:03.0/virtio1/block/vdb")
	for _, mountpoint := range []string{"", "/", "/run/microvm", "/run/microvm/../x", "/run/microvmx/y", "relative", "/etc"} {
		mounted, err := mountStorages(sys, "/run/microvm", []*agentproto.Storage{{PciAddresses: []string{"0000:00:03.0"}, Fstype: "ext4", Mountpoint: mountpoint}})
		if !errdefs.IsInvalidArgument(err) || len(mounted) != 0 {
			t.Errorf("%q: %v, %v", mountpoint, mounted, err)
		}
	}
}

func TestMakeDir(t *testing.T) {
	root := t.TempDir()
	outside := t.TempDir()
	dir, err := makeDir(root, "a/b", 0o755)
	if err != nil {
		t.Fatal(err)
	}
	dir.Close()
	if again, err := makeDir(root, "a/b", 0o755); err != nil {
		t.Error(err)
	} else {
		again.Close()
	}
	if err := os.Symlink(outside, filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, rel := range []string{"link", "link/x", "file", "file/x"} {
		if dir, err := makeDir(root, rel, 0o755); err == nil {
			dir.Close()
			t.Errorf("made %s", rel)
		}
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) != 0 {
		t.Errorf("outside: %v, %v", left, err)
	}
}

// A container that has the volume puts a link in the place of what was just made.
func TestMakeDirSwapped(t *testing.T) {
	root := t.TempDir()
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(root, "sub")
	begin, swapped := make(chan struct{}), make(chan struct{})
	go func() {
		for range begin {
			for unix.Rmdir(name) != nil {
			}
			unix.Symlink(outside, name)
			swapped <- struct{}{}
		}
	}()
	defer close(begin)
	for i := range 5000 {
		begin <- struct{}{}
		if dir, err := makeDir(root, "sub", 0o2777); err == nil {
			dir.Close()
		}
		<-swapped
		if info, err := os.Stat(outside); err != nil || info.Mode() != 0o600 {
			t.Fatalf("after %d directories: mode %v, %v", i+1, info.Mode(), err)
		}
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
}

func TestMountOptions(t *testing.T) {
	for options, want := range map[string]struct {
		flags uintptr
		data  string
	}{
		"":                          {0, ""},
		"defaults":                  {0, ""},
		"ro,noatime,dax":            {unix.MS_RDONLY | unix.MS_NOATIME, "dax"},
		"ro,rw":                     {0, ""},
		"errors=remount-ro,discard": {0, "errors=remount-ro,discard"},
		"nosuid,nodev,noexec,suid":  {unix.MS_NODEV | unix.MS_NOEXEC, ""},
	} {
		var list []string
		if options != "" {
			list = strings.Split(options, ",")
		}
		if flags, data := mountOptions(list); flags != want.flags || data != want.data {
			t.Errorf("%q: %#x %q, want %#x %q", options, flags, data, want.flags, want.data)
		}
	}
}

func TestStorageSource(t *testing.T) {
	sys := fakeSys(t,
		"bus/pci/devices/0000:00:03.0/virtio1/block/vdb",
		"bus/pci/devices/0000:00:04.0/virtio2/ndbus1/region1/namespace1.0/block/pmem1",
	)
	for _, tc := range []struct {
		storage *agentproto.Storage
		source  string
		options string
		kind    func(error) bool
	}{
		{storage: &agentproto.Storage{Fstype: "overlay", Options: []string{"lowerdir=/a"}}, source: "overlay", options: "lowerdir=/a"},
		{storage: &agentproto.Storage{Fstype: "ext4", PciAddresses: []string{"0000:00:03.0"}}, source: "/dev/vdb"},
		{
			storage: &agentproto.Storage{Fstype: "erofs", Options: []string{"ro"}, PciAddresses: []string{"0000:00:04.0", "0000:00:03.0", "0000:00:04.0"}},
			source:  "/dev/pmem1", options: "ro,device=/dev/vdb,device=/dev/pmem1",
		},
		{storage: &agentproto.Storage{Fstype: "ext4"}, kind: errdefs.IsInvalidArgument},
		{storage: &agentproto.Storage{Fstype: "proc"}, kind: errdefs.IsInvalidArgument},
		{storage: &agentproto.Storage{Fstype: "erofs", PciAddresses: []string{"0000:00:03.0", "../x"}}, kind: errdefs.IsInvalidArgument},
	} {
		source, options, err := storageSource(sys, tc.storage)
		if tc.kind != nil {
			if !tc.kind(err) {
				t.Errorf("%v: %v", tc.storage, err)
			}
			continue
		}
		if err != nil || source != tc.source || strings.Join(options, ",") != tc.options {
			t.Errorf("%v: %s %q, %v", tc.storage, source, options, err)
		}
	}
}

func TestStorageDirectories(t *testing.T) {
	root := t.TempDir()
	for _, path := range []string{"/etc/x", root, root + "/../x", "x"} {
		err := mountStorage(t.TempDir(), root, &agentproto.Storage{Fstype: "overlay", Directories: []*agentproto.Directory{{Path: path, Mode: 0o755}}, Mountpoint: root + "/m"})
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", path, err)
		}
	}
	dir, err := makeBelow(root, filepath.Join(root, "a/upper"), 0o1777)
	if err != nil {
		t.Fatal(err)
	}
	dir.Close()
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(root, "a/upper"), &st); err != nil || st.Mode&0o7777 != 0o1777 {
		t.Errorf("mode %o, %v", st.Mode, err)
	}
}

func TestRemoveDevice(t *testing.T) {
	sys := fakeSys(t, "bus/pci/devices/0000:00:03.0/virtio1/block/vdb", "bus/pci/devices/0000:00:05.0")
	dev := t.TempDir()
	removed := func(address string) string {
		b, _ := os.ReadFile(filepath.Join(sys, "bus/pci/devices", address, "remove"))
		return string(b)
	}
	// What was written is not known to be on the disk, but it goes all the same.
	if err := removeDevice(sys, dev, "0000:00:03.0", 0); err == nil || removed("0000:00:03.0") != "1" {
		t.Errorf("without its node: %v, %q", err, removed("0000:00:03.0"))
	}
	if err := os.WriteFile(filepath.Join(dev, "vdb"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{"0000:00:03.0", "0000:00:05.0", "0000:00:06.0"} { // a disk, no disk, nothing
		if err := removeDevice(sys, dev, address, 0); err != nil {
			t.Errorf("%s: %v", address, err)
		}
	}
	if removed("0000:00:05.0") != "1" {
		t.Error("a device that is no disk was not removed")
	}
	for _, address := range []string{"", "../0000:00:03.0", "0000:00:*"} {
		if err := removeDevice(sys, dev, address, 0); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", address, err)
		}
	}
}

func TestUseBlockDevices(t *testing.T) {
	sys := fakeSys(t,
		"bus/pci/devices/0000:00:03.0/virtio1/block/vda",
		"bus/pci/devices/0000:00:04.0/virtio2/block/vdb",
		"bus/pci/devices/0000:00:05.0/virtio3/block/vdc",
		"class/block/vda", "class/block/vdb", "class/block/vdc",
	)
	for name, number := range map[string]string{"vda": "254:0\n", "vdb": "254:16\n", "vdc": "what\n"} {
		if err := os.WriteFile(filepath.Join(sys, "class/block", name, "dev"), []byte(number), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	n := func(v int64) *int64 { return &v }
	spec := func() *specs.Spec {
		return &specs.Spec{Linux: &specs.Linux{
			Devices: []specs.LinuxDevice{
				{Path: "/dev/null", Type: "c", Major: 7, Minor: 1},
				{Path: "/dev/data", Type: "b", Major: 7, Minor: 1},
				{Path: "/dev/log", Type: "b", Major: 254, Minor: 0},
			},
			Resources: &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{
				{Access: "rwm"},
				{Allow: true, Type: "c", Major: n(7), Minor: n(1), Access: "rwm"},
				{Allow: true, Type: "b", Major: n(7), Minor: n(1), Access: "rw"},
				{Allow: true, Type: "b", Major: n(254), Minor: n(0), Access: "r"},
				{Allow: true, Type: "b", Access: "m"},
			}},
		}}
	}
	got := spec()
	// The second one's number on the host is what the first one has here.
	err := useBlockDevices(sys, got, []*agentproto.BlockDevice{
		{Major: 7, Minor: 1, PciAddress: "0000:00:03.0"}, {Major: 254, Minor: 0, PciAddress: "0000:00:04.0"},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := spec()
	want.Linux.Devices[1].Major, want.Linux.Devices[1].Minor = 254, 0
	want.Linux.Devices[2].Minor = 16
	rules := want.Linux.Resources.Devices
	rules[2].Major, rules[2].Minor = n(254), n(0)
	rules[3].Minor = n(16)
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, want %+v", got.Linux, want.Linux)
	}
	if err := useBlockDevices(sys, spec(), []*agentproto.BlockDevice{{PciAddress: "0000:00:05.0"}}); err == nil || !strings.Contains(err.Error(), "what") {
		t.Errorf("a number that is none: %v", err)
	}
	if err := useBlockDevices(sys, &specs.Spec{Linux: &specs.Linux{}}, []*agentproto.BlockDevice{{PciAddress: "x"}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an address that is none: %v", err)
	}
}
