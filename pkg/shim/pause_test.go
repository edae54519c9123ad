package shim

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/microvm-runtime/microvm/pkg/vmm/control"
)

// createPause makes a pod's sandbox as containerd's CRI plugin does, under
// sandboxer = "podsandbox".
func (f *fixture) createPause(id string) {
	f.t.Helper()
	bundle := f.bundle(func(s *specs.Spec) {
		s.Annotations = map[string]string{"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": id}
		s.Linux.Sysctl = map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}
	}, "/pause")
	if _, err := f.Create(f.t.Context(), &taskapi.CreateTaskRequest{ID: id, Bundle: bundle}); err != nil {
		f.t.Fatal(err)
	}
}

// createInPod makes a container of a pod, whose pids are those of another task
// if that is given.
func (f *fixture) createInPod(id string, sandboxPid, pids uint32, args ...string) error {
	f.t.Helper()
	bundle := f.bundle(func(s *specs.Spec) {
		s.Annotations = map[string]string{"io.kubernetes.cri.container-type": "container"}
		path := func(kind string) string { return fmt.Sprintf("/proc/%d/ns/%s", sandboxPid, kind) }
		s.Linux.Namespaces = []specs.LinuxNamespace{
			{Type: specs.MountNamespace}, {Type: specs.PIDNamespace},
			{Type: specs.IPCNamespace, Path: path("ipc")}, {Type: specs.UTSNamespace, Path: path("uts")},
			{Type: specs.NetworkNamespace, Path: path("net")},
		}
		if pids != 0 {
			s.Linux.Namespaces[1].Path = fmt.Sprintf("/proc/%d/ns/pid", pids)
		}
	}, args...)
	_, err := f.Create(f.t.Context(), &taskapi.CreateTaskRequest{ID: id, Bundle: bundle})
	return err
}

func (f *fixture) signal(id string, signal unix.Signal) error {
	_, err := f.Kill(context.Background(), &taskapi.KillRequest{ID: id, Signal: uint32(signal)})
	return err
}

// A pod lives as long as its sandbox, with and without containers.
func TestPod(t *testing.T) {
	f := newFixture(t)
	ctx := context.Background()
	f.createPause("pod")
	f.start("pod", "")
	if r := f.agent.Sandbox(); r.Hostname != "host" || r.Sysctls["net.ipv4.ip_unprivileged_port_start"] != "0" {
		t.Errorf("sandbox configured with %v", r)
	}
	if calls := f.agent.Calls(); slices.Contains(calls, "CreateContainer") || f.tree.left() != 0 {
		t.Errorf("the sandbox is in the guest: %q, %d in the tree", calls, f.tree.left())
	}
	pause := f.status("pod", "")
	if pause.Status != tasktypes.Status_RUNNING || pause.Pid != uint32(os.Getpid()) {
		t.Errorf("sandbox %v", pause)
	}
	if r, err := f.Pids(ctx, &taskapi.PidsRequest{ID: "pod"}); err != nil || len(r.Processes) != 1 || r.Processes[0].Pid != pause.Pid {
		t.Errorf("pids %v, %v", r, err)
	}
	if r, err := f.Stats(ctx, &taskapi.StatsRequest{ID: "pod"}); err != nil || r.Stats.TypeUrl != "io.containerd.cgroups.v2.Metrics" {
		t.Errorf("stats %v, %v", r, err)
	}

	// An init container, then two that stay, one of which comes again.
	for _, round := range []struct{ id, program string }{{"init", "exit"}, {"app", "sleep"}, {"app", "sleep"}} {
		if err := f.createInPod(round.id, pause.Pid, 0, round.program); err != nil {
			t.Fatal(err)
		}
		f.start(round.id, "")
		if round.program == "sleep" {
			f.kill(round.id, "")
		}
		f.wait(round.id, "")
		if err := f.delete(round.id, ""); err != nil {
			t.Fatal(err)
		}
		f.shutdown(round.id)
		if err := f.sandbox.alive(); err != nil {
			t.Fatalf("after %s: %v", round.id, err)
		}
	}
	if n := len(f.machines); n != 1 {
		t.Errorf("%d machines", n)
	}
	if err := f.kill("pod", ""); err != nil {
		t.Fatal(err)
	}
	if code := f.wait("pod", ""); code != 137 {
		t.Errorf("the sandbox ended with %d", code)
	}
	if err := f.sandbox.alive(); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("the machine outlives its pod: %v", err)
	}
	if err := f.createInPod("late", pause.Pid, 0, "sleep"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("create after the end: %v", err)
	}
	if err := f.delete("pod", ""); err != nil {
		t.Error(err)
	}
	f.shutdown("pod")
	<-f.down
	f.expectEvents("create pod", "start pod",
		"create init", "start init", "exit init init 0", "delete init 0",
		"create app", "start app", "exit app app 137", "delete app 137",
		"create app", "start app", "exit app app 137", "delete app 137",
		"exit pod pod 137", "delete pod 137")
}

// What ends the sandbox ends its containers, each once.
func TestPodEnds(t *testing.T) {
	for _, test := range []struct {
		name      string
		end       func(*fixture) error
		code, app uint32
	}{
		{"killed", func(f *fixture) error { return f.signal("pod", unix.SIGKILL) }, 137, 137},
		{"terminated", func(f *fixture) error { return f.signal("pod", unix.SIGTERM) }, 0, 137},
		{"interrupted twice", func(f *fixture) error {
			f.signal("pod", unix.SIGINT)
			f.signal("pod", unix.SIGKILL) // may find it ended
			return nil
		}, 0, 137},
		{"the VMM is killed", func(f *fixture) error { return f.machine().Kill() }, 137, 137},
		{"the guest panics", func(f *fixture) error { f.machine().end(control.ReasonPanic, ""); return nil }, 255, 255},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := newFixture(t)
			f.createPause("pod")
			f.start("pod", "")
			for _, id := range []string{"c1", "c2"} {
				if err := f.createInPod(id, uint32(os.Getpid()), 0, "sleep"); err != nil {
					t.Fatal(err)
				}
				f.start(id, "")
			}
			for _, harmless := range []unix.Signal{0, unix.SIGHUP, unix.SIGCHLD} {
				if err := f.signal("pod", harmless); err != nil {
					t.Error(err)
				}
			}
			f.await(6)
			if err := test.end(f); err != nil {
				t.Fatal(err)
			}
			want := []string{fmt.Sprintf("exit pod pod %d", test.code)}
			for _, id := range []string{"c1", "c2"} {
				if code := f.wait(id, ""); code != test.app {
					t.Errorf("%s ended with %d", id, code)
				}
				want = append(want, fmt.Sprintf("exit %s %s %d", id, id, test.app))
			}
			if code := f.wait("pod", ""); code != test.code {
				t.Errorf("ended with %d", code)
			}
			if err := f.signal("pod", unix.SIGKILL); !errdefs.IsNotFound(err) {
				t.Errorf("kill after the end: %v", err)
			}
			exits := f.seen()[6:]
			slices.Sort(exits)
			slices.Sort(want)
			if !slices.Equal(exits, want) {
				t.Errorf("events %q, want %q", exits, want)
			}
			for _, id := range []string{"c1", "pod", "c2"} {
				if err := f.delete(id, ""); err != nil {
					t.Error(err)
				}
			}
			f.shutdown("pod")
			<-f.down
		})
	}
}

// A sandbox that was created only is deleted like any container.
func TestDeleteCreatedPod(t *testing.T) {
	f := newFixture(t)
	f.createPause("pod")
	if err := f.delete("pod", ""); err != nil {
		t.Fatal(err)
	}
	f.shutdown("pod")
	<-f.down
	f.expectEvents("create pod", "exit pod pod 137", "delete pod 137")
}

// Nothing can be done in a sandbox but to end it.
func TestPauseRefuses(t *testing.T) {
	f := newFixture(t)
	ctx := context.Background()
	f.createPause("pod")
	f.start("pod", "")
	for name, err := range map[string]error{
		"exec":  f.exec("pod", "e", "sh"),
		"pause": func() error { _, err := f.Pause(ctx, &taskapi.PauseRequest{ID: "pod"}); return err }(),
		"update": func() error {
			_, err := f.Update(ctx, &taskapi.UpdateTaskRequest{ID: "pod", Resources: &anypb.Any{Value: []byte("{}")}})
			return err
		}(),
	} {
		if !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "the pod's virtual machine") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if s := f.status("pod", ""); s.Status != tasktypes.Status_RUNNING {
		t.Errorf("afterwards: %v", s)
	}
	bundle := f.bundle(func(s *specs.Spec) {
		s.Annotations = map[string]string{"io.kubernetes.cri.container-type": "sandbox"}
	}, "/pause")
	if _, err := f.Create(ctx, &taskapi.CreateTaskRequest{ID: "again", Bundle: bundle}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second sandbox: %v", err)
	}
	f.signal("pod", unix.SIGTERM)
	f.wait("pod", "")
	f.delete("pod", "")
}

// Each container has a process id of its own on the host, by which others can
// name its namespaces, and the network there is the VMM's.
func TestSharedPIDs(t *testing.T) {
	f := newFixture(t)
	f.createPause("pod")
	f.start("pod", "")
	sandbox := f.status("pod", "").Pid
	if err := f.createInPod("c1", sandbox, sandbox, "sleep"); err != nil {
		t.Fatal(err)
	}
	if r := f.agent.Request("c1"); r.PidNamespace == nil || r.PidNamespace.ContainerId != "" {
		t.Errorf("c1: %v", r)
	}
	c1 := f.status("c1", "").Pid
	if err := f.createInPod("c2", sandbox, c1, "sleep"); err != nil {
		t.Fatal(err)
	}
	if r := f.agent.Request("c2"); r.PidNamespace == nil || r.PidNamespace.ContainerId != "c1" {
		t.Errorf("c2: %v", r)
	}
	if err := f.createInPod("c3", sandbox, 0, "sleep"); err != nil {
		t.Fatal(err)
	}
	if r := f.agent.Request("c3"); r.PidNamespace != nil {
		t.Errorf("c3: %v", r)
	}
	if err := f.createInPod("c4", sandbox, 1, "sleep"); !errdefs.IsNotImplemented(err) {
		t.Errorf("the host's pids: %v", err)
	}
	pids := []uint32{sandbox}
	for _, id := range []string{"c1", "c2", "c3"} {
		pid := f.status(id, "").Pid
		if slices.Contains(pids, pid) {
			t.Errorf("%s has the number of another one: %d of %d", id, pid, pids)
		}
		pids = append(pids, pid)
		network, err1 := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
		machine, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", f.machine().Pid()))
		if err1 != nil || err2 != nil || network != machine {
			t.Errorf("%s: network %s, %v, the VMM's is %s, %v", id, network, err1, machine, err2)
		}
	}
	for _, id := range []string{"c1", "c2", "c3", "pod"} {
		f.kill(id, "")
		f.wait(id, "")
		if err := f.delete(id, ""); err != nil {
			t.Error(err)
		}
	}
}
