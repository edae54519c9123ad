package main

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/control"
	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit"
	"github.com/microvm-runtime/microvm/pkg/vmm/seccomp"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/balloon"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/console"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/rng"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/vsock"
)

// A guest activates and resets each device by writes to a register, which a vCPU's
// thread handles. The filter ends the process if it does not allow what that takes:
// a process of its own.
func TestDevicesOnVCPUThread(t *testing.T) {
	const child = "MICROVM_TEST_VCPU_THREAD"
	if os.Getenv(child) == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), child+"=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		return
	}
	log := slog.New(slog.DiscardHandler)
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	rate := ratelimit.Limits{Operations: ratelimit.Rate{PerSecond: 1, Burst: 1}}
	limits, err := newLimiters(control.RateLimits{Disk: rate, NetworkReceive: rate, NetworkTransmit: rate}, ratelimit.SystemClock)
	if err != nil {
		t.Fatal(err)
	}
	share, err := limits.newShare("shared", dir, nil, log)
	if err != nil {
		t.Fatal(err)
	}
	nic, err := limits.newNIC(control.NIC{MAC: "02:00:00:00:00:01", QueuePairs: 2}, openTaps(t, 2), log)
	if err != nil {
		t.Fatal(err)
	}
	disk, err := limits.newDisk(control.Disk{}, tempFile(t, "disk", make([]byte, 512)), log)
	if err != nil {
		t.Fatal(err)
	}
	var drivers []*virtiotest.Driver
	for _, d := range []virtio.Device{
		console.New(tempFile(t, "console", nil)), rng.New(rng.Kernel), balloon.New(log),
		vsock.New(vsock.Config{GuestCID: guestCID, Log: log}), share, nic.device, disk.device,
	} {
		driver := virtiotest.NewDriver(t, d, virtiotest.Options{})
		driver.Reset()
		drivers = append(drivers, driver)
	}
	filter, err := vcpuFilter()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good
		err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
		if err == nil {
			err = filter.Install()
		}
		if err == nil {
			for range 3 {
				for _, d := range drivers {
					if d.Device == nic.device {
						d.Features ^= 1 << 1 // GUEST_CSUM: the tap is told
					}
					d.Activate()
					d.Reset()
				}
				runtime.GC()
			}
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestSocketsStayNonBlocking: a VMM that its guest has taken over must not make the
// shim's ends of streams block, see vmm.Syscalls.
func TestSocketsStayNonBlocking(t *testing.T) {
	const child = "MICROVM_TEST_NONBLOCK"
	const allowed = "it may be set"
	filters := map[string]func() (seccomp.Filter, error){"process": processFilter, "vCPU": vcpuFilter}
	if name := os.Getenv(child); name != "" {
		runtime.LockOSThread()
		filter, err := filters[name]()
		if err == nil {
			err = unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
		}
		if err == nil {
			err = filter.Install()
		}
		if err == nil {
			_, err = unix.FcntlInt(0, unix.F_SETFL, unix.O_NONBLOCK|unix.O_APPEND)
		}
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println(allowed)
		unix.FcntlInt(0, unix.F_SETFL, unix.O_APPEND)
		return
	}
	for name := range filters {
		cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), child+"="+name)
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != unix.SIGSYS || !strings.HasPrefix(string(out), allowed) {
			t.Errorf("%s: %v: %s", name, err, out)
		}
	}
}
