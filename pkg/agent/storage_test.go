package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
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
		mounted, err := mountStorages(sys, "/run/microvm", []*agentproto.Storage{{PciAddress: "0000:00:03.0", Fstype: "ext4", Mountpoint: mountpoint}})
		if !errdefs.IsInvalidArgument(err) || len(mounted) != 0 {
			t.Errorf("%q: %v, %v", mountpoint, mounted, err)
		}
	}
}

func TestMakeDir(t *testing.T) {
	root := t.TempDir()
	outside := t.TempDir()
	dir, err := makeDir(root, "a/b")
	if err != nil {
		t.Fatal(err)
	}
	dir.Close()
	if again, err := makeDir(root, "a/b"); err != nil {
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
		if dir, err := makeDir(root, rel); err == nil {
			dir.Close()
			t.Errorf("made %s", rel)
		}
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) != 0 {
		t.Errorf("outside: %v, %v", left, err)
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
