package shim

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
	"github.com/microvm-runtime/microvm/pkg/shim/agenttest"
)

// abandonCreate has a Create of c1 given up on while the agent works on it, which
// then goes on to answer as is said.
func (f *fixture) abandonCreate(answer error) (goOn func()) {
	f.t.Helper()
	asked, proceed := make(chan struct{}), make(chan struct{})
	f.agent.SetIntercept(func(method string, r any) (any, error) {
		if c, ok := r.(*agentproto.CreateContainerRequest); ok && c.GetId() == "c1" {
			close(asked)
			<-proceed
			f.agent.SetIntercept(nil)
			return nil, answer
		}
		return nil, nil
	})
	ctx, cancel := context.WithCancel(f.t.Context())
	go func() {
		<-asked
		cancel()
	}()
	if _, err := f.Create(ctx, &taskapi.CreateTaskRequest{ID: "c1", Bundle: f.bundle(nil, "sleep")}); err == nil {
		f.t.Fatal("a creation that was cancelled has succeeded")
	}
	return func() { close(proceed) }
}

// A container whose creation was given up on is not taken for one that is created
// since under its id, whether the agent has made it or not.
func TestCreateAfterAbandonedCreate(t *testing.T) {
	for name, answer := range map[string]error{"made": nil, "failed": errors.New("no such root")} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			f.create("c0", "sleep")
			goOn := f.abandonCreate(answer)
			early, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
			defer cancel()
			_, err := f.Create(early, &taskapi.CreateTaskRequest{ID: "c1", Bundle: f.bundle(nil, "sleep")})
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("while the guest may have one of the same id: %v", err)
			}
			waits := make(chan error)
			go func() {
				_, err := f.Create(context.Background(), &taskapi.CreateTaskRequest{ID: "c1", Bundle: f.bundle(nil, "sleep")})
				waits <- err
			}()
			for !f.isCreating("c1") {
				time.Sleep(time.Millisecond)
			}
			f.delete("c1", "")
			if err := <-waits; !errdefs.IsAborted(err) {
				t.Errorf("deleted while it waits for its id: %v", err)
			}
			goOn()
			f.create("c1", "sleep")
			f.start("c1", "")
			calls := f.agent.Calls()
			last := len(calls) - 1 - slices.Index(reversed(calls), "CreateContainer")
			if slices.Contains(calls[last:], "SignalProcess") || slices.Contains(calls[last:], "DeleteProcess") {
				t.Errorf("the agent was asked %q", calls)
			}
			if deleted := slices.Contains(calls[:last], "DeleteProcess"); deleted != (answer == nil) {
				t.Errorf("the abandoned one was deleted: %v; the agent was asked %q", deleted, calls)
			}
			if s := f.status("c1", ""); s.Status != tasktypes.Status_RUNNING {
				t.Errorf("c1: %v", s)
			}
			f.endAll("c1", "c0")
		})
	}
}

func (f *fixture) isCreating(id string) bool {
	f.service.mu.Lock()
	defer f.service.mu.Unlock()
	return f.service.creating[id] != nil
}

func reversed(list []string) []string {
	list = slices.Clone(list)
	slices.Reverse(list)
	return list
}

// An exec whose start was given up on is ended and deleted when the agent has
// started it or failed to, and keeps its id until then.
func TestAbandonedExecStart(t *testing.T) {
	for name, answer := range map[string]error{"started": nil, "failed": errors.New("no such program")} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			ended := make(chan struct{})
			f.agent.Programs["probe"] = func(p *agenttest.Process) uint32 {
				defer close(ended)
				<-p.Killed
				return 137
			}
			f.create("c1", "sleep")
			f.start("c1", "")
			if err := f.exec("c1", "e1", "probe"); err != nil {
				t.Fatal(err)
			}
			asked, proceed := make(chan struct{}), make(chan struct{})
			f.agent.SetIntercept(func(method string, _ any) (any, error) {
				if method == "StartProcess" {
					close(asked)
					<-proceed
					f.agent.SetIntercept(nil)
					return nil, answer
				}
				return nil, nil
			})
			ctx, cancel := context.WithCancel(t.Context())
			go func() {
				<-asked
				cancel()
			}()
			if _, err := f.Start(ctx, &taskapi.StartRequest{ID: "c1", ExecID: "e1"}); err == nil {
				t.Fatal("a start that was cancelled has succeeded")
			}
			if err := f.delete("c1", "e1"); err != nil {
				t.Errorf("delete: %v", err)
			}
			if _, err := f.State(t.Context(), &taskapi.StateRequest{ID: "c1", ExecID: "e1"}); !errdefs.IsNotFound(err) {
				t.Errorf("state of a deleted exec: %v", err)
			}
			if err := f.exec("c1", "e1", "sleep"); !errdefs.IsAlreadyExists(err) {
				t.Errorf("an exec of the same id: %v", err)
			}
			close(proceed)
			if answer == nil {
				<-ended
			}
			for f.exec("c1", "e1", "sleep") != nil {
				time.Sleep(time.Millisecond)
			}
			if !slices.Contains(f.agent.Calls(), "DeleteProcess") {
				t.Errorf("the agent was asked %q", f.agent.Calls())
			}
			f.start("c1", "e1")
			f.endAll("c1")
		})
	}
}

// A pause whose caller has gone is done, and known.
func TestAbandonedPause(t *testing.T) {
	f := newFixture(t)
	f.create("c1", "sleep")
	f.start("c1", "")
	asked, proceed := make(chan struct{}), make(chan struct{})
	f.agent.SetIntercept(func(method string, _ any) (any, error) {
		if method == "PauseContainer" {
			close(asked)
			<-proceed
		}
		return nil, nil
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-asked
		cancel()
		close(proceed)
	}()
	f.Pause(ctx, &taskapi.PauseRequest{ID: "c1"})
	if s := f.status("c1", ""); s.Status != tasktypes.Status_PAUSED {
		t.Errorf("%v", s)
	}
	if _, err := f.Resume(t.Context(), &taskapi.ResumeRequest{ID: "c1"}); err != nil {
		t.Error(err)
	}
	f.endAll("c1")
}

// A pause that the guest gets to when it is taken back already can be undone.
func TestLatePause(t *testing.T) {
	f := newFixture(t)
	f.create("c1", "sleep")
	f.start("c1", "")
	f.agent.SetIntercept(func(method string, _ any) (any, error) {
		switch method {
		case "PauseContainer":
			return nil, context.DeadlineExceeded
		case "ResumeContainer":
			return nil, errors.New("it is not paused")
		}
		return nil, nil
	})
	if _, err := f.Pause(t.Context(), &taskapi.PauseRequest{ID: "c1"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("pause: %v", err)
	}
	f.agent.SetIntercept(nil)
	if _, err := f.Resume(t.Context(), &taskapi.ResumeRequest{ID: "c1"}); err != nil {
		t.Errorf("resume: %v", err)
	}
	if _, err := f.Resume(t.Context(), &taskapi.ResumeRequest{ID: "c1"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("resume of what is not paused: %v", err)
	}
	f.endAll("c1")
}
