package main

import (
	"bytes"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/boot/boottest"
	"github.com/microvm-runtime/microvm/pkg/vmm/control"
)

func tempFile(t *testing.T, name string, content []byte) *os.File {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), name))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := file.Write(content); err != nil {
		t.Fatal(err)
	}
	return file
}

// spinning is a vmlinux that jumps to itself.
func spinning() []byte { return boottest.Kernel(1<<20, []byte{0xeb, 0xfe}) }

// openTaps makes a tap in a namespace of its own and opens its queues.
func openTaps(t *testing.T, queues int) []*os.File {
	t.Helper()
	var taps []*os.File
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		for range queues {
			fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
			if err != nil {
				done <- err
				return
			}
			ifr, _ := unix.NewIfreq("tap0")
			ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_MULTI_QUEUE)
			if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
				done <- err
				return
			}
			taps = append(taps, os.NewFile(uintptr(fd), "tap"))
		}
		done <- nil
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return taps
}

// descriptors is the number of open taps and disks. Other files that are not
// used any more may be closed at any time.
func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range entries {
		file, _ := os.Readlink("/proc/self/fd/" + e.Name())
		if file == "/dev/net/tun" || filepath.Base(file) == "disk" {
			n++
		}
	}
	return n
}

// startMachine runs a machine whose guest does nothing, with a disk and a NIC.
func startMachine(t *testing.T) *machine {
	t.Helper()
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	taps := openTaps(t, 2)
	m, err := assemble(control.Config{
		VCPUs: 1, MemoryBytes: 32 << 20,
		Disks: []control.Disk{{Serial: "boot"}},
		NICs:  []control.NIC{{MAC: "02:00:00:00:00:01", MTU: 1450, QueuePairs: 2}},
	}, map[string]*os.File{
		control.FileKVM: kvm, control.FileKernel: tempFile(t, "kernel", spinning()), control.FileImage: tempFile(t, "image", make([]byte, 512)),
		control.FileConsole: tempFile(t, "console", nil), control.FileDisk(0): tempFile(t, "disk", make([]byte, 512)),
		control.FileTap(0, 0): taps[0], control.FileTap(0, 1): taps[1],
	}, slog.New(slog.NewTextHandler(io.Discard, nil)), hooks{phase: func(string) {}, running: func() {}})
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		if exit := m.run(); exit.Reason != control.ReasonStopped {
			t.Errorf("exit %v", exit)
		}
	})
	t.Cleanup(func() {
		m.Stop()
		running.Wait()
		for _, p := range m.plugged {
			p.close()
		}
	})
	return m
}

func TestHotplug(t *testing.T) {
	m := startMachine(t)
	// pmem, console, rng and vsock come first.
	const disk, nic, next = "0000:00:05.0", "0000:00:06.0", "0000:00:08.0" // after pvpanic
	traffic := func() map[string]control.NICStats {
		t.Helper()
		s, err := m.stats()
		if err != nil {
			t.Fatal(err)
		}
		return s.NICs
	}
	if s := traffic(); len(s) != 1 || s[nic].MAC != "02:00:00:00:00:01" {
		t.Errorf("NICs %+v", s)
	}
	before := descriptors(t)
	for range 5 {
		at, err := m.attachNIC(control.NIC{MAC: "02:00:00:00:00:02", QueuePairs: 3}, openTaps(t, 3))
		if at != next || err != nil {
			t.Fatalf("NIC at %q, %v", at, err)
		}
		if s := traffic(); len(s) != 2 || s[next].MAC != "02:00:00:00:00:02" {
			t.Errorf("NICs %+v", s)
		}
		if err := m.detach(at); err != nil {
			t.Fatal(err)
		}
		if at, err = m.attachDisk(control.Disk{ReadOnly: true}, tempFile(t, "disk", make([]byte, 512))); at != next || err != nil {
			t.Fatalf("disk at %q, %v", at, err)
		}
		if err := m.detach(at); err != nil {
			t.Fatal(err)
		}
		if at, err = m.attachDisk(control.Disk{ReadOnly: true, Pmem: true}, tempFile(t, "disk", make([]byte, 512))); at != next || err != nil {
			t.Fatalf("persistent memory at %q, %v", at, err)
		}
		if err := m.detach(at); err != nil {
			t.Fatal(err)
		}
	}
	if n := descriptors(t); n != before {
		t.Errorf("%d descriptors became %d", before, n)
	}

	for what, refused := range map[string]func() error{
		"no MAC": func() error { _, err := m.attachNIC(control.NIC{QueuePairs: 1}, openTaps(t, 1)); return err },
		"long MAC": func() error {
			_, err := m.attachNIC(control.NIC{MAC: "02:00:5e:10:00:00:00:01"}, openTaps(t, 1))
			return err
		},
		"not a tap": func() error {
			_, err := m.attachNIC(control.NIC{MAC: "02:00:00:00:00:03"}, []*os.File{tempFile(t, "disk", nil)})
			return err
		},
		"empty disk": func() error { _, err := m.attachDisk(control.Disk{}, tempFile(t, "disk", nil)); return err },
		"empty persistent memory": func() error {
			_, err := m.attachDisk(control.Disk{ReadOnly: true, Pmem: true}, tempFile(t, "disk", nil))
			return err
		},
		"persistent memory to write to": func() error {
			_, err := m.attachDisk(control.Disk{Pmem: true}, tempFile(t, "disk", make([]byte, 512)))
			return err
		},
		"the console":    func() error { return m.detach("0000:00:01.0") },
		"no such device": func() error { return m.detach(next) },
	} {
		if err := refused(); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
	if n := descriptors(t); n != before {
		t.Errorf("after refusals %d descriptors became %d", before, n)
	}
	for _, at := range []string{disk, nic} {
		if err := m.detach(at); err != nil {
			t.Error(err)
		}
	}
	if n := descriptors(t); n != before-3 { // a disk and two taps
		t.Errorf("after the first devices went %d descriptors became %d", before, n)
	}
}

func TestHotplugFull(t *testing.T) {
	m := startMachine(t)
	content := make([]byte, 512)
	for range 32 - 8 {
		if _, err := m.attachDisk(control.Disk{}, tempFile(t, "disk", content)); err != nil {
			t.Fatal(err)
		}
	}
	before := descriptors(t)
	if _, err := m.attachDisk(control.Disk{}, tempFile(t, "disk", content)); err == nil || !strings.Contains(err.Error(), "full") {
		t.Errorf("one disk too many: %v", err)
	}
	if _, err := m.attachNIC(control.NIC{MAC: "02:00:00:00:00:02", QueuePairs: 1}, openTaps(t, 1)); err == nil || !strings.Contains(err.Error(), "full") {
		t.Errorf("one NIC too many: %v", err)
	}
	if n := descriptors(t); n != before {
		t.Errorf("%d descriptors became %d", before, n)
	}
}

func TestBootDevicesRefused(t *testing.T) {
	log := slog.New(slog.NewTextHandler(&bytes.Buffer{}, nil))
	tap := openTaps(t, 1)[0]
	for _, tc := range []struct {
		config control.Config
		want   string
	}{
		{control.Config{Disks: []control.Disk{{}}}, "disk 0 has no file"},
		{control.Config{NICs: []control.NIC{{QueuePairs: 1}}}, "NIC 0 has no tap for queue pair 0"},
		{control.Config{NICs: []control.NIC{{QueuePairs: -1, MAC: "02:00:00:00:00:01"}}}, "0 queue pairs"},
	} {
		if _, err := (limiters{}).bootDevices(tc.config, map[string]*os.File{control.FileTap(1, 0): tap}, log); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%+v: %v", tc.config, err)
		}
	}
	tap.Close()
}
