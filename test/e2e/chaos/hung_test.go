//go:build e2e

package chaos

import (
	"context"
	"fmt"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// A guest that hangs: whoever waits for it is told so after a while, and the pod can be removed. The agent alone may stand
// still, or the whole machine.
func TestHungGuest(t *testing.T) {
	n := nodeFor(t)
	if !isVM(n) {
		return
	}
	other := newBystander(t, n)
	n.Collect(t)
	host := n.Snapshot(t)
	for _, row := range []struct {
		name string
		hang func(t *testing.T, p *pods.Pod, vmm int)
		out  []string // crictl's arguments that are the way out
	}{
		{"agent-frozen", freezeAgent, []string{"stopp"}},
		{"machine-stopped", func(t *testing.T, _ *pods.Pod, vmm int) { stop(t, map[int]string{vmm: ""}) }, []string{"rmp", "--force"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			var seen []string
			defer func() { promise(t, seen...) }()
			before := parts(n)
			p := n.Pod(t, pods.PrivilegedPod)
			c := p.Run(t, pods.Shell(counter))
			vmm := one(t, "VMM", parts(n).without(before).vmms)
			row.hang(t, p, vmm)

			for name, call := range map[string]func(context.Context) error{
				"ExecSync": func(ctx context.Context) error {
					_, err := n.CRI.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{"true"}})
					return err
				},
				"StopContainer": func(ctx context.Context) error {
					_, err := n.CRI.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: c.ID, Timeout: 1})
					return err
				},
			} {
				ctx := n.Context(t)
				err := call(ctx)
				switch {
				case ctx.Err() != nil:
					t.Errorf("%s has no limit of its own", name)
				case err == nil || !strings.Contains(err.Error(), "does not answer"):
					t.Errorf("%s of a guest that hangs: %v", name, err)
				}
				seen = append(seen, fmt.Sprintf("%s: %s", name, short(err)))
			}
			n.MustCrictl(t, append(row.out, p.ID)...)
			node.Until(t, "the machine has ended", func() bool { return n.Processes(vmmProgram)[vmm] == "" })
			seen = append(seen, fmt.Sprintf("crictl %v ends it", row.out))
			removeByName(t, n, p.Config())
			seen = append(seen, other.goesOn(t, true))
			n.Collect(t)
			host = n.WantHost(t, host)
		})
	}
	t.Run("ctr-task", func(t *testing.T) {
		var seen []string
		defer func() { promise(t, seen...) }()
		before := parts(n)
		id := n.DetachImage(t, node.Box, nil, "sleep", "1000")
		stop(t, parts(n).without(before).vmms)
		n.Exec(t, id, nil, "true").WantError(t, "does not answer")
		n.MustCtr(t, "tasks", "delete", "--force", id)
		n.MustCtr(t, "containers", "rm", id)
		seen = append(seen, "exec: does not answer", "ctr task delete --force ends it", other.goesOn(t, true))
		n.Collect(t)
		n.WantHost(t, host)
	})
}

// freezeAgent returns when the agent stands still.
func freezeAgent(t *testing.T, p *pods.Pod, _ int) {
	t.Helper()
	l := newFreezer(t)
	l.attach(t, p)
	l.pull(t)
	// The lever's container goes on: it is not the agent.
	node.Until(t, "the agent is frozen", func() bool { return node.Exists(l.dir, "pulled") })
}
