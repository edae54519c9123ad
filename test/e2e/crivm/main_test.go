//go:build e2e

// Package crivm tests what only pods in virtual machines do. How they end when one of their parts does is tested by chaos.
package crivm

import (
	"os"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

func TestMain(m *testing.M) { node.MainPods(m) }

const (
	vmm  = "microvm-vmm"
	shim = "containerd-shim-microvm-v2"
)

// bootID tells virtual machines apart: each boot of a kernel has its own.
func bootID(t *testing.T, c *pods.Container) string {
	t.Helper()
	return c.Get(t, "cat /proc/sys/kernel/random/boot_id")
}

// processes returns the pids of a program that run now and did not before.
func processes(n *pods.Node, program string, before map[int]string) []int {
	var found []int
	for pid := range n.Processes(program) {
		if _, ok := before[pid]; !ok {
			found = append(found, pid)
		}
	}
	return found
}

// only returns the one process of a program that belongs to the pod which f makes.
func only(t *testing.T, n *pods.Node, program string, f func() *pods.Pod) (*pods.Pod, int) {
	t.Helper()
	before := n.Processes(program)
	p := f()
	found := processes(n, program, before)
	if len(found) != 1 {
		t.Fatalf("want one %s for a pod: %v", program, found)
	}
	return p, found[0]
}

func ready(t *testing.T, p *pods.Pod) bool {
	t.Helper()
	return p.Status(t).State == cri.PodSandboxState_SANDBOX_READY
}

// hostFile reads a file of the machine the tests run on.
func hostFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}
