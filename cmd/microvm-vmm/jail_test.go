package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/shim/guestspec"
	"github.com/microvm-runtime/microvm/pkg/shim/hostcgroup"
	"github.com/microvm-runtime/microvm/pkg/shim/share"
	"github.com/microvm-runtime/microvm/pkg/vmm/control"
	"github.com/microvm-runtime/microvm/pkg/vmm/jail/jailtest"
)

// The tests mount in a mount namespace of their own.
func TestMain(m *testing.M) {
	jailtest.EnterNamespace()
	if order := os.Getenv(injectEnv); order != "" {
		var tid int
		var call uint64
		_, err := fmt.Sscan(order, &tid, &call)
		if err == nil {
			err = inject(tid, call)
		}
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// injectEnv has this program do what inject does: from the process that waits for
// the VMM it would be taken for the VMM's end, see "wait" in ptrace(2).
const injectEnv = "MICROVM_TEST_INJECT"

// vmmID is the user id of the VMMs of these tests.
const vmmID = 1999999996

// build builds the program as it is shipped, whatever the tests are built with.
func build(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "microvm-vmm")
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", program, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return program
}

// jailed is a VMM in its jail, with a guest that does nothing.
type jailed struct {
	*control.VMM
	tree   *share.Tree
	cgroup string
	pipes  map[string]string // what its console and its log are called in /proc
}

// memoryBytes is the guest's memory.
const memoryBytes = 64 << 20

func launchJailed(t *testing.T, program string) *jailed {
	t.Helper()
	tree, err := share.New(filepath.Join(t.TempDir(), "shared"), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tree.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := tree.Add("first", share.Rootfs{Path: t.TempDir()}, nil); err != nil {
		t.Fatal(err)
	}
	root, err := tree.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer kvm.Close()
	taps := openTaps(t, 1)
	defer taps[0].Close()
	pipes := map[string]string{}
	pipe := func(name string) (r, w *os.File) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close() })
		target, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", w.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		pipes[target] = name
		return r, w
	}
	_, console := pipe("console")
	logged, log := pipe("log")
	cgroup, path := confined(t)
	vmm, err := control.Launch(t.Context(), control.Options{
		Binary: program, ID: vmmID, Root: root, KVM: kvm, Console: console, Log: log, Cgroup: cgroup,
		Kernel: tempFile(t, "kernel", spinning()), Image: tempFile(t, "image", make([]byte, 512)),
		Disks: []*os.File{tempFile(t, "disk", make([]byte, 512))}, Taps: [][]*os.File{taps},
		Config: control.Config{
			VCPUs: 1, MaxVCPUs: 3, MemoryBytes: memoryBytes, MaxMemoryBytes: 256 << 20, SharedTag: "shared",
			Disks: []control.Disk{{}}, NICs: []control.NIC{{MAC: "02:00:00:00:00:01", QueuePairs: 1}},
		},
	})
	console.Close()
	log.Close()
	if err != nil {
		said, _ := io.ReadAll(logged)
		t.Fatalf("%v\n%s", err, said)
	}
	t.Cleanup(func() { vmm.Kill(); <-vmm.Done() })
	return &jailed{vmm, tree, path, pipes}
}

// confined is a cgroup in which no device can be opened, and its path.
func confined(t *testing.T) (*os.File, string) {
	t.Helper()
	path := fmt.Sprintf("/microvm-test-%d", os.Getpid())
	group, err := hostcgroup.New(path)
	if err != nil {
		t.Fatal(err)
	}
	owned := group.Owned(nil)
	t.Cleanup(func() {
		if err := hostcgroup.Remove(owned); err != nil {
			t.Error(err)
		}
	})
	dir, err := group.Confine()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() })
	return dir, path
}

// proc is a path in the VMM's directory of /proc.
func (j *jailed) proc(elem ...string) string {
	return filepath.Join(append([]string{"/proc", strconv.Itoa(j.Pid())}, elem...)...)
}

// threads returns the ids of the threads that are under that many filters.
func (j *jailed) threads(t *testing.T, filters string) (tids []int) {
	t.Helper()
	tasks, err := os.ReadDir(j.proc("task"))
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		// Kernel threads of KVM are no business of ours.
		if s := status(t, j.proc("task", task.Name(), "status")); s["Seccomp_filters"] == filters && !strings.HasPrefix(s["Name"], "kvm-") {
			tid, _ := strconv.Atoi(task.Name())
			tids = append(tids, tid)
		}
	}
	return tids
}

// status reads a file of the form "key: value".
func status(t *testing.T, path string) map[string]string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	fields := map[string]string{}
	for line := range strings.Lines(string(data)) {
		key, value, _ := strings.Cut(line, ":")
		fields[key] = strings.Join(strings.Fields(value), " ")
	}
	return fields
}

// mounts are the VMM's mounts: flags by mount point.
func (j *jailed) mounts(t *testing.T) map[string]string {
	t.Helper()
	data, err := os.ReadFile(j.proc("mountinfo"))
	if err != nil {
		t.Fatal(err)
	}
	mounts := map[string]string{}
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(line) // proc_pid_mountinfo(5)
		mounts[fields[4]] = fields[5]
	}
	return mounts
}

func TestJail(t *testing.T) {
	program := build(t)
	t.Run("process", func(t *testing.T) { testProcess(t, launchJailed(t, program)) })
	t.Run("mounts", func(t *testing.T) { testMounts(t, launchJailed(t, program)) })
	t.Run("machine", func(t *testing.T) { testMachine(t, launchJailed(t, program)) })
	// Not even a socket, on any thread; and a vCPU cannot open files.
	t.Run("socket", func(t *testing.T) { testKilled(t, launchJailed(t, program), "1", unix.SYS_SOCKET) })
	t.Run("vCPU", func(t *testing.T) { testKilled(t, launchJailed(t, program), "2", unix.SYS_OPENAT) })
	t.Run("unjailed", func(t *testing.T) {
		out, err := exec.Command(program).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "the shim") {
			t.Errorf("%v: %s", err, out)
		}
	})
}

// What the program links, all sandboxes pay for. See rng.Kernel about this one.
func TestLinksNoCrypto(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	if slices.Contains(strings.Fields(string(out)), "crypto/rand") {
		t.Error("the VMM links crypto/rand; go list -deps says through what")
	}
}

// testMounts has containers come and go.
func testMounts(t *testing.T, j *jailed) {
	before := j.mounts(t)
	if len(before) != 2 || before["/"] == "" || before["/first/rootfs"] == "" {
		t.Errorf("mounts %v", before)
	}
	source := t.TempDir()
	if err := unix.Mount("tmpfs", source, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(source, unix.MNT_DETACH)
	if err := unix.Mount("", source, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(source, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	below := filepath.Join(source, "below")
	if err := os.Mkdir(below, 0o755); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		err := j.tree.Add("late", share.Rootfs{Mounts: []mount.Mount{{Type: "bind", Source: source, Options: []string{"rbind", "rw"}}}},
			[]guestspec.Mount{{Source: source, Recursive: true}, {Source: filepath.Join(source, "file"), File: true}, {Source: "tmpfs", Type: "tmpfs"}})
		if err != nil {
			t.Fatal(err)
		}
		mounts := j.mounts(t)
		if len(mounts) != len(before)+4 {
			t.Errorf("mounts %v", mounts)
		}
		for at, flags := range mounts {
			for _, flag := range []string{"nosuid", "nodev", "noexec"} {
				if !slices.Contains(strings.Split(flags, ","), flag) {
					t.Errorf("%s is mounted %s", at, flags)
				}
			}
		}
		for _, name := range []string{"rootfs/file", "mounts/0/file", "mounts/1"} {
			if _, err := os.Stat(j.proc("root", "late", name)); err != nil {
				t.Error(err)
			}
		}
		// What the host mounts in there later comes too, and goes.
		if err := unix.Mount("tmpfs", below, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		volume, err := os.Readlink(j.proc("root", "late", "mounts/0"))
		if err != nil {
			t.Fatal(err)
		}
		at := filepath.Join("/late/mounts", volume, "below")
		if mounts := j.mounts(t); mounts[at] == "" {
			t.Errorf("a late mount of the host's is not there: %v", mounts)
		}
		if err := unix.Unmount(below, 0); err != nil {
			t.Error(err)
		}
		if mounts := j.mounts(t); mounts[at] != "" {
			t.Error("a mount that the host has unmounted is there")
		}
		// The VMM is at work in there; what is unmounted is gone all the same.
		busy, err := os.Open(j.proc("root", "late", "rootfs"))
		if err != nil {
			t.Fatal(err)
		}
		if err := j.tree.Remove("late"); err != nil {
			t.Error(err)
		}
		if mounts := j.mounts(t); len(mounts) != len(before) {
			t.Errorf("mounts are left: %v", mounts)
		}
		busy.Close()
	}
	// Nobody holds the file system.
	if err := unix.Unmount(source, 0); err != nil {
		t.Errorf("unmount: %v", err)
	}
}

// testMachine has the machine do what it does when it runs.
func testMachine(t *testing.T, j *jailed) {
	ctx := t.Context()
	for range 3 {
		taps := openTaps(t, 2)
		nic, err := j.AttachNIC(ctx, control.NIC{MAC: "02:00:00:00:00:02", QueuePairs: 2}, taps)
		if err != nil {
			t.Fatal(err)
		}
		disk, err := j.AttachDisk(ctx, control.Disk{ReadOnly: true}, tempFile(t, "disk", make([]byte, 512)))
		if err != nil {
			t.Fatal(err)
		}
		if stats, err := j.Stats(ctx); err != nil || len(stats.NICs) != 2 {
			t.Errorf("%+v, %v", stats, err)
		}
		if err := errors.Join(j.Detach(ctx, nic), j.Detach(ctx, disk), j.Pause(ctx), j.Resume(ctx)); err != nil {
			t.Error(err)
		}
		for _, tap := range taps {
			tap.Close()
		}
	}
	if size, err := j.Resize(ctx, control.Size{VCPUs: 3, MemoryBytes: 256 << 20}); err != nil || size.VCPUs != 3 {
		t.Errorf("%+v, %v", size, err)
	}
	for len(j.threads(t, "2")) < 3 { // the new vCPUs' threads are on their way
		runtime.Gosched()
	}
	if n := len(j.threads(t, "2")); n != 3 {
		t.Errorf("%d threads with a vCPU's filter", n)
	}
	// Threads come, under load.
	var callers sync.WaitGroup
	for range 64 {
		callers.Go(func() {
			if _, err := j.Dial(ctx, 7); err == nil {
				t.Error("a guest without a driver was connected with")
			}
			if _, err := j.Stats(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	callers.Wait()
	if err := j.Stop(context.Background()); err != nil {
		t.Error(err)
	}
	if exit := j.Exit(); exit.Reason != control.ReasonStopped {
		t.Errorf("exit %v", exit)
	}
}

// testKilled has a thread with that many filters make a system call.
func testKilled(t *testing.T, j *jailed, filters string, call uint64) {
	tids := j.threads(t, filters)
	for len(tids) == 0 { // the vCPU's thread is on its way
		tids = j.threads(t, filters)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d", injectEnv, tids[0], call))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	exit := j.Exit()
	if exit.Reason != control.ReasonKilled || !strings.Contains(exit.Detail, "type=1326 pid="+strconv.Itoa(j.Pid())) {
		t.Errorf("exit %v", exit)
	}
}

// inject has a thread make a system call in place of the one that it is in.
func inject(tid int, call uint64) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for range 1000 {
		if err := unix.PtraceAttach(tid); err != nil {
			return fmt.Errorf("attach: %w", err)
		}
		var status syscall.WaitStatus
		if _, err := syscall.Wait4(tid, &status, unix.WALL, nil); err != nil || !status.Stopped() {
			return fmt.Errorf("wait: %v, %w", status, err)
		}
		var regs unix.PtraceRegs
		if err := unix.PtraceGetRegs(tid, &regs); err != nil {
			return fmt.Errorf("registers: %w", err)
		}
		instruction := make([]byte, 2)
		if _, err := unix.PtracePeekText(tid, uintptr(regs.Rip-2), instruction); err != nil {
			return fmt.Errorf("text: %w", err)
		}
		found := instruction[0] == 0x0f && instruction[1] == 0x05 // syscall
		if found {
			regs.Rip -= 2
			regs.Rax, regs.Orig_rax = call, ^uint64(0)
			if err := unix.PtraceSetRegs(tid, &regs); err != nil {
				return fmt.Errorf("registers: %w", err)
			}
		}
		if err := unix.PtraceDetach(tid); err != nil {
			return fmt.Errorf("detach: %w", err)
		}
		if found {
			return nil
		}
	}
	return errors.New("the thread is never in a system call")
}
