package shim

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/microvm-runtime/microvm/pkg/shim/agentclient"
	"github.com/microvm-runtime/microvm/pkg/shim/stdio"
)

// drainStall is how long the client of a process that has ended may not read
// its output, or the guest not end it, before the exit is told all the same.
const drainStall = 10 * time.Second

// process is a container's init process, or another one by its exec id.
type process struct {
	container *container
	execID    string // empty for init
	stdio     stdio.Config
	streams   *stdio.Streams

	// operation is held by what changes the process's state on a client's
	// behalf: start and delete.
	operation sync.Mutex

	mu      sync.Mutex
	status  task.Status // CREATED, RUNNING or STOPPED
	deleted bool
	// told is closed when the start event is on its way; the exit must not
	// overtake it.
	told   chan struct{}
	code   uint32
	at     time.Time
	exited chan struct{} // closed when STOPPED

	enforce sync.Once
	// undoing is the container's, see its setUndoing.
	undoing bool
	// outlives says that the process has outlived SIGKILL.
	outlives atomic.Bool
}

func newProcess(c *container, execID string, config stdio.Config, streams *stdio.Streams) *process {
	return &process{
		container: c,
		execID:    execID,
		stdio:     config,
		streams:   streams,
		status:    task.Status_CREATED,
		told:      make(chan struct{}),
		exited:    make(chan struct{}),
	}
}

// id is the one by which containerd's events name the process.
func (p *process) id() string {
	if p.execID == "" {
		return p.container.id
	}
	return p.execID
}

func (p *process) state() (status task.Status, code uint32, at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.status, p.code, p.at
}

// pid is the container's number, which is the host's.
func (p *process) pid() uint32 {
	status, _, _ := p.state()
	if p.execID != "" && status == task.Status_CREATED {
		return 0
	}
	return p.container.pid
}

// start lets the process run.
func (p *process) start(ctx context.Context) error {
	p.operation.Lock()
	defer p.operation.Unlock()
	c := p.container
	status, _, _ := p.state()
	switch {
	case p.isDeleted():
		return fmt.Errorf("process %s: %w", p.id(), errdefs.ErrNotFound)
	case status == task.Status_RUNNING:
		return fmt.Errorf("cannot start a running process: %w", errdefs.ErrFailedPrecondition)
	case status == task.Status_STOPPED:
		return fmt.Errorf("cannot start a stopped process: %w", errdefs.ErrFailedPrecondition)
	}
	if p.execID != "" {
		if err := c.beginExec(); err != nil {
			return err
		}
		defer c.endExecStart()
	}
	if err := c.sandbox.alive(); err != nil {
		return err
	}
	err := p.streams.StartStdin()
	switch {
	case err != nil:
	case p.execID == "":
		_, err = c.agent.StartProcess(ctx, c.id, "")
	default:
		err = c.startExec(ctx, p)
	}
	if err != nil {
		if p.execID != "" {
			// Nobody will tell of its end, because it has not begun.
			p.exit(agentclient.UnknownStatus, time.Now(), nil)
		}
		return err
	}
	p.mu.Lock()
	if p.status == task.Status_CREATED {
		p.status = task.Status_RUNNING
	}
	p.mu.Unlock()
	if p.execID == "" {
		c.publish(&eventsapi.TaskStart{ContainerID: c.id, Pid: p.pid()})
	} else {
		c.publish(&eventsapi.TaskExecStarted{ContainerID: c.id, ExecID: p.execID, Pid: p.pid()})
		c.execs.Add(1)
		go func() {
			defer c.execs.Done()
			p.watch()
		}()
	}
	close(p.told)
	return nil
}

// watch waits for the end of the process in the guest, and for its output,
// and tells of it, once.
func (p *process) watch() {
	c := p.container
	code, err := c.agent.WaitProcess(context.Background(), c.id, p.execID)
	switch {
	case errdefs.IsUnavailable(err):
		code = c.sandbox.deathStatus()
	case err != nil:
		log.L.WithError(err).Errorf("the agent does not say how process %s has ended", p.id())
		code = agentclient.UnknownStatus
	}
	at := time.Now()
	if err := p.streams.Drain(drainStall); err != nil {
		log.L.WithError(err).Warnf("process %s has ended, but not its output", p.id())
	}
	if p.execID == "" {
		c.endExecs()
	}
	p.awaitStart()
	if p.execID == "" {
		c.recordExit(code, at)
	}
	p.exit(code, at, func() {
		c.publish(&eventsapi.TaskExit{
			ContainerID: c.id,
			ID:          p.id(),
			Pid:         c.pid,
			ExitStatus:  code,
			ExitedAt:    timestamppb.New(at),
		})
	})
}

// awaitStart waits until a start in progress has told of itself.
func (p *process) awaitStart() {
	select {
	case <-p.told:
		return
	default:
	}
	// Either it is being started now, and told soon, or it never was.
	p.operation.Lock()
	defer p.operation.Unlock()
}

// exit ends the process for everybody in one step: who sees that it has
// stopped knows that tell was called, and who is told sees it stopped.
func (p *process) exit(code uint32, at time.Time, tell func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.status == task.Status_STOPPED {
		return
	}
	p.status, p.code, p.at = task.Status_STOPPED, code, at
	if tell != nil {
		tell()
	}
	close(p.exited)
}

// kill sends a signal, to all processes of the container if all is set.
func (p *process) kill(ctx context.Context, signal uint32, all bool) error {
	const maxSignal = 64 // SIGRTMAX
	if signal > maxSignal {
		return fmt.Errorf("signal %d: %w", signal, errdefs.ErrInvalidArgument)
	}
	status, _, _ := p.state()
	switch {
	case status == task.Status_STOPPED:
		return fmt.Errorf("process already finished: %w", errdefs.ErrNotFound)
	case status == task.Status_CREATED && p.execID != "":
		return fmt.Errorf("process not created: %w", errdefs.ErrFailedPrecondition)
	}
	if p.container.sandbox.alive() != nil {
		return fmt.Errorf("process already finished: %w", errdefs.ErrNotFound)
	}
	enforced := signal == sigkill && p.execID == ""
	if enforced {
		p.enforce.Do(func() { go p.enforceKill() })
	}
	err := p.container.agent.Signal(ctx, p.container.id, p.execID, signal, all)
	if enforced && (errors.Is(err, context.DeadlineExceeded) || errdefs.IsUnavailable(err)) {
		// The process ends all the same. Callers that are told of an error go
		// no further: CRI would leave the pod's other containers as they are.
		log.L.WithError(err).Warnf("container %s is killed without its guest's help", p.container.id)
		return nil
	}
	return err
}

// enforceKill sees to it that SIGKILL has its effect although a guest may not
// want it to: when a container outlives it, the machine is killed, unless there
// are other containers in there, which do not, and the agent answers.
func (p *process) enforceKill() {
	c := p.container
	for {
		ctx, cancel := context.WithTimeout(context.Background(), c.sandbox.host.patience)
		var answers atomic.Bool
		go func() {
			_, err := c.sandbox.agent.Info(ctx)
			answers.Store(err == nil)
		}()
		select {
		case <-p.exited:
			cancel()
			return
		case <-ctx.Done():
			cancel()
		}
		p.outlives.Store(true)
		switch {
		case !answers.Load():
			log.L.Errorf("container %s outlives SIGKILL, and the agent in the guest does not answer: killing the virtual machine", c.id)
		case c.alone():
			log.L.Errorf("container %s outlives SIGKILL, killing its virtual machine", c.id)
		default:
			log.L.Errorf("container %s outlives SIGKILL; other containers run in its virtual machine", c.id)
			continue
		}
		c.sandbox.vm.Kill()
		return
	}
}

func (p *process) isDeleted() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.deleted
}

// remove forgets the process in the guest and closes its streams. The caller
// holds operation.
func (p *process) remove(ctx context.Context) {
	c := p.container
	if c.sandbox.alive() == nil && !c.isUndoing(p) {
		if err := c.agent.DeleteProcess(ctx, c.id, p.execID); err != nil && !errdefs.IsNotFound(err) {
			// The guest keeps something; it has its machine's limits.
			log.L.WithError(err).Warnf("the agent does not delete process %s", p.id())
		}
	}
	p.streams.Close()
	p.mu.Lock()
	p.deleted = true
	p.mu.Unlock()
}
