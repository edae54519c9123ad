// Package agent makes and runs the containers of a guest, as the shim on the
// host tells it to. It is the server of pkg/agentproto.
package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/microvm-runtime/microvm/pkg/agent/guest"
	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// Protocol is the version of pkg/agentproto that this agent speaks.
const Protocol = 1

// sharedDir is where the virtio-fs device is mounted, below Config.Root. Each
// container has a directory of its name in it.
const sharedDir = "shared"

// Version of the agent, set by the build.
var Version = "dev"

// Config is what an agent needs of its surroundings.
type Config struct {
	// Streams accepts the connections of standard streams, which must have a
	// CloseWrite, and AllowPeer says whether one may bring streams.
	Streams   net.Listener
	AllowPeer func(net.Addr) bool
	// Reaper is told of all child processes. Someone must run it where the
	// agent is the first process.
	Reaper *Reaper
	// Root is the agent's directory on a tmpfs: /run/microvm.
	Root string
	// Begun is CLOCK_BOOTTIME, in nanoseconds, when the agent's main began.
	Begun int64
	Log   *slog.Logger
}

// Agent implements agentproto.AgentService. All its methods may be called at the
// same time.
type Agent struct {
	config  Config
	log     *slog.Logger
	streams *streamHub
	events  *eventQueue
	oom     *oomWatch
	network *guestNetwork
	clock   *wallClock
	// forwards has an element for each connection of Forward.
	forwards chan struct{}
	size     *guestSize
	podInit  *podInit
	ready    int64

	sharedMounts sharedMounts

	shutdown     chan struct{}
	shutdownOnce sync.Once

	mu         sync.Mutex
	configured bool
	sysctls    map[string]string // the sandbox's
	// containers has nil for a container that is being made.
	containers map[string]*container
}

// New returns an agent that accepts streams, until the listener is closed.
func New(config Config) (*Agent, error) {
	// Root of a user namespace has to get through to the root file systems.
	if err := os.MkdirAll(config.Root, 0o711); err != nil {
		return nil, fmt.Errorf("make the state directory: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(config.Root, "containers"), 0o700); err != nil {
		return nil, fmt.Errorf("make the state directory: %w", err)
	}
	// libcontainer would make it with the first container; it has metrics from
	// the beginning.
	if err := os.MkdirAll(cgroupMount+cgroupParent, 0o755); err != nil {
		return nil, fmt.Errorf("make the containers' cgroup: %w", err)
	}
	a := &Agent{
		config:     config,
		log:        config.Log,
		streams:    newStreamHub(config.Log),
		events:     newEventQueue(config.Log),
		network:    &guestNetwork{sys: "/sys", index: make(map[deviceKey]int)},
		clock:      &wallClock{slew: guest.SlewTime, step: guest.StepTime, log: config.Log},
		forwards:   make(chan struct{}, maxForwards),
		podInit:    &podInit{reaper: config.Reaper, log: config.Log},
		shutdown:   make(chan struct{}),
		containers: make(map[string]*container),
	}
	var err error
	if a.size, err = newGuestSize(a.log); err != nil {
		return nil, err
	}
	if a.oom, err = newOOMWatch(a.events, a.log); err != nil {
		return nil, err
	}
	go a.oom.run()
	go func() {
		if err := a.streams.serve(config.Streams, config.AllowPeer); err != nil {
			a.log.Error("no more streams are accepted", "error", err)
		}
	}()
	a.ready = guest.BootTime()
	return a, nil
}

// Info describes the guest.
func (a *Agent) Info(context.Context, *agentproto.InfoRequest) (*agentproto.InfoResponse, error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return nil, fmt.Errorf("uname: %w", err)
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return nil, fmt.Errorf("sysinfo: %w", err)
	}
	var cpus unix.CPUSet
	if err := unix.SchedGetaffinity(0, &cpus); err != nil {
		return nil, fmt.Errorf("count processors: %w", err)
	}
	return &agentproto.InfoResponse{
		Protocol:         Protocol,
		Version:          Version,
		KernelRelease:    unix.ByteSliceToString(uts.Release[:]),
		KernelVersion:    unix.ByteSliceToString(uts.Version[:]),
		MemoryTotalBytes: info.Totalram * uint64(info.Unit),
		CpusOnline:       uint32(cpus.Count()),
		InitNanoseconds:  uint64(a.config.Begun),
		ReadyNanoseconds: uint64(a.ready),
	}, nil
}

// ConfigureSandbox sets what the whole sandbox shares. It is called once.
func (a *Agent) ConfigureSandbox(_ context.Context, r *agentproto.ConfigureSandboxRequest) (*emptypb.Empty, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.configured {
		return nil, fmt.Errorf("the sandbox has been configured: %w", errdefs.ErrFailedPrecondition)
	}
	if t := r.GetTime(); t != nil {
		if err := t.CheckValid(); err != nil {
			return nil, fmt.Errorf("time: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		if err := guest.SetTime(t.AsTime()); err != nil {
			return nil, err
		}
	}
	if name := r.GetHostname(); name != "" {
		if err := unix.Sethostname([]byte(name)); err != nil {
			return nil, fmt.Errorf("set the host name to %q: %w", name, err)
		}
	}
	// Before the sysctls: they may be about its links.
	if err := a.network.update(r.GetNetwork()); err != nil {
		return nil, err
	}
	for name, value := range r.GetSysctls() {
		if err := guest.WriteSysctl(name, value); err != nil {
			return nil, err
		}
	}
	a.sysctls = r.GetSysctls()
	if size := r.GetShmBytes(); size != 0 {
		if err := guest.ResizeShm(size); err != nil {
			return nil, err
		}
	}
	if tag := r.GetSharedTag(); tag != "" {
		dir, err := makeDir(a.config.Root, sharedDir, 0o711)
		if err != nil {
			return nil, err
		}
		defer dir.Close()
		if err := mountAt(tag, dir, "virtiofs", 0, ""); err != nil {
			return nil, fmt.Errorf("shared directory: %w", err)
		}
	}
	a.configured = true
	return &emptypb.Empty{}, nil
}

// Events sends what happens in the guest, to one caller at a time.
func (a *Agent) Events(ctx context.Context, _ *agentproto.EventsRequest, server agentproto.Agent_EventsServer) error {
	return a.events.send(ctx, server.Send)
}

// Shutdown ends all containers and makes Serve return.
func (a *Agent) Shutdown(ctx context.Context, _ *emptypb.Empty) (*emptypb.Empty, error) {
	a.killAll(ctx)
	a.shutdownOnce.Do(func() { close(a.shutdown) })
	return &emptypb.Empty{}, nil
}

// killAll ends the processes of all containers and unmounts what was mounted for
// them, as far as that can be done.
func (a *Agent) killAll(ctx context.Context) {
	a.mu.Lock()
	var all []*container
	for _, c := range a.containers {
		if c != nil {
			all = append(all, c)
		}
	}
	a.mu.Unlock()
	var wg sync.WaitGroup
	for _, c := range all {
		wg.Go(func() {
			if err := c.end(ctx); err != nil {
				a.log.Error("container does not end", "error", err)
			}
			// What is on a device is left clean, not to be repaired.
			if err := c.unmount(); err != nil {
				a.log.Error("mounts left by a container", "container", c.id, "error", err)
			}
		})
	}
	wg.Wait()
	a.podInit.kill()
}

// container returns a container that has been made.
func (a *Agent) container(id string) (*container, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.containers[id]
	if c == nil {
		return nil, fmt.Errorf("container %.*q: %w", maxIDLength, id, errdefs.ErrNotFound)
	}
	return c, nil
}

// process returns a process of a container that has been made.
func (a *Agent) process(id, execID string) (*process, error) {
	c, err := a.container(id)
	if err != nil {
		return nil, err
	}
	return c.process(execID)
}
