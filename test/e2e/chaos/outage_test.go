//go:build e2e

package chaos

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// containerd is killed and away for a while: pods go on and are found again, and what ended meanwhile is told then.
func TestContainerdOutage(t *testing.T) {
	n := nodeFor(t)
	var seen []string
	defer func() { promise(t, seen...) }()
	p := n.Pod(t)
	dir := t.TempDir()
	running := p.Run(t, pods.Shell(counter))
	before := p.Run(t, pods.Shell("exit 6"))
	before.Wait(t)
	during := p.Run(t, pods.Mount(dir, "/dir"), pods.Shell("until [ -e /dir/go ]; do sleep 0.1; done; echo last words; touch /dir/gone; exit 7"))
	ip, _ := p.IPs(t)
	waitLog(t, running, "2")

	n.KillContainerd(t)
	if err := os.WriteFile(filepath.Join(dir, "go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	node.Until(t, "a container has ended", func() bool { return node.Exists(dir, "gone") })
	size := logSize(t, running)
	restartContainerd(t, n)

	if s := p.Status(t); s.State != cri.PodSandboxState_SANDBOX_READY || s.Network.Ip != ip {
		t.Errorf("the pod: %v", s)
	}
	if s := before.Status(t); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 6 {
		t.Errorf("the container that had ended before: %v", s)
	}
	want := 7
	if !isVM(n) {
		want = 255 // containerd deletes a task without processes when it comes back: the exit is not known any more
	}
	if code := during.Wait(t); code != want {
		t.Errorf("exit code %d of the container that ended meanwhile", code)
	}
	seen = append(seen, fmt.Sprintf("exit code %d of the outage is told", want))
	running.Exec(t, "echo", "hello").WantOutput(t, "hello\n")
	seen = append(seen, "exec works")
	node.Until(t, "the log goes on", func() bool { return logSize(t, running) > size })
	seen = append(seen, "log goes on")
	var stats *cri.ContainerStats
	node.Until(t, "there are statistics", func() bool {
		r, err := n.CRI.ContainerStats(n.Context(t), &cri.ContainerStatsRequest{ContainerId: running.ID})
		stats = r.GetStats()
		return err == nil && stats.GetCpu().GetUsageCoreNanoSeconds().GetValue() > 0
	})
	seen = append(seen, fmt.Sprintf("stats go on (%d ms of CPU)", stats.Cpu.UsageCoreNanoSeconds.Value/1e6))
	p.Run(t).Get(t, "true")
	seen = append(seen, "a further container runs")
}
