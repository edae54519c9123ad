package shim

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/microvm-runtime/microvm/pkg/shim/agenttest"
	"github.com/microvm-runtime/microvm/pkg/shim/bootstrap"
	"github.com/microvm-runtime/microvm/pkg/shim/state"
)

// What cannot be removed keeps its record, by which the next delete removes it.
func TestDeleteKeepsRecord(t *testing.T) {
	p := &Program{stateRoot: t.TempDir()}
	// It stands for a cgroup that something is still in.
	cgroup := filepath.Join(t.TempDir(), "cgroup")
	if err := os.MkdirAll(filepath.Join(cgroup, "busy"), 0o755); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "s")
	if err := os.WriteFile(socket, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	dir, err := state.At(p.stateRoot, "ns", "c1")
	if err != nil {
		t.Fatal(err)
	}
	held, err := dir.Hold(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	held.Release()
	if err := dir.Store(state.Record{Cgroups: []string{cgroup}, Socket: socket}); err != nil {
		t.Fatal(err)
	}
	bundle := t.TempDir()
	writeConfig(t, bundle, []byte("{}"))
	in := bootstrap.Invocation{Action: bootstrap.ActionDelete, ID: "c1", Namespace: "ns", Bundle: bundle}
	var stdout, stderr bytes.Buffer
	if err := p.delete(in, &stdout, &stderr); err == nil || !strings.Contains(err.Error(), "remove cgroup") {
		t.Errorf("delete: %v", err)
	}
	if _, err := os.Stat(socket); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is left because of the cgroup: %v", err)
	}
	if err := os.Remove(filepath.Join(cgroup, "busy")); err != nil {
		t.Fatal(err)
	}
	in.ID = "c2"
	if err := p.delete(in, &stdout, &stderr); err != nil {
		t.Error(err)
	}
	for _, path := range []string{cgroup, dir.Path} {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
}

// A container that needs more time than delete has takes neither the shim along
// nor the other containers of its sandbox, and goes in the end.
func TestDeleteOfASlowContainer(t *testing.T) {
	f := newFixture(t)
	p := &Program{stateRoot: t.TempDir()}
	shim := f.serveAs(p, "pod")
	release := make(chan struct{})
	f.agent.Programs["slow"] = func(p *agenttest.Process) uint32 {
		<-p.Killed
		<-release
		return 137
	}
	bundle := f.bundle(func(s *specs.Spec) {
		s.Annotations = map[string]string{"io.kubernetes.cri.sandbox-id": "pod"}
	}, "slow")
	f.create("c1", "sleep")
	f.start("c1", "")
	if _, err := f.Create(t.Context(), &taskapi.CreateTaskRequest{ID: "c2", Bundle: bundle}); err != nil {
		t.Fatal(err)
	}
	f.start("c2", "")
	in := bootstrap.Invocation{Action: bootstrap.ActionDelete, ID: "c2", Namespace: "ns", Bundle: bundle}
	var stdout, stderr bytes.Buffer
	if err := p.delete(in, &stdout, &stderr); err != nil {
		t.Error(err)
	}
	select {
	case <-shim:
		t.Error("the shim was killed")
	default:
	}
	if s := f.status("c1", ""); s.Status != tasktypes.Status_RUNNING {
		t.Errorf("the other container: %v", s)
	}
	close(release)
	f.awaitDeleted("c2")
	f.endAll("c1")
}

// Who shuts down for a container that is there asks no more for it: it goes when
// it can, and others stay.
func TestShutdownWithContainer(t *testing.T) {
	f := newFixture(t)
	release := make(chan struct{})
	f.agent.Programs["slow"] = func(p *agenttest.Process) uint32 {
		<-p.Killed
		<-release
		return 137
	}
	for id, program := range map[string]string{"c1": "sleep", "c2": "slow"} {
		f.create(id, program)
		f.start(id, "")
	}
	f.shutdown("c2")
	if s := f.status("c1", ""); s.Status != tasktypes.Status_RUNNING {
		t.Errorf("the other container: %v", s)
	}
	close(release)
	f.awaitDeleted("c2")
	f.endAll("c1")
	f.shutdown("c1")
	<-f.down
}

func (f *fixture) awaitDeleted(id string) {
	f.t.Helper()
	for {
		if _, err := f.State(f.t.Context(), &taskapi.StateRequest{ID: id}); errdefs.IsNotFound(err) {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// serveAs serves on a socket as the shim of a sandbox, whose process is another
// one; its end closes ended.
func (f *fixture) serveAs(p *Program, sandbox string) (ended <-chan struct{}) {
	f.t.Helper()
	fail := func(err error) {
		f.t.Helper()
		if err != nil {
			f.t.Fatal(err)
		}
	}
	socket := filepath.Join(f.t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	fail(err)
	server, err := ttrpc.NewServer()
	fail(err)
	register(server, f.service)
	registerSandbox(server, f.service)
	go server.Serve(context.Background(), l)
	f.t.Cleanup(func() { server.Close() })

	dir, err := state.At(p.stateRoot, "ns", sandbox)
	fail(err)
	held, err := dir.Hold(f.t.Context())
	fail(err)
	defer held.Release()
	lock, err := dir.Lock()
	fail(err)
	defer lock.Close()
	shim := exec.Command("sleep", "infinity")
	shim.ExtraFiles = []*os.File{lock}
	fail(shim.Start())
	done := make(chan struct{})
	go func() {
		shim.Wait()
		close(done)
	}()
	f.t.Cleanup(func() {
		shim.Process.Kill()
		<-done
	})
	process, err := state.Identify(shim.Process.Pid)
	fail(err)
	fail(dir.Store(state.Record{Shim: process, Socket: socket}))
	return done
}
