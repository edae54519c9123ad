package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/internal/alloctest"
	"github.com/microvm-runtime/microvm/pkg/internal/fdtest"
)

// hostileVMM is the shim's end of a VMM that a guest has taken over, and that
// VMM's end of the socket.
func hostileVMM(t testing.TB) (v *VMM, theirs *conn, read *sync.WaitGroup) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*conn
	for i, fd := range fds {
		if ends[i], err = newConn(os.NewFile(uintptr(fd), "control")); err != nil {
			t.Fatal(err)
		}
	}
	v = &VMM{
		conn:    ends[0],
		accept:  map[uint32]chan *net.UnixConn{1024: make(chan *net.UnixConn, acceptBacklog)},
		pending: map[uint64]chan reply{},
		done:    make(chan struct{}),
	}
	read = new(sync.WaitGroup)
	read.Go(v.readLoop)
	return v, ends[1], read
}

// numCalls is how many requests callAll makes: all that there are.
const numCalls = 9

func callAll(ctx context.Context, v *VMM, file *os.File) *sync.WaitGroup {
	var calls sync.WaitGroup
	for _, call := range []func(){
		func() {
			if c, err := v.Dial(ctx, 1025); err == nil {
				c.Close()
			}
		},
		func() { v.Pause(ctx) },
		func() { v.Resume(ctx) },
		func() { v.Stats(ctx) },
		func() { v.Stop(ctx) },
		func() { v.AttachDisk(ctx, Disk{}, file) },
		func() { v.AttachNIC(ctx, NIC{QueuePairs: 1}, []*os.File{file}) },
		func() { v.Detach(ctx, "0000:00:07.0") },
		func() { v.Resize(ctx, Size{}) },
	} {
		calls.Go(call)
	}
	return &calls
}

// FuzzVMM lets a VMM say what it likes, with descriptors, in the middle of
// requests. The shim's end neither panics nor hangs nor keeps a descriptor, and
// what it repeats is short and printable.
func FuzzVMM(f *testing.F) {
	packet := func(files byte, text string) []byte {
		return append([]byte{files, byte(len(text) >> 8), byte(len(text))}, text...)
	}
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	f.Add(join(packet(0, `{"id":1}`), packet(1, `{"id":2}`), packet(3, `{"id":3}`), packet(1, `{"id":4}`), packet(2, `{"id":5}`),
		packet(1, `{"id":6}`), packet(1, `{"id":7}`), packet(1, `{"id":8}`), packet(1, `{"id":9}`)))
	f.Add(join(packet(1, `{"id":1,"error":"no\nsuch\u001b"}`), packet(1, `{"id":1,"error":"again"}`)))
	f.Add(join(packet(1, `{"method":"accepted","body":{"port":1024}}`), packet(2, `{"method":"accepted","body":{"port":1024}}`), packet(1, `{"method":"accepted","body":{"port":7}}`)))
	f.Add(join(packet(7, `{"method":"phase","body":{"name":"x\u0000"}}`), packet(0, `{"method":"exit","body":{"reason":"a\nb","detail":"\u001b[2J"}}`)))
	f.Add(join(packet(1, `{"id":6,"body":{"address":"../../x\n"}}`), packet(0, `{"id":9,"body":{"vcpus":-1}}`), packet(0, `{"id":4,"body":{"nics":{"":{}}}}`)))
	f.Add(join(packet(4, `{`), packet(0, `[]`), packet(0, ``)))
	f.Add(packet(3, ``))
	null, err := os.Open(os.DevNull)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, script []byte) {
		defer alloctest.Limit(t, 32<<20)() // each end has buffers of its own
		before := fdtest.Count(t)
		v, theirs, read := hostileVMM(t)
		ctx, cancel := context.WithCancel(t.Context())
		calls := callAll(ctx, v, null)
		buf, oob := scratch() // the VMM takes what it is sent, and keeps nothing
		for range numCalls {
			_, files, err := theirs.receive(buf, oob)
			if err != nil {
				t.Fatal(err)
			}
			closeAll(files)
		}
		for range 50 {
			if len(script) < 3 {
				break
			}
			n, length := int(script[0]%8), int(script[1])<<8|int(script[2])
			text := script[3:min(len(script), 3+length)]
			script = script[3+len(text):]
			var rights []byte
			var ours []int
			for range n {
				a, b, err := Socketpair()
				if err != nil {
					t.Fatal(err)
				}
				a.Close()
				fd, err := unix.Dup(int(b.Fd()))
				if err != nil {
					t.Fatal(err)
				}
				b.Close()
				ours = append(ours, fd)
			}
			if n > 0 {
				rights = unix.UnixRights(ours...)
			}
			var err error
			if n > 0 && len(text) == 0 {
				err = sendEmpty(theirs.unix, rights)
			} else {
				_, _, err = theirs.unix.WriteMsgUnix(text, rights, nil)
			}
			for _, fd := range ours {
				unix.Close(fd)
			}
			if err != nil {
				break // the shim has had enough
			}
		}
		theirs.unix.CloseWrite()
		read.Wait()
		cancel()
		calls.Wait()
		for len(v.accept[1024]) > 0 {
			(<-v.accept[1024]).Close()
		}
		v.conn.unix.Close()
		theirs.unix.Close()
		if n := fdtest.Count(t); n > before {
			t.Errorf("%d descriptors, there were %d", n, before)
		}
		if v.exit != nil && (len(v.exit.String()) > maxText+maxWord+10 || strings.ContainsAny(v.exit.String(), "\n\x1b\x00")) {
			t.Errorf("exit %q", v.exit.String())
		}
		for _, p := range v.phases {
			if len(p.Name) > maxWord+3 || strings.ContainsAny(p.Name, "\n\x1b\x00") {
				t.Errorf("phase %q", p.Name)
			}
		}
	})
}

// vmmGivesItselfAway is a VMM that has its end of the control socket outlive it, in
// the shim: as a connection, or in flight in one that the shim does not read.
func vmmGivesItselfAway(s *Server, inFlight bool) {
	s.ReplyBoot(vmmBoot(s), nil)
	file, err := s.conn.unix.File()
	if err != nil {
		panic(err)
	}
	if inFlight {
		a, b, err := Socketpair()
		if err != nil {
			panic(err)
		}
		if err := unix.Sendmsg(int(a.Fd()), []byte{0}, unix.UnixRights(int(file.Fd())), nil, 0); err != nil {
			panic(err)
		}
		file = b
	}
	s.Accepted(1024, file)
	s.Exited(Exit{Reason: ReasonPowerOff})
}

// TestOnlyStreams: what a VMM passes for a connection and is none is refused and
// closed, its own end of the control socket above all.
func TestOnlyStreams(t *testing.T) {
	before := fdtest.Count(t)
	v, theirs, read := hostileVMM(t)
	a, b, err := Socketpair()
	if err != nil {
		t.Fatal(err)
	}
	own, err := theirs.unix.File()
	if err != nil {
		t.Fatal(err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []*os.File{own, null, b} {
		if err := theirs.send(t.Context(), message{Method: noteAccepted, Body: json.RawMessage(`{"port":1024}`)}, nil, file); err != nil {
			t.Fatal(err)
		}
	}
	c, err := v.Accept(t.Context(), 1024)
	if err != nil {
		t.Fatal(err)
	}
	if network := c.LocalAddr().Network(); network != "unix" {
		t.Fatalf("Accept returned a socket of type %s", network)
	}
	if _, err := a.WriteString("x"); err != nil {
		t.Fatal(err)
	}
	a.Close()
	if got, err := io.ReadAll(c); err != nil || string(got) != "x" {
		t.Errorf("the connection has %q, %v", got, err)
	}
	go func() {
		buf, oob := scratch()
		m, _, err := theirs.receive(buf, oob)
		if err == nil {
			err = theirs.send(t.Context(), message{ID: m.ID}, nil, own)
		}
		if err != nil {
			t.Error(err)
			theirs.unix.Close()
		}
	}()
	if _, err := v.Dial(t.Context(), 1025); err == nil {
		t.Error("Dial returned the control socket")
	}
	for _, f := range []io.Closer{b, own, null, c, theirs.unix} {
		f.Close()
	}
	read.Wait()
	v.conn.unix.Close()
	if n := fdtest.Count(t); n > before {
		t.Errorf("%d descriptors, there were %d", n, before)
	}
}

// TestHostileVMM has a VMM flood the shim with whatever the protocol has, while
// requests of the shim's are answered wrongly, late, twice, or not at all.
func TestHostileVMM(t *testing.T) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	before := fdtest.Count(t)
	v, theirs, read := hostileVMM(t)
	a, b, err := Socketpair()
	if err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("line\n\x1b[2J", 4000)
	ctx, cancel := context.WithCancel(t.Context())
	calls := callAll(ctx, v, null)
	for round := range 200 {
		for _, m := range []message{
			{Method: noteAccepted, Body: json.RawMessage(`{"port":1024}`)},
			{Method: noteAccepted, Body: json.RawMessage(`{"port":1}`)},
			{Method: notePhase, Body: json.RawMessage(fmt.Sprintf(`{"name":%q}`, "phase"))},
			{Method: "made-up"},
			{ID: uint64(1000 - round), Error: long}, // of no request, in any order
			{ID: uint64(round%9 + 1), Error: long},  // of a request, and again
		} {
			if err := theirs.send(ctx, m, nil, a, b); err != nil {
				t.Fatal(err)
			}
		}
	}
	// It is asked for more than it answers.
	_, err = v.Stats(func() context.Context { c, cancel := context.WithCancel(ctx); cancel(); return c }())
	if err == nil {
		t.Error("an answer that there was not")
	}
	a.Close()
	b.Close()
	theirs.send(ctx, message{ID: 1 << 40}, nil)
	if n := len(v.accept[1024]); n > acceptBacklog {
		t.Errorf("%d connections wait", n)
	}
	cancel()
	calls.Wait()
	v.mu.Lock()
	pending, phases := len(v.pending), len(v.phases)
	v.mu.Unlock()
	if pending != 0 || phases > maxPhases {
		t.Errorf("%d requests and %d phases are kept", pending, phases)
	}
	theirs.unix.Close()
	read.Wait()
	for len(v.accept[1024]) > 0 {
		(<-v.accept[1024]).Close()
	}
	v.conn.unix.Close()
	if n := fdtest.Count(t); n > before {
		t.Errorf("%d descriptors, there were %d", n, before)
	}
}

// TestVMMThatDoesNotRead asks a VMM for more than fits into its socket. Whoever
// asks gets an error when he wants to wait no longer, and the VMM can be killed.
func TestVMMThatDoesNotRead(t *testing.T) {
	v, err := launch(t, "never-reads")
	if err != nil {
		t.Fatal(err)
	}
	ask := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		_, err := v.Stats(ctx)
		return err
	}
	for range 500 { // 278 fill it
		if err := ask(); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("Stats: %v", err)
		}
	}
	var calls sync.WaitGroup
	for range 500 {
		calls.Go(func() {
			if err := ask(); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Stats beside others: %v", err)
			}
		})
	}
	calls.Wait()

	// Those who would wait for long go when they are told to, and hold up nobody.
	ctx, cancel := context.WithCancel(t.Context())
	waiting := callAll(ctx, v, tempFile(t, ""))
	if err := ask(); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Stats behind others: %v", err)
	}
	cancel()
	waiting.Wait()
	v.mu.Lock()
	if n := len(v.pending); n != 0 {
		t.Errorf("%d requests are kept", n)
	}
	v.mu.Unlock()

	// The end of the VMM is the end of those who still wait.
	waiting = callAll(t.Context(), v, tempFile(t, ""))
	if err := v.Kill(); err != nil {
		t.Fatal(err)
	}
	waiting.Wait()
	if e := v.Exit(); e.Reason != ReasonKilled {
		t.Errorf("Exit: %v", e)
	}
}

// TestVMMThatShutsItsEars: a VMM to which nothing can be sent any more is ended, though
// its socket is not, and what was asked is not kept.
func TestVMMThatShutsItsEars(t *testing.T) {
	v, err := launch(t, "shuts-its-ears")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	callAll(ctx, v, tempFile(t, "")).Wait()
	v.mu.Lock()
	n := len(v.pending)
	v.mu.Unlock()
	if n != 0 || ctx.Err() != nil {
		t.Fatalf("%d requests are kept, %v", n, ctx.Err())
	}
	if e := v.Exit(); e.Reason != ReasonKilled {
		t.Errorf("Exit: %v", e)
	}
}

// TestNoDescriptorsLeft: where the kernel finds no room for the descriptor that an
// answer comes with, the request fails, and not the whole machine.
func TestNoDescriptorsLeft(t *testing.T) {
	v, theirs, read := hostileVMM(t)
	a, b, err := Socketpair()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	defer b.Close()
	answer := func() {
		buf, oob := scratch()
		m, _, err := theirs.receive(buf, oob)
		if err == nil {
			err = theirs.send(t.Context(), message{ID: m.ID}, nil, b)
		}
		if err != nil {
			t.Error(err)
			theirs.unix.Close()
		}
	}
	before := fdtest.Count(t)
	fdtest.WithoutRoom(t, func() {
		theirs.send(t.Context(), message{Method: noteAccepted, Body: json.RawMessage(`{"port":1024}`)}, nil, b)
		var dial sync.WaitGroup
		dial.Go(func() {
			if _, err := v.Dial(t.Context(), 1025); !errors.Is(err, unix.EMFILE) {
				t.Errorf("Dial: %v", err)
			}
		})
		answer()
		dial.Wait()
	})
	if len(v.accept[1024]) > 0 {
		t.Error("a connection was accepted that has not arrived")
	}
	if n := fdtest.Count(t); n != before {
		t.Errorf("%d descriptors, there were %d", n, before)
	}

	go answer()
	c, err := v.Dial(t.Context(), 1025)
	if err != nil {
		t.Fatalf("later: %v", err)
	}
	c.Close()
	theirs.unix.Close()
	read.Wait()
	v.conn.unix.Close()
}

// TestNoDescriptorsLeftInVMM is the same for a device's descriptors on their way to
// the VMM.
func TestNoDescriptorsLeftInVMM(t *testing.T) {
	v, theirs, read := hostileVMM(t)
	file := tempFile(t, "")
	var served sync.WaitGroup
	served.Go(func() {
		s := Server{conn: theirs}
		s.Serve(Handler{AttachDisk: func(_ Disk, file *os.File) (string, error) { return "0000:00:07.0", file.Close() }})
	})
	fdtest.WithoutRoom(t, func() {
		if _, err := v.AttachDisk(t.Context(), Disk{}, file); err == nil || !strings.Contains(err.Error(), "the VMM has no room") {
			t.Errorf("AttachDisk: %v", err)
		}
	})
	if at, err := v.AttachDisk(t.Context(), Disk{}, file); err != nil || at != "0000:00:07.0" {
		t.Errorf("later: %q, %v", at, err)
	}
	v.conn.unix.Close()
	served.Wait()
	theirs.unix.Close()
	read.Wait()
}

// fill sends until there is no room. It is not c that sends: its time can be over
// although there is.
func fill(t *testing.T, c *conn) {
	t.Helper()
	raw, err := c.unix.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var sent error
	err = raw.Control(func(fd uintptr) {
		for sent == nil {
			sent = unix.Sendto(int(fd), []byte("unread"), unix.MSG_DONTWAIT, nil)
		}
	})
	if err != nil || sent != unix.EAGAIN {
		t.Fatal(err, sent)
	}
}

// TestPatience: nobody waits for the other end's reading without a bound, who has
// none of his own least of all.
func TestPatience(t *testing.T) {
	v, theirs, read := hostileVMM(t)
	v.conn.patience, theirs.patience = time.Millisecond, time.Millisecond
	// The shim does not wait for the VMM,
	fill(t, v.conn)
	if err := v.conn.send(t.Context(), message{Method: methodStats}, nil); !errors.Is(err, errUnread) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("send: %v", err)
	}
	if _, err := v.Stats(t.Context()); !errors.Is(err, errUnread) {
		t.Errorf("Stats: %v", err)
	}
	theirs.unix.Close()
	read.Wait()
	v.conn.unix.Close()

	// and the VMM, here an end of which nobody reads the other, not for the shim.
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	s, err := NewServer(os.NewFile(uintptr(fds[1]), "control"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.conn.unix.Close()
	s.conn.patience = time.Millisecond
	fill(t, s.conn)
	file := tempFile(t, "")
	for name, err := range map[string]error{
		"Phase":    s.Phase("again"),
		"Accepted": s.Accepted(1024, file),
		"reply":    s.reply(1, nil, nil, file),
		"Exited":   s.Exited(Exit{Reason: ReasonPanic}),
	} {
		if !errors.Is(err, errUnread) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
