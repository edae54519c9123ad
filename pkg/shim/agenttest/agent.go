// Package agenttest is a guest for tests: an agent that speaks the real
// protocol over a socketpair, and whose processes are Go functions.
package agenttest

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"google.golang.org/protobuf/proto"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// Program is what a process does; it returns the exit status. It should end
// when the process is killed.
type Program func(*Process) uint32

// Process runs a Program. Streams that are not connected are nil.
type Process struct {
	Spec   *specs.Process
	Stdin  *net.UnixConn
	Stdout *net.UnixConn
	Stderr *net.UnixConn
	// Killed is closed on SIGKILL, and by Signal for what it says.
	Killed chan struct{}

	pid       uint32
	program   Program
	started   bool
	exited    chan struct{}
	status    uint32
	killOnce  sync.Once
	startOnce sync.Once
}

type container struct {
	init  *Process
	execs map[string]*Process
}

// Agent is the fake. Its exported fields are set before it is used.
type Agent struct {
	// Programs by the first argument of a process.
	Programs map[string]Program
	// Ports are what listens in the guest.
	Ports map[uint32]func(*net.UnixConn)

	mu         sync.Mutex
	intercept  func(method string, request any) (reply any, err error)
	containers map[string]*container
	streams    map[uint64]*net.UnixConn
	arrived    *sync.Cond
	nextPid    uint32
	calls      []string
	specs      map[string]*specs.Spec
	requests   map[string]*agentproto.CreateContainerRequest
	sandbox    *agentproto.ConfigureSandboxRequest
	network    *agentproto.Network
	oom        chan string
	shutdown   chan struct{}
	once       sync.Once
}

// New makes an agent with a program "sleep", which ends when it is killed, and
// "exit", which ends at once with status 0.
func New() *Agent {
	a := &Agent{
		Programs: map[string]Program{
			"sleep": func(p *Process) uint32 { <-p.Killed; return 128 + uint32(unix.SIGKILL) },
			"exit":  func(*Process) uint32 { return 0 },
		},
		containers: map[string]*container{},
		streams:    map[uint64]*net.UnixConn{},
		nextPid:    40,
		specs:      map[string]*specs.Spec{},
		requests:   map[string]*agentproto.CreateContainerRequest{},
		oom:        make(chan string, 100),
		shutdown:   make(chan struct{}),
	}
	a.arrived = sync.NewCond(&a.mu)
	return a
}

// Serve answers on a connection until it is closed, or after a Shutdown.
func (a *Agent) Serve(conn net.Conn) error {
	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(
		func(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
			reply, err := method(ctx, unmarshal)
			return reply, errgrpc.ToGRPC(err)
		}))
	if err != nil {
		return err
	}
	agentproto.RegisterAgentService(server, a)
	l := &listener{conn: conn, closed: make(chan struct{})}
	go func() {
		<-a.shutdown
		time.Sleep(time.Millisecond) // for the answer
		server.Close()
	}()
	return server.Serve(context.Background(), l)
}

type listener struct {
	mu     sync.Mutex
	conn   net.Conn
	once   sync.Once
	closed chan struct{}
}

func (l *listener) Accept() (net.Conn, error) {
	l.mu.Lock()
	c := l.conn
	l.conn = nil
	l.mu.Unlock()
	if c != nil {
		return c, nil
	}
	<-l.closed
	return nil, net.ErrClosed
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *listener) Addr() net.Addr { return &net.UnixAddr{} }

// Stopped is closed by Shutdown.
func (a *Agent) Stopped() <-chan struct{} { return a.shutdown }

// Stream takes the guest's end of a new stream.
func (a *Agent) Stream(conn *net.UnixConn) {
	var id [8]byte
	if _, err := io.ReadFull(conn, id[:]); err != nil {
		conn.Close()
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.streams[binary.BigEndian.Uint64(id[:])] = conn
	a.arrived.Broadcast()
}

// Calls are the methods that were called, in order.
func (a *Agent) Calls() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.calls)
}

// Spec is what a container was created from.
func (a *Agent) Spec(id string) *specs.Spec {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.specs[id]
}

// Request is what a container was created with.
func (a *Agent) Request(id string) *agentproto.CreateContainerRequest {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.requests[id]
}

// Sandbox is the configuration that came.
func (a *Agent) Sandbox() *agentproto.ConfigureSandboxRequest {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.sandbox
}

// Network is what came last.
func (a *Agent) Network() *agentproto.Network {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.network
}

// OOM reports a kill in a container.
func (a *Agent) OOM(id string) { a.oom <- id }

// KillAll ends all processes, as the guest's death does.
func (a *Agent) KillAll() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.containers {
		for _, p := range c.execs {
			p.kill()
		}
		c.init.kill()
	}
}

func (p *Process) kill() { p.killOnce.Do(func() { close(p.Killed) }) }

// SetIntercept makes f answer, delay or spoil requests; its nil, nil lets one pass. Nil ends that.
func (a *Agent) SetIntercept(f func(method string, request any) (any, error)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.intercept = f
}

// enter notes a call and asks the interceptor.
func enter[T any](a *Agent, method string, request any) (*T, error) {
	a.mu.Lock()
	a.calls = append(a.calls, method)
	intercept := a.intercept
	a.mu.Unlock()
	if intercept == nil {
		return nil, nil
	}
	reply, err := intercept(method, request)
	if err != nil || reply == nil {
		return nil, err
	}
	return reply.(*T), nil
}

func (a *Agent) find(id, execID string) (*Process, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.containers[id]
	if c == nil {
		return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
	}
	if execID == "" {
		return c.init, nil
	}
	p := c.execs[execID]
	if p == nil {
		return nil, fmt.Errorf("exec %s: %w", execID, errdefs.ErrNotFound)
	}
	return p, nil
}

func (a *Agent) newProcess(spec *specs.Process, s *agentproto.Streams) (*Process, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	program := a.Programs[spec.Args[0]]
	if program == nil {
		return nil, fmt.Errorf("exec: %q: executable file not found in $PATH", spec.Args[0])
	}
	a.nextPid++
	p := &Process{Spec: spec, Killed: make(chan struct{}), exited: make(chan struct{}), pid: a.nextPid, program: program}
	for _, stream := range []struct {
		id uint64
		to **net.UnixConn
	}{{s.GetStdin(), &p.Stdin}, {s.GetStdout(), &p.Stdout}, {s.GetStderr(), &p.Stderr}} {
		if stream.id == 0 {
			continue
		}
		for a.streams[stream.id] == nil {
			a.arrived.Wait()
		}
		*stream.to = a.streams[stream.id]
		delete(a.streams, stream.id)
	}
	return p, nil
}

func (p *Process) run(killed func()) {
	status := make(chan uint32, 1)
	go func() { status <- p.program(p) }()
	p.status = <-status
	for _, c := range []*net.UnixConn{p.Stdin, p.Stdout, p.Stderr} {
		if c != nil {
			c.Close()
		}
	}
	killed()
	close(p.exited)
}

func (a *Agent) Info(_ context.Context, r *agentproto.InfoRequest) (*agentproto.InfoResponse, error) {
	if reply, err := enter[agentproto.InfoResponse](a, "Info", r); reply != nil || err != nil {
		return reply, err
	}
	return &agentproto.InfoResponse{Protocol: 1, Version: "test", KernelRelease: "6.12.0"}, nil
}

func (a *Agent) ConfigureSandbox(_ context.Context, r *agentproto.ConfigureSandboxRequest) (*emptypb.Empty, error) {
	if reply, err := enter[emptypb.Empty](a, "ConfigureSandbox", r); reply != nil || err != nil {
		return reply, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.sandbox, a.network = r, r.GetNetwork()
	return &emptypb.Empty{}, nil
}

func (a *Agent) UpdateNetwork(_ context.Context, r *agentproto.Network) (*emptypb.Empty, error) {
	if reply, err := enter[emptypb.Empty](a, "UpdateNetwork", r); reply != nil || err != nil {
		return reply, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.network = r
	return &emptypb.Empty{}, nil
}

// Forward gives the stream to the function of Ports for its port.
func (a *Agent) Forward(_ context.Context, r *agentproto.ForwardRequest) (*emptypb.Empty, error) {
	if reply, err := enter[emptypb.Empty](a, "Forward", r); reply != nil || err != nil {
		return reply, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for a.streams[r.GetStream()] == nil {
		a.arrived.Wait()
	}
	stream := a.streams[r.GetStream()]
	delete(a.streams, r.GetStream())
	serve := a.Ports[r.GetPort()]
	if serve == nil {
		stream.Close()
		return nil, fmt.Errorf("nothing listens on port %d: %w", r.GetPort(), errdefs.ErrUnavailable)
	}
	go serve(stream)
	return &emptypb.Empty{}, nil
}

func (a *Agent) CreateContainer(_ context.Context, r *agentproto.CreateContainerRequest) (*agentproto.CreateProcessResponse, error) {
	if reply, err := enter[agentproto.CreateProcessResponse](a, "CreateContainer", r); reply != nil || err != nil {
		return reply, err
	}
	var spec specs.Spec
	if err := json.Unmarshal(r.GetSpec(), &spec); err != nil {
		return nil, err
	}
	p, err := a.newProcess(spec.Process, r.GetStreams())
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.containers[r.GetId()] != nil {
		return nil, errdefs.ErrAlreadyExists
	}
	a.specs[r.GetId()], a.requests[r.GetId()] = &spec, r
	a.containers[r.GetId()] = &container{init: p, execs: map[string]*Process{}}
	return &agentproto.CreateProcessResponse{Pid: p.pid}, nil
}

func (a *Agent) CreateExec(_ context.Context, r *agentproto.CreateExecRequest) (*emptypb.Empty, error) {
	if reply, err := enter[emptypb.Empty](a, "CreateExec", r); reply != nil || err != nil {
		return reply, err
	}
	var spec specs.Process
	if err := json.Unmarshal(r.GetProcess(), &spec); err != nil {
		return nil, err
	}
	p, err := a.newProcess(&spec, r.GetStreams())
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.containers[r.GetContainerId()]
	if c == nil {
		return nil, errdefs.ErrNotFound
	}
	c.execs[r.GetExecId()] = p
	return &emptypb.Empty{}, nil
}

func (a *Agent) StartProcess(_ context.Context, r *agentproto.ProcessRequest) (*agentproto.StartProcessResponse, error) {
	if reply, err := enter[agentproto.StartProcessResponse](a, "StartProcess", r); reply != nil || err != nil {
		return reply, err
	}
	p, err := a.find(r.GetContainerId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	err = errors.New("started before")
	p.startOnce.Do(func() {
		err = nil
		p.started = true
		go p.run(func() {
			if r.GetExecId() == "" {
				a.killExecs(r.GetContainerId())
			}
		})
	})
	return &agentproto.StartProcessResponse{Pid: p.pid}, err
}

// killExecs is what the end of a pid namespace's init does.
func (a *Agent) killExecs(id string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.containers[id]; c != nil {
		for _, p := range c.execs {
			p.kill()
		}
	}
}

func (a *Agent) WaitProcess(_ context.Context, r *agentproto.ProcessRequest) (*agentproto.WaitProcessResponse, error) {
	if reply, err := enter[agentproto.WaitProcessResponse](a, "WaitProcess", r); reply != nil || err != nil {
		return reply, err
	}
	p, err := a.find(r.GetContainerId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	<-p.exited
	return &agentproto.WaitProcessResponse{ExitStatus: p.status, ExitedAt: timestamppb.Now()}, nil
}

func (a *Agent) SignalProcess(_ context.Context, r *agentproto.SignalProcessRequest) (*emptypb.Empty, error) {
	if reply, err := enter[emptypb.Empty](a, "SignalProcess", r); reply != nil || err != nil {
		return reply, err
	}
	p, err := a.find(r.GetContainerId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	select {
	case <-p.exited:
		return nil, fmt.Errorf("process already finished: %w", errdefs.ErrNotFound)
	default:
	}
	if r.GetSignal() == uint32(unix.SIGKILL) {
		p.kill()
		// One that was not started has nothing to run.
		p.startOnce.Do(func() {
			p.status = 128 + uint32(unix.SIGKILL)
			close(p.exited)
		})
	}
	return &emptypb.Empty{}, nil
}

func (a *Agent) ResizePty(_ context.Context, r *agentproto.ResizePtyRequest) (*emptypb.Empty, error) {
	if reply, err := enter[emptypb.Empty](a, "ResizePty", r); reply != nil || err != nil {
		return reply, err
	}
	_, err := a.find(r.GetContainerId(), r.GetExecId())
	return &emptypb.Empty{}, err
}

func (a *Agent) VolumeChanged(_ context.Context, r *agentproto.VolumeRequest) (*emptypb.Empty, error) {
	if reply, err := enter[emptypb.Empty](a, "VolumeChanged", r); reply != nil || err != nil {
		return reply, err
	}
	return &emptypb.Empty{}, nil
}

func (a *Agent) RemoveDevice(_ context.Context, r *agentproto.RemoveDeviceRequest) (*emptypb.Empty, error) {
	if reply, err := enter[emptypb.Empty](a, "RemoveDevice", r); reply != nil || err != nil {
		return reply, err
	}
	return &emptypb.Empty{}, nil
}

func (a *Agent) DeleteProcess(_ context.Context, r *agentproto.ProcessRequest) (*emptypb.Empty, error) {
	if reply, err := enter[emptypb.Empty](a, "DeleteProcess", r); reply != nil || err != nil {
		return reply, err
	}
	if _, err := a.find(r.GetContainerId(), r.GetExecId()); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if r.GetExecId() == "" {
		delete(a.containers, r.GetContainerId())
	} else if c := a.containers[r.GetContainerId()]; c != nil {
		delete(c.execs, r.GetExecId())
	}
	return &emptypb.Empty{}, nil
}

func (a *Agent) ListProcesses(_ context.Context, r *agentproto.ContainerRequest) (*agentproto.ListProcessesResponse, error) {
	if reply, err := enter[agentproto.ListProcessesResponse](a, "ListProcesses", r); reply != nil || err != nil {
		return reply, err
	}
	if _, err := a.find(r.GetContainerId(), ""); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.containers[r.GetContainerId()]
	list := []*agentproto.ProcessEntry{{Pid: c.init.pid}}
	for id, p := range c.execs {
		list = append(list, &agentproto.ProcessEntry{Pid: p.pid, ExecId: id})
	}
	return &agentproto.ListProcessesResponse{Processes: list}, nil
}

func (a *Agent) PauseContainer(_ context.Context, r *agentproto.ContainerRequest) (*emptypb.Empty, error) {
	if reply, err := enter[emptypb.Empty](a, "PauseContainer", r); reply != nil || err != nil {
		return reply, err
	}
	_, err := a.find(r.GetContainerId(), "")
	return &emptypb.Empty{}, err
}

func (a *Agent) ResumeContainer(_ context.Context, r *agentproto.ContainerRequest) (*emptypb.Empty, error) {
	if reply, err := enter[emptypb.Empty](a, "ResumeContainer", r); reply != nil || err != nil {
		return reply, err
	}
	_, err := a.find(r.GetContainerId(), "")
	return &emptypb.Empty{}, err
}

func (a *Agent) UpdateContainer(_ context.Context, r *agentproto.UpdateContainerRequest) (*emptypb.Empty, error) {
	if reply, err := enter[emptypb.Empty](a, "UpdateContainer", r); reply != nil || err != nil {
		return reply, err
	}
	_, err := a.find(r.GetContainerId(), "")
	return &emptypb.Empty{}, err
}

func (a *Agent) ContainerStats(_ context.Context, r *agentproto.ContainerRequest) (*agentproto.ContainerStatsResponse, error) {
	if reply, err := enter[agentproto.ContainerStatsResponse](a, "ContainerStats", r); reply != nil || err != nil {
		return reply, err
	}
	return stats(&cgroup2.Metrics{Pids: &cgroup2.PidsStat{Current: 3}})
}

func (a *Agent) SandboxStats(_ context.Context, r *emptypb.Empty) (*agentproto.ContainerStatsResponse, error) {
	if reply, err := enter[agentproto.ContainerStatsResponse](a, "SandboxStats", r); reply != nil || err != nil {
		return reply, err
	}
	return stats(&cgroup2.Metrics{
		CPU:    &cgroup2.CPUStat{UsageUsec: 30, UserUsec: 20, SystemUsec: 10},
		Memory: &cgroup2.MemoryStat{Usage: 1 << 20, InactiveFile: 1 << 10, Anon: 1 << 12},
		Pids:   &cgroup2.PidsStat{Current: 7},
	})
}

func stats(metrics *cgroup2.Metrics) (*agentproto.ContainerStatsResponse, error) {
	data, err := proto.Marshal(metrics)
	if err != nil {
		return nil, err
	}
	return &agentproto.ContainerStatsResponse{Metrics: &anypb.Any{TypeUrl: "io.containerd.cgroups.v2.Metrics", Value: data}}, nil
}

func (a *Agent) Events(ctx context.Context, _ *agentproto.EventsRequest, server agentproto.Agent_EventsServer) error {
	for {
		select {
		case id := <-a.oom:
			event := &agentproto.Event{Kind: &agentproto.Event_OomKill{OomKill: &agentproto.OOMKill{ContainerId: id}}}
			if err := server.Send(event); err != nil {
				return err
			}
		case <-a.shutdown:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (a *Agent) Shutdown(_ context.Context, r *emptypb.Empty) (*emptypb.Empty, error) {
	if reply, err := enter[emptypb.Empty](a, "Shutdown", r); reply != nil || err != nil {
		return reply, err
	}
	a.KillAll()
	a.once.Do(func() { close(a.shutdown) })
	return &emptypb.Empty{}, nil
}
