//go:build e2e

package chaos

import (
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// A shim, or a VMM, that gets no descriptor any more says so to whoever wants something new of it. What there is goes on, and so
// does all else once there are descriptors.
func TestNoDescriptors(t *testing.T) {
	n := nodeFor(t)
	if !isVM(n) {
		return
	}
	before := parts(n)
	p := n.Pod(t)
	c := p.Run(t, pods.Shell(counter))
	node.Until(t, "the container counts", func() bool { return logSize(t, c) > 0 }) // and has opened what it needs
	now := parts(n).without(before)
	for name, pid := range map[string]int{"shim": one(t, "shim", now.shims), "VMM": one(t, "VMM", now.vmms)} {
		t.Run(name, func(t *testing.T) {
			var seen []string
			defer func() { promise(t, seen...) }()
			var old unix.Rlimit
			if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &old); err != nil {
				t.Fatal(err)
			}
			none := unix.Rlimit{Cur: 3, Max: old.Max} // those that are open stay
			if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &none, nil); err != nil {
				t.Fatal(err)
			}
			knock(t, n)
			_, err := n.CRI.ExecSync(n.Context(t), &cri.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{"true"}})
			if err == nil || !strings.Contains(err.Error(), "too many open files") {
				t.Errorf("exec: %v", err)
			}
			seen = append(seen, "exec: "+short(err))
			size := logSize(t, c)
			node.Until(t, "the container goes on", func() bool { return logSize(t, c) > size })
			if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &old, nil); err != nil {
				t.Fatal(err)
			}
			c.Exec(t, "echo", "hello").WantOutput(t, "hello\n")
			seen = append(seen, "output goes on", "exec works when there are descriptors again")
		})
	}
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
// sees why.
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
	p.Remove(t)
	seen = append(seen, "pod not ready", "the log says that memory ran out", other.goesOn(t, true))
}

// The disk of a pod's logs is full: its containers go on and can be reached, and so do others'.
func TestFullLogDisk(t *testing.T) {
	n := nodeFor(t)
	var seen []string
	defer func() { promise(t, seen...) }()
	other := newBystander(t, n)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=65536"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	p := n.Pod(t, func(c *cri.PodSandboxConfig) { c.LogDirectory = dir })
	c := p.Run(t, pods.Shell("seq 100000; touch /written; sleep 1000"))
	node.Until(t, "the container has written all", func() bool { return c.Shell(t, "test -e /written").Code == 0 })
	seen = append(seen, "a container that writes 10 times what there is room for goes on, exec works", other.goesOn(t, true))
	p.Remove(t)
}
