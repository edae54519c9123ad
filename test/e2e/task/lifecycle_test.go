//go:build e2e

package task

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

// A container in the background from its start to its removal, with what ctr says at each step.
func TestLifecycle(t *testing.T) {
	n := node.For(t)
	id := n.Detach(t, nil, "sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done")
	if s := n.Status(t, id); s != "RUNNING" {
		t.Errorf("status %q", s)
	}
	n.Ctr(t, "tasks", "rm", id).WantError(t, id)
	n.Ctr(t, "containers", "rm", id).WantError(t, id)
	n.Ctr(t, n.RunArgs(node.Busybox, id, []string{"-d"}, "true")...).WantError(t, id, "already exists")
	n.MustCtr(t, "tasks", "kill", "-s", "SIGTERM", id)
	node.Until(t, "the task has stopped", func() bool { return n.Status(t, id) == "STOPPED" })
	n.Exec(t, id, nil, "true").WantError(t)
	removeStopped(t, n, id, 3)
	if s := n.Status(t, id); s != "" {
		t.Errorf("the task is still there: %q", s)
	}
	// The container is still there: it may have another task.
	n.MustCtr(t, "tasks", "start", "-d", "--fifo-dir", t.TempDir(), id)
	n.MustCtr(t, "tasks", "kill", "-s", "SIGKILL", id)
	node.Until(t, "the second task has stopped", func() bool { return n.Status(t, id) == "STOPPED" })
	removeStopped(t, n, id, 137)
	n.MustCtr(t, "containers", "rm", id)
}

// removeStopped removes a task that has ended. ctr tells its exit code in a warning.
func removeStopped(t *testing.T, n *node.Node, id string, code int) {
	t.Helper()
	if r := n.MustCtr(t, "tasks", "rm", id); !strings.Contains(r.Stderr, fmt.Sprintf("exit with non-zero exit code %d\"", code)) {
		t.Errorf("want exit code %d in ctr's warning: %s", code, r)
	}
}

// Someone waits for a container, in the foreground, while someone else sends it a signal.
func TestWaitAndSignals(t *testing.T) {
	n := node.For(t)
	for signal, want := range map[string]int{"SIGHUP": 21, "SIGUSR2": 22, "SIGTERM": 23, "SIGKILL": 137} {
		t.Run(signal, func(t *testing.T) {
			id := n.ID(t)
			n.RemoveIfFailed(t, id)
			done := make(chan node.Result, 1)
			dir := t.TempDir()
			go func() {
				done <- n.Ctr(t, n.RunArgs(node.Busybox, id, []string{"--rm", "--mount", "type=bind,src=" + dir + ",dst=/dir,options=rbind:rw"},
					"sh", "-c", "trap 'exit 21' HUP; trap 'exit 22' USR2; trap 'exit 23' TERM; touch /dir/ready; while :; do sleep 0.1; done")...)
			}()
			node.Until(t, "the container is ready", func() bool { return node.Exists(dir, "ready") })
			n.MustCtr(t, "tasks", "kill", "-s", signal, id)
			(<-done).WantExit(t, want)
		})
	}
}

// A signal to ctr itself goes on to the container.
func TestSignalThroughCtr(t *testing.T) {
	n := node.For(t)
	term := n.RunTerminal(t, 80, 25, nil, "sh", "-c", "trap 'exit 30' QUIT; echo ready; while :; do sleep 0.1; done")
	term.Expect("ready")
	term.Type("\x1c")
	term.Wait().WantExit(t, 30)
}

func TestPs(t *testing.T) {
	n := node.For(t)
	id := n.Detach(t, nil, "sh", "-c", "sleep 1000 & sleep 1001 & wait")
	node.Until(t, "ctr tasks ps shows the shell and its two children", func() bool {
		lines := strings.Split(strings.TrimSpace(n.MustCtr(t, "tasks", "ps", id).Stdout), "\n")
		return len(lines) == 1+3
	})
}

func TestPauseResume(t *testing.T) {
	n := node.For(t)
	dir := t.TempDir()
	id := n.Detach(t, []string{"--mount", "type=bind,src=" + dir + ",dst=/dir,options=rbind:rw"},
		"sh", "-c", "while :; do echo >>/dir/ticks; sleep 0.1; done")
	ticks := func() int64 {
		info, err := os.Stat(filepath.Join(dir, "ticks"))
		if err != nil {
			return 0
		}
		return info.Size()
	}
	node.Until(t, "the container runs", func() bool { return ticks() > 0 })
	n.MustCtr(t, "tasks", "pause", id)
	if s := n.Status(t, id); s != "PAUSED" {
		t.Errorf("status %s", s)
	}
	paused := ticks()
	n.Status(t, id) // takes longer than ten ticks would
	n.Status(t, id)
	if now := ticks(); now != paused {
		t.Errorf("the container has gone on from %d to %d while it was paused", paused, now)
	}
	n.MustCtr(t, "tasks", "resume", id)
	if s := n.Status(t, id); s != "RUNNING" {
		t.Errorf("status %s", s)
	}
	node.Until(t, "the container goes on", func() bool { return ticks() > paused })
}

// A paused container can be removed.
func TestRemovePaused(t *testing.T) {
	n := node.For(t)
	id := n.Detach(t, nil, "sleep", "1000")
	n.MustCtr(t, "tasks", "pause", id)
	n.Ctr(t, "tasks", "rm", "-f", id)
	if s := n.Status(t, id); s != "" {
		t.Errorf("status %s", s)
	}
}

func TestMetrics(t *testing.T) {
	n := node.For(t)
	id := n.Detach(t, nil, "sh", "-c", "dd if=/dev/zero of=/dev/shm/ballast bs=1M count=20 2>/dev/null; sleep 1000 & exec sleep 1000")
	// cgroup v1 and v2 have different messages.
	var m struct {
		Memory struct {
			Usage json.RawMessage `json:"usage"`
		} `json:"memory"`
		Pids struct {
			Current uint64 `json:"current"`
		} `json:"pids"`
	}
	var usage uint64
	node.Until(t, "the metrics show the memory in use, and two processes", func() bool {
		out := n.Metrics(t, id, &m)
		var v1 struct {
			Usage uint64 `json:"usage"`
		}
		if json.Unmarshal(m.Memory.Usage, &usage) != nil {
			if err := json.Unmarshal(m.Memory.Usage, &v1); err != nil {
				t.Fatalf("no memory usage in %s", out)
			}
			usage = v1.Usage
		}
		return usage >= 20<<20 && m.Pids.Current == 2
	})
	if usage > 200<<20 {
		t.Errorf("memory usage of %d bytes cannot be the container's", usage)
	}
}

func TestSeveralAtOnce(t *testing.T) {
	n := node.For(t)
	const containers = 3
	results := make([]node.Result, containers)
	var wg sync.WaitGroup
	for i := range containers {
		id := n.ID(t)
		n.RemoveIfFailed(t, id)
		wg.Go(func() {
			results[i] = n.Ctr(t, n.RunArgs(node.Busybox, id, []string{"--rm", "--env", fmt.Sprint("N=", i)},
				"sh", "-c", "echo $N >/me; sleep 1; cat /me")...)
		})
	}
	wg.Wait()
	for i, r := range results {
		r.WantOutput(t, fmt.Sprintln(i))
	}
}

func TestContainerdRestart(t *testing.T) {
	n := node.For(t)
	id := n.Detach(t, nil, "sh", "-c", "trap 'exit 4' TERM; touch /tmp/ready; while :; do sleep 0.1; done")
	node.Until(t, "the container is ready", func() bool { return n.Exec(t, id, nil, "ls", "/tmp/ready").Code == 0 })
	n.KillContainerd(t)
	n.StartContainerd(t)
	if s := n.Status(t, id); s != "RUNNING" {
		t.Fatalf("status %q after containerd's restart", s)
	}
	n.Exec(t, id, nil, "echo", "hello").WantOutput(t, "hello\n")
	n.MustCtr(t, "tasks", "kill", id)
	node.Until(t, "the task has stopped", func() bool { return n.Status(t, id) == "STOPPED" })
	removeStopped(t, n, id, 4)

	// And one that ends while nobody is there to be told. Its pipes, which are ctr's, stay.
	dir := t.TempDir()
	id = n.Detach(t, []string{"--fifo-dir", t.TempDir(), "--mount", "type=bind,src=" + dir + ",dst=/dir,options=rbind:rw"},
		"sh", "-c", "until [ -e /dir/go ]; do sleep 0.1; done; touch /dir/gone; exit 6")
	n.KillContainerd(t)
	write(t, filepath.Join(dir, "go"), "")
	node.Until(t, "the container has ended", func() bool { return node.Exists(dir, "gone") })
	n.StartContainerd(t)
	node.Until(t, "the task is known to have ended", func() bool { return n.Status(t, id) != "RUNNING" })
	if !n.Runc() { // whose containerd takes a task without processes for left over, and removes it when it comes back
		removeStopped(t, n, id, 6)
	}
}
