package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// testHub is a hub with a listener; dial opens a connection that has said id,
// or nothing for id 0.
func testHub(t *testing.T, allow func(net.Addr) bool) (h *streamHub, dial func(id uint64) *net.UnixConn) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "streams")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	h = newStreamHub(slog.New(slog.DiscardHandler))
	served := make(chan error, 1)
	go func() { served <- h.serve(l, allow) }()
	t.Cleanup(func() {
		l.Close()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return h, func(id uint64) *net.UnixConn {
		t.Helper()
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if id != 0 {
			if err := binary.Write(conn, binary.BigEndian, id); err != nil {
				t.Fatal(err)
			}
		}
		return conn.(*net.UnixConn)
	}
}

func anyone(net.Addr) bool { return true }

// mustEnd fails unless the other side has closed the connection.
func mustEnd(t *testing.T, conn net.Conn) {
	t.Helper()
	if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("read %d bytes, %v; want the connection closed", n, err)
	}
}

func TestStreamHub(t *testing.T) {
	h, dial := testHub(t, anyone)
	ctx := context.Background()

	// Before it is wanted and after.
	early := dial(1)
	taken := make(chan streamConn)
	go func() {
		conn, err := h.take(ctx, 2)
		if err != nil {
			t.Error(err)
		}
		taken <- conn
	}()
	late := dial(2)
	first, err := h.take(ctx, 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, pair := range []struct {
		ours  io.ReadWriteCloser
		peers streamConn
	}{{early, first}, {late, <-taken}} {
		if _, err := io.WriteString(pair.ours, "hi"); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 2)
		if _, err := io.ReadFull(pair.peers, buf); err != nil || string(buf) != "hi" {
			t.Errorf("%q, %v", buf, err)
		}
		pair.peers.Close()
	}
}

func TestStreamHubRefuses(t *testing.T) {
	h, dial := testHub(t, anyone)
	ctx, cancel := context.WithCancel(context.Background())

	// The same id twice: the second is closed.
	dial(7)
	await(h, func() bool { return h.waiting[7] != nil })
	mustEnd(t, dial(7))

	// Half an id, and the id that means none.
	half := dial(0)
	half.Write([]byte{0, 0, 0})
	half.CloseWrite()
	mustEnd(t, half)
	none := dial(0)
	none.Write(make([]byte, streamIDSize))
	mustEnd(t, none)

	// Two who want the same.
	wanting := make(chan error, 1)
	go func() {
		_, err := h.take(ctx, 9)
		wanting <- err
	}()
	await(h, func() bool { return h.wanted[9] != nil })
	if _, err := h.take(ctx, 9); !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Errorf("second taker: %v", err)
	}
	cancel()
	if err := <-wanting; !errors.Is(err, context.Canceled) {
		t.Errorf("taker of a stream that never came: %v", err)
	}
	if len(h.wanted) != 0 {
		t.Errorf("wanted: %v", h.wanted)
	}
}

func TestStreamHubBounds(t *testing.T) {
	h, dial := testHub(t, anyone)
	for i := range maxWaitingStreams {
		dial(uint64(i + 1))
		if i%(maxStrangers/2) == 0 { // no more at once than may be strangers
			await(h, func() bool { return len(h.waiting) == i+1 })
		}
	}
	await(h, func() bool { return len(h.waiting) == maxWaitingStreams })
	mustEnd(t, dial(maxWaitingStreams+1))

	for range maxStrangers {
		dial(0)
	}
	await(h, func() bool { return h.strangers == maxStrangers })
	mustEnd(t, dial(0))
}

// await waits until cond, which is called with the hub's lock.
func await(h *streamHub, cond func() bool) {
	for {
		h.mu.Lock()
		ok := cond()
		h.mu.Unlock()
		if ok {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

func TestStreamHubPeers(t *testing.T) {
	_, dial := testHub(t, func(net.Addr) bool { return false })
	mustEnd(t, dial(0))
}

func FuzzStreamID(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{1, 2, 3})
	f.Add(make([]byte, 8))
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 1, 2})
	f.Fuzz(func(t *testing.T, data []byte) {
		ours, theirs := net.Pipe()
		go func() {
			ours.Write(data)
			ours.Close()
		}()
		id, err := readStreamID(theirs)
		theirs.Close()
		if err == nil && (len(data) < streamIDSize || id != binary.BigEndian.Uint64(data) || id == 0) {
			t.Errorf("id %d of %x", id, data)
		}
	})
}

// outputPair is an output with the process's end of the pipe and the shim's end
// of the stream.
func outputPair(t *testing.T) (o *output, process *os.File, shim *net.UnixConn) {
	t.Helper()
	h, dial := testHub(t, anyone)
	shim = dial(1)
	conn, err := h.take(context.Background(), 1)
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	o = newOutput(conn, r, 0)
	go o.run()
	return o, w, shim
}

func TestOutputEnds(t *testing.T) {
	o, process, shim := outputPair(t)
	go func() {
		io.WriteString(process, "all of it")
		process.Close()
	}()
	got, err := io.ReadAll(shim)
	if err != nil || string(got) != "all of it" {
		t.Errorf("%q, %v", got, err)
	}
	o.drain()
}

// TestOutputHeld: someone else holds the pipe after the process's end.
func TestOutputHeld(t *testing.T) {
	o, process, shim := outputPair(t)
	if _, err := io.WriteString(process, "all of it"); err != nil {
		t.Fatal(err)
	}
	o.drain()
	got, err := io.ReadAll(shim)
	if err != nil || string(got) != "all of it" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := io.WriteString(process, "late"); err == nil {
		t.Error("the pipe can still be written")
	}
}

// TestOutputEndless: someone else writes to the pipe without an end.
func TestOutputEndless(t *testing.T) {
	o, process, shim := outputPair(t)
	go func() {
		for {
			if _, err := process.Write(make([]byte, 1000)); err != nil {
				return
			}
		}
	}()
	go io.Copy(io.Discard, shim)
	o.drain()
}

// TestOutputSlow: the reader is slower than the grace for others is long, while
// someone else holds the pipe.
func TestOutputSlow(t *testing.T) {
	o, process, shim := outputPair(t)
	const size = 1 << 20
	go func() {
		process.Write(make([]byte, size)) // returns with much of it on the way
		o.drain()
	}()
	buf := make([]byte, 64<<10)
	got := 0
	for {
		time.Sleep(drainGrace / 4)
		n, err := shim.Read(buf)
		got += n
		if err != nil {
			break
		}
	}
	if got != size {
		t.Errorf("%d bytes of %d", got, size)
	}
	<-o.done
}

// TestOutputBroken: the process does not notice that its reader is gone.
func TestOutputBroken(t *testing.T) {
	o, process, shim := outputPair(t)
	shim.Close()
	for range 100 {
		if _, err := process.Write(make([]byte, 64<<10)); err != nil {
			t.Fatal(err)
		}
	}
	process.Close()
	o.drain()
}

// BenchmarkOutput carries a process's output to its stream.
func BenchmarkOutput(b *testing.B) {
	r, w, err := os.Pipe()
	if err != nil {
		b.Fatal(err)
	}
	unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, pipeSize)
	l, err := net.Listen("unix", filepath.Join(b.TempDir(), "stream"))
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	shim, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	conn, err := l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	o := newOutput(conn.(streamConn), r, 0)
	chunk := make([]byte, 64<<10)
	b.SetBytes(int64(len(chunk)))
	go o.run()
	go func() {
		for range b.N {
			w.Write(chunk)
		}
		w.Close()
	}()
	if n, err := io.Copy(io.Discard, shim); err != nil || n != int64(b.N)*int64(len(chunk)) {
		b.Fatal(n, err)
	}
	shim.Close()
	o.drain()
}
