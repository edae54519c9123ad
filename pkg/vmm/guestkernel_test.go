//go:build guestkernel

package vmm

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/rng"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

// The tests of this file boot the real guest kernel, so they run where KVM can:
// see "make test-guest". The guest's only program is this test binary, which is
// static: as process 1 it does what the kernel command line tells it to.

func TestMain(m *testing.M) {
	if os.Getpid() == 1 {
		guestInit()
	}
	os.Exit(m.Run())
}

// guestInit is process 1 of the guest.
func guestInit() {
	say := func(format string, args ...any) {
		kmsg, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
		if err != nil {
			panic(err)
		}
		fmt.Fprintf(kmsg, "<1>guest: "+format+"\n", args...)
		kmsg.Close()
	}
	mount := func(fs, dir string) {
		if err := unix.Mount(fs, dir, fs, 0, ""); err != nil {
			panic(fmt.Sprintf("mount %s: %v", dir, err))
		}
	}
	mount("devtmpfs", "/dev")
	mount("proc", "/proc")
	mount("sysfs", "/sys")
	cmdline, _ := os.ReadFile("/proc/cmdline")
	for _, word := range strings.Fields(string(cmdline)) {
		action, ok := strings.CutPrefix(word, "guest.do=")
		if !ok {
			continue
		}
		say("userspace, doing %s", action)
		if do, ok := guestActions[action]; ok {
			do(say)
		} else {
			say("no such action")
		}
	}
	select {}
}

var guestActions = map[string]func(say func(string, ...any)){
	"poweroff": func(func(string, ...any)) { unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF) },
	"reset":    func(func(string, ...any)) { unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART) },
	"panic":    func(func(string, ...any)) { os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0) },
	"exit":     func(func(string, ...any)) { os.Exit(7) },
	"cpus": func(say func(string, ...any)) {
		online, _ := os.ReadFile("/sys/devices/system/cpu/online")
		packages, _ := filepath.Glob("/sys/devices/system/cpu/cpu*/topology/physical_package_id")
		siblings, _ := os.ReadFile("/sys/devices/system/cpu/cpu0/topology/core_siblings_list")
		threads, _ := os.ReadFile("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
		clock, _ := os.ReadFile("/sys/devices/system/clocksource/clocksource0/current_clocksource")
		say("online=%s topology=%d siblings=%s threads=%s gomaxprocs=%d clocksource=%s", bytes.TrimSpace(online), len(packages),
			bytes.TrimSpace(siblings), bytes.TrimSpace(threads), runtime.NumCPU(), bytes.TrimSpace(clock))
		iomem, _ := os.ReadFile("/proc/iomem")
		var ram uint64
		for line := range strings.Lines(string(iomem)) {
			var start, end uint64
			if strings.HasSuffix(line, " : System RAM\n") {
				fmt.Sscanf(line, "%x-%x", &start, &end)
				ram += end + 1 - start
			}
		}
		say("ram=%dMiB", ram>>20)
	},
	"devices": func(say func(string, ...any)) {
		for _, name := range []string{"pmem0", "pmem1"} {
			disk, err := os.OpenFile("/dev/"+name, os.O_RDWR, 0)
			if err != nil {
				say("%v", err)
				continue
			}
			size, _ := disk.Seek(0, 2)
			contents := make([]byte, 18000)
			disk.ReadAt(contents, 0)
			say("%s %d bytes, %x", name, size, sha256.Sum256(contents))
			if name == "pmem1" {
				disk.WriteAt([]byte("host"), 4096)
				if err := disk.Sync(); err == nil {
					say("%s written and flushed", name)
				} else {
					say("%s: %v", name, err)
				}
			}
			disk.Close()
		}
		current, _ := os.ReadFile("/sys/class/misc/hw_random/rng_current")
		bytes64 := make([]byte, 64)
		source, err := os.Open("/dev/hwrng")
		if err != nil {
			say("%v", err)
			return
		}
		n, err := io.ReadFull(source, bytes64)
		say("rng %s: %d bytes, %v", bytes.TrimSpace(current), n, err)
	},
	"rescan": func(say func(string, ...any)) {
		const device = "/sys/bus/virtio/devices/virtio0/driver"
		for driver := ""; driver == ""; driver, _ = os.Readlink(device) {
			say("looking")
			time.Sleep(100 * time.Millisecond)
			if err := os.WriteFile("/sys/bus/pci/rescan", []byte("1"), 0); err != nil {
				say("%v", err)
			}
		}
		bytes64 := make([]byte, 64)
		source, err := os.Open("/dev/hwrng")
		if err == nil {
			_, err = io.ReadFull(source, bytes64)
		}
		say("entropy: %v", err)
	},
	"spin": func(say func(string, ...any)) {
		for i := 0; ; i++ {
			say("tick %d", i)
			time.Sleep(10 * time.Millisecond)
		}
	},
}

// consoleBuffer collects the debug console.
type consoleBuffer struct {
	t  *testing.T
	mu sync.Mutex
	b  bytes.Buffer
}

func (c *consoleBuffer) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if os.Getenv("MICROVM_TEST_CONSOLE") != "" {
		os.Stderr.Write(p)
	}
	return c.b.Write(p)
}

func (c *consoleBuffer) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.b.String()
}

// guestKernel is the kernel to boot: MICROVM_KERNEL or bin/vmlinux.
func guestKernel(t testing.TB) *os.File {
	t.Helper()
	path := os.Getenv("MICROVM_KERNEL")
	if path == "" {
		path = "../../bin/vmlinux"
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return file
}

func guestConfig(t *testing.T, action, more string) (Config, *consoleBuffer) {
	console := &consoleBuffer{t: t}
	return Config{
		KVM: openKVM(t), Kernel: guestKernel(t), Initrd: virtiotest.Initrd(t),
		// Alerts alone, as every character is two exits. For more when a test fails
		// there is MICROVM_TEST_APPEND, for example "loglevel=8".
		CommandLine:  "earlyprintk=ttyS0 console=ttyS0 loglevel=2 panic=-1 guest.do=" + action + " " + more + " " + os.Getenv("MICROVM_TEST_APPEND"),
		MemoryBytes:  256 << 20,
		VCPUs:        1,
		DebugConsole: console,
		Log:          slog.New(slog.NewTextHandler(os.Stderr, nil)),
		Phase:        func(name string) { fmt.Fprintf(os.Stderr, "phase %s\n", name) },
	}, console
}

// guestLimit ends a guest that hangs.
const guestLimit = 3 * time.Minute

func runGuest(t *testing.T, c Config) Exit {
	t.Helper()
	start := time.Now()
	m, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	made := time.Since(start)
	watchdog := time.AfterFunc(guestLimit, m.Stop)
	defer watchdog.Stop()
	exit, err := m.Run()
	if err != nil {
		t.Error(err)
	}
	t.Logf("New %v, Run %v, exit %v %s", made, time.Since(start)-made, exit.Reason, exit.Detail)
	for i := range m.vcpus {
		t.Logf("vCPU %d: %v", i, exitCounts(m.vcpus[i]))
	}
	return exit
}

func exitCounts(v *vcpu) string {
	var s []string
	for i, name := range exitCounterNames {
		s = append(s, name+"="+strconv.FormatUint(v.exits[i].Load(), 10))
	}
	return strings.Join(s, " ")
}

func TestGuestExits(t *testing.T) {
	for _, tc := range []struct {
		name, action, append string
		want                 ExitReason
	}{
		{"power off", "poweroff", "", ExitPowerOff},
		{"reset", "reset", "", ExitReset},
		{"panic", "panic", "", ExitPanic},
		{"init exits", "exit", "", ExitPanic},
		{"triple fault", "reset", "reboot=t", ExitTripleFault},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, console := guestConfig(t, tc.action, tc.append)
			if exit := runGuest(t, c); exit.Reason != tc.want {
				t.Errorf("exit %+v, want %v; console:\n%s", exit, tc.want, console)
			}
			if !strings.Contains(console.String(), "guest: userspace") {
				t.Errorf("userspace was not reached; console:\n%s", console)
			}
		})
	}
}

func TestGuestCPUs(t *testing.T) {
	for _, n := range []int{1, 2, 4, MaxVCPUs} {
		t.Run(strconv.Itoa(n), func(t *testing.T) {
			c, console := guestConfig(t, "cpus", "guest.do=poweroff")
			c.VCPUs = n
			if n == 4 {
				c.MemoryBytes = 4 << 30 // a part of it above 4 GiB
			}
			all := "0"
			if n > 1 {
				all = fmt.Sprintf("0-%d", n-1)
			}
			if exit := runGuest(t, c); exit.Reason != ExitPowerOff {
				t.Errorf("exit %+v", exit)
			}
			for _, want := range []string{
				fmt.Sprintf("guest: online=%s topology=%d siblings=%s threads=0 gomaxprocs=%d clocksource=", all, n, all, n),
				fmt.Sprintf("guest: ram=%dMiB", c.MemoryBytes>>20-1), // less than 1 MiB is missing
			} {
				if !strings.Contains(console.String(), want) {
					t.Errorf("no %q on the console:\n%s", want, console)
				}
			}
		})
	}
}

// TestGuestDevices has the guest find two persistent memory devices and read
// one, written by the host, and draw from the entropy device.
func TestGuestDevices(t *testing.T) {
	c, console := guestConfig(t, "devices", "guest.do=poweroff")
	contents := bytes.Repeat([]byte("persistent memory "), 1000)
	for _, readOnly := range []bool{true, false} {
		file, err := os.Create(filepath.Join(t.TempDir(), "pmem"))
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if _, err := file.Write(contents); err != nil {
			t.Fatal(err)
		}
		c.Pmem = append(c.Pmem, PmemConfig{File: file, ReadOnly: readOnly})
	}
	c.VCPUs = 2
	c.Devices = []virtio.Device{rng.New(rand.Reader)}
	if exit := runGuest(t, c); exit.Reason != ExitPowerOff {
		t.Errorf("exit %+v", exit)
	}
	for _, want := range []string{
		fmt.Sprintf("guest: pmem0 2097152 bytes, %x", sha256.Sum256(contents)),
		fmt.Sprintf("guest: pmem1 2097152 bytes, %x", sha256.Sum256(contents)),
		"guest: pmem1 written and flushed",
		"guest: rng virtio_rng.0: 64 bytes",
	} {
		if !strings.Contains(console.String(), want) {
			t.Errorf("no %q on the console:\n%s", want, console)
		}
	}
	written := make([]byte, 4)
	if _, err := c.Pmem[1].File.ReadAt(written, 4096); err != nil || string(written) != "host" {
		t.Errorf("the writable file has %q, %v", written, err)
	}
}

// TestGuestHotplug adds a device while the guest runs: it finds the device by
// looking at the bus again.
func TestGuestHotplug(t *testing.T) {
	c, console := guestConfig(t, "rescan", "guest.do=poweroff")
	m, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	device := rng.New(rand.Reader)
	go func() {
		for !strings.Contains(console.String(), "guest: looking") {
			time.Sleep(100 * time.Millisecond)
		}
		if _, err := m.Attach(device); err != nil {
			t.Error(err)
		}
	}()
	watchdog := time.AfterFunc(guestLimit, m.Stop)
	defer watchdog.Stop()
	if exit, err := m.Run(); exit.Reason != ExitPowerOff || err != nil {
		t.Errorf("exit %+v, %v", exit, err)
	}
	if !strings.Contains(console.String(), "guest: entropy: <nil>") || m.PCIAddress(device) != "0000:00:01.0" {
		t.Errorf("device at %s; console:\n%s", m.PCIAddress(device), console)
	}
}

// TestGuestPause pauses a guest that ticks. While it is paused nothing of it
// may run, which the console shows; afterwards it goes on.
func TestGuestPause(t *testing.T) {
	c, console := guestConfig(t, "spin", "")
	c.VCPUs = 2
	m, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan Exit)
	go func() {
		exit, _ := m.Run()
		ended <- exit
	}()
	ticks := func() int { return strings.Count(console.String(), "guest: tick") }
	waitForTicks := func(n int) {
		t.Helper()
		for range 1800 {
			if ticks() >= n {
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		t.Fatalf("%d ticks; console:\n%s", ticks(), console)
	}
	waitForTicks(3)
	for range 5 {
		if err := m.Pause(); err != nil {
			t.Fatal(err)
		}
		before := console.String()
		if err := m.Pause(); err != nil { // again, for nothing
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
		if console.String() != before {
			t.Error("the guest ran while it was paused")
		}
		n := ticks()
		if err := m.Resume(); err != nil {
			t.Fatal(err)
		}
		waitForTicks(n + 2)
	}
	if err := m.Pause(); err != nil {
		t.Fatal(err)
	}
	m.Stop()
	if exit := <-ended; exit.Reason != ExitStopped {
		t.Errorf("exit %+v", exit)
	}
	if m.Pause() == nil || m.Resume() == nil {
		t.Error("a machine that has ended was paused or resumed")
	}
}

// TestGuestBootExits counts what a boot without a debug console costs.
func TestGuestBootExits(t *testing.T) {
	c, _ := guestConfig(t, "poweroff", "quiet")
	c.CommandLine = "quiet panic=-1 guest.do=poweroff " + os.Getenv("MICROVM_TEST_APPEND")
	c.DebugConsole = nil
	c.Devices = []virtio.Device{rng.New(rand.Reader)}
	if exit := runGuest(t, c); exit.Reason != ExitPowerOff {
		t.Errorf("exit %+v", exit)
	}
}

// BenchmarkNew makes machines with the guest kernel, and takes them apart again
// without running them: what the VMM does before a guest's first instruction.
func BenchmarkNew(b *testing.B) {
	for _, vcpus := range []int{1, 8} {
		b.Run(fmt.Sprintf("vcpus=%d", vcpus), func(b *testing.B) {
			c := Config{
				KVM: openKVM(b), Kernel: guestKernel(b), CommandLine: "quiet", MemoryBytes: 512 << 20, VCPUs: vcpus,
				Devices: []virtio.Device{rng.New(rand.Reader)},
				Log:     slog.New(slog.NewTextHandler(io.Discard, nil)),
			}
			for b.Loop() {
				m, err := New(c)
				if err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				m.Stop()
				m.Run()
				b.StartTimer()
			}
		})
	}
}
