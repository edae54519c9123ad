//go:build e2e

package vm

import (
	"testing"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

// waitForExit runs a container in the foreground and returns its result later.
func waitForExit(t *testing.T, n *node.Node, flags []string, command ...string) (id string, done chan node.Result) {
	t.Helper()
	id = n.ID(t)
	n.RemoveAtEnd(t, id)
	done = make(chan node.Result, 1)
	go func() {
		done <- n.Ctr(t, n.RunArgs(node.Busybox, id, append([]string{"--rm"}, flags...), command...)...)
	}()
	return id, done
}

// The machine's process is killed: the container has ended, whoever waits is told, exactly once.
func TestKillVMM(t *testing.T) {
	n := node.For(t)
	events := n.Events(t)
	from := n.LogSize()
	id, done := waitForExit(t, n, nil, "sleep", "1000")
	node.Until(t, "the container runs", func() bool { return n.Status(t, id) == "RUNNING" })
	node.Kill(t, only(t, n, vmm))
	(<-done).WantExit(t, 137)
	wantLog(t, n, from, "killed")
	exits := 0
	node.Until(t, "the container is deleted", func() bool {
		seen := events.Of(id)
		return len(seen) > 0 && seen[len(seen)-1].Topic == "/tasks/delete"
	})
	for _, e := range events.Of(id) {
		if e.Topic == "/tasks/exit" {
			exits++
		}
	}
	if exits != 1 {
		t.Errorf("%d exit events", exits)
	}
}

// The same with nobody waiting: ctr shows that the task has stopped, and it can be removed.
func TestKillVMMOfDetached(t *testing.T) {
	n := node.For(t)
	id := n.Detach(t, nil, "sleep", "1000")
	node.Kill(t, only(t, n, vmm))
	node.Until(t, "the task is shown as stopped", func() bool { return n.Status(t, id) == "STOPPED" })
	n.Exec(t, id, nil, "true").WantError(t)
	n.MustCtr(t, "tasks", "rm", id)
	n.MustCtr(t, "containers", "rm", id)
}

// One machine's end is the end of all containers in it and of no other.
func TestKillVMMOfSandbox(t *testing.T) {
	n := node.For(t)
	other := n.Detach(t, nil, "sleep", "1000")
	before := n.Processes(vmm)
	sandbox := annotation("io.containerd.runc.v2.group", n.ID(t))
	a := n.Detach(t, sandbox, "sleep", "1000")
	b := n.Detach(t, sandbox, "sleep", "1000")
	for pid := range n.Processes(vmm) {
		if _, ok := before[pid]; !ok {
			node.Kill(t, pid)
		}
	}
	for _, id := range []string{a, b} {
		node.Until(t, "the task is shown as stopped", func() bool { return n.Status(t, id) == "STOPPED" })
	}
	n.Exec(t, other, nil, "echo", "alive").WantOutput(t, "alive\n")
}

// The shim is killed: its machine must not live on, and containerd must get to know.
func TestKillShim(t *testing.T) {
	n := node.For(t)
	// The FIFOs are ctr's, who leaves them when the task is not there to be deleted.
	id, done := waitForExit(t, n, []string{"--fifo-dir", t.TempDir()}, "sleep", "1000")
	node.Until(t, "the container runs", func() bool { return n.Status(t, id) == "RUNNING" })
	node.Kill(t, only(t, n, shim))
	if r := <-done; r.Code == 0 {
		t.Errorf("ctr says that all went well: %s", r)
	}
	node.Until(t, "the machine has ended with its shim", func() bool { return len(n.Processes(vmm)) == 0 })
	node.Until(t, "the task is gone", func() bool { return n.Status(t, id) != "RUNNING" })
}

// Both are killed at the same moment, and containerd too.
func TestKillEverything(t *testing.T) {
	n := node.For(t)
	// The FIFOs are ctr's, and nobody is left who would remove them.
	id := n.Detach(t, []string{"--fifo-dir", t.TempDir()}, "sleep", "1000")
	pids := []int{only(t, n, shim), only(t, n, vmm)}
	n.KillContainerd(t)
	for _, pid := range pids {
		node.KillIfThere(t, pid)
	}
	n.StartContainerd(t)
	node.Until(t, "the task is gone", func() bool { return n.Status(t, id) != "RUNNING" })
}

// The guest ends by itself while a container runs. Only a privileged container can do that to its own machine.
func TestGuestEnds(t *testing.T) {
	for name, c := range map[string]struct{ script, log string }{
		"panic":     {"echo c >/proc/sysrq-trigger", "panic"},
		"power off": {"echo o >/proc/sysrq-trigger", "poweroff"},
		"reset":     {"echo b >/proc/sysrq-trigger", "reset"},
	} {
		t.Run(name, func(t *testing.T) {
			n := node.For(t)
			from := n.LogSize()
			_, done := waitForExit(t, n, []string{"--privileged", "--privileged-without-host-devices"},
				"sh", "-c", "echo before; "+c.script+"; sleep 1000")
			r := <-done
			if r.Code == 0 {
				t.Errorf("ctr says that all went well: %s", r)
			}
			wantLog(t, n, from, c.log)
			if name == "panic" {
				wantLog(t, n, from, "sysrq triggered crash") // the guest's last console lines
			}
		})
	}
}
