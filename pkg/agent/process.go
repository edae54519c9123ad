package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// exitUnknown is the exit status of a process whose own is lost, and of one
// that could not be started. It is what runc exits with then.
const exitUnknown = 255

const (
	// programTimeout is how long a signal waits for a process that has been
	// started to execute its program.
	programTimeout = time.Second
	programPoll    = time.Millisecond
)

// process is a container's init or one that was made by CreateExec.
type process struct {
	container *container
	execID    string // empty: init
	spec      *specs.Process
	log       *slog.Logger

	// started: it was told to execute its own program. An init exists before
	// that, an exec does not. Changed with container.running held.
	started atomic.Bool

	mu sync.Mutex
	// io is nil for a process that cannot be talked with.
	io *stdio
	// lp is nil until there is a process.
	lp *libcontainer.Process

	// pid is 0 until there is a process.
	pid atomic.Int64

	// exited is closed when the process has ended and its output is delivered.
	// status and exitedAt are valid from then on.
	exited   chan struct{}
	status   uint32
	exitedAt time.Time
}

func newProcess(c *container, execID string, io *stdio, log *slog.Logger) *process {
	return &process{
		container: c,
		execID:    execID,
		io:        io,
		log:       log,
		exited:    make(chan struct{}),
	}
}

// setSpec says what the process is to be. It is called before anyone else knows
// of the process.
func (p *process) setSpec(spec *specs.Process) {
	p.spec = spec
	p.io.terminal = spec.Terminal
}

// launch makes the process by calling start, which is libcontainer's. onExit is
// called when it has ended, before that is told. After an error the process does
// not exist, or soon will not, and is to be abandoned.
func (p *process) launch(reaper *Reaper, onExit func(), start func(*libcontainer.Process) error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	lp, err := libcontainerProcess(p.spec)
	if err != nil {
		return err
	}
	lp.Init = p.execID == ""
	config := p.container.lc.Config()
	uid, err := config.HostRootUID()
	if err != nil {
		return fmt.Errorf("find the user who is the container's root: %w", err)
	}
	gid, err := config.HostRootGID()
	if err != nil {
		return fmt.Errorf("find the group which is the container's root: %w", err)
	}
	if err := p.io.attach(lp, uid, gid); err != nil {
		return err
	}

	making, err := reaper.Begin()
	if err != nil {
		return err
	}
	if err := start(lp); err != nil {
		making.Done(0)
		return err
	}
	pid, err := lp.Pid()
	if err != nil {
		making.Done(0)
		return fmt.Errorf("find the process's id: %w", err)
	}
	making.Done(pid)

	err = p.io.started()
	if err != nil {
		// It exists, but cannot be talked with.
		p.io.abort()
		p.io = nil
		lp.Signal(unix.SIGKILL)
		err = fmt.Errorf("connect the process's streams: %w", err)
	}
	p.lp = lp
	p.pid.Store(int64(pid))
	go p.wait(reaper, p.io, onExit)
	return err
}

// wait waits for the process, which nobody else does.
func (p *process) wait(reaper *Reaper, io *stdio, onExit func()) {
	state, err := p.lp.Wait()
	at := time.Now()
	reaper.Release(int(p.pid.Load()))
	status := uint32(exitUnknown)
	if state != nil {
		// The error only says that the status is not 0.
		status = exitStatus(state)
	} else {
		p.log.Error("exit status lost", "container", p.container.id, "exec", p.execID, "error", err)
	}
	onExit()
	if io != nil {
		io.drain()
	}
	p.finish(status, at)
}

func (p *process) finish(status uint32, at time.Time) {
	p.status, p.exitedAt = status, at
	close(p.exited)
}

// abandon ends a process that could not be made, or never was.
func (p *process) abandon() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pid.Load() != 0 || p.ended() {
		return
	}
	p.io.abort()
	p.io = nil
	p.finish(exitUnknown, time.Now())
}

// exitStatus is what a shell makes of how a process ended.
func exitStatus(state *os.ProcessState) uint32 {
	ws, ok := state.Sys().(syscall.WaitStatus)
	switch {
	case !ok:
		return exitUnknown
	case ws.Signaled():
		return 128 + uint32(ws.Signal())
	default:
		return uint32(ws.ExitStatus())
	}
}

// ended says whether the process has ended and its output is delivered.
func (p *process) ended() bool {
	select {
	case <-p.exited:
		return true
	default:
		return false
	}
}

// awaitProgram waits until a process that was started executes its own program.
// Until then it is libcontainer's, which loses most signals. That takes no time
// to speak of, unless the program's file system is slow.
func (p *process) awaitProgram() {
	comm := fmt.Sprintf("/proc/%d/comm", p.pid.Load())
	for range programTimeout / programPoll {
		// The name is set in libcontainer/nsenter/nsexec.c.
		if name, err := os.ReadFile(comm); err != nil || string(name) != "runc:[2:INIT]\n" {
			return
		}
		time.Sleep(programPoll)
	}
}

func (p *process) signal(sig unix.Signal) error {
	p.mu.Lock()
	lp := p.lp
	p.mu.Unlock()
	if lp == nil {
		if p.ended() {
			return fmt.Errorf("process has ended: %w", errdefs.ErrNotFound)
		}
		return fmt.Errorf("process has not been started: %w", errdefs.ErrFailedPrecondition)
	}
	if p.started.Load() && sig != unix.SIGKILL {
		p.awaitProgram()
	}
	err := lp.Signal(sig)
	if errors.Is(err, os.ErrProcessDone) || errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("process has ended: %w", errdefs.ErrNotFound)
	}
	return err
}

// resize sets the size of the process's terminal, also of one that is not
// started yet.
func (p *process) resize(width, height uint16) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.io == nil {
		return fmt.Errorf("process has ended: %w", errdefs.ErrNotFound)
	}
	if !p.io.terminal {
		return fmt.Errorf("process has no terminal: %w", errdefs.ErrFailedPrecondition)
	}
	if p.pid.Load() == 0 {
		p.spec.ConsoleSize = &specs.Box{Width: uint(width), Height: uint(height)}
		return nil
	}
	return p.io.resize(width, height)
}
