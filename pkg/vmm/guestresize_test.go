//go:build guestkernel

package vmm

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/balloon"
)

const resizeBy = 256 << 20 // bytes of memory, that are plugged and used

func init() {
	guestActions["resize"] = guestResize
	guestActions["meminfo"] = func(say func(string, ...any)) {
		online, _ := os.ReadFile("/sys/devices/system/cpu/online")
		present, _ := os.ReadFile("/sys/devices/system/cpu/present")
		say("cpus online=[%s] present=[%s]", bytes.TrimSpace(online), bytes.TrimSpace(present))
		meminfo, _ := os.ReadFile("/proc/meminfo")
		for line := range strings.Lines(string(meminfo)) {
			say("%s", strings.Join(strings.Fields(line), " "))
		}
	}
}

// guestResize does its part of TestGuestResize.
func guestResize(say func(string, ...any)) {
	total := func() uint64 {
		var info unix.Sysinfo_t
		if err := unix.Sysinfo(&info); err != nil {
			panic(err)
		}
		return info.Totalram * uint64(info.Unit)
	}
	online := func() string {
		list, _ := os.ReadFile("/sys/devices/system/cpu/online")
		return string(bytes.TrimSpace(list))
	}
	// await returns by how much the size is missed, which should be nothing.
	await := func(size uint64) int64 {
		off := int64(total() - size)
		for ; off > 1<<20 || off < -1<<20; off = int64(total() - size) {
			time.Sleep(10 * time.Millisecond)
		}
		return off
	}
	booted := total()
	say("booted, cpus=[%s]", online())
	say("memory has grown, off by %d", await(booted+resizeBy))
	const more = resizeBy + 32<<20 // than fits without what was plugged
	b, err := unix.Mmap(-1, 0, more, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		panic(err)
	}
	for i := 0; i < more; i += os.Getpagesize() {
		b[i] = 1
	}
	say("memory is in use")
	time.Sleep(2 * time.Second) // for the host to look
	if err := unix.Munmap(b); err != nil {
		panic(err)
	}
	say("memory is free")
	for _, state := range []string{"1", "0", "1"} {
		err := os.WriteFile("/sys/devices/system/cpu/cpu1/online", []byte(state), 0)
		say("cpu1 online=%s: %v, cpus=[%s]", state, err, online())
	}
	say("memory has shrunk, off by %d", await(booted))
}

// residentAnon is the anonymous memory of this process, which is the guest's.
func residentAnon(t *testing.T) (bytes uint64) {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "RssAnon:") {
			fmt.Sscanf(line, "RssAnon: %d", &bytes)
		}
	}
	return bytes << 10
}

// TestGuestResize grows a guest by memory and a processor and shrinks it again.
// What it frees comes back to the host, with and without its being unplugged.
func TestGuestResize(t *testing.T) {
	c, console := guestConfig(t, "resize", "guest.do=poweroff maxcpus=1 memhp_default_state=online memory_hotplug.online_policy=auto-movable")
	c.MaxVCPUs = 2
	c.MaxMemoryBytes = 4 << 30
	c.Devices = []virtio.Device{balloon.New(slog.New(slog.NewTextHandler(io.Discard, nil)))}
	m, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan Exit, 1)
	go func() {
		exit, _ := m.Run()
		ended <- exit
	}()
	until := func(what string, done func() bool) {
		t.Helper()
		for range 10 * int(guestLimit/time.Second) {
			if done() {
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		m.Stop()
		t.Fatalf("waited in vain until %s; console:\n%s", what, console)
	}
	says := func(text string) {
		t.Helper()
		until(text, func() bool { return strings.Contains(console.String(), "guest: "+text) })
	}

	says("booted, cpus=[0]")
	if err := m.StartVCPUs(2); err != nil {
		t.Error(err)
	}
	if err := m.ResizeMemory(c.MemoryBytes + resizeBy); err != nil {
		t.Error(err)
	}
	says("memory has grown, off by 0")
	if now, _ := m.MemoryBytes(); now != c.MemoryBytes+resizeBy {
		t.Errorf("%d bytes of memory", now)
	}
	says("memory is in use")
	used := residentAnon(t)
	says("memory is free")
	until("the host gets back what the guest has freed", func() bool { return residentAnon(t)+resizeBy/2 < used })
	t.Logf("%d MiB while memory was in use, %d MiB after that", used>>20, residentAnon(t)>>20)
	says("cpu1 online=1: <nil>, cpus=[0-1]")
	says("cpu1 online=0: <nil>, cpus=[0]")
	until("the processor is back", func() bool { return strings.Count(console.String(), "cpu1 online=1: <nil>, cpus=[0-1]") == 2 })

	if err := m.ResizeMemory(0); err != nil {
		t.Error(err)
	}
	says("memory has shrunk, off by 0")
	until("all is unplugged", func() bool { now, _ := m.MemoryBytes(); return now == c.MemoryBytes })
	if n := m.hot.blocks.Plugged(0, m.hot.blocks.Count()); n != 0 {
		t.Errorf("%d blocks are plugged", n)
	}
	t.Logf("%d MiB in the end; console:\n%s", residentAnon(t)>>20, console)
	if exit := <-ended; exit.Reason != ExitPowerOff {
		t.Errorf("exit %+v", exit)
	}
}

// TestGuestResizeCosts sees what it costs a guest that it may grow.
func TestGuestResizeCosts(t *testing.T) {
	boot := func(vcpus int, memory uint64) (free int) {
		c, console := guestConfig(t, "meminfo", "guest.do=poweroff maxcpus=1")
		c.MaxVCPUs, c.MaxMemoryBytes = vcpus, memory
		if exit := runGuest(t, c); exit.Reason != ExitPowerOff {
			t.Errorf("exit %+v", exit)
		}
		_, text, found := strings.Cut(console.String(), "guest: MemFree: ")
		if _, err := fmt.Sscan(text, &free); !found || err != nil {
			t.Fatalf("no MemFree on the console:\n%s", console)
		}
		if vcpus > 1 && !strings.Contains(console.String(), fmt.Sprintf("guest: cpus online=[0] present=[0-%d]", vcpus-1)) {
			t.Errorf("console:\n%s", console)
		}
		return free
	}
	fixed := boot(1, 0)
	tall := fixed - boot(1, 64<<30)
	wide := fixed - boot(MaxVCPUs, 0)
	t.Logf("%d KiB are free; up to 64 GiB takes %d KiB, up to %d processors %d KiB", fixed, tall, MaxVCPUs, wide)
	if tall > 4<<10 || wide > MaxVCPUs*512 {
		t.Error("that is too much")
	}
}
