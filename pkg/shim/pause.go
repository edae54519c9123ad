package shim

import (
	"context"
	"fmt"
	"sync"

	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
	"github.com/microvm-runtime/microvm/pkg/shim/agentclient"
)

// guestTasks is what a container does in the guest. It is the agent's client,
// or pause, for a container that is not there.
type guestTasks interface {
	StartProcess(ctx context.Context, id, execID string) (pid uint32, err error)
	WaitProcess(ctx context.Context, id, execID string) (exitStatus uint32, err error)
	Signal(ctx context.Context, id, execID string, signal uint32, all bool) error
	DeleteProcess(ctx context.Context, id, execID string) error
	CreateExec(ctx context.Context, id, execID string, process []byte, streams *agentproto.Streams) error
	ResizePty(ctx context.Context, id, execID string, width, height uint32) error
	Processes(ctx context.Context, id string) ([]agentclient.Process, error)
	Pause(ctx context.Context, id string) error
	Resume(ctx context.Context, id string) error
	Update(ctx context.Context, id string, resources []byte) error
	Stats(ctx context.Context, id string) (*cgroup2.Metrics, error)
}

// pause is the container that the CRI plugin keeps a pod's namespaces with. The
// guest keeps them by itself, so no process runs in there: the container is
// the virtual machine. It ends when the machine does, and the machine with it.
type pause struct {
	sandbox *sandbox

	once   sync.Once
	ending chan struct{} // closed by the first signal that ends it
	ended  chan struct{} // closed when the machine has ended, after status is set
	status uint32
}

func newPause(s *sandbox) *pause {
	return &pause{sandbox: s, ending: make(chan struct{}), ended: make(chan struct{})}
}

func (p *pause) pid() uint32 { return uint32(p.sandbox.vm.Pid()) }

func (p *pause) StartProcess(context.Context, string, string) (uint32, error) { return p.pid(), nil }

func (p *pause) WaitProcess(ctx context.Context, _, _ string) (uint32, error) {
	select {
	case <-p.ending:
	case <-p.sandbox.dead:
		select {
		case <-p.ending:
		default:
			return 0, fmt.Errorf("the virtual machine has ended: %w", errdefs.ErrUnavailable)
		}
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	select {
	case <-p.ended:
		return p.status, nil
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// Signal ends the container with the status that the program of the pause
// image has: it exits on SIGINT and SIGTERM, and as the first process of its
// namespace it does not see a signal that it handles in no way. That its
// children end (SIGCHLD) is nothing to it.
func (p *pause) Signal(_ context.Context, _, _ string, signal uint32, _ bool) error {
	switch unix.Signal(signal) {
	case unix.SIGINT, unix.SIGTERM:
		p.end(0)
	case unix.SIGKILL:
		p.end(statusKilled)
	}
	return nil
}

func (p *pause) end(status uint32) {
	p.once.Do(func() {
		p.status = status
		close(p.ending)
		go func() {
			if err := p.sandbox.halt(powerOff); err != nil {
				log.L.WithError(err).Error("the pod's virtual machine does not end")
			} else {
				<-p.sandbox.dead // who hears of the end finds it has come
			}
			close(p.ended)
		}()
	})
}

func (p *pause) DeleteProcess(context.Context, string, string) error { return nil }

func (p *pause) Processes(context.Context, string) ([]agentclient.Process, error) {
	return []agentclient.Process{{Pid: p.pid()}}, nil
}

// Stats are those of the whole sandbox.
func (p *pause) Stats(ctx context.Context, _ string) (*cgroup2.Metrics, error) {
	return p.sandbox.metrics(ctx)
}

func (p *pause) CreateExec(_ context.Context, id, _ string, _ []byte, _ *agentproto.Streams) error {
	return p.refuse(id, "nothing can be executed in it")
}

func (p *pause) ResizePty(_ context.Context, id, _ string, _, _ uint32) error {
	return p.refuse(id, "it has no terminal")
}

func (p *pause) Pause(_ context.Context, id string) error {
	return p.refuse(id, "it cannot be paused")
}

func (p *pause) Resume(_ context.Context, id string) error {
	return p.refuse(id, "it cannot be paused")
}

func (p *pause) Update(_ context.Context, id string, _ []byte) error {
	return p.refuse(id, "it has no limits of its own")
}

func (p *pause) refuse(id, why string) error {
	return fmt.Errorf("container %s is the pod's virtual machine, not a container in it: %s: %w", id, why, errdefs.ErrNotImplemented)
}
