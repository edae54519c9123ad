//go:build e2e

package chaos

import (
	"fmt"
	"os"
	"strings"
	"testing"

	tasks "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types/task"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// The machine, or with runc the shim, is there, and the pod is not yet.
func booting(t *testing.T, c *trial) string {
	type result struct {
		pod *pods.Pod
		err error
	}
	done := make(chan result, 1)
	go func() {
		p, err := c.node.TryPod(t, c.config)
		done <- result{p, err}
	}()
	node.Until(t, "the pod is being made", func() bool {
		p := c.parts()
		return len(p.shims) == 1 && len(p.vmms) == 1 || !isVM(c.node) && len(p.shims) == 1
	})
	c.kill(t)
	r := <-done
	c.pod = r.pod // nil, or it was too late
	return "RunPodSandbox: " + short(r.err)
}

func podWithoutContainers(t *testing.T, c *trial) string {
	c.boot(t)
	c.kill(t)
	if c.podFate == dies {
		node.Until(t, "the pod is not ready", func() bool { return !ready(t, c.pod) })
		if _, err := c.pod.TryCreate(t); err == nil {
			t.Error("a container could be made in a pod that has ended")
		}
	}
	return "no call"
}

func starting(t *testing.T, c *trial) string {
	c.boot(t)
	c.container = c.pod.Create(t, pods.Shell(counter))
	err := c.during(t, func() error { return c.container.TryStart(t) })
	if c.victim == killContainerd || c.victim == killEverything {
		c.containerFate = either // it may be as before, created, and nobody was told of another state
	} else {
		c.wantStart(t, err)
	}
	return "StartContainer: " + short(err)
}

// Its init is killed when containerd is told that it runs, which CRI may not be yet.
func started(t *testing.T, c *trial) string {
	c.boot(t)
	c.container = c.pod.Create(t, pods.Shell(counter))
	done := make(chan error, 1)
	go func() { done <- c.container.TryStart(t) }()
	api := newTaskAPI(t, c.node)
	node.Until(t, "the task runs", func() bool {
		r, err := api.Get(api.context(t), &tasks.GetRequest{ContainerID: c.container.ID})
		return err == nil && r.Process.Status == task.Status_RUNNING
	})
	c.kill(t)
	err := <-done
	c.wantStart(t, err)
	return "StartContainer: " + short(err)
}

// wantStart fails the test unless a container's status says the same of its start as the call did.
func (c *trial) wantStart(t *testing.T, err error) {
	t.Helper()
	s := c.container.Status(t)
	if failed := s.Reason == startError; failed != (err != nil) || failed == (s.StartedAt > 0) {
		t.Errorf("StartContainer: %v, and the status is %v", err, s)
	}
}

func running(t *testing.T, c *trial) string {
	c.boot(t)
	c.container = c.pod.Run(t, pods.Shell(counter))
	waitLog(t, c.container, "3")
	size := logSize(t, c.container)
	c.kill(t)
	if c.containerFate == lives {
		node.Until(t, "the log goes on", func() bool { return logSize(t, c.container) > size })
		return "output goes on"
	}
	return fmt.Sprintf("output to line %s", lastLine(t, c.container))
}

func execing(t *testing.T, c *trial) string {
	c.boot(t)
	c.container = c.pod.Run(t, pods.Shell(counter))
	done := make(chan string, 1)
	go func() {
		r, err := c.node.CRI.ExecSync(c.node.Context(t), &cri.ExecSyncRequest{ContainerId: c.container.ID, Cmd: []string{"sleep", "1000"}})
		switch {
		case err != nil:
			done <- short(err)
		case r.ExitCode == 0:
			t.Error("the command that was killed has succeeded")
			done <- "success"
		default:
			done <- fmt.Sprintf("exit code %d", r.ExitCode)
		}
	}()
	node.Until(t, "the command runs", func() bool { return c.container.Shell(t, "pgrep -f '^sleep 1000$'").Code == 0 })
	c.kill(t)
	return "ExecSync: " + <-done
}

func stopping(t *testing.T, c *trial) string {
	c.boot(t)
	c.container = c.pod.Run(t, pods.Shell("trap 'echo TERM' TERM; "+counter))
	waitLog(t, c.container, "1")
	done := make(chan error, 1)
	go func() {
		_, err := c.node.CRI.StopContainer(c.node.Context(t), &cri.StopContainerRequest{ContainerId: c.container.ID, Timeout: 1000})
		done <- err
	}()
	waitLog(t, c.container, "TERM")
	c.kill(t)
	return "StopContainer: " + short(<-done)
}

func stopped(t *testing.T, c *trial) string {
	c.boot(t)
	c.container = c.pod.Run(t, pods.Shell("trap 'exit 0' TERM; "+counter))
	waitLog(t, c.container, "1") // without its trap it would ignore the signal
	c.container.Stop(t, 1000)
	c.ended, c.containerFate = true, dies
	c.kill(t)
	return "no call"
}

func deleting(t *testing.T, c *trial) string {
	c.boot(t)
	if c.victim == killInit {
		c.container = c.pod.Run(t, pods.Shell(counter))
	}
	err := c.during(t, func() error {
		_, err := c.node.CRI.StopPodSandbox(c.node.Context(t), &cri.StopPodSandboxRequest{PodSandboxId: c.pod.ID})
		return err
	})
	switch c.victim {
	case killContainerd:
		c.podFate = either
	case killInit:
		c.podFate = dies
		if err != nil {
			t.Errorf("StopPodSandbox: %v", err)
		}
	}
	return "StopPodSandbox: " + short(err)
}

func waitLog(t *testing.T, c *pods.Container, text string) {
	t.Helper()
	node.Until(t, "the log has "+text, func() bool {
		data, _ := os.ReadFile(c.Log) // not there before the start
		return strings.Contains(string(data), " F "+text+"\n")
	})
}

func logSize(t *testing.T, c *pods.Container) int64 {
	t.Helper()
	info, err := os.Stat(c.Log)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

func lastLine(t *testing.T, c *pods.Container) string {
	t.Helper()
	stdout, _ := c.Output(t)
	f := strings.Fields(stdout)
	return f[len(f)-1]
}

// stop has processes stand still, all their threads.
func stop(t *testing.T, pids map[int]string) {
	t.Helper()
	for pid := range pids {
		signalTo(t, pid, unix.SIGSTOP)
	}
}

// goOn has them run again.
func goOn(t *testing.T, pids map[int]string) {
	t.Helper()
	for pid := range pids {
		signalTo(t, pid, unix.SIGCONT)
	}
}

func signalTo(t *testing.T, pid int, s unix.Signal) {
	t.Helper()
	if err := unix.Kill(pid, s); err != nil && err != unix.ESRCH {
		t.Fatalf("signal %v for %d: %v", s, pid, err)
	}
}
