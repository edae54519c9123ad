package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/containerd/containerd/v2/pkg/identifiers"

	"github.com/microvm-runtime/microvm/pkg/shim/guestspec"
	"github.com/microvm-runtime/microvm/pkg/shim/stdio"
)

var empty = &emptypb.Empty{}

// listTime is how long the guest may take to list a container's processes.
// containerd gives all that it asks of a shim that it has found five seconds.
const listTime = 3 * time.Second

// service is containerd's task API for the containers of one sandbox.
type service struct {
	namespace string
	host      *host
	publish   func(proto.Message)
	// shutdown is called once the sandbox is not needed any more.
	shutdown func()

	// slot is held by the one container that is being created.
	slot chan struct{}
	// sandbox is changed only while slot is held, nil when there is none.
	sandbox *sandbox

	mu         sync.Mutex
	containers map[string]*container
	creating   map[string]*creation
	// withheld are ids of which the guest may have something left.
	withheld map[string]chan struct{}
	// pod is nil unless the sandbox is one of the sandbox API.
	pod    *pod
	closed bool
}

// creation is a Create in progress.
type creation struct {
	cancel context.CancelCauseFunc
	done   chan struct{}
}

func newService(namespace string, h *host, publish func(proto.Message), shutdown func()) *service {
	return &service{
		namespace:  namespace,
		host:       h,
		publish:    publish,
		shutdown:   shutdown,
		slot:       make(chan struct{}, 1),
		containers: map[string]*container{},
		creating:   map[string]*creation{},
		withheld:   map[string]chan struct{}{},
	}
}

func (s *service) container(id string) (*container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.containers[id]
	if c == nil {
		return nil, fmt.Errorf("container %s: not created: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

// find returns a container and one of its processes.
func (s *service) find(id, execID string) (*container, *process, error) {
	c, err := s.container(id)
	if err != nil {
		return nil, nil, err
	}
	p, err := c.process(execID)
	return c, p, err
}

func (s *service) Start(ctx context.Context, r *taskapi.StartRequest) (*taskapi.StartResponse, error) {
	c, p, err := s.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	if r.GetExecID() == "" {
		// What was connected since Create has to be there from the beginning.
		if err := c.sandbox.alive(); err == nil {
			if err := c.sandbox.syncNetwork(ctx); err != nil {
				return nil, fmt.Errorf("container %s: network: %w", c.id, err)
			}
		}
	}
	if err := p.start(ctx); err != nil {
		return nil, err
	}
	if r.GetExecID() == "" {
		if err := c.runHooks(ctx, "poststart", c.hooks.Poststart, specs.StateRunning); err != nil {
			return nil, errors.Join(err, p.kill(context.WithoutCancel(ctx), sigkill, false))
		}
	}
	return &taskapi.StartResponse{Pid: p.pid()}, nil
}

func (s *service) State(_ context.Context, r *taskapi.StateRequest) (*taskapi.StateResponse, error) {
	c, p, err := s.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	status, code, at := c.status(p)
	return &taskapi.StateResponse{
		ID:         p.id(),
		Bundle:     c.bundle,
		Pid:        p.pid(),
		Status:     status,
		Stdin:      p.stdio.Stdin,
		Stdout:     p.stdio.Stdout,
		Stderr:     p.stdio.Stderr,
		Terminal:   p.stdio.Terminal,
		ExitStatus: code,
		ExitedAt:   timestamppb.New(at),
		ExecID:     r.GetExecID(),
	}, nil
}

func (s *service) Delete(ctx context.Context, r *taskapi.DeleteRequest) (*taskapi.DeleteResponse, error) {
	if r.GetExecID() == "" {
		s.abandon(ctx, r.GetID())
	}
	c, p, err := s.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	if r.GetExecID() != "" {
		err = c.deleteExec(ctx, p)
	} else if err = c.delete(ctx); err == nil {
		s.mu.Lock()
		delete(s.containers, c.id)
		s.mu.Unlock()
		c.sandbox.resizer.gone(c.id)
	}
	if err != nil {
		return nil, err
	}
	_, code, at := p.state()
	return &taskapi.DeleteResponse{Pid: p.pid(), ExitStatus: code, ExitedAt: timestamppb.New(at)}, nil
}

func (s *service) Pids(ctx context.Context, r *taskapi.PidsRequest) (*taskapi.PidsResponse, error) {
	c, err := s.container(r.GetID())
	if err != nil {
		return nil, err
	}
	// Until it is deleted, what stands for it on the host is there. A containerd
	// that was away takes a shim whose task has no processes, or up to 2.2 cannot
	// name any, for one that nobody knows (core/runtime/v2/shim_load.go), and
	// deletes the task, with the exit that it has not been told of.
	standing := &taskapi.PidsResponse{Processes: []*tasktypes.ProcessInfo{{Pid: c.pid}}}
	if status, _, _ := c.init.state(); status == tasktypes.Status_STOPPED {
		return standing, nil
	}
	brief, cancel := context.WithTimeout(ctx, listTime)
	defer cancel()
	list, err := c.agent.Processes(brief, c.id)
	if errors.Is(err, context.DeadlineExceeded) || errdefs.IsUnavailable(err) {
		log.L.WithError(err).Warnf("container %s: only what stands for it on the host is listed", c.id)
		return standing, nil
	}
	if err != nil {
		return nil, err
	}
	response := &taskapi.PidsResponse{}
	for _, p := range list {
		info := &tasktypes.ProcessInfo{Pid: p.Pid}
		if p.ExecID != "" {
			if _, err := c.process(p.ExecID); err != nil {
				continue // the agent made it up, or it is being deleted
			}
			if info.Info, err = typeurl.MarshalAnyToProto(&options.ProcessDetails{ExecID: p.ExecID}); err != nil {
				return nil, fmt.Errorf("process details: %w", err)
			}
		}
		response.Processes = append(response.Processes, info)
	}
	return response, nil
}

func (s *service) Pause(ctx context.Context, r *taskapi.PauseRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.GetID())
	if err != nil {
		return nil, err
	}
	return empty, c.pause(ctx)
}

func (s *service) Resume(ctx context.Context, r *taskapi.ResumeRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.GetID())
	if err != nil {
		return nil, err
	}
	return empty, c.resume(ctx)
}

func (s *service) Checkpoint(_ context.Context, r *taskapi.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return nil, fmt.Errorf("checkpoint of container %s: containers in virtual machines cannot be checkpointed: %w",
		r.GetID(), errdefs.ErrNotImplemented)
}

func (s *service) Kill(ctx context.Context, r *taskapi.KillRequest) (*emptypb.Empty, error) {
	_, p, err := s.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	return empty, p.kill(ctx, r.GetSignal(), r.GetAll())
}

func (s *service) Exec(ctx context.Context, r *taskapi.ExecProcessRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.GetID())
	if err != nil {
		return nil, err
	}
	if err := identifiers.Validate(r.GetExecID()); err != nil {
		return nil, fmt.Errorf("exec id: %w", err)
	}
	var spec specs.Process
	if err := json.Unmarshal(r.GetSpec().GetValue(), &spec); err != nil {
		return nil, fmt.Errorf("exec %s: process: %w: %w", r.GetExecID(), err, errdefs.ErrInvalidArgument)
	}
	spec.Terminal = r.GetTerminal()
	spec.ExecCPUAffinity = nil // the numbers are those of the host's CPUs
	err = c.addExec(ctx, r.GetExecID(), &spec, stdio.Config{
		ID: r.GetExecID(), Namespace: s.namespace,
		Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(), Terminal: r.GetTerminal(),
	})
	return empty, err
}

func (s *service) ResizePty(ctx context.Context, r *taskapi.ResizePtyRequest) (*emptypb.Empty, error) {
	c, p, err := s.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	if !p.stdio.Terminal {
		return empty, nil // as runc's shim does
	}
	if status, _, _ := p.state(); status == tasktypes.Status_STOPPED {
		return nil, fmt.Errorf("cannot resize a stopped process: %w", errdefs.ErrFailedPrecondition)
	}
	return empty, c.agent.ResizePty(ctx, c.id, p.execID, r.GetWidth(), r.GetHeight())
}

func (s *service) CloseIO(_ context.Context, r *taskapi.CloseIORequest) (*emptypb.Empty, error) {
	_, p, err := s.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	if r.GetStdin() {
		p.streams.CloseStdin()
	}
	return empty, nil
}

func (s *service) Update(ctx context.Context, r *taskapi.UpdateTaskRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.GetID())
	if err != nil {
		return nil, err
	}
	var resources specs.LinuxResources
	if err := json.Unmarshal(r.GetResources().GetValue(), &resources); err != nil {
		return nil, fmt.Errorf("update container %s: %w: %w", c.id, err, errdefs.ErrInvalidArgument)
	}
	for _, remark := range guestspec.Resources(&resources) {
		log.L.Infof("container %s: %s", c.id, remark)
	}
	data, err := json.Marshal(resources)
	if err != nil {
		return nil, fmt.Errorf("update container %s: %w", c.id, err)
	}
	c.operation.Lock()
	defer c.operation.Unlock()
	if status, _, _ := c.init.state(); status == tasktypes.Status_STOPPED {
		return nil, fmt.Errorf("cannot update a stopped container: %w", errdefs.ErrFailedPrecondition)
	}
	return empty, c.sandbox.resizer.change(ctx, c.id, &resources, func() error {
		return c.agent.Update(ctx, c.id, data)
	})
}

func (s *service) Wait(ctx context.Context, r *taskapi.WaitRequest) (*taskapi.WaitResponse, error) {
	_, p, err := s.find(r.GetID(), r.GetExecID())
	if err != nil {
		return nil, err
	}
	select {
	case <-p.exited:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	_, code, at := p.state()
	return &taskapi.WaitResponse{ExitStatus: code, ExitedAt: timestamppb.New(at)}, nil
}

func (s *service) Stats(ctx context.Context, r *taskapi.StatsRequest) (*taskapi.StatsResponse, error) {
	c, err := s.container(r.GetID())
	if err != nil {
		return nil, err
	}
	// Those of a container that has ended are there until it is deleted: CRI looks
	// into them for what has ended it.
	if status, _, _ := c.init.state(); status == tasktypes.Status_STOPPED && c.sandbox.alive() != nil {
		return nil, fmt.Errorf("container %s is not running: %w", c.id, errdefs.ErrNotFound)
	}
	metrics, err := c.agent.Stats(ctx, c.id)
	if err != nil {
		return nil, err
	}
	stats, err := typeurl.MarshalAnyToProto(metrics)
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	return &taskapi.StatsResponse{Stats: stats}, nil
}

// Connect answers for a container that does not exist, too: callers want to
// know whether the shim is there.
func (s *service) Connect(_ context.Context, r *taskapi.ConnectRequest) (*taskapi.ConnectResponse, error) {
	response := &taskapi.ConnectResponse{ShimPid: uint32(os.Getpid())}
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.containers[r.GetID()]; c != nil {
		response.TaskPid = c.pid
	} else if s.pod.runs() && s.pod.id == r.GetID() {
		response.TaskPid = s.pod.pid()
	}
	return response, nil
}

// Shutdown ends the shim when it serves no container any more. containerd
// calls it after each Delete, also if that has failed, and then asks no more
// for the container: what is still there of it goes when it can. A sandbox of
// the sandbox API may be without containers, and ends by ShutdownSandbox.
func (s *service) Shutdown(ctx context.Context, r *taskapi.ShutdownRequest) (*emptypb.Empty, error) {
	s.abandon(ctx, r.GetID())
	s.mu.Lock()
	creation, c := s.creating[r.GetID()], s.containers[r.GetID()]
	s.mu.Unlock()
	if creation != nil || c != nil {
		go s.dispose(r.GetID(), creation)
		return empty, nil
	}
	s.closeIfEmpty()
	return empty, nil
}

// dispose kills and deletes a container that nobody asks for any more, if it
// comes to be, and ends the shim if it was the last one.
func (s *service) dispose(id string, creation *creation) {
	if creation != nil {
		<-creation.done
	}
	ctx := context.Background()
	if c, err := s.container(id); err == nil {
		if err := c.init.kill(ctx, sigkill, true); err != nil && !errdefs.IsNotFound(err) {
			log.L.WithError(err).Warnf("container %s is not killed", id)
		}
		<-c.init.exited // if need be with the machine, see enforceKill
		if _, err := s.Delete(ctx, &taskapi.DeleteRequest{ID: id}); err != nil && !errdefs.IsNotFound(err) {
			log.L.WithError(err).Errorf("container %s is left until the sandbox ends", id)
		}
	}
	s.closeIfEmpty()
}

func (s *service) closeIfEmpty() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.containers) == 0 && len(s.creating) == 0 && s.pod == nil {
		s.close()
	}
}

// close has the shim shut down. The caller holds mu.
func (s *service) close() {
	if !s.closed {
		s.closed = true
		s.shutdown()
	}
}
