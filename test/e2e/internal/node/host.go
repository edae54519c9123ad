package node

import (
	"bufio"
	"bytes"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// A hostState counts what a container may leave behind, by a description of each thing.
type hostState map[string]int

func (s hostState) add(kind, name string) { s[kind+" "+name]++ }

// host looks at everything: the descendants of the supervisor and their namespaces, and all mounts, cgroups, named
// sockets, network links with their traffic control, loop devices, mapped devices and state files of the machine.
func (n *Node) host() (hostState, error) {
	s := hostState{}
	self := os.Getpid()
	mine := descendants(os.Getppid())
	for pid, process := range mine {
		if pid != self {
			s.add("process", process)
		}
		s.namespaces(pid)
	}
	mounts, err := lines("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for _, l := range mounts {
		// Fields of proc_pid_mountinfo(5): 4 is the root within the file system, 5 the mount point.
		if f := strings.Fields(l); len(f) > 5 {
			s.add("mount", f[3]+" on "+f[4])
		}
	}
	sockets, err := lines("/proc/net/unix")
	if err != nil {
		return nil, err
	}
	for _, l := range sockets[1:] {
		// Accepted connections carry the listener's name too: only flag __SO_ACCEPTCON (0x10000) is a listener's.
		// Other programs' sockets in /tmp come and go on a machine where people work.
		if f := strings.Fields(l); len(f) == 8 && f[3] == "00010000" && !strings.HasPrefix(f[7], "/tmp/") {
			s.add("socket", f[7])
		}
	}
	s.walk("cgroup", "/sys/fs/cgroup", func(path string, d fs.DirEntry) bool { return d.IsDir() && !foreign(path, mine) })
	all := func(string, fs.DirEntry) bool { return true }
	for _, dir := range []string{
		"/run", "/dev/shm", "/var/lib/microvm",
		"/var/lib/cni", n.path("cni"), n.path("root/io.containerd.grpc.v1.cri"), n.path("state"), n.path("shims"), n.path("fifo"), n.path("runc"), n.path("root/io.containerd.runtime.v2.task"),
	} {
		s.walk("file", dir, all)
	}
	for _, pattern := range []string{n.path("root/io.containerd.snapshotter.v1.*/snapshots/*"), "/sys/block/loop*/loop", "/sys/block/dm-*/dm"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return nil, err
		}
		for _, f := range found {
			s.add("entry", f)
		}
	}
	if err := s.links(); err != nil {
		return nil, err
	}
	if n.pods {
		if err := s.rules(); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// rules adds those of nftables, which the portmap plugin makes.
func (s hostState) rules() error {
	out, err := exec.Command("nft", "list", "ruleset").Output()
	if err != nil {
		return fmt.Errorf("nft list ruleset: %w", err)
	}
	for l := range strings.Lines(string(out)) {
		s.add("rule", strings.TrimSpace(l))
	}
	return nil
}

// walk adds the entries of a tree which may change meanwhile, without looking into other file systems mounted in it.
func (s hostState) walk(kind, dir string, want func(string, fs.DirEntry) bool) {
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // gone since its parent was read, or never there
		}
		if d.IsDir() && strings.HasSuffix(path, "/rootfs") {
			return fs.SkipDir // a live container's files
		}
		// containerd and runc make directories and cgroups of the containerd namespace's name and keep them.
		if want(path, d) && path != dir && d.Name() != Namespace && d.Name() != PodNamespace {
			s.add(kind, path)
		}
		return nil
	})
}

// foreign says that a cgroup has processes and none of them is ours: others' come and go on a machine where people work.
func foreign(cgroup string, mine map[int]string) bool {
	pids, err := lines(filepath.Join(cgroup, "cgroup.procs"))
	if err != nil || len(pids) == 0 {
		return false
	}
	return !slices.ContainsFunc(pids, func(pid string) bool {
		n, err := strconv.Atoi(pid)
		return err == nil && mine[n] != ""
	})
}

// diff lists what is there more (+) or less (-) often than before.
func diff(before, after hostState) []string {
	keys := maps.Clone(before)
	maps.Copy(keys, after)
	var out []string
	for _, k := range slices.Sorted(maps.Keys(keys)) {
		switch d := after[k] - before[k]; {
		case d > 0:
			out = append(out, fmt.Sprintf("+ %s (%d times)", k, d))
		case d < 0:
			out = append(out, fmt.Sprintf("- %s (%d times)", k, -d))
		}
	}
	return out
}

// A Snapshot is what there was on the host at some time.
type Snapshot struct{ state hostState }

// Snapshot looks at the host as it is now.
func (n *Node) Snapshot(t *testing.T) Snapshot {
	t.Helper()
	state, err := n.host()
	if err != nil {
		t.Fatalf("look at the host: %v", err)
	}
	return Snapshot{state}
}

// WantHost fails the test unless the host comes back to what it was, and returns how it has last seen it. Removal goes on after
// ctr has returned, so it looks again until the limit.
func (n *Node) WantHost(t *testing.T, before Snapshot) (after Snapshot) {
	t.Helper()
	same := Wait(func() bool {
		after = n.Snapshot(t)
		return len(diff(before.state, after.state)) == 0
	})
	if !same {
		t.Errorf("the host is not as it was before:\n%s", strings.Join(diff(before.state, after.state), "\n"))
	}
	return after
}

// sameHost is WantHost for the end of a test.
func (n *Node) sameHost(t *testing.T) {
	t.Helper()
	if n.baseline.state == nil {
		return // it has not come so far
	}
	n.baseline = n.WantHost(t, n.baseline) // the next test is not to blame
}

// Processes returns the command lines, by pid, of everything the tests have started whose program's base name is given.
func (n *Node) Processes(program string) map[int]string {
	found := map[int]string{}
	for pid, command := range descendants(os.Getppid()) {
		name, _, _ := strings.Cut(command, " ")
		if filepath.Base(name) == program {
			found[pid] = command
		}
	}
	return found
}

// descendants returns the command lines of all processes below one, by pid.
func descendants(root int) map[int]string {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	parents := map[int]int{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue
		}
		// proc_pid_stat(5): "pid (comm) state ppid"; comm may contain anything.
		fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
		if len(fields) > 1 {
			parents[pid], _ = strconv.Atoi(string(fields[1]))
		}
	}
	found := map[int]string{}
	for pid := range parents {
		for p, depth := pid, 0; p > 1 && depth < 100; p, depth = parents[p], depth+1 {
			if parents[p] == root {
				found[pid] = commandLine(pid)
				break
			}
		}
	}
	return found
}

func commandLine(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || len(b) == 0 {
		comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		return "(" + strings.TrimSpace(string(comm)) + ", ended)"
	}
	return strings.TrimSpace(strings.ReplaceAll(string(b), "\x00", " "))
}

func lines(path string) ([]string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var out []string
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		out = append(out, s.Text())
	}
	return out, nil
}
