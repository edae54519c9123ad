//go:build e2e

// Package chaos kills and starves the parts of a sandbox at each step of its life, and attacks the host from inside one, and looks
// at what users see then, at the other pods, and at the host. It runs for runc too, without what runc has not: a VMM and an agent.
package chaos

import (
	"fmt"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

func TestMain(m *testing.M) { node.MainPods(m) }

// promise prints what was seen of a promise: "make chaos" ends with these lines.
func promise(t *testing.T, seen ...string) {
	t.Helper()
	result := "ok"
	if t.Failed() {
		result = "BROKEN"
	}
	fmt.Printf("promise: %s: %s: %s\n", strings.TrimPrefix(t.Name(), "Test"), result, strings.Join(seen, "; "))
}

// short is an error as a line of a report: its end says why.
func short(err error) string {
	const head, tail = 60, 240
	if err == nil {
		return "success"
	}
	s := strings.Join(strings.Fields(err.Error()), " ")
	if len(s) > head+tail {
		s = s[:head] + "..." + s[len(s)-tail:]
	}
	return fmt.Sprintf("%q", s)
}

// A moment is long enough for a call to have got where it is held up. Nothing depends on it: what is killed too soon is killed
// at an earlier step.
func moment() { time.Sleep(time.Duration(200+100*node.Slow()) * time.Millisecond) }

// nodeFor is pods.For, where ctr has the runtime of the handler under test too.
func nodeFor(t *testing.T) *pods.Node {
	t.Helper()
	n := pods.For(t)
	n.Runtime = "io.containerd." + n.Handler + ".v2"
	return n
}

func isVM(n *pods.Node) bool { return n.Handler == "microvm" }

const vmmProgram = "microvm-vmm"

func shimProgram(n *pods.Node) string {
	if isVM(n) {
		return "containerd-shim-microvm-v2"
	}
	return "containerd-shim-runc-v2"
}

// sandboxParts are the processes of the sandboxes that there are, by pid: those that serve, not those that start them.
type sandboxParts struct{ shims, vmms map[int]string }

func parts(n *pods.Node) sandboxParts {
	p := sandboxParts{shims: n.Processes(shimProgram(n)), vmms: n.Processes(vmmProgram)}
	for pid, command := range p.shims {
		for _, verb := range []string{"start", "delete", "-info", "-v", "ended)"} {
			if strings.HasSuffix(command, " "+verb) {
				delete(p.shims, pid)
			}
		}
	}
	return p
}

// without are those that were not there before.
func (p sandboxParts) without(before sandboxParts) sandboxParts {
	for pid := range before.shims {
		delete(p.shims, pid)
	}
	for pid := range before.vmms {
		delete(p.vmms, pid)
	}
	return p
}

// untilEnded waits until there is no sandbox but those that were there before.
func untilEnded(t *testing.T, n *pods.Node, before sandboxParts) {
	t.Helper()
	node.Until(t, "shim and VMM have ended", func() bool {
		left := parts(n).without(before)
		return len(left.shims)+len(left.vmms) == 0
	})
}

func one(t *testing.T, what string, found map[int]string) (pid int) {
	t.Helper()
	if len(found) != 1 {
		t.Fatalf("want one %s: %v", what, found)
	}
	for pid = range found {
	}
	return pid
}

// restartContainerd starts the one that was killed, and waits until CRI answers.
func restartContainerd(t *testing.T, n *pods.Node) {
	t.Helper()
	n.StartContainerd(t)
	node.Until(t, "CRI answers", func() bool {
		_, err := n.CRI.Version(n.Context(t), &cri.VersionRequest{})
		return err == nil
	})
}

func ready(t *testing.T, p *pods.Pod) bool {
	t.Helper()
	var status *cri.PodSandboxStatus
	node.Until(t, "containerd knows the pod's state", func() bool {
		var err error
		status, err = p.TryStatus(t)
		// Under the sandboxer shim it asks a shim that has been killed until it has noticed.
		if err != nil && !strings.Contains(err.Error(), "ttrpc: closed") {
			t.Fatalf("status of the pod: %v", err)
		}
		return err == nil
	})
	return status.State == cri.PodSandboxState_SANDBOX_READY
}

// removeByName removes every pod of a configuration's name, as crictl does and as a user would. A pod that could not be run has
// no id that anybody was told.
func removeByName(t *testing.T, n *pods.Node, config *cri.PodSandboxConfig) {
	t.Helper()
	for _, id := range strings.Fields(n.MustCrictl(t, "pods", "-q", "--name", "^"+config.Metadata.Name+"$").Stdout) {
		n.MustCrictl(t, "rmp", "--force", id)
	}
}
