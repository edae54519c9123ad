package shim

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
	"github.com/microvm-runtime/microvm/pkg/shim/agenttest"
	"github.com/microvm-runtime/microvm/pkg/vmm/control"
)

// Containers of a group share one machine, which ends with the last of them.
func TestGroup(t *testing.T) {
	f := newFixture(t)
	f.create("c1", "sleep")
	f.create("c2", "sleep")
	if n := len(f.machines); n != 1 {
		t.Errorf("%d machines", n)
	}
	if name := f.agent.Sandbox().Hostname; name != "host" {
		t.Errorf("host name %q", name)
	}
	f.start("c1", "")
	f.start("c2", "")
	f.kill("c1", "")
	f.wait("c1", "")
	if err := f.delete("c1", ""); err != nil {
		t.Fatal(err)
	}
	f.shutdown("c1")
	select {
	case <-f.down:
		t.Fatal("shut down while a container runs")
	default:
	}
	f.kill("c2", "")
	f.wait("c2", "")
	if err := f.delete("c2", ""); err != nil {
		t.Fatal(err)
	}
	f.shutdown("c2")
	<-f.down
	if _, err := f.Create(context.Background(), &taskapi.CreateTaskRequest{ID: "c3", Bundle: f.bundle(nil, "sleep")}); !errdefs.IsUnavailable(err) {
		t.Errorf("create after the end: %v", err)
	}
}

// The machine's death ends everything, once and with a reason.
func TestDeathOfTheMachine(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(*fakeMachine)
		code uint32
	}{
		{"killed", func(m *fakeMachine) { m.end(control.ReasonKilled, "killed") }, 137},
		{"panic", func(m *fakeMachine) { m.end(control.ReasonPanic, "Attempted to kill init\n\x1b") }, 255},
		{"power off", func(m *fakeMachine) { m.end(control.ReasonPowerOff, "") }, 255},
		{"the agent alone", (*fakeMachine).loseAgent, 137},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := newFixture(t)
			f.create("c1", "sleep")
			f.create("c2", "sleep")
			f.start("c1", "")
			if err := f.exec("c1", "e1", "sleep"); err != nil {
				t.Fatal(err)
			}
			f.start("c1", "e1")
			f.await(5)
			test.end(f.machine())
			for _, p := range [][2]string{{"c1", "e1"}, {"c1", ""}, {"c2", ""}} {
				if code := f.wait(p[0], p[1]); code != test.code {
					t.Errorf("%v ended with %d, want %d", p, code, test.code)
				}
			}
			f.await(8)
			events := f.seen()
			exits := events[5:]
			slices.Sort(exits)
			want := []string{fmt.Sprintf("exit c1 c1 %d", test.code), fmt.Sprintf("exit c1 e1 %d", test.code), fmt.Sprintf("exit c2 c2 %d", test.code)}
			if !slices.Equal(exits, want) {
				t.Errorf("events %q", events)
			}
			if err := f.kill("c1", ""); !errdefs.IsNotFound(err) {
				t.Errorf("kill: %v", err)
			}
			_, err := f.Create(context.Background(), &taskapi.CreateTaskRequest{ID: "c3", Bundle: f.bundle(nil, "sleep")})
			if !errdefs.IsFailedPrecondition(err) || strings.ContainsAny(fmt.Sprint(err), "\n\x1b") {
				t.Errorf("create: %v", err)
			}
			if r, err := f.Pids(context.Background(), &taskapi.PidsRequest{ID: "c1"}); err != nil || len(r.Processes) != 1 {
				t.Errorf("pids %v, %v", r, err)
			}
			if err := f.delete("c1", "e1"); err != nil {
				t.Error(err)
			}
			for _, id := range []string{"c1", "c2"} {
				if err := f.delete(id, ""); err != nil {
					t.Error(err)
				}
			}
			f.shutdown("c2")
			<-f.down
		})
	}
}

func TestFailedStartOfTheSandbox(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*fixture)
		bundle func(*specs.Spec)
		want   string
	}{
		{"no VMM", func(f *fixture) { f.launchError = errors.New("open /dev/kvm: no such file or directory") }, nil, "/dev/kvm"},
		{"no agent", func(f *fixture) { f.silent = true; f.conf.BootTimeout = 50 * time.Millisecond }, nil,
			"did not start within 50ms (configuration key boot_timeout); then it was at: stopped: vCPU 0 halted at rip 0x1234; the guest console's last lines: Linux version 6.12"},
		{"another protocol", func(f *fixture) {
			f.agent.SetIntercept(func(method string, _ any) (any, error) {
				if method == "Info" {
					return &agentproto.InfoResponse{Protocol: 9}, nil
				}
				return nil, nil
			})
		}, nil, "version 9"},
		{"missing program", func(*fixture) {}, func(s *specs.Spec) { s.Process.Args = []string{"nonsense"} }, `"nonsense"`},
		{"refused specification", func(*fixture) {}, func(s *specs.Spec) { s.Linux.Namespaces = nil }, "--net-host"},
		{"mounts", func(f *fixture) { f.tree.fail = errors.New("no such layer") }, nil, "no such layer"},
		{"failing hook", func(*fixture) {}, func(s *specs.Spec) {
			s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "echo no network; exit 3"}}}}
		}, "exit status 3: no network"},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := newFixture(t)
			test.change(f)
			_, err := f.Create(context.Background(), &taskapi.CreateTaskRequest{ID: "c1", Bundle: f.bundle(test.bundle, "sleep")})
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v does not say %q", err, test.want)
			}
			if f.tree.open || f.tree.left() > 0 {
				t.Error("the shared directory is left")
			}
			if events := f.seen(); len(events) > 0 {
				t.Errorf("events %q", events)
			}
			// As containerd does after a failed Create.
			if err := f.delete("c1", ""); !errdefs.IsNotFound(err) {
				t.Errorf("delete: %v", err)
			}
			f.shutdown("c1")
			<-f.down
		})
	}
}

// A machine that ends while it boots says why.
func TestGuestEndsWhileBooting(t *testing.T) {
	f := newFixture(t)
	f.silent = true
	go func() {
		for {
			f.mu.Lock()
			booting := len(f.machines) > 0
			f.mu.Unlock()
			if booting {
				f.machine().end(control.ReasonPanic, "VFS: Unable to mount root fs")
				return
			}
			time.Sleep(time.Millisecond)
		}
	}()
	_, err := f.Create(context.Background(), &taskapi.CreateTaskRequest{ID: "c1", Bundle: f.bundle(nil, "sleep")})
	if err == nil || !strings.Contains(err.Error(), "ended before it was ready: panic: VFS: Unable to mount root fs") {
		t.Errorf("error %v", err)
	}
}

// containerd deletes a container whose Create it does not wait for any more.
func TestDeleteWhileBooting(t *testing.T) {
	f := newFixture(t)
	f.silent = true
	created := make(chan error)
	bundle := f.bundle(nil, "sleep")
	go func() {
		_, err := f.Create(context.Background(), &taskapi.CreateTaskRequest{ID: "c1", Bundle: bundle})
		created <- err
	}()
	for {
		f.mu.Lock()
		booting := len(f.machines) > 0
		f.mu.Unlock()
		if booting {
			break
		}
		time.Sleep(time.Millisecond)
	}
	// Another container's Shutdown must not end the sandbox now.
	f.shutdown("c0")
	select {
	case <-f.down:
		t.Fatal("shut down while a container is being created")
	default:
	}
	if err := f.delete("c1", ""); !errdefs.IsNotFound(err) {
		t.Errorf("delete: %v", err)
	}
	if err := <-created; err == nil {
		t.Error("created after all")
	}
	f.shutdown("c1")
	<-f.down
}

// A container that fails in a running sandbox does not end it.
func TestSecondContainerFails(t *testing.T) {
	f := newFixture(t)
	f.create("c1", "sleep")
	_, err := f.Create(context.Background(), &taskapi.CreateTaskRequest{ID: "c2", Bundle: f.bundle(nil, "nonsense")})
	if err == nil {
		t.Error("no error")
	}
	f.start("c1", "")
	if n := f.tree.left(); n != 1 {
		t.Errorf("%d containers in the tree", n)
	}
	if _, err := f.Shutdown(context.Background(), &taskapi.ShutdownRequest{ID: "c2"}); err != nil {
		t.Error(err)
	}
	if s := f.status("c1", ""); s.Status != tasktypes.Status_RUNNING {
		t.Errorf("the first container: %v", s)
	}
	f.kill("c1", "")
	f.wait("c1", "")
	f.delete("c1", "")
}

// A hostile agent: processes it makes up are not repeated, nor are events of
// containers that there are not, nor as many of them as it likes.
func TestHostileAgent(t *testing.T) {
	f := newFixture(t)
	f.agent.SetIntercept(func(method string, _ any) (any, error) {
		switch method {
		case "ListProcesses":
			return &agentproto.ListProcessesResponse{Processes: []*agentproto.ProcessEntry{{Pid: 7}, {Pid: 8, ExecId: "made-up"}}}, nil
		case "WaitProcess":
			return &agentproto.WaitProcessResponse{ExitStatus: 1 << 30}, nil
		}
		return nil, nil
	})
	f.create("c1", "sleep")
	f.await(2) // created, and ended with a status that does not exist
	if code := f.wait("c1", ""); code != 255 {
		t.Errorf("ended with %d", code)
	}
	f.expectEvents("create c1", "exit c1 c1 255")
	f.delete("c1", "")

	f.agent.SetIntercept(nil)
	f.create("c2", "sleep")
	for range 90 {
		f.agent.OOM("c2")
	}
	f.agent.OOM("made-up")
	f.start("c2", "")
	f.kill("c2", "")
	f.wait("c2", "")
	n := 0
	for _, e := range f.seen() {
		if e == "oom c2" {
			n++
		} else if strings.HasPrefix(e, "oom") {
			t.Errorf("event %q", e)
		}
	}
	if n > 40 {
		t.Errorf("%d events of one kind", n)
	}
	f.delete("c2", "")
}

// A guest that does not let go of a container that was killed loses its
// machine, unless other containers run in there.
func TestKillIsEnforced(t *testing.T) {
	f := newFixture(t)
	f.host.patience = 200 * time.Millisecond // in which the agent has to answer
	f.agent.Programs["stubborn"] = func(p *agenttest.Process) uint32 {
		<-f.machine().done
		return 0
	}
	f.create("c1", "stubborn")
	f.create("c2", "sleep")
	f.start("c1", "")
	f.start("c2", "")
	if err := f.kill("c1", ""); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * f.host.patience)
	if s := f.status("c2", ""); s.Status != tasktypes.Status_RUNNING {
		t.Errorf("the other container: %v", s)
	}
	if err := f.kill("c2", ""); err != nil {
		t.Fatal(err)
	}
	f.expectKilled("c1", "c2")
}

// expectKilled waits for containers that were killed, and deletes them.
func (f *fixture) expectKilled(ids ...string) {
	f.t.Helper()
	for _, id := range ids {
		if code := f.wait(id, ""); code != 137 {
			f.t.Errorf("%s ended with %d", id, code)
		}
		if err := f.delete(id, ""); err != nil {
			f.t.Error(err)
		}
	}
}

// Two that outlive it do not keep each other.
func TestKillOfTwoIsEnforced(t *testing.T) {
	f := newFixture(t)
	f.host.patience = 50 * time.Millisecond
	f.agent.Programs["stubborn"] = func(*agenttest.Process) uint32 {
		<-f.machine().done
		return 0
	}
	for _, id := range []string{"c1", "c2"} {
		f.create(id, "stubborn")
		f.start(id, "")
	}
	for _, id := range []string{"c1", "c2"} {
		if err := f.kill(id, ""); err != nil {
			t.Fatal(err)
		}
	}
	f.expectKilled("c1", "c2")
}

// Of a guest that does not answer any more all containers can be killed, and
// it is gone then.
func TestKillInGuestThatHangs(t *testing.T) {
	f := newFixture(t)
	f.host.patience = 20 * time.Millisecond
	hung := make(chan struct{})
	f.agent.SetIntercept(func(string, any) (any, error) {
		select {
		case <-hung:
			<-f.machine().done
		default:
		}
		return nil, nil
	})
	for _, id := range []string{"c1", "c2"} {
		f.create(id, "sleep")
		f.start(id, "")
	}
	close(hung)
	if err := f.kill("c1", ""); err != nil {
		t.Errorf("SIGKILL: %v", err)
	}
	f.expectKilled("c1", "c2")
}

// A VMM that does not answer any more holds up nobody for ever.
func TestMachineThatHangs(t *testing.T) {
	f := newFixture(t)
	f.host.patience = 20 * time.Millisecond
	f.create("c1", "sleep")
	f.machine().stuck.Store(true)
	_, err := f.service.sandbox.dialStream(t.Context(), 1)
	if err == nil || !strings.Contains(err.Error(), "does not answer") {
		t.Errorf("stream: %v", err)
	}
	_, err = f.service.sandbox.resizeMachine(t.Context(), control.Size{VCPUs: 2})
	if !errors.Is(err, errHangs) {
		t.Errorf("resize: %v", err)
	}
	f.delete("c1", "")
}

func TestOOMEvent(t *testing.T) {
	f := newFixture(t)
	f.create("c1", "sleep")
	f.agent.OOM("c1")
	f.expectEvents("create c1", "oom c1")
	f.delete("c1", "")
}

// Those of one container are limited, and are not at the expense of another one.
func TestOOMEventsAreLimited(t *testing.T) {
	f := newFixture(t)
	f.create("c1", "sleep")
	f.create("c2", "sleep")
	for range 1000 {
		f.service.oom("c1")
	}
	f.service.oom("c2")
	count := map[string]int{}
	for _, e := range f.seen() {
		count[e]++
	}
	if n := count["oom c1"]; n < 20 || n > 30 || count["oom c2"] != 1 {
		t.Errorf("%v", count)
	}
	f.delete("c1", "")
	f.delete("c2", "")
}
