package shim

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
	"github.com/microvm-runtime/microvm/pkg/internal/printable"
	"github.com/microvm-runtime/microvm/pkg/shim/agentclient"
	"github.com/microvm-runtime/microvm/pkg/shim/config"
	"github.com/microvm-runtime/microvm/pkg/shim/guestspec"
	"github.com/microvm-runtime/microvm/pkg/shim/share"
	"github.com/microvm-runtime/microvm/pkg/shim/state"
	"github.com/microvm-runtime/microvm/pkg/vmm/control"
)

const (
	// powerOff bounds an orderly end of the machine. Callers wait for it.
	powerOff = 2 * time.Second
	// killed bounds the time until the kernel has taken a killed VMM away,
	// which takes long only on a host that is busy with something else.
	killed = time.Minute
	// lastWords is how long the end of the machine may come after the loss of
	// its agent, or be awaited before the end of its processes is told.
	lastWords = 3 * time.Second

	statusKilled = 128 + 9
)

// host is what a sandbox does with the host. Tests have another one.
type host struct {
	config  func() (*config.Config, error)
	launch  func(context.Context, launchRequest) (machine, error)
	newTree func() (tree, error)
	// place moves the shim, and so the VMM, into the sandbox's cgroup.
	place func(path string) (*placement, error)
	// openNetwork takes the network namespace of a path for the sandbox.
	openNetwork func(path string) (podNetwork, error)
	// chooseID chooses the VMM's user and group id among the n from first on.
	chooseID func(ctx context.Context, first, n uint32) (uint32, error)
	// newStandIn makes what stands for a container beside the VMM.
	newStandIn func(vmm int) (*standIn, error)
	// record stores the VMM's identity for a later clean-up.
	record   func(vmm state.Process) error
	cpus     int
	memory   uint64 // bytes
	identify func(pid int) (state.Process, error)
	// patience is how long a container may outlive SIGKILL, and how long the
	// machine may take to open a connection or to change its size.
	patience time.Duration
	// volumeDelay is from a change in a volume until the guest is told of it.
	volumeDelay time.Duration
}

// placement is a shim that is in its sandbox's cgroup.
type placement struct {
	// vmm is the cgroup that the VMM is to be started in, where it can open no
	// device; nil if this host has no such thing. It is closed by launched.
	vmm *os.File
	// launched is called when the VMM has been started, leave when it has
	// ended, which removes the cgroup.
	launched func()
	leave    func() error
	// oomKills counts the processes in there that the host's kernel has killed
	// for lack of memory.
	oomKills func() int
}

// tree is *share.Tree.
type tree interface {
	Open() (*os.File, error)
	Add(id string, rootfs share.Rootfs, mounts []guestspec.Mount) error
	OnHost(f func() error) error
	Mount(id string, n int) string
	Remove(id string) error
	Close() error
}

// sandbox is a virtual machine and what belongs to it on the host. Start and
// stop are called by one goroutine at a time, the other methods by any.
type sandbox struct {
	host *host
	tree tree
	vm   machine
	// agent is set as long as the machine is up.
	agent *agentclient.Client
	logs  *machineLogs
	// resizer is set with the agent.
	resizer *resizer
	// placed is nil before the sandbox has a cgroup, and after it has left it.
	placed *placement
	// info is the guest's own description of itself when it was ready.
	info agentclient.Info
	// shm is the host's directory that the guest's /dev/shm stands for.
	shm     string
	net     netState
	disks   disks
	volumes volumes

	halting sync.Mutex // held by halt
	asking  sync.Mutex // held while silent looks

	mu       sync.Mutex
	stopping bool
	end      error  // why the machine has ended; set before dead is closed
	status   uint32 // of the processes that ended with it
	dead     chan struct{}
}

// newSandbox prepares the shared directory. The machine starts with start.
func newSandbox(h *host) (*sandbox, error) {
	t, err := h.newTree()
	if err != nil {
		return nil, err
	}
	return &sandbox{host: h, tree: t, dead: make(chan struct{})}, nil
}

// sandboxConfig is what the first container, or the client of the sandbox API,
// says about the whole sandbox.
type sandboxConfig struct {
	name        []string // from machineName
	limits      limits
	cgroupsPath string
	hostname    string
	// network is the path of the pod's network namespace; empty for one of
	// the sandbox's own.
	network string
	sysctls map[string]string
	shm     guestspec.Shm
	// annotations are the pod's.
	annotations map[string]string
	onOOM       func(containerID string)
}

// start boots the machine and waits for its agent. On an error the caller has
// to stop the sandbox.
func (s *sandbox) start(ctx context.Context, c sandboxConfig) (err error) {
	conf, err := s.host.config()
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	rates, err := conf.RateLimitsFor(c.annotations)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if conf.Debug {
		setLogLevel(true)
	}
	begin := time.Now()
	if s.placed, err = s.host.place(c.cgroupsPath); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, conf.BootTimeout,
		fmt.Errorf("the guest did not start within %v (configuration key boot_timeout)", conf.BootTimeout))
	defer cancel()
	if err := s.boot(ctx, conf, c, rates); err != nil {
		return err
	}
	s.shm = c.shm.Path
	s.info, err = s.agent.Info(ctx)
	if err != nil {
		return s.logs.describe(s.bootError(ctx, err))
	}
	network, err := s.describeNetwork()
	if err != nil {
		return err
	}
	err = s.agent.ConfigureSandbox(ctx, &agentproto.ConfigureSandboxRequest{
		Hostname:  c.hostname,
		SharedTag: sharedTag,
		Sysctls:   c.sysctls,
		ShmBytes:  c.shm.Bytes,
		Network:   network,
	})
	if err != nil {
		return s.logs.describe(s.bootError(ctx, err))
	}
	if err := s.watchNetwork(); err != nil {
		return err
	}
	go s.watchOOM(c.onOOM)
	go keepTime(s.agent)
	go s.monitor(s.placed)
	log.L.WithFields(log.Fields{
		"vmm": s.vm.Pid(), "kernel": s.info.KernelRelease, "agent": s.info.Version, "took": time.Since(begin).Round(time.Millisecond).String(),
	}).Info("the sandbox's virtual machine is up")
	return nil
}

// boot launches the VMM and takes the agent's connection.
func (s *sandbox) boot(ctx context.Context, conf *config.Config, c sandboxConfig, rates control.RateLimits) error {
	size := machineSize(conf, c.limits, s.host.cpus, s.host.memory)
	devices, err := s.connectNetwork(c.network, size.vcpus)
	if err != nil {
		return err
	}
	defer closeDevices(devices)
	shared, err := s.tree.Open()
	if err != nil {
		return err
	}
	defer shared.Close()
	id, err := s.host.chooseID(ctx, conf.VMMFirstID, conf.VMMIDs)
	if err != nil {
		return err
	}
	logs, console, vmmLog, err := openLogs(conf.Debug)
	if err != nil {
		return err
	}
	s.logs = logs
	vm, err := s.host.launch(ctx, launchRequest{
		name:    c.name,
		config:  conf,
		size:    size,
		limit:   sizeLimit(conf, s.host.cpus, s.host.memory),
		rates:   rates,
		shared:  shared,
		id:      id,
		devices: devices,
		console: console,
		log:     vmmLog,
		cgroup:  s.placed.vmm,
	})
	s.placed.launched()
	if err != nil {
		logs.vmm.wait(time.Second)
		if lines := logs.vmm.last(4); len(lines) > 0 {
			return logs.describe(err)
		}
		return err
	}
	s.vm = vm
	s.recordVMM()
	conn, err := vm.Accept(ctx, agentclient.ControlPort)
	if err != nil {
		return logs.describe(s.bootError(ctx, err))
	}
	s.agent = agentclient.New(conn, s.silent)
	s.resizer = newResizer(conf, s.host, c.limits, s.resizeMachine, s.agent.ResizeSandbox)
	return nil
}

// bootError says what has become of a machine whose agent did not come.
func (s *sandbox) bootError(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		// The connection is lost, or does not come: the end of the machine, if
		// it is that, is about to be seen.
		select {
		case <-s.vm.Done():
		case <-time.After(lastWords):
		}
	}
	select {
	case <-s.vm.Done():
		s.logs.console.wait(time.Second)
		return fmt.Errorf("the guest ended before it was ready: %s", exitText(s.vm.Exit()))
	default:
	}
	if ctx.Err() != nil {
		return s.hung(context.Cause(ctx))
	}
	return fmt.Errorf("the guest's agent: %w", err)
}

// hung ends a machine whose guest does not do what it should, and adds to the
// error where its vCPUs were.
func (s *sandbox) hung(err error) error {
	ctx, cancel := context.WithTimeout(context.Background(), powerOff)
	defer cancel()
	if stopErr := s.vm.Stop(ctx); stopErr != nil {
		return fmt.Errorf("%w; the VMM does not answer: %w", err, stopErr)
	}
	select {
	case <-s.vm.Done():
		return fmt.Errorf("%w; then it was at: %s", err, exitText(s.vm.Exit()))
	case <-ctx.Done():
		return err
	}
}

// recordVMM notes the VMM for a clean-up without this process, and lets the
// host's kernel choose it before others when memory runs out: the shim's
// score, which it has inherited, is that of a daemon.
func (s *sandbox) recordVMM() {
	pid := s.vm.Pid()
	process, err := s.host.identify(pid)
	if err == nil {
		err = s.host.record(process)
	}
	if err != nil {
		// It ends with this process anyway, by PR_SET_PDEATHSIG.
		log.L.WithError(err).Warn("cannot record the VMM")
	}
	if err := setOOMScore(pid, 0); err != nil {
		log.L.WithError(err).Debug("cannot set the VMM's OOM score")
	}
}

// setOOMScore raises a process's score; that it is not lowered, which takes a
// capability, is no error.
func setOOMScore(pid, score int) error {
	path := "/proc/" + strconv.Itoa(pid) + "/oom_score_adj"
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if now, err := strconv.Atoi(string(trimEnd(data))); err == nil && now >= score {
		return nil
	}
	return os.WriteFile(path, []byte(strconv.Itoa(score)), 0)
}

// exitText describes how a machine ended, which a guest has a say in.
func exitText(e control.Exit) string {
	return printable.String(e.String(), maxLine)
}

var (
	errAgentGone  = errors.New("the agent in the guest is gone")
	errNoPowerOff = errors.New("the guest does not power off")
)

// monitor waits for the end of the machine, or of the agent, without which it
// is of no use.
func (s *sandbox) monitor(placed *placement) {
	select {
	case <-s.vm.Done():
	case <-s.agent.Done():
		select {
		case <-s.vm.Done():
		case <-time.After(lastWords):
			log.L.WithError(s.hung(errAgentGone)).Error("killing the virtual machine")
			s.vm.Kill()
		}
	}
	s.agent.Close()
	end := fmt.Errorf("%w, and the VMM does not end", errAgentGone)
	status := uint32(agentclient.UnknownStatus)
	select {
	case <-s.vm.Done():
		exit := s.vm.Exit()
		end = fmt.Errorf("the virtual machine has ended: %s", exitText(exit))
		if exit.Reason == control.ReasonKilled || exit.Reason == control.ReasonStopped {
			status = statusKilled
			if placed.oomKills() > 0 {
				end = fmt.Errorf("%w: the host's kernel has killed the VMM because memory ran out (the pod's, or the host's)", end)
			}
		}
	case <-time.After(2 * lastWords):
	}
	s.mu.Lock()
	stopping := s.stopping
	if stopping {
		status = statusKilled // all that ran was
	}
	s.end, s.status = end, status
	s.mu.Unlock()
	if !stopping {
		s.reportDeath(end)
	}
	close(s.dead)
}

// reportDeath logs why the machine ended although nobody had asked it to.
func (s *sandbox) reportDeath(end error) {
	s.logs.console.wait(time.Second)
	log.L.WithError(end).Error("the sandbox has lost its virtual machine")
	for _, line := range s.logs.console.last(keepLines) {
		log.L.Errorf("guest console: %s", line)
	}
}

// deathStatus waits for the end of the machine, of which the caller has seen a
// sign, and returns the exit status of the processes that ended with it.
func (s *sandbox) deathStatus() uint32 {
	<-s.dead
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status
}

// alive returns an error that says why the machine has ended, if it has.
func (s *sandbox) alive() error {
	select {
	case <-s.dead:
		s.mu.Lock()
		defer s.mu.Unlock()
		return fmt.Errorf("%w: %w", s.end, errdefs.ErrFailedPrecondition)
	default:
		return nil
	}
}

func (s *sandbox) watchOOM(handle func(string)) {
	if err := s.agent.OOMKills(context.Background(), handle); err != nil {
		// Without the stream the connection is of no use to either side: if
		// the machine lives, its agent has broken the protocol.
		log.L.WithError(err).Debug("the agent's events have ended")
		s.agent.Close()
	}
}

// errHangs is about a VMM that takes a request and does not answer it.
var errHangs = fmt.Errorf("the virtual machine does not answer: %w", context.DeadlineExceeded)

func (s *sandbox) resizeMachine(ctx context.Context, size control.Size) (control.Size, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, s.host.patience, errHangs)
	defer cancel()
	return s.vm.Resize(ctx, size)
}

// dialStream opens a connection for a stream and names it.
func (s *sandbox) dialStream(ctx context.Context, id uint64) (*net.UnixConn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, s.host.patience, errHangs)
	defer cancel()
	conn, err := s.vm.Dial(ctx, agentclient.StreamPort)
	if err != nil {
		if ctx.Err() != nil {
			s.silent()
		}
		return nil, fmt.Errorf("stream: %w", err)
	}
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetWriteDeadline(deadline)
	}
	if _, err := conn.Write(streamHeader(id)); err != nil {
		conn.Close()
		return nil, fmt.Errorf("stream: %w", err)
	}
	conn.SetWriteDeadline(time.Time{})
	return conn, nil
}

// halt ends the machine, if it runs, in order as long as that does not take
// too long. What is the sandbox's on the host stays.
func (s *sandbox) halt(patience time.Duration) error {
	s.mu.Lock()
	s.stopping = true
	s.mu.Unlock()
	s.halting.Lock()
	defer s.halting.Unlock()
	if s.agent != nil {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		if err := s.agent.Shutdown(ctx); err != nil {
			log.L.WithError(err).Debug("the agent does not shut the guest down")
		}
		select {
		case <-s.vm.Done():
		case <-ctx.Done():
			log.L.WithError(s.hung(errNoPowerOff)).Warn("killing the virtual machine")
		}
		cancel()
	}
	return s.kill()
}

// stop ends the machine, if it runs. Nothing is left of the sandbox afterwards.
func (s *sandbox) stop() error {
	err := s.halt(powerOff)
	s.closeVolumes()
	return errors.Join(err, s.leaveCgroup(), s.closeNetwork(), s.tree.Close())
}

// kill ends the VMM and waits for it.
func (s *sandbox) kill() error {
	if s.vm == nil {
		return nil
	}
	if err := s.vm.Kill(); err != nil {
		return err
	}
	select {
	case <-s.vm.Done():
	case <-time.After(killed):
		return fmt.Errorf("the VMM (process %d) does not end after SIGKILL", s.vm.Pid())
	}
	if s.agent != nil {
		s.agent.Close()
	}
	return nil
}

func (s *sandbox) leaveCgroup() error {
	if s.placed == nil {
		return nil
	}
	err := s.placed.leave()
	s.placed = nil
	return err
}
