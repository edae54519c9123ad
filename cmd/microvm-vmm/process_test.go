package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/control"
	"github.com/microvm-runtime/microvm/pkg/vmm/jail"
)

// testProcess looks at all that the kernel says about the process.
func testProcess(t *testing.T, j *jailed) {
	var caps uint64
	for _, c := range jail.Capabilities {
		caps |= 1 << c
	}
	id := strings.Repeat(strconv.Itoa(vmmID)+" ", 4)
	want := map[string]string{
		"Uid": id[:len(id)-1], "Gid": id[:len(id)-1], "Groups": "",
		"CapPrm": fmt.Sprintf("%016x", caps), "CapEff": fmt.Sprintf("%016x", caps),
		"CapInh": strings.Repeat("0", 16), "CapBnd": strings.Repeat("0", 16), "CapAmb": strings.Repeat("0", 16),
		"NoNewPrivs": "1", "Seccomp": "2",
	}
	tasks, err := os.ReadDir(j.proc("task"))
	if err != nil || len(tasks) < 3 {
		t.Fatalf("%d threads, %v", len(tasks), err)
	}
	for _, task := range tasks {
		got := status(t, j.proc("task", task.Name(), "status"))
		for key, value := range want {
			if got[key] != value {
				t.Errorf("thread %s: %s is %q, want %q", task.Name(), key, got[key], value)
			}
		}
	}
	if n := status(t, j.proc("status"))["NSpid"]; n != fmt.Sprintf("%d 1", j.Pid()) {
		t.Errorf("process ids %s", n)
	}
	environment, err := os.ReadFile(j.proc("environ"))
	if want := fmt.Sprintf("GODEBUG=disablethp=1\x00GOMAXPROCS=%d\x00", control.MaxProcs(1)); err != nil || string(environment) != want {
		t.Errorf("environment %q, %v", environment, err)
	}
	for _, ns := range []string{"mnt", "pid", "ipc", "uts", "cgroup", "net"} {
		ours, err1 := os.Readlink("/proc/self/ns/" + ns)
		its, err2 := os.Readlink(j.proc("ns", ns)) // as who looks up a container's network
		if err := errors.Join(err1, err2); err != nil || ours == its {
			t.Errorf("namespace %s: %s, %v", ns, its, err)
		}
	}
	cgroups, err := os.ReadFile(j.proc("cgroup"))
	if err != nil || !strings.Contains(string(cgroups), "0::"+j.cgroup+"/") {
		t.Errorf("not below the cgroup %s, where devices are denied: %s, %v", j.cgroup, cgroups, err)
	}
	// What belongs to root although the process does not is not dumpable.
	var st unix.Stat_t
	if err := unix.Stat(j.proc("fd"), &st); err != nil || st.Uid != 0 {
		t.Errorf("dumpable: uid %d, %v", st.Uid, err)
	}
	limits, err := os.ReadFile(j.proc("limits"))
	if err != nil {
		t.Fatal(err)
	}
	for name, most := range map[string]int{"core file size": 0, "msgqueue size": 0, "processes": 2048, "open files": 1 << 20} {
		_, rest, _ := strings.Cut(string(limits), "Max "+name)
		var soft, hard int
		if _, err := fmt.Sscan(rest, &soft, &hard); err != nil || soft > most || hard > most {
			t.Errorf("%s: %d, %d, %v", name, soft, hard, err)
		}
	}
	testHeap(t, j)
	testDescriptors(t, j)
	testNetwork(t, j)
	testMemory(t, j)
}

// testDescriptors looks at what the process has open, and how.
func testDescriptors(t *testing.T, j *jailed) {
	want := map[string]bool{ // true: it must be there, false: it may
		"0: log, w": true, "1: log, w": true, "2: log, w": true,
		"socket, rw":                     true, // to the shim
		"console, w":                     true,
		"disk, rw":                       true,
		"/dev/net/tun, rw":               true,
		"anon_inode:kvm-vm, rw":          true,
		"anon_inode:kvm-vcpu:0, rw":      true,
		"anon_inode:kvm-vcpu-stats:0, r": false, // where this kernel has them
		"anon_inode:[eventfd], rw":       true,
		"anon_inode:[eventpoll], rw":     true,
		"/, path":                        true,
		"/1/fd, path":                    true,
		// Go's runtime looks what the cgroup allows, with cgroup v2 or v1.
		"cpu.max, r": false, "cpu.cfs_quota_us, r": false, "cpu.cfs_period_us, r": false,
	}
	descriptors, err := os.ReadDir(j.proc("fd"))
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range descriptors {
		target, err := os.Readlink(j.proc("fd", d.Name()))
		if err != nil {
			t.Error(err)
		}
		flags, err := strconv.ParseUint(status(t, j.proc("fdinfo", d.Name()))["flags"], 8, 32)
		if err != nil {
			t.Error(err)
		}
		name := target
		switch kind, _, _ := strings.Cut(target, ":["); {
		case j.pipes[target] != "":
			name = j.pipes[target]
		case kind == "socket":
			name = kind
		case strings.HasPrefix(filepath.Base(target), "cpu.") || filepath.Base(target) == "disk":
			name = filepath.Base(target)
		}
		access := []string{unix.O_RDONLY: "r", unix.O_WRONLY: "w", unix.O_RDWR: "rw"}[flags&unix.O_ACCMODE]
		if flags&unix.O_PATH != 0 {
			access = "path"
		}
		is := name + ", " + access
		if fd, _ := strconv.Atoi(d.Name()); fd < 3 {
			is = d.Name() + ": " + is
		}
		if _, ok := want[is]; !ok {
			t.Errorf("descriptor %s is %s (%s)", d.Name(), is, target)
			continue
		}
		want[is] = false
	}
	for is, missing := range want {
		if missing {
			t.Errorf("there is no descriptor %s", is)
		}
	}
	// From a directory there is a way to others.
	for _, d := range descriptors {
		if target, _ := os.Readlink(j.proc("fd", d.Name())); target != "/1/fd" {
			continue
		}
		entries, err := os.ReadDir(j.proc("fd", d.Name()) + "/../..")
		for _, e := range entries {
			if name := e.Name(); name != "1" && name != "self" && name != "thread-self" {
				t.Errorf("its procfs has %s", name)
			}
		}
		if err != nil || len(entries) == 0 {
			t.Errorf("its procfs: %d entries, %v", len(entries), err)
		}
	}
}

// testNetwork looks for links in the process's network namespace.
func testNetwork(t *testing.T, j *jailed) {
	var links []net.Interface
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends
		namespace, err := os.Open(j.proc("ns", "net"))
		if err == nil {
			defer namespace.Close()
			err = unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNET)
		}
		if err == nil {
			links, err = net.Interfaces()
		}
		done <- err
	}()
	if err := <-done; err != nil || len(links) != 1 || links[0].Name != "lo" || links[0].Flags&net.FlagUp != 0 {
		t.Errorf("its network has %+v, %v", links, err)
	}
}

// testMemory looks whether the guest's memory is left out of dumps.
func testMemory(t *testing.T, j *jailed) {
	smaps, err := os.ReadFile(j.proc("smaps"))
	if err != nil {
		t.Fatal(err)
	}
	var accessible bool
	var size, guest int // in KiB
	for line := range strings.Lines(string(smaps)) {
		fields := strings.Fields(line) // proc_pid_smaps(5)
		switch fields[0] {
		case "Size:":
			size, err = strconv.Atoi(fields[1])
		case "VmFlags:":
			if !accessible || size < memoryBytes>>10 {
				continue
			}
			guest++
			if !slices.Contains(fields, "dd") {
				t.Errorf("%d KiB of memory would be dumped: %s", size, line)
			}
		default:
			if strings.Contains(fields[0], "-") {
				accessible = strings.HasPrefix(fields[1], "rw")
			}
		}
	}
	if err != nil || guest == 0 {
		t.Errorf("the guest has no memory, %v", err)
	}
}

// testHeap looks whether Go has refused huge pages for its heap, which is smaller
// than one.
func testHeap(t *testing.T, j *jailed) {
	if _, err := os.Stat("/sys/kernel/mm/transparent_hugepage"); err != nil {
		return // this host has none
	}
	maps, err := os.ReadFile(j.proc("smaps"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(maps), " nh ") { // VM_NOHUGEPAGE, proc(5)
		t.Error("no part of the process's memory refuses huge pages")
	}
}
