//go:build e2e

package chaos

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// A shim, or a VMM, that gets no descriptor any more says so to whoever wants something new of it. What there is goes on, and so
// does all else once there are descriptors. The pod can be removed without.
func TestNoDescriptors(t *testing.T) {
	n := nodeFor(t)
	if !isVM(n) {
		return
	}
	other := newBystander(t, n)
	n.Collect(t)
	host := n.Snapshot(t)
	for _, name := range []string{"shim", "VMM"} {
		t.Run(name, func(t *testing.T) {
			var seen []string
			defer func() { promise(t, seen...) }()
			before := parts(n)
			p := n.Pod(t)
			c := p.Run(t, pods.Shell(counter))
			node.Until(t, "the container counts", func() bool { return logSize(t, c) > 0 }) // and has opened what it needs
			now := parts(n).without(before)
			pid := one(t, "shim", now.shims)
			if name == "VMM" {
				pid = one(t, "VMM", now.vmms)
			}
			old := limitDescriptors(t, pid, 3) // those that are open stay
			knock(t, n)
			_, err := n.CRI.ExecSync(n.Context(t), &cri.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{"true"}})
			if err == nil || !strings.Contains(err.Error(), "too many open files") {
				t.Errorf("exec: %v", err)
			}
			seen = append(seen, "exec: "+short(err))
			size := logSize(t, c)
			node.Until(t, "the container goes on", func() bool { return logSize(t, c) > size })
			limitDescriptors(t, pid, old)
			c.Exec(t, "echo", "hello").WantOutput(t, "hello\n")
			seen = append(seen, "output goes on", "exec works when there are descriptors again")

			limitDescriptors(t, pid, 3)
			n.MustCrictl(t, "rmp", "--force", p.ID)
			untilEnded(t, n, before)
			seen = append(seen, "crictl rmp --force without descriptors", other.goesOn(t, true))
			n.Collect(t)
			if now := n.WantHost(t, host); !t.Failed() {
				seen = append(seen, "host as before")
			} else {
				host = now
			}
		})
	}
}

// limitDescriptors sets how many descriptors a process may have, and returns how many it might before.
func limitDescriptors(t *testing.T, pid int, most uint64) (before uint64) {
	t.Helper()
	var old unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: most, Max: old.Max}, nil); err != nil {
		t.Fatal(err)
	}
	return old.Cur
}

// knock connects to the shims' sockets: one that cannot accept must not end for that.
func knock(t *testing.T, n *pods.Node) {
	t.Helper()
	sockets, err := filepath.Glob(n.Path("shims/*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range sockets {
		if conn, err := net.Dial("unix", s); err == nil {
			conn.Close()
		}
	}
}

// The pod's cgroup on the host allows less than the machine has: when the guest uses it, the VMM is killed, and whoever looks
// sees why. It is not the container that has used more than its own limit (TestOutOfMemory in test/e2e/cri), and CRI does not
// say so.
func TestNoMemory(t *testing.T) {
	n := nodeFor(t)
	if !isVM(n) {
		return
	}
	var seen []string
	defer func() { promise(t, seen...) }()
	other := newBystander(t, n)
	const parent = "/chaos-memory"
	node.MemoryCgroup(t, parent, 256<<20)
	from := n.LogSize()
	p := n.Pod(t, func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = parent })
	c := p.Run(t, pods.Shell(`awk 'BEGIN { s = "x"; while (length(s) < 268435456) s = s s }'; sleep 1000`))
	code := c.Wait(t)
	if code != 137 {
		t.Errorf("exit code %d", code)
	}
	seen = append(seen, fmt.Sprintf("exit code %d", code))
	node.Until(t, "the pod is not ready", func() bool { return !ready(t, p) })
	if !node.Wait(func() bool { return strings.Contains(n.Log(from), "has killed the VMM because memory ran out") }) {
		t.Error("containerd's log does not say why")
	}
	reason := c.Status(t).Reason
	if reason != "Error" {
		t.Errorf("the reason for the container's end is %q", reason)
	}
	p.Remove(t)
	seen = append(seen, "pod not ready", "the log says that memory ran out", "reason "+reason, other.goesOn(t, true))
}

// The disk of a pod's logs is full: its containers go on and can be reached, and so do others'. The pod can be removed all the same.
func TestFullLogDisk(t *testing.T) {
	n := nodeFor(t)
	var seen []string
	defer func() { promise(t, seen...) }()
	other := newBystander(t, n)
	dir := t.TempDir()
	node.Tmpfs(t, dir, "size=65536")
	n.Collect(t)
	host := n.Snapshot(t)
	p := n.Pod(t, func(c *cri.PodSandboxConfig) { c.LogDirectory = dir })
	c := p.Run(t, pods.Shell("seq 100000; touch /written; sleep 1000"))
	node.Until(t, "the container has written all", func() bool { return c.Shell(t, "test -e /written").Code == 0 })
	seen = append(seen, "a container that writes 10 times what there is room for goes on, exec works")
	if err := os.WriteFile(filepath.Join(dir, "more"), make([]byte, os.Getpagesize()), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("the disk is not full: %v", err)
	}
	n.MustCrictl(t, "rmp", "--force", p.ID)
	seen = append(seen, "crictl rmp --force while it is full", other.goesOn(t, true))
	n.Collect(t)
	n.WantHost(t, host)
	seen = append(seen, "host as before")
}
