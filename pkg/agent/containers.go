package agent

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runc/libcontainer"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/microvm-runtime/microvm/pkg/agent/guest"
	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// maxSignal is SIGRTMAX.
const maxSignal = 64

// CreateContainer makes a container whose init waits for StartProcess.
func (a *Agent) CreateContainer(ctx context.Context, r *agentproto.CreateContainerRequest) (*agentproto.CreateProcessResponse, error) {
	io, err := openStdio(ctx, a.streams, r.GetStreams())
	if err != nil {
		return nil, err
	}
	if err := a.reserve(r.GetId()); err != nil {
		io.abort()
		return nil, err
	}
	c, err := a.createContainer(ctx, r, io)
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		delete(a.containers, r.GetId())
		return nil, err
	}
	a.containers[c.id] = c
	return &agentproto.CreateProcessResponse{Pid: uint32(c.init.pid.Load())}, nil
}

// reserve takes the id of a container that is going to be made.
func (a *Agent) reserve(id string) error {
	if err := checkID(id); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, exists := a.containers[id]; exists {
		return fmt.Errorf("container %q: %w", id, errdefs.ErrAlreadyExists)
	}
	a.containers[id] = nil
	return nil
}

// createContainer makes a container whose id is reserved and whose init has the
// streams io, which it ends if it fails.
func (a *Agent) createContainer(ctx context.Context, r *agentproto.CreateContainerRequest, io *stdio) (_ *container, err error) {
	c := &container{
		id:     r.GetId(),
		shared: filepath.Join(a.config.Root, sharedDir, r.GetId()),
		execs:  make(map[string]*process),

		sharedMounts: &a.sharedMounts,
	}
	c.init = newProcess(c, "", io, a.log)
	// On failure all is undone, in the opposite order.
	undo := []func() error{func() error { c.init.abandon(); return nil }}
	defer func() {
		if err == nil {
			return
		}
		for _, f := range slices.Backward(undo) {
			if uerr := f(); uerr != nil {
				a.log.Error("left behind by a container that could not be made", "container", c.id, "error", uerr)
			}
		}
	}()

	spec, sysctls, remarks, err := parseSpec(r.GetSpec(), c.id)
	if err != nil {
		return nil, err
	}
	for _, remark := range remarks {
		a.log.Warn(remark, "container", c.id)
	}
	c.resources = spec.Linux.Resources
	c.init.setSpec(spec.Process)

	if c.storages, err = mountStorages("/sys", a.config.Root, r.GetStorages()); err != nil {
		return nil, err
	}
	undo = append(undo, c.unmount)
	for name, value := range sysctls {
		if err := guest.WriteSysctl(name, value); err != nil {
			return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
	}

	if err := a.joinNamespaces(spec, r.GetPidNamespace()); err != nil {
		return nil, err
	}
	if err := useBlockDevices("/sys", spec, r.GetBlockDevices()); err != nil {
		return nil, fmt.Errorf("block device: %w", err)
	}
	if r.GetAllDevices() {
		if err := addDevices(spec, "/dev"); err != nil {
			return nil, err
		}
	}

	if err := c.openShares(spec.Mounts); err != nil {
		return nil, err
	}
	config, err := libcontainerConfig(spec, c.id)
	if err != nil {
		return nil, err
	}
	if c.lc, err = libcontainer.Create(filepath.Join(a.config.Root, "containers"), c.id, config); err != nil {
		return nil, fmt.Errorf("create container: %w", err)
	}
	undo = append(undo, c.lc.Destroy)

	undo = append(undo, func() error { return c.end(ctx) })
	if err := c.init.launch(a.config.Reaper, func() { a.onExit(c.init) }, c.lc.Start); err != nil {
		return nil, err
	}
	// libcontainer has made the cgroup along with init. Nothing of the
	// container has run yet.
	if err := a.oom.add(c); err != nil {
		return nil, err
	}
	return c, nil
}

// onExit is called when a process has ended and before that is told.
func (a *Agent) onExit(p *process) {
	c := p.container
	if p.execID == "" && !c.ownPIDs() {
		// Without a pid namespace the kernel does not end the others.
		if err := c.kill(); err != nil {
			a.log.Error("processes left by a container", "container", c.id, "error", err)
		}
	}
	a.oom.check(c)
}

// CreateExec prepares a process in a container.
func (a *Agent) CreateExec(ctx context.Context, r *agentproto.CreateExecRequest) (_ *emptypb.Empty, err error) {
	io, err := openStdio(ctx, a.streams, r.GetStreams())
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			io.abort()
		}
	}()
	if err := checkID(r.GetExecId()); err != nil {
		return nil, err
	}
	c, err := a.container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	spec, remarks, err := parseProcess(r.GetProcess())
	if err != nil {
		return nil, err
	}
	for _, remark := range remarks {
		a.log.Warn(remark, "container", c.id, "exec", r.GetExecId())
	}
	p := newProcess(c, r.GetExecId(), io, a.log)
	p.setSpec(spec)
	if err := c.addExec(p); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// StartProcess lets a container's init execute its program, or makes the
// process of an exec.
func (a *Agent) StartProcess(_ context.Context, r *agentproto.ProcessRequest) (*agentproto.StartProcessResponse, error) {
	p, err := a.process(r.GetContainerId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	c := p.container
	if p.execID == "" {
		err = c.startInit()
	} else {
		err = c.startExec(p, func() error {
			return p.launch(a.config.Reaper, func() { a.onExit(p) }, c.lc.Run)
		})
	}
	if err != nil {
		return nil, err
	}
	return &agentproto.StartProcessResponse{Pid: uint32(p.pid.Load())}, nil
}

// WaitProcess returns when a process has ended and its output is delivered.
func (a *Agent) WaitProcess(ctx context.Context, r *agentproto.ProcessRequest) (*agentproto.WaitProcessResponse, error) {
	p, err := a.process(r.GetContainerId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	select {
	case <-p.exited:
		return &agentproto.WaitProcessResponse{ExitStatus: p.status, ExitedAt: timestamppb.New(p.exitedAt)}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// SignalProcess sends a signal to one process or to all of a container.
func (a *Agent) SignalProcess(_ context.Context, r *agentproto.SignalProcessRequest) (*emptypb.Empty, error) {
	if r.GetSignal() > maxSignal {
		return nil, fmt.Errorf("signal %d: %w", r.GetSignal(), errdefs.ErrInvalidArgument)
	}
	sig := unix.Signal(r.GetSignal())
	p, err := a.process(r.GetContainerId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	c := p.container
	// Without a pid namespace SIGKILL for init is for all, as with runc.
	if r.GetAll() || p.execID == "" && sig == unix.SIGKILL && !c.ownPIDs() {
		err = c.signalAll(sig)
	} else {
		err = p.signal(sig)
	}
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// ResizePty sets the size of a process's terminal.
func (a *Agent) ResizePty(_ context.Context, r *agentproto.ResizePtyRequest) (*emptypb.Empty, error) {
	p, err := a.process(r.GetContainerId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	if err := p.resize(clampSize(uint(r.GetWidth())), clampSize(uint(r.GetHeight()))); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// DeleteProcess forgets a process that has ended, or a container.
func (a *Agent) DeleteProcess(ctx context.Context, r *agentproto.ProcessRequest) (*emptypb.Empty, error) {
	p, err := a.process(r.GetContainerId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	c := p.container
	if p.execID != "" {
		if err := c.deleteExec(p); err != nil {
			return nil, err
		}
		return &emptypb.Empty{}, nil
	}
	if err := c.destroy(ctx); err != nil {
		return nil, err
	}
	a.oom.remove(c)
	a.mu.Lock()
	delete(a.containers, c.id)
	a.mu.Unlock()
	return &emptypb.Empty{}, nil
}

// RemoveDevice has the kernel let go of a virtio device.
func (a *Agent) RemoveDevice(_ context.Context, r *agentproto.RemoveDeviceRequest) (*emptypb.Empty, error) {
	if err := removeDevice("/sys", "/dev", r.GetPciAddress(), releaseTimeout); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// ListProcesses lists the processes in a container's cgroup.
func (a *Agent) ListProcesses(_ context.Context, r *agentproto.ContainerRequest) (*agentproto.ListProcessesResponse, error) {
	c, err := a.container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	pids, err := c.lc.Processes()
	if err != nil {
		return nil, err
	}
	execs := c.execIDs()
	response := new(agentproto.ListProcessesResponse)
	for _, pid := range pids {
		response.Processes = append(response.Processes, &agentproto.ProcessEntry{Pid: uint32(pid), ExecId: execs[pid]})
	}
	return response, nil
}

// PauseContainer freezes a container.
func (a *Agent) PauseContainer(ctx context.Context, r *agentproto.ContainerRequest) (*emptypb.Empty, error) {
	c, err := a.container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	if err := c.pause(ctx); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// ResumeContainer thaws a container.
func (a *Agent) ResumeContainer(_ context.Context, r *agentproto.ContainerRequest) (*emptypb.Empty, error) {
	c, err := a.container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	if err := c.resume(); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// UpdateContainer changes a container's resources.
func (a *Agent) UpdateContainer(_ context.Context, r *agentproto.UpdateContainerRequest) (*emptypb.Empty, error) {
	c, err := a.container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	if err := c.update(r.GetResources()); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// ContainerStats reads the metrics of a container.
func (a *Agent) ContainerStats(_ context.Context, r *agentproto.ContainerRequest) (*agentproto.ContainerStatsResponse, error) {
	c, err := a.container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	metrics, err := cgroupStats(cgroupPath(c.id))
	if err != nil {
		return nil, fmt.Errorf("metrics of container %q: %w", c.id, err)
	}
	return &agentproto.ContainerStatsResponse{Metrics: metrics}, nil
}

// SandboxStats reads the metrics of all containers together.
func (a *Agent) SandboxStats(context.Context, *emptypb.Empty) (*agentproto.ContainerStatsResponse, error) {
	metrics, err := cgroupStats(cgroupParent)
	if err != nil {
		return nil, fmt.Errorf("metrics of the sandbox: %w", err)
	}
	return &agentproto.ContainerStatsResponse{Metrics: metrics}, nil
}
