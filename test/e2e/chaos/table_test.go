//go:build e2e

package chaos

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	tasks "github.com/containerd/containerd/api/services/tasks/v1"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// The table is each victim at each step of a pod's life: a test a victim, so that each fits one machine of the test bed.
func TestShim(t *testing.T)       { killAtEachStep(t, killShim) }
func TestVMM(t *testing.T)        { killAtEachStep(t, killVMM) }
func TestAgent(t *testing.T)      { killAtEachStep(t, crashAgent) }
func TestContainerd(t *testing.T) { killAtEachStep(t, killContainerd) }
func TestInit(t *testing.T)       { killAtEachStep(t, killInit) }
func TestEverything(t *testing.T) { killAtEachStep(t, killEverything) }

type victim int

const (
	killShim victim = iota
	killVMM
	crashAgent
	killContainerd
	killInit
	// killEverything is containerd, shim and VMM at once.
	killEverything
)

// A step of a pod's life brings a trial there, has the victim killed, and returns how the call ended that was in progress.
type step struct {
	name    string
	run     func(t *testing.T, c *trial) string
	victims []victim
}

var (
	// To crash the agent takes a pod that is there, and to kill a container's init a container.
	onHost    = []victim{killShim, killVMM, killContainerd, killEverything}
	withAgent = append([]victim{crashAgent}, onHost...)
	withInit  = append([]victim{killInit}, onHost...)
	all       = append([]victim{killInit}, withAgent...)
	steps     = []step{
		{"booting", booting, onHost},
		{"pod-without-containers", podWithoutContainers, withAgent},
		{"task-created", taskCreated, withInit},
		{"starting", starting, all},
		{"started", started, []victim{killInit}},
		{"running", running, all},
		{"exec", execing, all},
		{"stopping", stopping, all},
		{"stopped", stopped, withAgent},
		{"deleting", deleting, all},
		{"task-deleting", taskDeleting, onHost},
	}
)

func killAtEachStep(t *testing.T, v victim) {
	n := nodeFor(t)
	if !isVM(n) && v != killContainerd && v != killInit {
		return // of runc there is no VMM and no agent, and its shim, when it is killed, leaves its socket
	}
	other := newBystander(t, n)
	n.Collect(t)
	host := n.Snapshot(t)
	for _, s := range steps {
		if !slices.Contains(s.victims, v) {
			continue
		}
		t.Run(s.name, func(t *testing.T) {
			c := &trial{node: n, victim: v, before: parts(n), config: n.PodConfig(t)}
			if v == crashAgent {
				c.lever = newLever(t)
				c.config = n.PodConfig(t, pods.PrivilegedPod)
			}
			switch v {
			case killContainerd:
				c.podFate, c.containerFate = lives, lives
			case killInit:
				c.podFate = lives
			}
			var seen []string
			defer func() { promise(t, seen...) }()
			seen = append(seen, s.run(t, c))
			seen = append(seen, c.truth(t))
			if c.config != nil {
				removeByName(t, n, c.config)
				c.again(t)
			}
			seen = append(seen, "removed, made again", other.goesOn(t, v != killContainerd && v != killEverything))
			n.Collect(t)
			if now := n.WantHost(t, host); !t.Failed() {
				seen = append(seen, "host as before")
			} else {
				host = now // the next row is not to blame
			}
		})
	}
}

// A trial is one row of the table.
type trial struct {
	node   *pods.Node
	victim victim
	before sandboxParts
	config *cri.PodSandboxConfig // nil where it is about a task without a pod
	lever  *lever                // of crashAgent

	pod       *pods.Pod
	container *pods.Container // may be nil
	ended     bool            // the container has ended before, with 0
	// What has to become of the two. A step changes it where the victim alone does not decide.
	podFate, containerFate fate
}

type fate int

const (
	dies fate = iota
	lives
	either
)

func (f fate) String() string { return [...]string{"ends", "lives", "lives or ends"}[f] }

// boot makes the pod, with the lever that the agent is to be crashed by.
func (c *trial) boot(t *testing.T) {
	t.Helper()
	p, err := c.node.TryPod(t, c.config)
	if err != nil {
		t.Fatalf("run the pod: %v", err)
	}
	c.pod = p
	if c.lever != nil {
		c.lever.attach(t, p)
	}
}

func (c *trial) parts() sandboxParts { return parts(c.node).without(c.before) }

// kill ends the victim. containerd is started again.
func (c *trial) kill(t *testing.T) {
	t.Helper()
	switch c.victim {
	case killShim:
		node.KillIfThere(t, one(t, "shim", c.parts().shims))
	case killVMM:
		for pid := range c.parts().vmms { // it may have ended, where its end was asked for
			node.KillIfThere(t, pid)
		}
	case crashAgent:
		c.lever.pull(t)
	case killContainerd:
		c.node.KillContainerd(t)
		goOn(t, c.parts().shims)
		restartContainerd(t, c.node)
	case killInit:
		c.node.MustCtr(t, "tasks", "kill", "--signal", "SIGKILL", c.container.ID)
	case killEverything:
		p := c.parts()
		c.node.KillContainerd(t)
		for pid := range p.shims {
			node.KillIfThere(t, pid)
		}
		for pid := range p.vmms {
			node.KillIfThere(t, pid)
		}
		restartContainerd(t, c.node)
	}
}

// during makes a call, holds it up where the victim allows that, and kills the victim meanwhile. It returns how the call ended.
func (c *trial) during(t *testing.T, call func() error) error {
	t.Helper()
	c.hold(t)
	if c.lever != nil {
		c.lever.await(t) // the call may end it
	}
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		err = call()
	}()
	switch c.victim {
	case crashAgent:
		c.kill(t)
	case killInit:
		c.killInitBefore(t, done)
	default:
		moment()
		c.kill(t)
	}
	<-done // the call has a limit of its own
	return err
}

// killInitBefore kills the container's init as soon as there is one, and gives up when a call has ended that it was to be in.
func (c *trial) killInitBefore(t *testing.T, done <-chan struct{}) {
	t.Helper()
	api := newTaskAPI(t, c.node)
	ctx := api.context(t)
	for {
		last := false
		select {
		case <-done:
			last = true
		default:
		}
		_, err := api.Kill(ctx, &tasks.KillRequest{ContainerID: c.container.ID, Signal: uint32(unix.SIGKILL)})
		if err == nil || last {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// hold stops what would answer: the guest for the shim and for itself, the shim for containerd.
func (c *trial) hold(t *testing.T) {
	t.Helper()
	switch p := c.parts(); c.victim {
	case killShim, killVMM, killEverything:
		stop(t, p.vmms)
	case killContainerd:
		stop(t, p.shims)
	}
}

// shortID is how much of an id crictl prints.
const shortID = 13

// truth fails the test unless CRI, crictl and ctr say what has become of the pod, and returns that.
func (c *trial) truth(t *testing.T) string {
	t.Helper()
	if c.pod == nil {
		return "no pod"
	}
	n := c.node
	if c.podFate != either {
		node.Until(t, "the pod "+c.podFate.String(), func() bool { return ready(t, c.pod) == (c.podFate == lives) })
	}
	podSeen := "pod not ready"
	if ready(t, c.pod) {
		podSeen = "pod ready"
	}
	if got := n.MustCrictl(t, "pods", "--id", c.pod.ID).Stdout; strings.Contains(got, "NotReady") == (podSeen == "pod ready") {
		t.Errorf("%s: crictl shows %s", podSeen, got)
	}
	if c.container == nil {
		return podSeen
	}
	// CRI has the end of a task from its event; both have to say the same in the end.
	var status *cri.ContainerStatus
	node.Until(t, "the container "+c.containerFate.String()+", and its task too", func() bool {
		status = c.container.Status(t)
		runs := status.State == cri.ContainerState_CONTAINER_RUNNING
		task := strings.Contains(line(n.MustCtr(t, "tasks", "ls").Stdout, c.container.ID), "RUNNING")
		return runs == task && (c.containerFate == either || runs == (c.containerFate == lives))
	})
	if got := line(n.MustCrictl(t, "ps", "-a", "--id", c.container.ID).Stdout, c.container.ID[:shortID]); !strings.Contains(got, crictlStates[status.State]) {
		t.Errorf("%v: crictl shows %s", status.State, got)
	}
	if status.State == cri.ContainerState_CONTAINER_RUNNING {
		c.container.Exec(t, "echo", "hello").WantOutput(t, "hello\n")
		return podSeen + ", container runs, exec works"
	}
	code := status.ExitCode
	if c.containerFate == dies && code == 0 != c.ended || c.victim == killInit && status.Reason != startError && code != 137 {
		t.Errorf("exit code %d", code)
	}
	return fmt.Sprintf("%s, container %s (%d)", podSeen, crictlStates[status.State], code)
}

// startError is the reason that CRI gives for the end of a container that could not be started.
const startError = "StartError"

var crictlStates = map[cri.ContainerState]string{
	cri.ContainerState_CONTAINER_CREATED: "Created",
	cri.ContainerState_CONTAINER_RUNNING: "Running",
	cri.ContainerState_CONTAINER_EXITED:  "Exited",
	cri.ContainerState_CONTAINER_UNKNOWN: "Unknown",
}

// line is the one of a text that has a word.
func line(text, word string) string {
	for l := range strings.Lines(text) {
		if strings.Contains(l, word) {
			return l
		}
	}
	return ""
}

// again makes the same pod once more.
func (c *trial) again(t *testing.T) {
	t.Helper()
	p, err := c.node.TryPod(t, c.config)
	if err != nil {
		t.Fatalf("make the pod again: %v", err)
	}
	p.Run(t).Exec(t, "echo", "hello").WantOutput(t, "hello\n")
	p.Remove(t)
}
