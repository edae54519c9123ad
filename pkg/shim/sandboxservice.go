package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/microvm-runtime/microvm/pkg/shim/agentclient"
	"github.com/microvm-runtime/microvm/pkg/shim/podconfig"
)

var (
	errStopped      = errors.New("the sandbox was stopped while it started")
	errShuttingDown = errors.New("the sandbox is shutting down")
)

// States of a sandbox as the CRI plugin understands them.
var (
	stateReady    = "SANDBOX_READY"
	stateNotReady = "SANDBOX_NOTREADY"
)

// CreateSandbox notes what the sandbox is to be. Its machine comes with
// StartSandbox.
func (s *service) CreateSandbox(_ context.Context, r *sandboxapi.CreateSandboxRequest) (*sandboxapi.CreateSandboxResponse, error) {
	id := r.GetSandboxID()
	if err := identifiers.Validate(id); err != nil {
		return nil, fmt.Errorf("sandbox id: %w", err)
	}
	if !filepath.IsAbs(r.GetBundlePath()) {
		return nil, fmt.Errorf("sandbox %s: bundle %q is not an absolute path: %w", id, r.GetBundlePath(), errdefs.ErrInvalidArgument)
	}
	p, err := newPod(id, r.GetBundlePath(), r.GetNetnsPath(), r.GetOptions())
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return nil, fmt.Errorf("sandbox %s: %w: %w", id, errShuttingDown, errdefs.ErrUnavailable)
	case s.pod != nil:
		return nil, fmt.Errorf("sandbox %s: this shim has the sandbox %s: %w", id, s.pod.id, errdefs.ErrAlreadyExists)
	case len(s.containers) > 0 || len(s.creating) > 0:
		return nil, fmt.Errorf("sandbox %s: this shim has containers without a sandbox of this API: %w", id, errdefs.ErrFailedPrecondition)
	}
	if err := p.writeFiles(); err != nil {
		return nil, fmt.Errorf("sandbox %s: %w", id, err)
	}
	s.pod = p
	return &sandboxapi.CreateSandboxResponse{}, nil
}

// findPod returns the sandbox. The caller holds mu.
func (s *service) findPod(id string) (*pod, error) {
	if s.pod == nil || s.pod.id != id {
		return nil, fmt.Errorf("sandbox %s: %w", id, errdefs.ErrNotFound)
	}
	return s.pod, nil
}

// currentPod returns the sandbox, or nil.
func (s *service) currentPod() *pod {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pod
}

// runs says whether the pod has a machine, also one that has ended. The caller
// holds the service's mu.
func (p *pod) runs() bool { return p != nil && p.sandbox != nil }

// StartSandbox boots the machine, without a container.
func (s *service) StartSandbox(ctx context.Context, r *sandboxapi.StartSandboxRequest) (*sandboxapi.StartSandboxResponse, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s.mu.Lock()
	p, err := s.findPod(r.GetSandboxID())
	switch {
	case err != nil:
	case s.closed:
		err = fmt.Errorf("sandbox %s: %w: %w", p.id, errShuttingDown, errdefs.ErrUnavailable)
	case p.state != podCreated:
		err = fmt.Errorf("cannot start a sandbox that is %v: %w", p.state, errdefs.ErrFailedPrecondition)
	default:
		p.state, p.cancel = podStarting, cancel
	}
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	machine, err := s.startPod(ctx, p)
	s.mu.Lock()
	defer s.mu.Unlock()
	close(p.started)
	if err != nil {
		if cause := context.Cause(ctx); errors.Is(cause, errStopped) || errors.Is(cause, errShuttingDown) {
			err = fmt.Errorf("%w: %w", cause, errdefs.ErrAborted)
		}
		p.end(agentclient.UnknownStatus)
		log.L.WithError(err).Errorf("sandbox %s could not be started", p.id)
		return nil, fmt.Errorf("sandbox %s: %w", p.id, err)
	}
	p.state, p.sandbox = podRunning, machine
	go s.watchPod(p)
	return &sandboxapi.StartSandboxResponse{Pid: p.pid(), CreatedAt: timestamppb.New(p.created)}, nil
}

// startPod boots the machine; on an error nothing is left of it.
func (s *service) startPod(ctx context.Context, p *pod) (*sandbox, error) {
	select {
	case s.slot <- struct{}{}:
		defer func() { <-s.slot }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	machine, err := newSandbox(s.host)
	if err != nil {
		return nil, err
	}
	config := p.sandboxConfig(s.namespace)
	config.onOOM = s.oom
	if err := machine.start(ctx, config); err != nil {
		if stopErr := machine.stop(); stopErr != nil {
			log.L.WithError(stopErr).Error("a sandbox that did not start is not cleaned up")
		}
		return nil, err
	}
	s.sandbox = machine
	return machine, nil
}

// watchPod waits for the end of the machine.
func (s *service) watchPod(p *pod) {
	code := p.sandbox.deathStatus()
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.stopping {
		code = 0
	}
	p.end(code)
}

// end says that the pod has ended. The caller holds the service's mu.
func (p *pod) end(code uint32) {
	p.state, p.code, p.exited = podStopped, code, time.Now()
	close(p.stopped)
}

// Platform is what containers are built for.
func (s *service) Platform(_ context.Context, r *sandboxapi.PlatformRequest) (*sandboxapi.PlatformResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.findPod(r.GetSandboxID()); err != nil {
		return nil, err
	}
	return &sandboxapi.PlatformResponse{Platform: &types.Platform{OS: "linux", Architecture: runtime.GOARCH}}, nil
}

// StopSandbox ends the machine, and all that still runs in it. One that has
// ended, or was not started, may be stopped as well.
func (s *service) StopSandbox(ctx context.Context, r *sandboxapi.StopSandboxRequest) (*sandboxapi.StopSandboxResponse, error) {
	s.mu.Lock()
	p, err := s.findPod(r.GetSandboxID())
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	patience := powerOff
	if seconds := r.GetTimeoutSecs(); seconds > 0 {
		patience = time.Duration(seconds) * time.Second
	}
	if err := s.stopPod(ctx, p, patience, errStopped); err != nil {
		return nil, fmt.Errorf("sandbox %s: %w", p.id, err)
	}
	return &sandboxapi.StopSandboxResponse{}, nil
}

// stopPod ends the machine and waits for it.
func (s *service) stopPod(ctx context.Context, p *pod, patience time.Duration, why error) error {
	s.mu.Lock()
	p.stopping = true
	switch p.state {
	case podCreated:
		p.end(0)
	case podStarting:
		p.cancel(why)
	}
	starting := p.state == podStarting
	s.mu.Unlock()
	if starting {
		select {
		case <-p.started:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	s.mu.Lock()
	machine := p.sandbox
	s.mu.Unlock()
	if machine != nil {
		if err := machine.halt(patience); err != nil {
			return err
		}
	}
	select {
	case <-p.stopped:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// WaitSandbox waits until the sandbox has ended. The status is 0 if that was
// asked for.
func (s *service) WaitSandbox(ctx context.Context, r *sandboxapi.WaitSandboxRequest) (*sandboxapi.WaitSandboxResponse, error) {
	s.mu.Lock()
	p, err := s.findPod(r.GetSandboxID())
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	select {
	case <-p.stopped:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return &sandboxapi.WaitSandboxResponse{ExitStatus: p.code, ExitedAt: timestamppb.New(p.exited)}, nil
}

// SandboxStatus describes the sandbox.
func (s *service) SandboxStatus(_ context.Context, r *sandboxapi.SandboxStatusRequest) (*sandboxapi.SandboxStatusResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.findPod(r.GetSandboxID())
	if err != nil {
		return nil, err
	}
	response := &sandboxapi.SandboxStatusResponse{
		SandboxID: p.id,
		State:     stateNotReady,
		CreatedAt: timestamppb.New(p.created),
	}
	if p.runs() {
		response.Pid = p.pid()
	}
	switch p.state {
	case podRunning:
		response.State = stateReady
	case podStopped:
		response.ExitedAt = timestamppb.New(p.exited)
	}
	if r.GetVerbose() {
		if response.Info, err = p.info(response.Pid); err != nil {
			return nil, fmt.Errorf("sandbox %s: %w", p.id, err)
		}
	}
	return response, nil
}

// info is the verbose part of the status. The caller holds the service's mu.
func (p *pod) info(pid uint32) (map[string]string, error) {
	// The CRI plugin parses this one and adds to it: SandboxInfo of
	// internal/cri/server/podsandbox/types.
	sandboxInfo := struct {
		Pid    uint32                      `json:"pid"`
		Status string                      `json:"processStatus"`
		Config *podconfig.PodSandboxConfig `json:"config"`
	}{pid, p.state.String(), p.config}

	machine := struct {
		Network string `json:"networkNamespace,omitempty"`
		VMM     uint32 `json:"vmm,omitempty"`
		Kernel  string `json:"kernel,omitempty"`
		Agent   string `json:"agent,omitempty"`
		CPUs    int    `json:"cpus,omitempty"`
		Memory  uint64 `json:"memoryBytes,omitempty"`
		End     string `json:"end,omitempty"`
	}{Network: p.netns, VMM: pid}
	if p.sandbox != nil {
		machine.Kernel, machine.Agent = p.sandbox.info.KernelRelease, p.sandbox.info.Version
		now := p.sandbox.resizer.reached.Load()
		machine.CPUs, machine.Memory = now.vcpus, now.memory
		if err := p.sandbox.alive(); err != nil {
			machine.End = err.Error()
		}
	}
	info := map[string]string{}
	for name, value := range map[string]any{"info": sandboxInfo, "machine": machine} {
		data, err := json.Marshal(value)
		if err != nil {
			return nil, err
		}
		info[name] = string(data)
	}
	return info, nil
}

// PingSandbox says whether the sandbox runs.
func (s *service) PingSandbox(_ context.Context, r *sandboxapi.PingRequest) (*sandboxapi.PingResponse, error) {
	if _, err := s.livePod(r.GetSandboxID()); err != nil {
		return nil, err
	}
	return &sandboxapi.PingResponse{}, nil
}

// livePod returns the machine of a sandbox that runs.
func (s *service) livePod(id string) (*sandbox, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.findPod(id)
	if err != nil {
		return nil, err
	}
	if p.state != podRunning {
		return nil, fmt.Errorf("sandbox %s is %v: %w", id, p.state, errdefs.ErrFailedPrecondition)
	}
	return p.sandbox, p.sandbox.alive()
}

// SandboxMetrics are cgroup metrics of the whole sandbox, the host's part
// included.
func (s *service) SandboxMetrics(ctx context.Context, r *sandboxapi.SandboxMetricsRequest) (*sandboxapi.SandboxMetricsResponse, error) {
	machine, err := s.livePod(r.GetSandboxID())
	if err != nil {
		return nil, err
	}
	metrics, err := machine.metrics(ctx)
	if err != nil {
		return nil, fmt.Errorf("sandbox %s: %w", r.GetSandboxID(), err)
	}
	data, err := typeurl.MarshalAnyToProto(metrics)
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	return &sandboxapi.SandboxMetricsResponse{Metrics: &types.Metric{
		Timestamp: timestamppb.Now(), ID: r.GetSandboxID(), Data: data,
	}}, nil
}

// ShutdownSandbox ends the shim. It does so, too, when there is no sandbox
// because CreateSandbox failed.
func (s *service) ShutdownSandbox(ctx context.Context, r *sandboxapi.ShutdownSandboxRequest) (*sandboxapi.ShutdownSandboxResponse, error) {
	s.mu.Lock()
	p := s.pod
	var err error
	if p != nil || len(s.containers) > 0 || len(s.creating) > 0 {
		p, err = s.findPod(r.GetSandboxID())
	}
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if p != nil {
		if err := s.stopPod(ctx, p, powerOff, errShuttingDown); err != nil {
			// What comes next ends it all the same.
			log.L.WithError(err).Warnf("sandbox %s does not stop", p.id)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.close()
	return &sandboxapi.ShutdownSandboxResponse{}, nil
}
