package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/microvm-runtime/microvm/pkg/shim/agentclient"
	"github.com/microvm-runtime/microvm/pkg/shim/state"
	"github.com/microvm-runtime/microvm/pkg/shim/stdio"
)

const (
	// execsEnd is how long the other processes of a container may outlive
	// init, which takes them along.
	execsEnd = 10 * time.Second
	// initEnd is how long init of a container that was not started may take
	// to die when it is deleted.
	initEnd = 10 * time.Second

	sigkill = 9
)

// container is a task of containerd's.
type container struct {
	id      string
	bundle  string
	sandbox *sandbox
	// agent does what is to be done in the guest.
	agent guestTasks
	// pid is a number of the host's: that of the VMM for the sandbox's first
	// task, that of a thread of ours for others. Numbers of the guest mean
	// other processes here, and are the guest's to choose.
	pid       uint32
	standIn   *standIn // nil if the number is the VMM's
	init      *process
	hooks     specs.Hooks
	hookState specs.State
	publish   func(proto.Message)
	ooms      *limiter // of the events that a guest can make us send
	// alone says that no other container of the sandbox runs.
	alone func() bool

	// operation is held by pause, resume and update.
	operation sync.Mutex
	// execs counts the running ones.
	execs sync.WaitGroup

	mu        sync.Mutex
	paused    bool
	unsure    bool // the guest may have paused it although that has failed
	pausing   bool
	ending    bool // init has ended: no further exec may start
	starting  int  // execs that are being started
	started   *sync.Cond
	processes map[string]*process // by exec id
}

// newContainer makes a container. Whoever has it calls release in the end.
func newContainer(id, bundle string, s *sandbox, first bool, publish func(proto.Message)) (*container, error) {
	c := &container{
		id:        id,
		bundle:    bundle,
		sandbox:   s,
		agent:     s.agent,
		pid:       uint32(s.vm.Pid()),
		publish:   publish,
		ooms:      newLimiter(20, 1),
		processes: map[string]*process{},
	}
	c.started = sync.NewCond(&c.mu)
	if !first {
		var err error
		if c.standIn, err = s.host.newStandIn(s.vm.Pid()); err != nil {
			return nil, fmt.Errorf("container %s: %w", id, err)
		}
		c.pid = c.standIn.tid
	}
	return c, nil
}

// release lets go of what stands for the container on the host.
func (c *container) release() {
	if c.standIn != nil {
		c.standIn.close()
	}
}

// isPause says whether the container is the sandbox itself.
func (c *container) isPause() bool {
	_, is := c.agent.(*pause)
	return is
}

// process finds one by its exec id; the empty id is init's.
func (c *container) process(execID string) (*process, error) {
	if execID == "" {
		return c.init, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.processes[execID]
	if p == nil || p.streams == nil || p.isDeleted() {
		return nil, fmt.Errorf("process %s of container %s: %w", execID, c.id, errdefs.ErrNotFound)
	}
	return p, nil
}

// status of a process, which is the container's when that is paused.
func (c *container) status(p *process) (task.Status, uint32, time.Time) {
	status, code, at := p.state()
	c.mu.Lock()
	defer c.mu.Unlock()
	if status == task.Status_RUNNING {
		switch {
		case c.pausing:
			status = task.Status_PAUSING
		case c.paused:
			status = task.Status_PAUSED
		}
	}
	return status, code, at
}

// beginExec and endExecStart enclose the start of an exec, so that init's exit
// is the last one of the container to be told.
func (c *container) beginExec() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.ending:
		return fmt.Errorf("container %s: its init process is not running: %w", c.id, errdefs.ErrFailedPrecondition)
	case c.paused:
		return fmt.Errorf("container %s is paused: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	c.starting++
	return nil
}

func (c *container) endExecStart() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.starting--
	c.started.Broadcast()
}

// endExecs waits until all other processes have ended and that was told: they
// end with init, except in a container without pids of its own.
func (c *container) endExecs() {
	c.mu.Lock()
	c.ending = true
	for c.starting > 0 {
		c.started.Wait()
	}
	c.mu.Unlock()

	ended := make(chan struct{})
	go func() {
		c.execs.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(execsEnd):
		log.L.Errorf("container %s: processes outlive its init process", c.id)
	}
}

// addExec creates a further process.
func (c *container) addExec(ctx context.Context, execID string, spec *specs.Process, config stdio.Config) error {
	data, err := json.Marshal(spec)
	if err != nil {
		return fmt.Errorf("exec %s: %w", execID, err)
	}
	reserved := &process{} // streams are nil: not to be found yet
	c.mu.Lock()
	switch {
	case c.processes[execID] != nil:
		err = fmt.Errorf("exec %s: %w", execID, errdefs.ErrAlreadyExists)
	case c.ending:
		err = fmt.Errorf("cannot exec in a stopped container: %w", errdefs.ErrFailedPrecondition)
	case c.paused:
		err = fmt.Errorf("cannot exec in a paused container: %w", errdefs.ErrFailedPrecondition)
	default:
		c.processes[execID] = reserved
	}
	c.mu.Unlock()
	if err != nil {
		return err
	}
	p, err := c.createExec(ctx, execID, data, config)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		delete(c.processes, execID)
		return err
	}
	c.processes[execID] = p
	c.publish(&eventsapi.TaskExecAdded{ContainerID: c.id, ExecID: execID})
	return nil
}

func (c *container) createExec(ctx context.Context, execID string, spec []byte, config stdio.Config) (_ *process, err error) {
	if err := c.sandbox.alive(); err != nil {
		return nil, err
	}
	streams, err := stdio.Open(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("exec %s: %w", execID, err)
	}
	defer func() {
		if err != nil {
			streams.Close()
		}
	}()
	connections, err := c.sandbox.connect(ctx, streams)
	if err != nil {
		return nil, fmt.Errorf("exec %s: %w", execID, err)
	}
	defer connections.close()
	if err := c.agent.CreateExec(ctx, c.id, execID, spec, &connections.ids); err != nil {
		return nil, err
	}
	connections.copy(streams)
	return newProcess(c, execID, config, streams), nil
}

// startExec starts a process in the guest. One whose start nobody waits for is
// ended there, and keeps its id until then.
func (c *container) startExec(ctx context.Context, p *process) error {
	c.setUndoing(p, true)
	undoing, err := outlive(ctx, func(ctx context.Context) error {
		_, err := c.agent.StartProcess(ctx, c.id, p.execID)
		return err
	}, func(answer error) {
		c.sandbox.discard(c.id, p.execID, answer)
		c.setUndoing(p, false)
	})
	if !undoing {
		c.setUndoing(p, false)
	}
	return err
}

// setUndoing says whether the guest may have something left of an exec that
// nobody waits for. When it has not, and the exec is deleted, the id is free.
func (c *container) setUndoing(p *process, undoing bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p.undoing = undoing
	if !undoing && p.isDeleted() {
		delete(c.processes, p.execID)
	}
}

func (c *container) isUndoing(p *process) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return p.undoing
}

// deleteExec forgets a process that does not run.
func (c *container) deleteExec(ctx context.Context, p *process) error {
	p.operation.Lock()
	defer p.operation.Unlock()
	status, _, _ := p.state()
	switch {
	case p.isDeleted():
		return fmt.Errorf("process %s: %w", p.execID, errdefs.ErrNotFound)
	case status == task.Status_RUNNING:
		return fmt.Errorf("cannot delete a running process: %w", errdefs.ErrFailedPrecondition)
	}
	p.remove(ctx)
	p.exit(agentclient.UnknownStatus, time.Now(), nil) // if it was never started
	c.mu.Lock()
	defer c.mu.Unlock()
	if !p.undoing {
		delete(c.processes, p.execID)
	}
	return nil
}

// delete takes the container apart, which must not run.
func (c *container) delete(ctx context.Context) error {
	p := c.init
	if status, _, _ := p.state(); status == task.Status_CREATED {
		// As runc does: what was created only is killed.
		if err := p.kill(ctx, sigkill, false); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("delete container %s: %w", c.id, err)
		}
		select {
		case <-p.exited:
		case <-time.After(initEnd):
			return fmt.Errorf("container %s: init does not end: %w", c.id, errdefs.ErrUnavailable)
		case <-ctx.Done():
			return fmt.Errorf("delete container %s: %w", c.id, ctx.Err())
		}
	}
	p.operation.Lock()
	defer p.operation.Unlock()
	status, code, at := p.state()
	switch {
	case p.isDeleted():
		return fmt.Errorf("container %s: %w", c.id, errdefs.ErrNotFound)
	case status != task.Status_STOPPED:
		return fmt.Errorf("cannot delete a running process: %w", errdefs.ErrFailedPrecondition)
	}
	c.mu.Lock()
	for id, exec := range c.processes {
		if exec.streams != nil {
			exec.streams.Close()
		}
		delete(c.processes, id)
	}
	c.mu.Unlock()
	p.remove(ctx)
	c.sandbox.unwatchVolumes(c.id)
	c.sandbox.releaseDisks(c.id)
	if err := c.sandbox.tree.Remove(c.id); err != nil {
		log.L.WithError(err).Errorf("container %s: its mounts are left until the sandbox ends", c.id)
	}
	c.runPoststop(ctx)
	c.release()
	c.publish(&eventsapi.TaskDelete{
		ContainerID: c.id,
		Pid:         c.pid,
		ExitStatus:  code,
		ExitedAt:    timestamppb.New(at),
	})
	return nil
}

// pause freezes the container, resume lets it go on.
func (c *container) pause(ctx context.Context) error {
	c.operation.Lock()
	defer c.operation.Unlock()
	if status, _, _ := c.status(c.init); status != task.Status_RUNNING {
		return fmt.Errorf("cannot pause a container that is %s: %w", statusText(status), errdefs.ErrFailedPrecondition)
	}
	c.setPaused(false, true)
	// The agent does it whether the caller goes on waiting or not.
	ctx = context.WithoutCancel(ctx)
	err := c.agent.Pause(ctx, c.id)
	if errors.Is(err, context.DeadlineExceeded) {
		// It may be about to. What is said not to be paused is not to be frozen.
		resumeErr := c.agent.Resume(ctx, c.id)
		if resumeErr != nil {
			log.L.WithError(resumeErr).Warnf("container %s may be paused, or not: it can be resumed", c.id)
		}
		c.mu.Lock()
		c.unsure = resumeErr != nil
		c.mu.Unlock()
	}
	c.setPaused(err == nil, false)
	if err != nil {
		return err
	}
	c.publish(&eventsapi.TaskPaused{ContainerID: c.id})
	return nil
}

func (c *container) resume(ctx context.Context) error {
	c.operation.Lock()
	defer c.operation.Unlock()
	c.mu.Lock()
	unsure := c.unsure
	c.mu.Unlock()
	if status, _, _ := c.status(c.init); status != task.Status_PAUSED && !(status == task.Status_RUNNING && unsure) {
		return fmt.Errorf("cannot resume a container that is %s: %w", statusText(status), errdefs.ErrFailedPrecondition)
	}
	if err := c.agent.Resume(context.WithoutCancel(ctx), c.id); err != nil {
		return err
	}
	c.mu.Lock()
	c.paused, c.unsure = false, false
	c.mu.Unlock()
	c.publish(&eventsapi.TaskResumed{ContainerID: c.id})
	return nil
}

func (c *container) setPaused(paused, pausing bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.paused, c.pausing = paused, pausing
}

func statusText(s task.Status) string {
	return map[task.Status]string{
		task.Status_CREATED: "created", task.Status_RUNNING: "running", task.Status_STOPPED: "stopped",
		task.Status_PAUSED: "paused", task.Status_PAUSING: "being paused",
	}[s]
}

// exitRecord is what a bundle keeps of a container that has ended, in case the
// shim is gone when containerd asks.
type exitRecord struct {
	Pid        uint32    `json:"pid"`
	ExitStatus uint32    `json:"exit_status"`
	ExitedAt   time.Time `json:"exited_at"`
}

func exitRecordPath(bundle string) string { return filepath.Join(bundle, "microvm-exit.json") }

func (c *container) recordExit(code uint32, at time.Time) {
	data, err := json.Marshal(exitRecord{Pid: c.pid, ExitStatus: code, ExitedAt: at})
	if err == nil {
		err = state.WriteFile(exitRecordPath(c.bundle), data)
	}
	if err != nil {
		log.L.WithError(err).Warnf("container %s: cannot record its exit", c.id)
	}
}
