//go:build e2e

package chaos

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// counter writes a number a second, without starting a process for it.
const counter = `mkfifo /tick; exec 3<>/tick; i=0; while :; do i=$((i+1)); echo $i; read -t 1 x <&3; done`

// A bystander is a pod that has nothing to do with what happens to others, and goes on.
type bystander struct {
	node      *pods.Node
	pod       *pods.Pod
	container *pods.Container
	parts     sandboxParts
	last      int // of its numbers that were seen
}

func newBystander(t *testing.T, n *pods.Node) *bystander {
	t.Helper()
	before := parts(n)
	b := &bystander{node: n, pod: n.Pod(t)}
	b.container = b.pod.Run(t, pods.Shell(counter))
	b.parts = parts(n).without(before)
	b.goesOn(t, true)
	return b
}

// goesOn fails the test unless the bystander runs as it has, and its output goes on. Of the output nothing may be missing,
// unless a containerd that was killed had it in its hands.
func (b *bystander) goesOn(t *testing.T, complete bool) string {
	t.Helper()
	var numbers []int
	node.Until(t, "the other pod's output goes on", func() bool {
		numbers = b.numbers(t)
		return len(numbers) > 0 && numbers[len(numbers)-1] > b.last
	})
	previous := 0
	for _, i := range numbers {
		if i != previous+1 && i > b.last && complete {
			t.Errorf("the other pod's output goes from %d to %d", previous, i)
		}
		previous = i
	}
	b.last = previous
	if s := b.container.Status(t).State; s != cri.ContainerState_CONTAINER_RUNNING || !ready(t, b.pod) {
		t.Errorf("the other pod's container is %v", s)
	}
	now := parts(b.node)
	for pid := range b.parts.shims {
		if now.shims[pid] == "" {
			t.Errorf("the other pod's shim has ended")
		}
	}
	for pid := range b.parts.vmms {
		if now.vmms[pid] == "" {
			t.Errorf("the other pod's VMM has ended")
		}
	}
	return fmt.Sprintf("other pod at line %d", b.last)
}

// numbers are those in the log, without what was torn in two when containerd was killed.
func (b *bystander) numbers(t *testing.T) []int {
	t.Helper()
	data, err := os.ReadFile(b.container.Log)
	if err != nil {
		t.Fatal(err)
	}
	var found []int
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(line)
		if len(fields) != 4 || fields[2] != "F" {
			continue
		}
		if i, err := strconv.Atoi(fields[3]); err == nil {
			found = append(found, i)
		}
	}
	return found
}
