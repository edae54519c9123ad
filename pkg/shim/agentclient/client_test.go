package agentclient

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
	"github.com/microvm-runtime/microvm/pkg/internal/alloctest"
	"github.com/microvm-runtime/microvm/pkg/internal/socktest"
	"github.com/microvm-runtime/microvm/pkg/shim/agenttest"
)

func connect(t *testing.T, agent *agenttest.Agent) *Client {
	t.Helper()
	ours, guest, err := socktest.New()
	if err != nil {
		t.Fatal(err)
	}
	go agent.Serve(guest)
	c := New(ours, func() {})
	t.Cleanup(func() { c.Close(); guest.Close() })
	return c
}

// reply makes an agent answer one method in its own way.
func reply(method string, message any, err error) *agenttest.Agent {
	a := agenttest.New()
	a.SetIntercept(func(called string, _ any) (any, error) {
		if called == method {
			return message, err
		}
		return nil, nil
	})
	return a
}

func stats(t testing.TB, typeURL string, value []byte) *agentproto.ContainerStatsResponse {
	t.Helper()
	return &agentproto.ContainerStatsResponse{Metrics: &anypb.Any{TypeUrl: typeURL, Value: value}}
}

// What a hostile agent answers is an error, and not more.
func TestHostileReplies(t *testing.T) {
	ctx := context.Background()
	many := &agentproto.ListProcessesResponse{}
	for range 40000 {
		many.Processes = append(many.Processes, &agentproto.ProcessEntry{Pid: 1})
	}
	for _, test := range []struct {
		name  string
		agent *agenttest.Agent
		call  func(c *Client) error
		want  string
	}{
		{"another protocol", reply("Info", &agentproto.InfoResponse{Protocol: 2}, nil),
			func(c *Client) error { _, err := c.Info(ctx); return err }, "version 2"},
		{"no process id", reply("CreateContainer", &agentproto.CreateProcessResponse{}, nil),
			func(c *Client) error {
				_, err := c.CreateContainer(ctx, &agentproto.CreateContainerRequest{Id: "c"})
				return err
			}, "0 is no process id"},
		{"impossible process id", reply("StartProcess", &agentproto.StartProcessResponse{Pid: 1 << 31}, nil),
			func(c *Client) error { _, err := c.StartProcess(ctx, "c", ""); return err }, "is no process id"},
		{"impossible exit status", reply("WaitProcess", &agentproto.WaitProcessResponse{ExitStatus: 256}, nil),
			func(c *Client) error { _, err := c.WaitProcess(ctx, "c", ""); return err }, "256 is no exit status"},
		{"a process list that is too long", reply("ListProcesses", many, nil),
			func(c *Client) error { _, err := c.Processes(ctx, "c"); return err }, "bytes"},
		{"a process list with a zero", reply("ListProcesses",
			&agentproto.ListProcessesResponse{Processes: []*agentproto.ProcessEntry{{Pid: 7}, {}}}, nil),
			func(c *Client) error { _, err := c.Processes(ctx, "c"); return err }, "0 is no process id"},
		{"no processors", reply("ResizeSandbox", &agentproto.ResizeSandboxResponse{}, nil),
			func(c *Client) error { _, err := c.ResizeSandbox(ctx, 1, 0); return err }, "0 is no number of processors"},
		{"too many processors", reply("ResizeSandbox", &agentproto.ResizeSandboxResponse{Cpus: 1 << 31}, nil),
			func(c *Client) error { _, err := c.ResizeSandbox(ctx, 1, 0); return err }, "is no number of processors"},
		{"metrics of another type", reply("ContainerStats", stats(t, "containerd.events.TaskExit", nil), nil),
			func(c *Client) error { _, err := c.Stats(ctx, "c"); return err }, "metrics of type"},
		{"metrics that are none", reply("ContainerStats", stats(t, "io.containerd.cgroups.v2.Metrics", []byte{0xff}), nil),
			func(c *Client) error { _, err := c.Stats(ctx, "c"); return err }, "metrics"},
		{"no metrics", reply("ContainerStats", &agentproto.ContainerStatsResponse{}, nil),
			func(c *Client) error { _, err := c.Stats(ctx, "c"); return err }, "metrics of type"},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := test.call(connect(t, test.agent))
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v does not say %q", err, test.want)
			}
		})
	}
}

func TestErrorsKeepTheirKindAndArePrintable(t *testing.T) {
	text := "no\n\x1b[31m such " + strings.Repeat("x", 1<<17)
	c := connect(t, reply("SignalProcess", (*emptypb.Empty)(nil), errors.Join(errors.New(text), errdefs.ErrNotFound)))
	err := c.Signal(context.Background(), "c", "", 9, false)
	if !errdefs.IsNotFound(err) {
		t.Errorf("%.200v is not of its kind", err)
	}
	if len(err.Error()) > 2*maxError || strings.ContainsAny(err.Error(), "\n\x1b") {
		t.Errorf("%d bytes: %.200q", len(err.Error()), err.Error())
	}
}

func TestStats(t *testing.T) {
	value, err := proto.Marshal(&cgroup2.Metrics{Memory: &cgroup2.MemoryStat{Usage: 42}})
	if err != nil {
		t.Fatal(err)
	}
	c := connect(t, reply("ContainerStats", stats(t, "io.containerd.cgroups.v2.Metrics", value), nil))
	m, err := c.Stats(context.Background(), "c")
	if err != nil || m.GetMemory().GetUsage() != 42 {
		t.Errorf("%v, %v", m, err)
	}
}

// All that waits ends when the connection does.
func TestConnectionLost(t *testing.T) {
	waiting := make(chan struct{})
	block := make(chan struct{})
	defer close(block)
	a := agenttest.New()
	a.SetIntercept(func(method string, _ any) (any, error) {
		if method == "WaitProcess" {
			close(waiting)
			<-block
		}
		return nil, nil
	})
	c := connect(t, a)
	events := make(chan error)
	go func() { events <- c.OOMKills(context.Background(), func(string) {}) }()
	waited := make(chan error)
	go func() {
		_, err := c.WaitProcess(context.Background(), "c", "")
		waited <- err
	}()
	<-waiting
	c.Close()
	if err := <-waited; !errdefs.IsUnavailable(err) {
		t.Errorf("wait: %v", err)
	}
	if err := <-events; err == nil {
		t.Error("events ended without an error")
	}
	<-c.Done()
}

// raw is an agent that writes what it likes.
func raw(t *testing.T, script func(net.Conn)) *Client {
	t.Helper()
	ours, guest, err := socktest.New()
	if err != nil {
		t.Fatal(err)
	}
	c := New(ours, func() {})
	t.Cleanup(func() { c.Close(); guest.Close() })
	go script(guest)
	return c
}

// frame is a ttrpc message.
func frame(stream uint32, kind, flags byte, payload []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(payload)))
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(append(b, kind, flags), payload...)
}

func TestBrokenFrames(t *testing.T) {
	oversized := binary.BigEndian.AppendUint32(nil, 5<<20)
	oversized = append(binary.BigEndian.AppendUint32(oversized, 1), 2, 0)
	for _, test := range []struct {
		name string
		data []byte
	}{
		{"a response that does not parse", frame(1, 2, 0, []byte{0xff, 0xff})},
		{"data instead of a response", frame(1, 3, 0, []byte("data"))},
		{"an unknown type", frame(1, 77, 255, nil)},
		{"another stream, then nothing", append(frame(8, 2, 0, nil), 1, 2, 3)},
		{"an oversized message", append(oversized, make([]byte, 5<<20)...)},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := raw(t, func(conn net.Conn) {
				conn.Read(make([]byte, 4096))
				conn.Write(test.data)
				conn.Close()
			})
			if _, err := c.Info(context.Background()); err == nil {
				t.Error("no error")
			}
		})
	}
}

// A reply may come twice, and streams may be flooded: requests are answered
// all the same.
func TestUnaskedFrames(t *testing.T) {
	c := raw(t, func(conn net.Conn) {
		reader := make([]byte, 4096)
		for id := uint32(1); ; id += 2 {
			if _, err := conn.Read(reader); err != nil {
				return
			}
			answer, _ := proto.Marshal(&agentproto.InfoResponse{Protocol: 1})
			// Field 2 of ttrpc's Response is the payload.
			response := append([]byte{0x12, byte(len(answer))}, answer...)
			for range 3 {
				conn.Write(frame(id, 2, 0, response))
			}
		}
	})
	for range 3 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		if _, err := c.Info(ctx); err != nil {
			t.Error(err)
		}
		cancel()
	}
}

// An agent that goes on with messages that nobody waits for loses its
// connection: each would be a line of the log.
func TestEndlessUnaskedFrames(t *testing.T) {
	for name, flood := range map[string][]byte{
		"answers to nobody":       frame(1<<20+1, 2, 0, nil),
		"data of nobody":          frame(1<<20+1, 3, 0, nil),
		"of a type that is not":   frame(1<<20+1, 77, 0, nil),
		"more answers to a first": frame(1, 2, 0, []byte{0x12, 2, 8, 1}),
	} {
		t.Run(name, func(t *testing.T) {
			c := raw(t, func(conn net.Conn) {
				conn.Read(make([]byte, 4096))
				for {
					if _, err := conn.Write(flood); err != nil {
						return
					}
				}
			})
			c.Info(t.Context())
			<-c.Done()
			if _, err := c.Info(t.Context()); !errdefs.IsUnavailable(err) {
				t.Errorf("an error that says that the connection is lost: %v", err)
			}
		})
	}
}

// FuzzReplies: no bytes on the connection make the client panic or hang, and
// what it returns is in range.
func FuzzReplies(f *testing.F) {
	f.Add(frame(1, 2, 0, nil))
	f.Add(frame(1, 2, 0, []byte{0x12, 2, 8, 1}))
	f.Add(frame(1, 3, 1, []byte("x")))
	f.Add(append(frame(3, 2, 0, nil), 0xff))
	f.Fuzz(func(t *testing.T, data []byte) {
		// ttrpc makes room for a message that was announced, of at most 4 MiB.
		defer alloctest.Limit(t, 16<<20)()
		ours, guest, err := socktest.New()
		if err != nil {
			t.Fatal(err)
		}
		c := New(ours, func() {})
		defer c.Close()
		go func() {
			guest.Write(data)
			guest.CloseWrite()
			guest.Read(make([]byte, 4096))
			guest.Close()
		}()
		if pid, err := c.StartProcess(context.Background(), "c", ""); err == nil && (pid == 0 || pid >= maxPid) {
			t.Errorf("pid %d", pid)
		}
		<-c.Done()
	})
}

// FuzzStats: metrics that pass can be marshalled again.
func FuzzStats(f *testing.F) {
	f.Add([]byte{0x0a, 2, 8, 1})
	f.Fuzz(func(t *testing.T, value []byte) {
		defer alloctest.Limit(t, 4<<20+64*uint64(len(value)))()
		m, err := checkStats(stats(t, "io.containerd.cgroups.v2.Metrics", value))
		if err != nil {
			return
		}
		if _, err := proto.Marshal(m); err != nil {
			t.Error(err)
		}
	})
}
