package console

import (
	"bytes"
	"context"
	"errors"
	"io"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

// sink collects what is written.
type sink struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (s *sink) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.Write(p)
}

func (s *sink) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.String()
}

// gate is a writer that is stuck until it is opened.
type gate struct {
	sink
	stuck chan struct{} // gets a value at each Write
	open  chan struct{}
}

func newGate() *gate { return &gate{stuck: make(chan struct{}, 1), open: make(chan struct{})} }

func (g *gate) Write(p []byte) (int, error) {
	select {
	case g.stuck <- struct{}{}:
	default:
	}
	<-g.open
	return g.sink.Write(p)
}

func send(t testing.TB, d *virtiotest.Driver, parts ...string) {
	t.Helper()
	var readable [][]byte
	for _, p := range parts {
		readable = append(readable, []byte(p))
	}
	if written, _ := d.Send(transmitQueue, readable, nil).Wait(t); written != 0 {
		t.Fatalf("the device says it wrote %d bytes to a request without room", written)
	}
}

func TestOutput(t *testing.T) {
	var out sink
	c := New(&out)
	d := virtiotest.NewDriver(t, c, virtiotest.Options{})
	send(t, d, "a")
	send(t, d, "")
	send(t, d, "b", "", "cd")
	d.Send(transmitQueue, [][]byte{[]byte("e")}, []int{3}).Wait(t) // writable makes no sense, and no harm
	d.Send(transmitQueue, nil, []int{3}).Wait(t)
	d.Reset()
	d.Activate()
	long := strings.Repeat("0123456789", 5000)
	send(t, d, long)
	if err := c.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := out.String(); got != "abcde"+long {
		t.Fatalf("%d bytes: %.80q", len(got), got)
	}
	send(t, d, "after Close")
	if err := c.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := out.String(); got != "abcde"+long {
		t.Fatalf("written after Close: %q", got[5+len(long):])
	}
}

var lostLine = regexp.MustCompile(`\r\n\[(\d+) bytes of console output lost\]\r\n`)

// A reader that is stuck holds nobody up, and gets the end of the output and
// the number of bytes that are missing.
func TestFloodWithStuckReader(t *testing.T) {
	g := newGate()
	c := New(g)
	d := virtiotest.NewDriver(t, c, virtiotest.Options{})
	var sent strings.Builder
	for i := range 20_000 {
		line := "line " + strconv.Itoa(i) + " of a guest that talks too much\n"
		sent.WriteString(line)
		send(t, d, line)
		if i == 0 {
			<-g.stuck
		}
	}
	close(g.open)
	if err := c.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := g.String()
	m := lostLine.FindAllStringSubmatchIndex(got, -1)
	if len(m) != 1 {
		t.Fatalf("%d notes about lost output", len(m))
	}
	lost, err := strconv.Atoi(got[m[0][2]:m[0][3]])
	if err != nil {
		t.Fatal(err)
	}
	head, tail := got[:m[0][0]], got[m[0][1]:]
	all := sent.String()
	if len(tail) != bufferSize || len(head)+lost+len(tail) != len(all) {
		t.Fatalf("%d bytes, %d lost, %d bytes; sent %d", len(head), lost, len(tail), len(all))
	}
	if !strings.HasPrefix(all, head) || !strings.HasSuffix(all, tail) {
		t.Fatal("what is there is not the beginning and the end of what was sent")
	}
}

func TestRequestLargerThanBuffer(t *testing.T) {
	g := newGate()
	c := New(g)
	d := virtiotest.NewDriver(t, c, virtiotest.Options{})
	send(t, d, "first")
	<-g.stuck
	send(t, d, "gone")
	send(t, d, "lost"+strings.Repeat("x", 1000), strings.Repeat("y", bufferSize-1), "z")
	close(g.open)
	if err := c.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := "first\r\n[1008 bytes of console output lost]\r\n" + strings.Repeat("y", bufferSize-1) + "z"
	if got := g.String(); got != want {
		t.Fatalf("%d bytes: %.80q", len(got), got)
	}
}

func TestCloseGivesUp(t *testing.T) {
	g := newGate()
	c := New(g)
	d := virtiotest.NewDriver(t, c, virtiotest.Options{})
	send(t, d, "never written")
	<-g.stuck
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 2 {
		if err := c.Close(ctx); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	}
	close(g.open)
}

func TestWriterFails(t *testing.T) {
	r, w := io.Pipe()
	broken := errors.New("reader is gone")
	r.CloseWithError(broken)
	c := New(w)
	d := virtiotest.NewDriver(t, c, virtiotest.Options{})
	for range 1000 { // the guest does not notice
		send(t, d, strings.Repeat("x", 1000))
	}
	if err := c.Close(t.Context()); !errors.Is(err, broken) {
		t.Fatal(err)
	}
}

// The receive queue stays with the device: nothing is completed.
func TestNoInput(t *testing.T) {
	c := New(io.Discard)
	d := virtiotest.NewDriver(t, c, virtiotest.Options{})
	for range d.Rings[receiveQueue].Size {
		d.Send(receiveQueue, nil, []int{64})
	}
	send(t, d, "x")
	if n := d.Rings[receiveQueue].UsedIdx(); n != 0 {
		t.Fatalf("%d receive buffers used", n)
	}
}

func TestBadRing(t *testing.T) {
	d := virtiotest.NewDriver(t, New(io.Discard), virtiotest.Options{MayFail: true})
	r := d.Rings[transmitQueue]
	r.SetAvailIdx(r.Size + 1)
	d.Kick(transmitQueue)
	if err := d.Failed(); !strings.Contains(err.Error(), "65 ahead") {
		t.Fatal(err)
	}
}

func TestQueuesNotEnabled(t *testing.T) {
	virtiotest.NewDriver(t, New(io.Discard), virtiotest.Options{Disabled: []int{0, 1}})
}

func TestConfigIsEmpty(t *testing.T) {
	p := []byte{1, 2, 3}
	c := New(io.Discard)
	c.WriteConfig(8, p) // emerg_wr, not offered
	c.ReadConfig(0, p)
	if !bytes.Equal(p, make([]byte, 3)) {
		t.Fatal(p)
	}
}

// Resets with requests in flight, while the writer is stuck.
func TestResetInFlight(t *testing.T) {
	g := newGate()
	c := New(g)
	d := virtiotest.NewDriver(t, c, virtiotest.Options{})
	for range 20 {
		for range 50 {
			d.Send(transmitQueue, [][]byte{bytes.Repeat([]byte("x"), 512)}, nil)
		}
		d.Reset()
		d.Activate()
	}
	close(g.open)
}

// FuzzOutput sends the fuzzer's bytes in chains of its shape. What comes out is
// what went in.
func FuzzOutput(f *testing.F) {
	f.Add([]byte("hello, world\n"), []byte{3, 0, 5, 1}, uint8(0))
	f.Add(bytes.Repeat([]byte("x"), 5000), []byte{200, 1, 255}, uint8(130))
	f.Fuzz(func(t *testing.T, data, shape []byte, rotate uint8) {
		var out sink
		c := New(&out)
		// Start anywhere in the ring, so that the data wraps around its end.
		c.out.mu.Lock()
		c.out.start, c.out.length = bufferSize-int(rotate), int(rotate)
		c.out.changed.Broadcast()
		c.out.mu.Unlock()
		d := virtiotest.NewDriver(t, c, virtiotest.Options{})
		rest := data
		for len(rest) > 0 {
			var readable [][]byte
			for i := range 1 + len(data)%3 {
				n := len(rest)
				if len(shape) > 0 {
					n = min(n, int(shape[0]))
					shape = shape[1:]
				}
				if i == 0 {
					n = max(n, 1)
				}
				n = min(n, len(rest))
				readable = append(readable, rest[:n])
				rest = rest[n:]
			}
			d.Send(transmitQueue, readable, nil).Wait(t)
		}
		if err := c.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := out.String(); got != strings.Repeat("\x00", int(rotate))+string(data) {
			t.Fatalf("%d bytes came out, %d went in after %d zeroes", len(got), len(data), rotate)
		}
	})
}

func BenchmarkOutput(b *testing.B) {
	for _, size := range []int{16, 128, 4096} {
		b.Run(strconv.Itoa(size), func(b *testing.B) {
			d := virtiotest.NewDriver(b, New(io.Discard), virtiotest.Options{})
			r := d.Prepare(transmitQueue, [][]byte{make([]byte, size)}, nil)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				r.Submit()
				r.Join()
			}
		})
	}
}
