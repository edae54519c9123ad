package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
	"github.com/microvm-runtime/microvm/pkg/shim/agenttest"
)

func (f *fixture) status(id, execID string) *taskapi.StateResponse {
	f.t.Helper()
	r, err := f.State(context.Background(), &taskapi.StateRequest{ID: id, ExecID: execID})
	if err != nil {
		f.t.Fatal(err)
	}
	return r
}

func TestLifeCycle(t *testing.T) {
	f := newFixture(t)
	ctx := context.Background()
	f.create("c1", "sleep")
	if s := f.status("c1", ""); s.Status != tasktypes.Status_CREATED || s.Pid != uint32(os.Getpid()) || s.ID != "c1" {
		t.Errorf("created: %v", s)
	}
	f.start("c1", "")
	if s := f.status("c1", ""); s.Status != tasktypes.Status_RUNNING {
		t.Errorf("running: %v", s)
	}
	if err := f.exec("c1", "e1", "sleep"); err != nil {
		t.Fatal(err)
	}
	if s := f.status("c1", "e1"); s.Status != tasktypes.Status_CREATED || s.Pid != 0 || s.ID != "e1" {
		t.Errorf("exec created: %v", s)
	}
	f.start("c1", "e1")

	r, err := f.Pids(ctx, &taskapi.PidsRequest{ID: "c1"})
	if err != nil || len(r.Processes) != 2 {
		t.Fatalf("pids %v, %v", r, err)
	}
	details, err := typeurl.UnmarshalAny(r.Processes[1].Info)
	if d, ok := details.(*options.ProcessDetails); err != nil || !ok || d.ExecID != "e1" {
		t.Errorf("details %v, %v", details, err)
	}
	if c, err := f.Connect(ctx, &taskapi.ConnectRequest{ID: "c1"}); err != nil || c.TaskPid != uint32(os.Getpid()) || c.ShimPid == 0 {
		t.Errorf("connect %v, %v", c, err)
	}
	if c, err := f.Connect(ctx, &taskapi.ConnectRequest{ID: "other"}); err != nil || c.TaskPid != 0 {
		t.Errorf("connect to no container %v, %v", c, err)
	}

	if _, err := f.Pause(ctx, &taskapi.PauseRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	for _, execID := range []string{"", "e1"} {
		if s := f.status("c1", execID); s.Status != tasktypes.Status_PAUSED {
			t.Errorf("paused: %v", s)
		}
	}
	if err := f.exec("c1", "e2", "sleep"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("exec in a paused container: %v", err)
	}
	if _, err := f.Resume(ctx, &taskapi.ResumeRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}

	stats, err := f.Stats(ctx, &taskapi.StatsRequest{ID: "c1"})
	if err != nil || stats.Stats.TypeUrl != "io.containerd.cgroups.v2.Metrics" {
		t.Errorf("stats %v, %v", stats, err)
	}
	if _, err := f.Update(ctx, &taskapi.UpdateTaskRequest{ID: "c1", Resources: &anypb.Any{Value: []byte(`{"memory":{"limit":1}}`)}}); err != nil {
		t.Error(err)
	}

	if err := f.kill("c1", "e1"); err != nil {
		t.Error(err)
	}
	if code := f.wait("c1", "e1"); code != 137 {
		t.Errorf("exec ended with %d", code)
	}
	if err := f.delete("c1", "e1"); err != nil {
		t.Error(err)
	}
	if err := f.kill("c1", ""); err != nil {
		t.Error(err)
	}
	if code := f.wait("c1", ""); code != 137 {
		t.Errorf("ended with %d", code)
	}
	if s := f.status("c1", ""); s.Status != tasktypes.Status_STOPPED || s.ExitStatus != 137 || s.ExitedAt.AsTime().Before(time.Now().Add(-time.Hour)) {
		t.Errorf("stopped: %v", s)
	}
	if err := f.kill("c1", ""); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "process already finished") {
		t.Errorf("kill of what has ended: %v", err)
	}
	if _, err := f.Stats(ctx, &taskapi.StatsRequest{ID: "c1"}); err != nil {
		t.Errorf("stats of what has ended: %v", err)
	}
	if err := f.delete("c1", ""); err != nil {
		t.Error(err)
	}
	if err := f.delete("c1", ""); !errdefs.IsNotFound(err) {
		t.Errorf("deleted again: %v", err)
	}
	f.shutdown("c1")
	f.shutdown("c1")
	<-f.down
	f.expectEvents("create c1", "start c1", "exec-added c1 e1", "exec-started c1 e1", "paused c1", "resumed c1",
		"exit c1 e1 137", "exit c1 c1 137", "delete c1 137")
	if err := f.end(); err != nil {
		t.Error(err)
	}
	if calls := f.agent.Calls(); !slices.Contains(calls, "Shutdown") || calls[0] != "Info" || calls[1] != "ConfigureSandbox" {
		t.Errorf("the agent was asked %v", calls)
	}
}

func TestErrors(t *testing.T) {
	f := newFixture(t)
	ctx := context.Background()
	f.create("c1", "sleep")
	start := func(id, execID string) error {
		_, err := f.Start(ctx, &taskapi.StartRequest{ID: id, ExecID: execID})
		return err
	}
	for _, test := range []struct {
		name string
		err  error
		is   func(error) bool
	}{
		{"create again", func() error {
			_, err := f.Create(ctx, &taskapi.CreateTaskRequest{ID: "c1", Bundle: f.bundle(nil, "sleep")})
			return err
		}(), errdefs.IsAlreadyExists},
		{"no such bundle", func() error {
			_, err := f.Create(ctx, &taskapi.CreateTaskRequest{ID: "c2", Bundle: "/nonexistent"})
			return err
		}(), errdefs.IsInvalidArgument},
		{"bad id", func() error {
			_, err := f.Create(ctx, &taskapi.CreateTaskRequest{ID: "../c", Bundle: f.bundle(nil, "sleep")})
			return err
		}(), errdefs.IsInvalidArgument},
		{"restore", func() error {
			_, err := f.Create(ctx, &taskapi.CreateTaskRequest{ID: "c2", Bundle: f.bundle(nil, "sleep"), Checkpoint: "/c"})
			return err
		}(), errdefs.IsNotImplemented},
		{"checkpoint", func() error {
			_, err := f.Checkpoint(ctx, &taskapi.CheckpointTaskRequest{ID: "c1"})
			return err
		}(), errdefs.IsNotImplemented},
		{"start of nothing", start("other", ""), errdefs.IsNotFound},
		{"start of no exec", start("c1", "e"), errdefs.IsNotFound},
		{"pause before start", func() error { _, err := f.Pause(ctx, &taskapi.PauseRequest{ID: "c1"}); return err }(), errdefs.IsFailedPrecondition},
		{"resume before start", func() error { _, err := f.Resume(ctx, &taskapi.ResumeRequest{ID: "c1"}); return err }(), errdefs.IsFailedPrecondition},
		{"bad exec id", f.exec("c1", "a/b", "sleep"), errdefs.IsInvalidArgument},
		{"bad exec process", func() error {
			_, err := f.Exec(ctx, &taskapi.ExecProcessRequest{ID: "c1", ExecID: "e", Spec: &anypb.Any{Value: []byte("{")}})
			return err
		}(), errdefs.IsInvalidArgument},
		{"bad signal", func() error { _, err := f.Kill(ctx, &taskapi.KillRequest{ID: "c1", Signal: 65}); return err }(), errdefs.IsInvalidArgument},
		{"bad resources", func() error {
			_, err := f.Update(ctx, &taskapi.UpdateTaskRequest{ID: "c1", Resources: &anypb.Any{Value: []byte("x")}})
			return err
		}(), errdefs.IsInvalidArgument},
		{"wait without a container", func() error { _, err := f.Wait(ctx, &taskapi.WaitRequest{ID: "x"}); return err }(), errdefs.IsNotFound},
	} {
		if !test.is(test.err) {
			t.Errorf("%s: %v", test.name, test.err)
		}
	}
	f.start("c1", "")
	for _, test := range []struct {
		name string
		err  error
		is   func(error) bool
	}{
		{"start again", start("c1", ""), errdefs.IsFailedPrecondition},
		{"delete while it runs", f.delete("c1", ""), errdefs.IsFailedPrecondition},
		{"exec", f.exec("c1", "e", "sleep"), func(err error) bool { return err == nil }},
		{"exec again", f.exec("c1", "e", "sleep"), errdefs.IsAlreadyExists},
		{"kill of an exec that was not started", f.kill("c1", "e"), errdefs.IsFailedPrecondition},
		{"missing program", f.exec("c1", "e2", "nonsense"), func(err error) bool {
			return err != nil && strings.Contains(err.Error(), `"nonsense": executable file not found`)
		}},
	} {
		if !test.is(test.err) {
			t.Errorf("%s: %v", test.name, test.err)
		}
	}
	if err := f.kill("c1", ""); err != nil {
		t.Error(err)
	}
	f.wait("c1", "")
	if err := f.exec("c1", "e3", "sleep"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("exec after the end: %v", err)
	}
	if err := start("c1", "e"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("start of an exec after the end: %v", err)
	}
	if err := f.delete("c1", ""); err != nil {
		t.Error(err)
	}
}

// A container that was only created can be deleted: it is killed.
func TestDeleteCreated(t *testing.T) {
	f := newFixture(t)
	f.create("c1", "sleep")
	if err := f.delete("c1", ""); err != nil {
		t.Fatal(err)
	}
	f.expectEvents("create c1", "exit c1 c1 137", "delete c1 137")
}

// An exec whose start fails has ended, without events of a start or an exit.
func TestExecThatDoesNotStart(t *testing.T) {
	f := newFixture(t)
	f.agent.SetIntercept(func(method string, r any) (any, error) {
		if p, ok := r.(*agentproto.ProcessRequest); ok && method == "StartProcess" && p.ExecId != "" {
			return nil, errors.New("no such user")
		}
		return nil, nil
	})
	f.create("c1", "sleep")
	f.start("c1", "")
	if err := f.exec("c1", "e1", "sleep"); err != nil {
		t.Fatal(err)
	}
	waited := make(chan uint32)
	go func() { waited <- f.wait("c1", "e1") }()
	if _, err := f.Start(context.Background(), &taskapi.StartRequest{ID: "c1", ExecID: "e1"}); err == nil || !strings.Contains(err.Error(), "no such user") {
		t.Errorf("start: %v", err)
	}
	if code := <-waited; code == 0 {
		t.Error("ended with 0")
	}
	if err := f.delete("c1", "e1"); err != nil {
		t.Error(err)
	}
	f.expectEvents("create c1", "start c1", "exec-added c1 e1")
	f.kill("c1", "")
	f.wait("c1", "")
	f.delete("c1", "")
}

// All output is with the client when the exit is told, and processes that exit
// at once do so after they have started.
func TestOutputBeforeExit(t *testing.T) {
	f := newFixture(t)
	const size = 8 << 20
	f.agent.Programs["write"] = func(p *agenttest.Process) uint32 {
		p.Stdout.Write(make([]byte, size))
		p.Stderr.Write([]byte("err"))
		return 7
	}
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"out", "err"} {
		if err := unix.Mkfifo(path(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, err := os.OpenFile(path("out"), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	_, err = f.Create(context.Background(), &taskapi.CreateTaskRequest{
		ID: "c1", Bundle: f.bundle(nil, "write"), Stdout: path("out"), Stderr: path("err"),
	})
	if err != nil {
		t.Fatal(err)
	}
	received := make(chan int64, 1)
	go func() {
		n, _ := io.Copy(io.Discard, out)
		received <- n
	}()
	f.start("c1", "")
	if code := f.wait("c1", ""); code != 7 {
		t.Errorf("ended with %d", code)
	}
	// The shim has let go of the fifo: this is all there will be.
	if n := <-received; n != size {
		t.Errorf("%d bytes of %d", n, size)
	}
	if err := f.delete("c1", ""); err != nil {
		t.Error(err)
	}
	f.expectEvents("create c1", "start c1", "exit c1 c1 7", "delete c1 7")
}

func TestStdin(t *testing.T) {
	f := newFixture(t)
	got := make(chan string, 1)
	f.agent.Programs["read"] = func(p *agenttest.Process) uint32 {
		data, _ := io.ReadAll(p.Stdin)
		got <- string(data)
		return 0
	}
	stdin := filepath.Join(t.TempDir(), "in")
	if err := unix.Mkfifo(stdin, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Create(context.Background(), &taskapi.CreateTaskRequest{ID: "c1", Bundle: f.bundle(nil, "read"), Stdin: stdin}); err != nil {
		t.Fatal(err)
	}
	f.start("c1", "")
	w, err := os.OpenFile(stdin, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, "hello")
	w.Close()
	if _, err := f.CloseIO(context.Background(), &taskapi.CloseIORequest{ID: "c1", Stdin: true}); err != nil {
		t.Fatal(err)
	}
	if text := <-got; text != "hello" {
		t.Errorf("the process read %q", text)
	}
	f.wait("c1", "")
	if err := f.delete("c1", ""); err != nil {
		t.Error(err)
	}
}

// Everybody at once: each exit and each delete is told once.
func TestConcurrentEnd(t *testing.T) {
	f := newFixture(t)
	const containers = 4
	var wg sync.WaitGroup
	for i := range containers {
		id := fmt.Sprintf("c%d", i)
		f.create(id, "sleep")
		f.start(id, "")
		if err := f.exec(id, "e", "sleep"); err != nil {
			t.Fatal(err)
		}
		f.start(id, "e")
	}
	for i := range containers {
		id := fmt.Sprintf("c%d", i)
		for range 3 {
			wg.Go(func() { f.kill(id, "e"); f.kill(id, "") })
			wg.Go(func() {
				// Another one may have deleted it by now.
				r, err := f.Wait(context.Background(), &taskapi.WaitRequest{ID: id})
				if err == nil && r.ExitStatus != 137 || err != nil && !errdefs.IsNotFound(err) {
					t.Errorf("%s: %v, %v", id, r, err)
				}
				f.delete(id, "")
				f.Shutdown(context.Background(), &taskapi.ShutdownRequest{ID: id})
			})
			wg.Go(func() {
				f.State(context.Background(), &taskapi.StateRequest{ID: id})
				f.Pids(context.Background(), &taskapi.PidsRequest{ID: id})
				f.Stats(context.Background(), &taskapi.StatsRequest{ID: id})
				f.exec(id, "late", "sleep")
			})
		}
	}
	wg.Wait()
	<-f.down
	count := map[string]int{}
	position := map[string]int{}
	for i, e := range f.seen() {
		count[e]++
		position[e] = i
	}
	for i := range containers {
		id := fmt.Sprintf("c%d", i)
		exit, execExit, deleted := fmt.Sprintf("exit %s %s 137", id, id), fmt.Sprintf("exit %s e 137", id), fmt.Sprintf("delete %s 137", id)
		for _, e := range []string{exit, execExit, deleted} {
			if count[e] != 1 {
				t.Errorf("%q came %d times", e, count[e])
			}
		}
		if !(position[execExit] < position[exit] && position[exit] < position[deleted]) {
			t.Errorf("order of %s's events: %q", id, f.seen())
		}
	}
}

func TestRootfs(t *testing.T) {
	f := newFixture(t)
	bundle := f.bundle(nil, "sleep")
	_, err := f.Create(context.Background(), &taskapi.CreateTaskRequest{
		ID: "c1", Bundle: bundle, Rootfs: []*types.Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/l"}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if r := f.tree.added["c1"]; len(r.Mounts) != 1 || r.Mounts[0].Type != "overlay" || r.Path != "" {
		t.Errorf("rootfs %+v", r)
	}
	f.create("c2", "sleep")
	if r := f.tree.added["c2"]; len(r.Mounts) != 0 || !strings.HasSuffix(r.Path, "/rootfs") {
		t.Errorf("rootfs %+v", r)
	}
	other := f.bundle(func(s *specs.Spec) { s.Root.Path = "/somewhere" }, "sleep")
	if _, err := f.Create(context.Background(), &taskapi.CreateTaskRequest{ID: "c3", Bundle: other}); err != nil {
		t.Fatal(err)
	}
	if r := f.tree.added["c3"]; r.Path != "/somewhere" {
		t.Errorf("rootfs %+v", r)
	}
	for _, id := range []string{"c1", "c2", "c3"} {
		if err := f.delete(id, ""); err != nil {
			t.Error(err)
		}
	}
	if spec := f.agent.Spec("c3"); spec.Root.Path != "/run/microvm/shared/c3/rootfs" {
		t.Errorf("root in the guest: %s", spec.Root.Path)
	}
}

// The exit is kept in the bundle for a delete without a shim.
func TestExitRecord(t *testing.T) {
	f := newFixture(t)
	bundle := f.bundle(nil, "exit")
	if _, err := f.Create(context.Background(), &taskapi.CreateTaskRequest{ID: "c1", Bundle: bundle}); err != nil {
		t.Fatal(err)
	}
	f.start("c1", "")
	f.wait("c1", "")
	if _, err := os.Stat(exitRecordPath(bundle)); err != nil {
		t.Error(err)
	}
	f.delete("c1", "")
}

func TestHooks(t *testing.T) {
	f := newFixture(t)
	file := filepath.Join(t.TempDir(), "hooks")
	hook := func(name string) []specs.Hook {
		return []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", `printf "%s " "$NAME" >> ` + file + `; grep -o '"status":"[a-z]*"' >> ` + file}, Env: []string{"NAME=" + name}}}
	}
	bundle := f.bundle(func(s *specs.Spec) {
		s.Hooks = &specs.Hooks{CreateRuntime: hook("createRuntime"), Poststart: hook("poststart"), Poststop: hook("poststop")}
	}, "sleep")
	if _, err := f.Create(context.Background(), &taskapi.CreateTaskRequest{ID: "c1", Bundle: bundle}); err != nil {
		t.Fatal(err)
	}
	f.start("c1", "")
	f.kill("c1", "")
	f.wait("c1", "")
	if err := f.delete("c1", ""); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(file)
	want := "createRuntime \"status\":\"creating\"\npoststart \"status\":\"running\"\npoststop \"status\":\"stopped\"\n"
	if err != nil || string(data) != want {
		t.Errorf("%q, %v", data, err)
	}
	if n := f.tree.onHost.Load(); n != 3 {
		t.Errorf("%d of 3 hooks ran on the host", n)
	}
}

// What hooks have set up is undone when the container does not come, or is
// stopped by one of them.
func TestFailingHooks(t *testing.T) {
	file := filepath.Join(t.TempDir(), "hooks")
	shell := func(script string) []specs.Hook {
		return []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", script}}}
	}
	undo := append(shell("exit 1"), shell("echo undone >> "+file)...)
	for _, hooks := range []*specs.Hooks{
		{CreateRuntime: shell("exit 1"), Poststop: undo},
		{Poststart: shell("exit 1"), Poststop: undo},
	} {
		f := newFixture(t)
		bundle := f.bundle(func(s *specs.Spec) { s.Hooks = hooks }, "sleep")
		_, err := f.Create(context.Background(), &taskapi.CreateTaskRequest{ID: "c1", Bundle: bundle})
		if hooks.Poststart != nil {
			if err != nil {
				t.Fatal(err)
			}
			if _, err = f.Start(context.Background(), &taskapi.StartRequest{ID: "c1"}); err == nil {
				t.Error("started although its hook failed")
			}
			if code := f.wait("c1", ""); code != 137 {
				t.Errorf("ended with %d", code)
			}
			if err := f.delete("c1", ""); err != nil {
				t.Error(err)
			}
		} else if err == nil {
			t.Error("created although its hook failed")
		}
	}
	if data, err := os.ReadFile(file); err != nil || string(data) != "undone\nundone\n" {
		t.Errorf("%q, %v", data, err)
	}
}
