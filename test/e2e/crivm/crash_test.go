//go:build e2e

package crivm

import (
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// A pod whose VMM is killed at some point of its life: CRI says that it is not ready and its containers have ended, it can be
// removed, and other pods go on.
func TestKillVMM(t *testing.T) {
	n := pods.For(t)
	other := n.Pod(t).Run(t)
	for name, prepare := range map[string]func(*testing.T, *pods.Pod) *pods.Container{
		"without containers": func(*testing.T, *pods.Pod) *pods.Container { return nil },
		"container created":  func(t *testing.T, p *pods.Pod) *pods.Container { return p.Create(t) },
		"container runs":     func(t *testing.T, p *pods.Pod) *pods.Container { return p.Run(t) },
		"container has ended": func(t *testing.T, p *pods.Pod) *pods.Container {
			c := p.Run(t, pods.Shell("exit 3"))
			c.Wait(t)
			return c
		},
	} {
		t.Run(name, func(t *testing.T) {
			p, pid := only(t, n, vmm, func() *pods.Pod { return n.Pod(t) })
			c := prepare(t, p)
			node.Kill(t, pid)
			node.Until(t, "the pod is not ready", func() bool { return !ready(t, p) })
			if _, err := p.TryCreate(t); err == nil {
				t.Error("a container could be made in the pod")
			}
			if c != nil && name == "container runs" {
				if code := c.Wait(t); code != 137 {
					t.Errorf("exit code %d", code)
				}
			}
			if c != nil && name == "container created" {
				if err := c.TryStart(t); err == nil {
					t.Error("a container could be started in the pod")
				}
			}
			if c != nil && name == "container has ended" {
				if code := c.Status(t).ExitCode; code != 3 {
					t.Errorf("exit code %d of a container that had ended before", code)
				}
			}
			p.Remove(t)
		})
	}
	other.Get(t, "true")
}

// The same while somebody waits for a command in the pod.
func TestKillVMMDuringExec(t *testing.T) {
	n := pods.For(t)
	p, pid := only(t, n, vmm, func() *pods.Pod { return n.Pod(t) })
	c := p.Run(t)
	ended := make(chan error, 1)
	go func() {
		r, err := n.CRI.ExecSync(n.Context(t), &cri.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{"sleep", "1000"}})
		if err == nil && r.ExitCode == 0 {
			t.Error("the command ended well")
		}
		ended <- err
	}()
	node.Until(t, "the command runs", func() bool { return c.Shell(t, "[ $(pgrep -f '^sleep 1000$' | wc -l) = 2 ]").Code == 0 })
	node.Kill(t, pid)
	<-ended
	node.Until(t, "the pod is not ready", func() bool { return !ready(t, p) })
}

// The shim is killed: its machine does not live on.
func TestKillShim(t *testing.T) {
	n := pods.For(t)
	p, pid := only(t, n, shim, func() *pods.Pod { return n.Pod(t) })
	p.Run(t)
	node.Kill(t, pid)
	node.Until(t, "the machine has ended with its shim", func() bool { return len(n.Processes(vmm)) == 0 })
	node.Until(t, "the pod is not ready", func() bool { return !ready(t, p) })
	p.Remove(t)
}

// The guest's kernel panics: only a privileged container can do that to its own machine.
func TestGuestPanics(t *testing.T) {
	n := pods.For(t)
	from := n.LogSize()
	p := n.Pod(t, pods.PrivilegedPod)
	c := p.Run(t, pods.Shell("sleep 1; echo c >/proc/sysrq-trigger; sleep 1000"), pods.Security(func(s *cri.LinuxContainerSecurityContext) {
		*s = cri.LinuxContainerSecurityContext{NamespaceOptions: s.NamespaceOptions, Privileged: true}
	}))
	if code := c.Wait(t); code == 0 {
		t.Errorf("exit code %d", code)
	}
	node.Until(t, "the pod is not ready", func() bool { return !ready(t, p) })
	node.Until(t, "containerd's log says why", func() bool { return strings.Contains(n.Log(from), "sysrq triggered crash") })
}

// A sandbox that is killed together with containerd is found to be gone when that comes back.
func TestKillEverything(t *testing.T) {
	n := pods.For(t)
	p, machine := only(t, n, vmm, func() *pods.Pod { return n.Pod(t) })
	shims := processes(n, shim, nil)
	p.Run(t)
	n.KillContainerd(t)
	for _, pid := range append(shims, machine) {
		node.KillIfThere(t, pid)
	}
	n.StartContainerd(t)
	node.Until(t, "CRI answers", func() bool {
		_, err := n.CRI.Version(n.Context(t), &cri.VersionRequest{})
		return err == nil
	})
	node.Until(t, "the pod is not ready", func() bool { return !ready(t, p) })
	p.Remove(t)
}
