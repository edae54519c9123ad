// Package agentclient is the shim's side of the protocol with the agent. The
// agent belongs to the guest and may be hostile: it is not waited for without
// a bound, what it sends is bounded and checked, and nothing it says is
// repeated without being made printable.
package agentclient

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
	"github.com/microvm-runtime/microvm/pkg/internal/printable"
)

// Ports of the agent's protocol, in the numbering of vsock.
const (
	// ControlPort of the host is where the agent connects to when it is ready.
	ControlPort = 1024
	// StreamPort of the guest takes the connections of standard streams.
	StreamPort = 1025
)

const (
	// quick bounds requests that only touch the agent's or the guest kernel's
	// state; long those that wait for processes or file systems.
	quick = 30 * time.Second
	long  = 2 * time.Minute
	// writeTimeout bounds the time that the agent does not read at all.
	writeTimeout = 30 * time.Second

	// maxReply bounds a reply before it is parsed, which multiplies it.
	maxReply = 128 << 10
	// maxFrame bounds a message with all that ttrpc parses itself before we see
	// the reply: details of a status, of two bytes each, would become a hundred
	// times as much. The longest that an honest agent sends lists as many
	// processes as there can be (pid_max is 32768, six bytes each).
	maxFrame = 256 << 10
	// maxUnasked is how many messages more than were asked for may come. ttrpc
	// writes a line to the log for each that is for nobody. Of events, those that
	// are on their way to whoever handles them count: 70 bytes each, of 4096 that
	// are read at once, and 10 that wait.
	maxUnasked = 256
	// maxError bounds what of an error's text is repeated.
	maxError = 1024
	// maxPid is Linux's PID_MAX_LIMIT, the first value that is none.
	maxPid = 1 << 22
	// UnknownStatus is the exit status of a process of which nothing else is
	// known.
	UnknownStatus = 255
)

// Client speaks with one agent. All methods may be called concurrently.
type Client struct {
	conn   *agentConn
	ttrpc  *ttrpc.Client
	rpc    agentproto.AgentClient
	done   chan struct{}
	silent func()
}

// New takes over the connection that the agent has opened. It calls silent when
// the agent lets the time for an answer pass, concurrently and as often as that
// happens.
func New(conn net.Conn, silent func()) *Client {
	c := &Client{conn: &agentConn{Conn: conn}, done: make(chan struct{}), silent: silent}
	c.conn.due.Store(maxUnasked)
	var once sync.Once
	c.ttrpc = ttrpc.NewClient(c.conn,
		ttrpc.WithUnaryClientInterceptor(c.intercept),
		ttrpc.WithOnClose(func() { once.Do(func() { close(c.done) }) }))
	c.rpc = agentproto.NewAgentClient(c.ttrpc)
	return c
}

// Done is closed when the connection has ended, from whichever side.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close ends the connection.
func (c *Client) Close() { c.ttrpc.Close() }

// agentConn ends a connection whose other side has stopped reading, for which
// ttrpc holds a lock while it writes, so that nothing else would end any request
// then; and one whose other side sends more at a time than an agent has to say,
// or more often than it was asked.
type agentConn struct {
	net.Conn
	// due is how many messages may come still. A request is good for one, and so
	// is an event that was handled: there may be any number of them.
	due atomic.Int64
	// Where in the stream of messages reading is; it is for one goroutine.
	header [10]byte // of the next message: its length first, big endian
	have   int      // bytes of header
	rest   uint32   // bytes of the message that are to come
}

// These end a connection.
var (
	errLongMessage = fmt.Errorf("a message of more than %d bytes", maxFrame)
	errUnasked     = errors.New("more messages than were asked for")
)

func (c *agentConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	for b := p[:n]; len(b) > 0; {
		if c.rest > 0 {
			skip := min(uint32(len(b)), c.rest)
			b, c.rest = b[skip:], c.rest-skip
			continue
		}
		k := copy(c.header[c.have:], b)
		b, c.have = b[k:], c.have+k
		if c.have < len(c.header) {
			continue
		}
		c.have, c.rest = 0, binary.BigEndian.Uint32(c.header[:])
		if c.rest > maxFrame {
			c.Conn.Close()
			return 0, errLongMessage
		}
		if c.due.Add(-1) < 0 {
			c.Conn.Close()
			return 0, errUnasked
		}
	}
	return n, err
}

func (c *agentConn) Write(p []byte) (int, error) {
	if err := c.Conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return 0, err
	}
	n, err := c.Conn.Write(p)
	if err != nil {
		c.Conn.Close()
	}
	return n, err
}

// intercept sees replies before they are parsed.
func (c *Client) intercept(ctx context.Context, request *ttrpc.Request, reply *ttrpc.Response, _ *ttrpc.UnaryClientInfo, invoke ttrpc.Invoker) error {
	c.conn.due.Add(1)
	if err := invoke(ctx, request, reply); err != nil {
		if errors.Is(err, ttrpc.ErrClosed) || errors.Is(err, errLongMessage) || errors.Is(err, errUnasked) {
			return fmt.Errorf("the connection to the agent is lost: %w", errdefs.ErrUnavailable)
		}
		if errors.Is(err, context.DeadlineExceeded) {
			c.silent()
			return fmt.Errorf("the agent in the guest does not answer (%s): %w", request.GetMethod(), err)
		}
		return fmt.Errorf("agent: %w", err)
	}
	if s := reply.GetStatus(); s.GetCode() != int32(codes.OK) {
		message := printable.String(s.GetMessage(), maxError)
		reply.Status = nil
		return errgrpc.ToNative(status.Error(codes.Code(s.GetCode()), message))
	}
	if n := len(reply.GetPayload()); n > maxReply {
		return fmt.Errorf("agent: %s answered with %d bytes: %w", request.GetMethod(), n, errdefs.ErrResourceExhausted)
	}
	return nil
}

// Info describes the guest, in the agent's own words.
type Info struct {
	Version       string
	KernelRelease string
	KernelVersion string
	// Init and Ready are on the guest's own clock since it booted.
	Init, Ready time.Duration
}

// Protocol is the version of the protocol that this package speaks.
const Protocol = 1

// Info is the first request.
func (c *Client) Info(ctx context.Context) (Info, error) {
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	r, err := c.rpc.Info(ctx, &agentproto.InfoRequest{})
	if err != nil {
		return Info{}, err
	}
	if r.GetProtocol() != Protocol {
		return Info{}, fmt.Errorf("the agent in the guest image speaks version %d of the protocol, this shim %d: %w",
			r.GetProtocol(), Protocol, errdefs.ErrFailedPrecondition)
	}
	return Info{
		Version:       printable.String(r.GetVersion(), 64),
		KernelRelease: printable.String(r.GetKernelRelease(), 64),
		KernelVersion: printable.String(r.GetKernelVersion(), 128),
		Init:          time.Duration(r.GetInitNanoseconds()),
		Ready:         time.Duration(r.GetReadyNanoseconds()),
	}, nil
}

// ConfigureSandbox sets what all containers share. The guest's clock is set to
// the host's.
func (c *Client) ConfigureSandbox(ctx context.Context, r *agentproto.ConfigureSandboxRequest) error {
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	r.Time = timestamppb.Now()
	_, err := c.rpc.ConfigureSandbox(ctx, r)
	return err
}

// UpdateNetwork replaces the network.
func (c *Client) UpdateNetwork(ctx context.Context, network *agentproto.Network) error {
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	_, err := c.rpc.UpdateNetwork(ctx, network)
	return err
}

// Forward connects a stream, which has been opened, with a TCP port of the
// guest's loopback.
func (c *Client) Forward(ctx context.Context, stream uint64, port uint16, ipv6First bool) error {
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	_, err := c.rpc.Forward(ctx, &agentproto.ForwardRequest{Stream: stream, Port: uint32(port), Ipv6First: ipv6First})
	return err
}

// CreateContainer makes a container, whose init process waits.
func (c *Client) CreateContainer(ctx context.Context, request *agentproto.CreateContainerRequest) (pid uint32, err error) {
	ctx, cancel := context.WithTimeout(ctx, long)
	defer cancel()
	r, err := c.rpc.CreateContainer(ctx, request)
	if err != nil {
		return 0, err
	}
	return checkPid(r.GetPid())
}

// CreateExec prepares another process of a container.
func (c *Client) CreateExec(ctx context.Context, id, execID string, process []byte, streams *agentproto.Streams) error {
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	_, err := c.rpc.CreateExec(ctx, &agentproto.CreateExecRequest{
		ContainerId: id, ExecId: execID, Process: process, Streams: streams,
	})
	return err
}

// StartProcess starts a process that was created. An empty execID is the
// container's init process, here and below.
func (c *Client) StartProcess(ctx context.Context, id, execID string) (pid uint32, err error) {
	ctx, cancel := context.WithTimeout(ctx, long)
	defer cancel()
	r, err := c.rpc.StartProcess(ctx, &agentproto.ProcessRequest{ContainerId: id, ExecId: execID})
	if err != nil {
		return 0, err
	}
	return checkPid(r.GetPid())
}

// WaitProcess waits, without a bound, until a process has ended. When it ended
// is the host's to say: the guest's clock is the guest's.
func (c *Client) WaitProcess(ctx context.Context, id, execID string) (exitStatus uint32, err error) {
	r, err := c.rpc.WaitProcess(ctx, &agentproto.ProcessRequest{ContainerId: id, ExecId: execID})
	if err != nil {
		return 0, err
	}
	return checkStatus(r.GetExitStatus())
}

// Signal sends a signal to a process, or to all of a container.
func (c *Client) Signal(ctx context.Context, id, execID string, signal uint32, all bool) error {
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	_, err := c.rpc.SignalProcess(ctx, &agentproto.SignalProcessRequest{
		ContainerId: id, ExecId: execID, Signal: signal, All: all,
	})
	return err
}

// ResizePty sets the size of a process's terminal, in characters.
func (c *Client) ResizePty(ctx context.Context, id, execID string, width, height uint32) error {
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	_, err := c.rpc.ResizePty(ctx, &agentproto.ResizePtyRequest{
		ContainerId: id, ExecId: execID, Width: width, Height: height,
	})
	return err
}

// DeleteProcess frees a process that has ended, or a container.
func (c *Client) DeleteProcess(ctx context.Context, id, execID string) error {
	ctx, cancel := context.WithTimeout(ctx, long)
	defer cancel()
	_, err := c.rpc.DeleteProcess(ctx, &agentproto.ProcessRequest{ContainerId: id, ExecId: execID})
	return err
}

// RemoveDevice has the guest's kernel let go of a device before it is detached.
func (c *Client) RemoveDevice(ctx context.Context, pciAddress string) error {
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	_, err := c.rpc.RemoveDevice(ctx, &agentproto.RemoveDeviceRequest{PciAddress: pciAddress})
	return err
}

// VolumeChanged has the guest's inotify watches of a container's mount fire.
func (c *Client) VolumeChanged(ctx context.Context, id string, mount int) error {
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	_, err := c.rpc.VolumeChanged(ctx, &agentproto.VolumeRequest{ContainerId: id, Mount: uint32(mount)})
	return err
}

// Process is one of a container's, by its number in the guest.
type Process struct {
	Pid uint32
	// ExecID as the agent says: it need not be one that was created.
	ExecID string
}

// Processes lists a container's processes.
func (c *Client) Processes(ctx context.Context, id string) ([]Process, error) {
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	r, err := c.rpc.ListProcesses(ctx, &agentproto.ContainerRequest{ContainerId: id})
	if err != nil {
		return nil, err
	}
	return checkProcesses(r)
}

// Pause freezes a container's processes; Resume lets them go on.
func (c *Client) Pause(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	_, err := c.rpc.PauseContainer(ctx, &agentproto.ContainerRequest{ContainerId: id})
	return err
}

// Resume undoes Pause.
func (c *Client) Resume(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	_, err := c.rpc.ResumeContainer(ctx, &agentproto.ContainerRequest{ContainerId: id})
	return err
}

// Update sets a container's limits, OCI LinuxResources as JSON.
func (c *Client) Update(ctx context.Context, id string, resources []byte) error {
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	_, err := c.rpc.UpdateContainer(ctx, &agentproto.UpdateContainerRequest{ContainerId: id, Resources: resources})
	return err
}

// Stats reads a container's cgroup.
func (c *Client) Stats(ctx context.Context, id string) (*cgroup2.Metrics, error) {
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	r, err := c.rpc.ContainerStats(ctx, &agentproto.ContainerRequest{ContainerId: id})
	if err != nil {
		return nil, err
	}
	return checkStats(r)
}

// SandboxStats reads the metrics of all containers together.
func (c *Client) SandboxStats(ctx context.Context) (*cgroup2.Metrics, error) {
	ctx, cancel := context.WithTimeout(ctx, quick)
	defer cancel()
	r, err := c.rpc.SandboxStats(ctx, &emptypb.Empty{})
	if err != nil {
		return nil, err
	}
	return checkStats(r)
}

// Shutdown has the agent power the machine off. The answer may get lost, which
// is no error.
func (c *Client) Shutdown(ctx context.Context) error {
	_, err := c.rpc.Shutdown(ctx, &emptypb.Empty{})
	if errdefs.IsUnavailable(err) {
		return nil
	}
	return err
}

// OOMKills calls handle with the id, as the agent says it, of each container
// of which the guest's kernel kills a process for its memory limit. It returns
// when the agent ends the stream or the connection is lost. It has to be
// called, and handle must not wait: the whole connection would wait with it.
func (c *Client) OOMKills(ctx context.Context, handle func(containerID string)) error {
	stream, err := c.rpc.Events(ctx, &agentproto.EventsRequest{})
	if err != nil {
		return fmt.Errorf("agent's events: %w", err)
	}
	for {
		event, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("agent's events: %w", err)
		}
		c.conn.due.Add(1)
		if kill := event.GetOomKill(); kill != nil {
			handle(kill.GetContainerId())
		}
	}
}
