package shim

import (
	"context"
	"errors"
	"fmt"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/microvm-runtime/microvm/pkg/shim/stdio"
)

var errAbandoned = errors.New("the container was deleted while it was being created")

// Create makes a container, and the virtual machine if it is the first one.
func (s *service) Create(ctx context.Context, r *taskapi.CreateTaskRequest) (*taskapi.CreateTaskResponse, error) {
	if err := identifiers.Validate(r.GetID()); err != nil {
		return nil, fmt.Errorf("container id: %w", err)
	}
	if r.GetCheckpoint() != "" {
		return nil, fmt.Errorf("container %s: a virtual machine's containers cannot be restored from a checkpoint: %w",
			r.GetID(), errdefs.ErrNotImplemented)
	}
	ctx, finish, err := s.reserve(ctx, r.GetID())
	if err != nil {
		return nil, err
	}
	c, err := s.create(ctx, r)
	if err != nil && errors.Is(context.Cause(ctx), errAbandoned) {
		err = fmt.Errorf("container %s: %w: %w", r.GetID(), errAbandoned, errdefs.ErrAborted)
	}
	finish(c)
	if err != nil {
		log.L.WithError(err).Errorf("container %s could not be created", r.GetID())
		return nil, err
	}
	go c.init.watch()
	return &taskapi.CreateTaskResponse{Pid: c.pid}, nil
}

// reserve keeps an id for a container that is about to be created. The context
// ends when the container is deleted meanwhile. finish gives the id to the
// container, or up if it is nil.
func (s *service) reserve(ctx context.Context, id string) (_ context.Context, finish func(*container), err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.containers[id] != nil || s.creating[id] != nil:
		err = fmt.Errorf("container %s: %w", id, errdefs.ErrAlreadyExists)
	case s.closed:
		err = fmt.Errorf("container %s: the sandbox is shutting down: %w", id, errdefs.ErrUnavailable)
	}
	if err != nil {
		cancel(nil)
		return nil, nil, err
	}
	creation := &creation{cancel: cancel, done: make(chan struct{})}
	s.creating[id] = creation
	return ctx, func(c *container) {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.creating, id)
		if c != nil {
			s.containers[id] = c
		}
		cancel(nil)
		close(creation.done)
	}, nil
}

// awaitID waits until nothing of an earlier container of this id, which is
// reserved, is left in the guest.
func (s *service) awaitID(ctx context.Context, id string) error {
	s.mu.Lock()
	released := s.withheld[id]
	s.mu.Unlock()
	if released == nil {
		return nil
	}
	select {
	case <-released:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("container %s: an earlier one of this id is still being removed in the guest: %w", id, context.Cause(ctx))
	}
}

// withhold has awaitID wait until release is called.
func (s *service) withhold(id string) (release func()) {
	released := make(chan struct{})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.withheld[id] = released
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.withheld, id)
		close(released)
	}
}

// abandon ends a Create in progress and waits until it has cleaned up.
func (s *service) abandon(ctx context.Context, id string) {
	s.mu.Lock()
	creation := s.creating[id]
	s.mu.Unlock()
	if creation == nil {
		return
	}
	creation.cancel(errAbandoned)
	select {
	case <-creation.done:
	case <-ctx.Done():
	}
}

// create does the work of Create. On an error nothing is left of the
// container, nor of a sandbox without containers.
func (s *service) create(ctx context.Context, r *taskapi.CreateTaskRequest) (_ *container, err error) {
	if err := s.awaitID(ctx, r.GetID()); err != nil {
		return nil, err
	}
	select {
	case s.slot <- struct{}{}:
		defer func() { <-s.slot }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	first := s.sandbox == nil || s.sandbox.agent == nil
	plan, err := s.plan(r, first)
	if err != nil {
		return nil, err
	}
	for _, remark := range plan.remarks {
		log.L.Infof("container %s: %s", r.GetID(), remark)
	}

	if s.sandbox == nil {
		if s.sandbox, err = newSandbox(s.host); err != nil {
			return nil, err
		}
	}
	defer func() {
		if err != nil && first {
			if stopErr := s.sandbox.stop(); stopErr != nil {
				log.L.WithError(stopErr).Error("a sandbox that did not start is not cleaned up")
			}
			s.sandbox = nil
		}
	}()
	if !plan.pause {
		if err := s.sandbox.tree.Add(r.GetID(), plan.rootfs, plan.mounts); err != nil {
			return nil, fmt.Errorf("container %s: %w", r.GetID(), err)
		}
		defer func() {
			if err != nil {
				if removeErr := s.sandbox.tree.Remove(r.GetID()); removeErr != nil {
					log.L.WithError(removeErr).Errorf("container %s", r.GetID())
				}
			}
		}()
	}
	if first {
		err = s.sandbox.start(ctx, plan.sandbox)
	} else {
		err = s.sandbox.alive()
	}
	if err != nil {
		return nil, fmt.Errorf("sandbox: %w", err)
	}
	if !plan.pause {
		s.sandbox.resizer.come(ctx, r.GetID(), plan.limits)
		defer func() {
			if err != nil {
				s.sandbox.resizer.gone(r.GetID())
			}
		}()
		defer func() {
			if err != nil && !plan.abandoned {
				s.sandbox.releaseDisks(r.GetID())
			}
		}()
		if err := s.sandbox.attachDisks(ctx, r.GetID(), plan); err != nil {
			return nil, fmt.Errorf("container %s: %w", r.GetID(), err)
		}
	}
	c, err := newContainer(r.GetID(), r.GetBundle(), s.sandbox, first, s.publish)
	if err != nil {
		return nil, err
	}
	if err := s.createInGuest(ctx, r, c, plan); err != nil {
		c.release()
		return nil, err
	}
	return c, nil
}

// createInGuest makes the container in the running machine.
func (s *service) createInGuest(ctx context.Context, r *taskapi.CreateTaskRequest, c *container, plan *plan) (err error) {
	c.alone = func() bool { return s.isAlone(c) }
	c.hooks = plan.hooks
	c.hookState = specs.State{
		Version: plan.version, ID: c.id, Pid: int(c.pid),
		Bundle: c.bundle, Annotations: plan.annotations,
	}
	defer func() {
		if err != nil {
			c.runPoststop(ctx)
		}
	}()
	//lint:ignore SA1019 deprecated, but in use
	prestart := c.hooks.Prestart
	err = c.runHooks(ctx, "prestart", prestart, specs.StateCreating)
	if err == nil {
		err = c.runHooks(ctx, "createRuntime", c.hooks.CreateRuntime, specs.StateCreating)
	}
	if err != nil {
		return fmt.Errorf("container %s: %w", c.id, err)
	}
	config := stdio.Config{
		ID: c.id, Namespace: s.namespace,
		Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(), Terminal: r.GetTerminal(),
	}
	streams, err := stdio.Open(ctx, config)
	if err != nil {
		return fmt.Errorf("container %s: %w", c.id, err)
	}
	defer func() {
		if err != nil {
			streams.Close()
		}
	}()
	connections := &connections{}
	if plan.pause {
		c.agent = newPause(s.sandbox)
	} else if connections, err = s.sandbox.connect(ctx, streams); err != nil {
		return fmt.Errorf("container %s: %w", c.id, err)
	} else {
		defer connections.close()
		plan.request.Streams = &connections.ids
		sandbox, release := s.sandbox, s.withhold(c.id)
		plan.abandoned, err = outlive(ctx, func(ctx context.Context) error {
			_, err := sandbox.agent.CreateContainer(ctx, plan.request)
			return err
		}, func(answer error) {
			defer release()
			sandbox.discard(c.id, "", answer)
			sandbox.releaseDisks(c.id)
		})
		if !plan.abandoned {
			release()
		}
		if err != nil {
			return fmt.Errorf("container %s: %w", c.id, err)
		}
		s.sandbox.watchVolumes(ctx, c.id, plan.mounts)
	}
	connections.copy(streams)
	c.init = newProcess(c, "", config, streams)
	s.publish(&eventsapi.TaskCreate{
		ContainerID: c.id,
		Bundle:      c.bundle,
		Rootfs:      r.GetRootfs(),
		IO: &eventsapi.TaskIO{
			Stdin: config.Stdin, Stdout: config.Stdout, Stderr: config.Stderr, Terminal: config.Terminal,
		},
		Checkpoint: r.GetCheckpoint(),
		Pid:        c.pid,
	})
	return nil
}

// isAlone says that no container but c runs or is about to. The one that is
// the sandbox itself does not count, nor do those that have outlived SIGKILL as
// well.
func (s *service) isAlone(c *container) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, other := range s.containers {
		if other == c || other.isPause() || other.init.outlives.Load() {
			continue
		}
		if status, _, _ := other.init.state(); status != tasktypes.Status_STOPPED {
			return false
		}
	}
	return len(s.creating) == 0
}

// oom tells of a container that has run into its memory limit. The id is the
// agent's word.
func (s *service) oom(id string) {
	if c, err := s.container(id); err == nil && c.ooms.allow() {
		s.publish(&eventsapi.TaskOOM{ContainerID: c.id})
	}
}

// stop ends the sandbox, and what is left of its containers with it.
func (s *service) stop() error {
	s.mu.Lock()
	s.closed = true
	for _, c := range s.creating {
		c.cancel(errShuttingDown)
	}
	if s.pod != nil && s.pod.state == podStarting {
		s.pod.cancel(errShuttingDown)
	}
	s.mu.Unlock()
	s.slot <- struct{}{} // for good
	if s.sandbox == nil {
		return nil
	}
	err := s.sandbox.stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	deadline := time.After(time.Second)
	for _, c := range s.containers {
		select {
		case <-c.init.exited: // its event is on its way
		case <-deadline:
			return errors.Join(err, fmt.Errorf("container %s has not ended with its sandbox", c.id))
		}
	}
	return err
}
