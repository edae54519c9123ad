//go:build e2e

package task

import (
	"fmt"
	"slices"
	"testing"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

// wantEvents waits for a container's last event, then compares all: in order, and each once.
func wantEvents(t *testing.T, n *node.Node, events *node.Events, id string, want ...string) {
	t.Helper()
	const deleted = "/tasks/delete"
	if n.Runc() {
		// runc's shim may end before it has sent its last events.
		want = slices.DeleteFunc(want, func(topic string) bool { return topic == deleted })
	}
	topics := func() (got []string) {
		for _, e := range events.Of(id) {
			topic := e.Topic
			switch {
			case topic == "/tasks/exit":
				topic = fmt.Sprintf("%s %d", topic, e.ExitStatus)
				if e.ID != id {
					topic += " of " + e.ID
				}
			case e.ExecID != "":
				topic += " of " + e.ExecID
			}
			if topic != deleted || !n.Runc() {
				got = append(got, topic)
			}
		}
		return got
	}
	node.Wait(func() bool { return slices.Contains(topics(), want[len(want)-1]) })
	if got := topics(); !slices.Equal(got, want) {
		t.Errorf("events of %s:\n%q\nwant\n%q", id, got, want)
	}
}

func TestEvents(t *testing.T) {
	n := node.For(t)
	events := n.Events(t)

	if !n.Runc() {
		id := n.ID(t)
		n.RemoveIfFailed(t, id)
		n.Ctr(t, n.RunArgs(node.Busybox, id, []string{"--rm"}, "sh", "-c", "exit 8")...)
		wantEvents(t, n, events, id, "/tasks/create", "/tasks/start", "/tasks/exit 8", "/tasks/delete")
	}
	id := n.Detach(t, nil, "sleep", "1000")
	exec := n.ID(t)
	n.Ctr(t, "tasks", "exec", "--exec-id", exec, "--fifo-dir", t.TempDir(), id, "sh", "-c", "exit 9")
	n.MustCtr(t, "tasks", "pause", id)
	n.MustCtr(t, "tasks", "resume", id)
	n.MustCtr(t, "tasks", "kill", "-s", "SIGKILL", id)
	node.Until(t, "the task has stopped", func() bool { return n.Status(t, id) == "STOPPED" })
	n.Ctr(t, "tasks", "rm", id)
	wantEvents(t, n, events, id, "/tasks/create", "/tasks/start",
		"/tasks/exec-added of "+exec, "/tasks/exec-started of "+exec, "/tasks/exit 9 of "+exec,
		"/tasks/paused", "/tasks/resumed", "/tasks/exit 137", "/tasks/delete")
}

func TestOutOfMemoryEvent(t *testing.T) {
	n := node.For(t)
	events := n.Events(t)
	id := n.ID(t)
	n.RemoveIfFailed(t, id)
	r := n.Ctr(t, n.RunArgs(node.Busybox, id, []string{"--rm", "--memory-limit", fmt.Sprint(64 << 20)},
		"sh", "-c", "tail -c 200000000 </dev/zero; sleep 2; exit 3")...)
	r.WantExit(t, 3)
	wantEvents(t, n, events, id, "/tasks/create", "/tasks/start", "/tasks/oom", "/tasks/exit 3", "/tasks/delete")
}
