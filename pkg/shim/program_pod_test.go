//go:build privileged

package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskv3 "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
)

// sandboxBundle is one as containerd makes it for a sandbox: empty.
func (n *node) sandboxBundle(id string) string {
	n.t.Helper()
	dir := filepath.Join(n.dir, "bundles", id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		n.t.Fatal(err)
	}
	return dir
}

func startSandbox(t *testing.T, sandbox sandboxapi.TTRPCSandboxService, id, bundle string) *sandboxapi.StartSandboxResponse {
	t.Helper()
	ctx := context.Background()
	_, err := sandbox.CreateSandbox(ctx, &sandboxapi.CreateSandboxRequest{
		SandboxID: id, BundlePath: bundle, Options: podConfig(t, testPod),
	})
	if err != nil {
		t.Fatal(err)
	}
	r, err := sandbox.StartSandbox(ctx, &sandboxapi.StartSandboxRequest{SandboxID: id})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// containerd with sandboxer = "shim": the sandbox's calls, and tasks by the same
// address, of which the shim program is not asked.
func TestSandboxer(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	bundle := n.sandboxBundle("pod1")
	client := dial(t, n.start("pod1", bundle))
	sandbox := sandboxapi.NewTTRPCSandboxClient(client)
	r := startSandbox(t, sandbox, "pod1", bundle)
	if r.Pid == 0 {
		t.Errorf("started: %v", r)
	}
	if _, err := sandbox.UpdateSandbox(ctx, &sandboxapi.UpdateSandboxRequest{SandboxID: "pod1"}); !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
		t.Errorf("update: %v", err)
	}
	if _, err := sandbox.StartSandbox(ctx, &sandboxapi.StartSandboxRequest{SandboxID: "pod1"}); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("start again: %v", err)
	}
	task := taskv3.NewTTRPCTaskClient(client)
	container := n.bundle("c1", map[string]string{"io.kubernetes.cri.sandbox-id": "pod1"})
	for range 2 {
		run(t, task, "c1", container)
		mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", n.shims()[0]))
		if err != nil || !strings.Contains(string(mounts), "/microvm-hosts "+n.root+"/ns/pod1/shared/tree/.volumes/") {
			t.Errorf("the pod's files are not mounted: %v\n%s", err, mounts)
		}
		task.Kill(ctx, &taskv3.KillRequest{ID: "c1", Signal: 9})
		if _, err := task.Wait(ctx, &taskv3.WaitRequest{ID: "c1"}); err != nil {
			t.Fatal(err)
		}
		if _, err := task.Delete(ctx, &taskv3.DeleteRequest{ID: "c1"}); err != nil {
			t.Fatal(err)
		}
		// As containerd does after each Delete.
		if _, err := task.Shutdown(ctx, &taskv3.ShutdownRequest{ID: "c1"}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := sandbox.PingSandbox(ctx, &sandboxapi.PingRequest{SandboxID: "pod1"}); err != nil {
		t.Errorf("without containers: %v", err)
	}
	if m, err := sandbox.SandboxMetrics(ctx, &sandboxapi.SandboxMetricsRequest{SandboxID: "pod1"}); err != nil || m.Metrics.Data == nil {
		t.Errorf("metrics %v, %v", m, err)
	}
	if _, err := sandbox.StopSandbox(ctx, &sandboxapi.StopSandboxRequest{SandboxID: "pod1"}); err != nil {
		t.Error(err)
	}
	if w, err := sandbox.WaitSandbox(ctx, &sandboxapi.WaitSandboxRequest{SandboxID: "pod1"}); err != nil || w.ExitStatus != 0 {
		t.Errorf("wait %v, %v", w, err)
	}
	if _, err := sandbox.ShutdownSandbox(ctx, &sandboxapi.ShutdownSandboxRequest{SandboxID: "pod1"}); err != nil && !errors.Is(err, ttrpc.ErrClosed) {
		t.Error(err)
	}
	client.Close()
	n.delete("pod1", bundle)
}

// A sandbox whose shim containerd has lost is deleted by the program, with its
// containers, whether the shim serves, or was killed.
func TestDeleteOfASandbox(t *testing.T) {
	for name, lose := range map[string]func(*node){"serves": func(*node) {}, "killed": (*node).killShim} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			bundle := n.sandboxBundle("pod1")
			client := dial(t, n.start("pod1", bundle))
			startSandbox(t, sandboxapi.NewTTRPCSandboxClient(client), "pod1", bundle)
			container := n.bundle("c1", map[string]string{"io.kubernetes.cri.sandbox-id": "pod1"})
			run(t, taskv3.NewTTRPCTaskClient(client), "c1", container)
			lose(n)
			if r := n.delete("c1", container); r.ExitStatus != 137 {
				t.Errorf("delete answered %v", r)
			}
			n.delete("pod1", bundle)
		})
	}
}

// containerd with sandboxer = "podsandbox" and version 3 of the task API: the
// program is asked for the pod's own container only.
func TestPodSandboxer(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	pause := n.bundle("pod1", map[string]string{"io.kubernetes.cri.sandbox-id": "pod1", "io.kubernetes.cri.container-type": "sandbox"})
	client := dial(t, n.start("pod1", pause))
	task := taskv3.NewTTRPCTaskClient(client)
	run(t, task, "pod1", pause)
	container := n.bundle("c1", map[string]string{"io.kubernetes.cri.sandbox-id": "pod1"})
	run(t, task, "c1", container)
	state, err := task.State(ctx, &taskv3.StateRequest{ID: "c1"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d/ns/pid", state.Pid)); err != nil {
		t.Errorf("the container's number: %v", err)
	}
	task.Kill(ctx, &taskv3.KillRequest{ID: "pod1", Signal: 9})
	for _, id := range []string{"c1", "pod1"} {
		if r, err := task.Wait(ctx, &taskv3.WaitRequest{ID: id}); err != nil || r.ExitStatus != 137 {
			t.Errorf("%s: %v, %v", id, r, err)
		}
		if _, err := task.Delete(ctx, &taskv3.DeleteRequest{ID: id}); err != nil {
			t.Error(err)
		}
		if _, err := task.Shutdown(ctx, &taskv3.ShutdownRequest{ID: id}); err != nil && !errors.Is(err, ttrpc.ErrClosed) {
			t.Error(err)
		}
	}
	client.Close()
	n.delete("c1", container)
	n.delete("pod1", pause)
}

// What stands for a container is in the VMM's network, as long as it is there.
func TestStandIn(t *testing.T) {
	vmm := exec.Command("sleep", "1000")
	vmm.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := vmm.Start(); err != nil {
		t.Fatal(err)
	}
	defer vmm.Wait()
	defer vmm.Process.Kill()
	network := func(pid int) string {
		t.Helper()
		link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
		if err != nil {
			t.Fatal(err)
		}
		return link
	}
	own := network(os.Getpid())
	var standIns []*standIn
	for range 4 {
		s, err := newStandIn(vmm.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		if int(s.tid) == os.Getpid() || network(int(s.tid)) != network(vmm.Process.Pid) || network(os.Getpid()) != own {
			t.Errorf("%d is in %s, this process in %s", s.tid, network(int(s.tid)), network(os.Getpid()))
		}
		root := fmt.Sprintf("/proc/%d/root", s.tid)
		if entries, err := os.ReadDir(root); err != nil || len(entries) > 0 {
			t.Errorf("its root directory has %v, %v", entries, err)
		}
		if err := os.WriteFile(root+"/file", nil, 0o600); !errors.Is(err, unix.EROFS) {
			t.Errorf("a file in its root directory: %v", err)
		}
		standIns = append(standIns, s)
	}
	for _, s := range standIns {
		s.close()
		for { // the thread ends soon
			if _, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", s.tid)); errors.Is(err, os.ErrNotExist) {
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
	if _, err := newStandIn(1 << 22); err == nil { // no process has this number
		t.Error("stands for nothing")
	}
}
