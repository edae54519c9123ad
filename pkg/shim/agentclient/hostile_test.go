package agentclient

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"reflect"
	"runtime"
	"runtime/metrics"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
	"github.com/microvm-runtime/microvm/pkg/shim/agenttest"
)

// TestMain silences ttrpc, which logs what it does not expect.
func TestMain(m *testing.M) {
	log.L.Logger.SetOutput(io.Discard)
	os.Exit(m.Run())
}

// A method makes a request and checks what it returns.
type method struct {
	name string
	call func(t testing.TB, ctx context.Context, c *Client) error
}

// methods are all those of a Client.
var methods = []method{
	{"Info", func(t testing.TB, ctx context.Context, c *Client) error {
		info, err := c.Info(ctx)
		for _, s := range []string{info.Version, info.KernelRelease, info.KernelVersion} {
			if len(s) > 128+3 || strings.ContainsAny(s, "\n\x00\x1b") {
				t.Errorf("info %q", s)
			}
		}
		return err
	}},
	{"ConfigureSandbox", func(_ testing.TB, ctx context.Context, c *Client) error {
		return c.ConfigureSandbox(ctx, &agentproto.ConfigureSandboxRequest{})
	}},
	{"UpdateNetwork", func(_ testing.TB, ctx context.Context, c *Client) error {
		return c.UpdateNetwork(ctx, &agentproto.Network{})
	}},
	{"Forward", func(_ testing.TB, ctx context.Context, c *Client) error { return c.Forward(ctx, 1, 80, false) }},
	{"CreateContainer", func(t testing.TB, ctx context.Context, c *Client) error {
		pid, err := c.CreateContainer(ctx, &agentproto.CreateContainerRequest{Id: "c"})
		return wantPid(t, pid, err)
	}},
	{"CreateExec", func(_ testing.TB, ctx context.Context, c *Client) error { return c.CreateExec(ctx, "c", "e", nil, nil) }},
	{"StartProcess", func(t testing.TB, ctx context.Context, c *Client) error {
		pid, err := c.StartProcess(ctx, "c", "")
		return wantPid(t, pid, err)
	}},
	{"WaitProcess", func(t testing.TB, ctx context.Context, c *Client) error {
		status, err := c.WaitProcess(ctx, "c", "")
		if status > 255 {
			t.Errorf("exit status %d", status)
		}
		return err
	}},
	{"Signal", func(_ testing.TB, ctx context.Context, c *Client) error { return c.Signal(ctx, "c", "", 9, true) }},
	{"ResizePty", func(_ testing.TB, ctx context.Context, c *Client) error { return c.ResizePty(ctx, "c", "", 80, 24) }},
	{"DeleteProcess", func(_ testing.TB, ctx context.Context, c *Client) error { return c.DeleteProcess(ctx, "c", "") }},
	{"RemoveDevice", func(_ testing.TB, ctx context.Context, c *Client) error { return c.RemoveDevice(ctx, "0000:00:07.0") }},
	{"VolumeChanged", func(_ testing.TB, ctx context.Context, c *Client) error { return c.VolumeChanged(ctx, "c", 0) }},
	{"Processes", func(t testing.TB, ctx context.Context, c *Client) error {
		list, err := c.Processes(ctx, "c")
		for _, p := range list {
			wantPid(t, p.Pid, err)
		}
		return err
	}},
	{"Pause", func(_ testing.TB, ctx context.Context, c *Client) error { return c.Pause(ctx, "c") }},
	{"Resume", func(_ testing.TB, ctx context.Context, c *Client) error { return c.Resume(ctx, "c") }},
	{"Update", func(_ testing.TB, ctx context.Context, c *Client) error { return c.Update(ctx, "c", nil) }},
	{"Stats", func(_ testing.TB, ctx context.Context, c *Client) error { _, err := c.Stats(ctx, "c"); return err }},
	{"SandboxStats", func(_ testing.TB, ctx context.Context, c *Client) error { _, err := c.SandboxStats(ctx); return err }},
	{"ResizeSandbox", func(t testing.TB, ctx context.Context, c *Client) error {
		n, err := c.ResizeSandbox(ctx, 1, 0)
		if n < 0 || n > maxCPUs {
			t.Errorf("%d processors", n)
		}
		return err
	}},
	{"CompareTime", func(_ testing.TB, ctx context.Context, c *Client) error { return c.CompareTime(ctx) }},
	{"Shutdown", func(_ testing.TB, ctx context.Context, c *Client) error { return c.Shutdown(ctx) }},
	{"OOMKills", func(_ testing.TB, ctx context.Context, c *Client) error { return c.OOMKills(ctx, func(string) {}) }},
}

// unbounded are the methods that wait for the guest as long as it takes, or as
// long as the caller says.
var unbounded = map[string]bool{"WaitProcess": true, "OOMKills": true, "CompareTime": true, "Shutdown": true}

func wantPid(t testing.TB, pid uint32, err error) error {
	t.Helper()
	if err == nil && (pid == 0 || pid >= maxPid) {
		t.Errorf("process id %d", pid)
	}
	return err
}

func TestMethodsAreAll(t *testing.T) {
	client := reflect.TypeFor[*Client]()
	known := map[string]bool{"Done": true, "Close": true}
	for _, m := range methods {
		known[m.name] = true
	}
	for i := range client.NumMethod() {
		if name := client.Method(i).Name; !known[name] {
			t.Errorf("%s is in no test of hostile agents", name)
		}
	}
}

// TestSilentAgent: an agent that takes requests and never answers, and one that
// does not even take them, hold up nobody without a bound.
func TestSilentAgent(t *testing.T) {
	for _, reads := range []bool{true, false} {
		for _, m := range methods {
			t.Run(fmt.Sprintf("%s, reads %v", m.name, reads), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					ours, guest := net.Pipe()
					c := New(ours, func() {})
					if reads {
						go io.Copy(io.Discard, guest)
					}
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					if unbounded[m.name] {
						time.AfterFunc(long, cancel)
					}
					start := time.Now()
					// That the answer to Shutdown gets lost is no error.
					if err := m.call(t, ctx, c); err == nil && (reads || m.name != "Shutdown") {
						t.Error("an answer that there was not")
					}
					if d := time.Since(start); d > long+writeTimeout {
						t.Errorf("it took %v", d)
					}
					c.Close()
					guest.Close()
					<-c.Done()
				})
			})
		}
	}
}

// TestAnswersOutOfOrder: an agent may answer in any order; whoever asked gets the
// answer to that, and answers to nobody are nobody's.
func TestAnswersOutOfOrder(t *testing.T) {
	const n = 200
	var mu sync.Mutex
	all := make(chan struct{})
	var waiting []string
	a := agenttest.New()
	a.SetIntercept(func(name string, request any) (any, error) {
		if name != "WaitProcess" {
			return nil, nil
		}
		id := request.(*agentproto.ProcessRequest).GetContainerId()
		mu.Lock()
		if waiting = append(waiting, id); len(waiting) == n {
			close(all)
		}
		mu.Unlock()
		<-all
		var status uint32
		fmt.Sscan(id, &status)
		for { // the last one first
			mu.Lock()
			if waiting[len(waiting)-1] == id {
				waiting = waiting[:len(waiting)-1]
				mu.Unlock()
				return &agentproto.WaitProcessResponse{ExitStatus: status}, nil
			}
			mu.Unlock()
			runtime.Gosched()
		}
	})
	c := connect(t, a)
	var waiters sync.WaitGroup
	for i := range uint32(n) {
		waiters.Go(func() {
			if status, err := c.WaitProcess(t.Context(), fmt.Sprint(i), ""); err != nil || status != i {
				t.Errorf("process %d: %d, %v", i, status, err)
			}
		})
	}
	waiters.Wait()
}

func allocated() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// TestMultipliedAnswer: what an agent sends grows when it is parsed; the more, the
// more parts it has.
func TestMultipliedAnswer(t *testing.T) {
	// Fields 1 (status) of ttrpc's Response and 3 (details) of that, which are
	// empty messages.
	for name, size := range map[string]int{"as long as ttrpc takes": 4<<20 - 16, "as long as we take": maxFrame - 16} {
		t.Run(name, func(t *testing.T) {
			status := []byte(strings.Repeat("\x1a\x00", size/2))
			response := append(binary.AppendUvarint([]byte{0x0a}, uint64(len(status))), status...)
			before := allocated()
			c := raw(t, func(conn net.Conn) {
				conn.Read(make([]byte, 4096))
				conn.Write(frame(1, 2, 0, response))
			})
			c.Signal(t.Context(), "c", "", 9, true)
			if n := allocated() - before; n > 32<<20 {
				t.Errorf("%d bytes were allocated for an answer of %d", n, size)
			}
		})
	}
}

// TestEndlessEvents: a flood of events, and of answers that nobody waits for,
// stays outside of the shim's memory, and requests are answered meanwhile.
func TestEndlessEvents(t *testing.T) {
	a := agenttest.New()
	c := connect(t, a)
	seen := make(chan struct{}, 1)
	go c.OOMKills(t.Context(), func(string) {
		select {
		case seen <- struct{}{}:
		default:
		}
	})
	stop := make(chan struct{})
	var flood sync.WaitGroup
	flood.Go(func() {
		id := strings.Repeat("made-up", 1000)
		for {
			select {
			case <-stop:
				return
			default:
				a.OOM(id)
			}
		}
	})
	<-seen
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	goroutines := runtime.NumGoroutine()
	for range 200 {
		if err := c.Signal(t.Context(), "c", "", 9, true); err != nil && !errdefs.IsNotFound(err) {
			t.Fatal(err)
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	close(stop)
	flood.Wait()
	if after.HeapAlloc > before.HeapAlloc+8<<20 {
		t.Errorf("%d bytes are in use, there were %d", after.HeapAlloc, before.HeapAlloc)
	}
	if n := runtime.NumGoroutine(); n > goroutines+10 {
		t.Errorf("%d goroutines, there were %d", n, goroutines)
	}
}

// FuzzAnswers sends answers of the fuzzer's to each request: one after the other,
// to whichever stream it likes. What comes of it is an error, or in range.
func FuzzAnswers(f *testing.F) {
	answer := func(stream, kind, flags byte, payload ...byte) []byte {
		return append([]byte{stream, kind, flags, byte(len(payload))}, payload...)
	}
	ok := func(payload ...byte) []byte { return append([]byte{0x12, byte(len(payload))}, payload...) }
	for i := range methods {
		f.Add(uint8(i), answer(0, 2, 0))
		f.Add(uint8(i), answer(0, 2, 0, ok(8, 1)...))                                            // field 1: a number
		f.Add(uint8(i), answer(0, 2, 0, ok(8, 0xff, 0xff, 0xff, 0xff, 0x0f)...))                 // the largest
		f.Add(uint8(i), answer(0, 2, 0, ok(0x0a, 2, 8, 0)...))                                   // a message with a zero
		f.Add(uint8(i), append(answer(2, 2, 0, ok(8, 1)...), answer(0, 2, 0, 0x0a, 2, 8, 5)...)) // another stream's, then an error
		f.Add(uint8(i), append(answer(0, 3, 0, 0x0a, 3, 0x0a, 1, 'c'), answer(0, 3, 5)...))      // events, and their end
		f.Add(uint8(i), answer(0, 1, 0xff, 1, 2, 3))
	}
	f.Fuzz(func(t *testing.T, which uint8, script []byte) {
		m := methods[int(which)%len(methods)]
		c := raw(t, func(conn net.Conn) {
			defer conn.Close()
			conn.Read(make([]byte, 4096))
			for range 50 {
				if len(script) < 4 {
					return
				}
				n := min(int(script[3]), len(script)-4)
				if _, err := conn.Write(frame(1+uint32(script[0]), script[1], script[2], script[4:4+n])); err != nil {
					return
				}
				script = script[4+n:]
			}
		})
		before := allocated()
		err := m.call(t, t.Context(), c)
		if err != nil && len(err.Error()) > 2*maxError {
			t.Errorf("an error of %d bytes", len(err.Error()))
		}
		if n := allocated() - before; n > 8<<20 {
			t.Errorf("%d bytes were allocated", n)
		}
		<-c.Done()
	})
}
