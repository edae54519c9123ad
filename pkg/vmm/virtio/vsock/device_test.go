package vsock

import (
	"bytes"
	"context"
	"errors"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func socketpair() (a, b *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "a"), os.NewFile(uintptr(fds[1]), "b"), nil
}

// unixConn is what a shim makes of the file it gets.
func unixConn(t testing.TB, f *os.File) *net.UnixConn {
	t.Helper()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	t.Cleanup(func() { c.Close() })
	return c.(*net.UnixConn)
}

// dial connects the host to a port that the guest listens at.
func dial(t testing.TB, g *guest, port uint32, accept <-chan *socket) (*net.UnixConn, *socket) {
	t.Helper()
	f, err := g.device.Dial(t.Context(), port)
	if err != nil {
		t.Fatal(err)
	}
	return unixConn(t, f), <-accept
}

// connect connects the guest to a port of the host.
func connect(t testing.TB, g *guest, hostPort, guestPort uint32, accepted <-chan *os.File) (*net.UnixConn, *socket) {
	t.Helper()
	s, err := g.connect(hostPort, guestPort, 256<<10)
	if err != nil {
		t.Fatal(err)
	}
	return unixConn(t, <-accepted), s
}

// stream makes n bytes that are the same for the same seed, and no repetition.
func stream(seed uint64, n int64) io.Reader {
	var s [32]byte
	s[0] = byte(seed)
	return io.LimitReader(rand.NewChaCha8(s), n)
}

// plain hides ReadFrom and WriteTo, so that io.Copy uses a buffer.
type plainReader struct{ io.Reader }
type plainWriter struct{ io.Writer }

func copyAll(w io.Writer, r io.Reader) (int64, error) {
	return io.CopyBuffer(plainWriter{w}, plainReader{r}, make([]byte, 64<<10))
}

// sum is the length and the checksum of what r gives until its end.
func sum(t testing.TB, r io.Reader) (int64, uint32) {
	h := crc32.NewIEEE()
	n, err := copyAll(h, r)
	if err != nil {
		t.Errorf("read after %d bytes: %v", n, err)
	}
	return n, h.Sum32()
}

func wantStream(t testing.TB, what string, r io.Reader, seed uint64, n int64) {
	t.Helper()
	_, want := sum(t, stream(seed, n))
	if gotN, got := sum(t, r); gotN != n || got != want {
		t.Errorf("%s: %d bytes with checksum %08x, want %d with %08x", what, gotN, got, n, want)
	}
}

func TestConfigSpace(t *testing.T) {
	d := New(Config{GuestCID: 0x11223344})
	for _, tc := range []struct {
		offset uint64
		want   []byte
	}{
		{0, []byte{0x44, 0x33, 0x22, 0x11, 0, 0, 0, 0}},
		{2, []byte{0x22, 0x11}},
		{6, []byte{0, 0, 0, 0}},
		{8, []byte{0, 0}},
		{1<<64 - 1, []byte{0, 0, 0, 0, 0, 0, 0, 0}},
	} {
		got := bytes.Repeat([]byte{0xff}, len(tc.want))
		d.ReadConfig(tc.offset, got)
		if !bytes.Equal(got, tc.want) {
			t.Errorf("at %d: % x, want % x", tc.offset, got, tc.want)
		}
		d.WriteConfig(tc.offset, got)
	}
}

func TestDial(t *testing.T) {
	g := newGuest(t, Config{})
	host, s := dial(t, g, 1025, g.listen(1025))
	if _, err := host.Write([]byte("to the guest")); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 100)
	n, err := s.Read(p)
	if err != nil || string(p[:n]) != "to the guest" {
		t.Fatalf("%q, %v", p[:n], err)
	}
	if _, err := s.Write([]byte("to the host")); err != nil {
		t.Fatal(err)
	}
	n, err = host.Read(p)
	if err != nil || string(p[:n]) != "to the host" {
		t.Fatalf("%q, %v", p[:n], err)
	}
	s.Close()
	if n, err := host.Read(p); err != io.EOF {
		t.Fatalf("after the guest's close: %q, %v", p[:n], err)
	}
	s.waitGone()
	waitFor(t, "no connection is left", func() bool { return g.connections() == 0 })
}

func TestDialFails(t *testing.T) {
	g := newGuest(t, Config{})

	if _, err := g.device.Dial(t.Context(), 99); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("nobody listens: %v", err)
	}

	// A guest without rx buffers gets no request, and so does not answer.
	g.starve()
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error)
	go func() {
		_, err := g.device.Dial(ctx, 98)
		failed <- err
	}()
	waitFor(t, "the connection is there", func() bool { return g.connections() == 1 })
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	g.device.dialTimeout = 1
	if _, err := g.device.Dial(t.Context(), 97); !errors.Is(err, ErrNoAnswer) {
		t.Errorf("no answer: %v", err)
	}
	if n := g.connections(); n != 0 {
		t.Errorf("%d connections are left", n)
	}
	// The guest learns that they are gone; the requests were never sent.
	g.release()
	for _, port := range []uint32{98, 97} {
		if h := g.packet(); h.op != opReset || h.dstPort != port {
			t.Errorf("got %+v, want a reset for port %d", h, port)
		}
	}

	g.reset()
	if _, err := g.device.Dial(t.Context(), 99); !errors.Is(err, ErrNotReady) {
		t.Errorf("not active: %v", err)
	}
}

// A guest answers a dial that is no longer waiting.
func TestDialAnswerTooLate(t *testing.T) {
	g := newGuest(t, Config{})
	g.device.dialTimeout = 1
	if f, err := g.device.Dial(t.Context(), 50); err == nil { // the answer may win
		f.Close()
	}
	g.send(header{srcCID: testCID, dstCID: hostCID, srcPort: 51, dstPort: firstPort, kind: typeStream, op: opResponse}, nil)
	for {
		if h := g.packet(); h.dstPort == 51 {
			if h.op != opReset {
				t.Errorf("got %+v, want a reset", h)
			}
			return
		}
	}
}

func TestAccept(t *testing.T) {
	accept, accepted := listenHost(t)
	g := newGuest(t, Config{Accept: func(port uint32) (*os.File, error) {
		if port != 1024 {
			return nil, errors.New("nobody listens")
		}
		return accept(port)
	}})
	if _, err := g.connect(1023, 7, 256<<10); err == nil {
		t.Error("connected to a port that nobody listens at")
	}
	for range 3 { // the same port again, after a close
		host, s := connect(t, g, 1024, 7, accepted)
		go func() {
			io.Copy(s, s)
			s.Close()
		}()
		if _, err := host.Write([]byte("echo")); err != nil {
			t.Fatal(err)
		}
		if err := host.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(host)
		if err != nil || string(got) != "echo" {
			t.Fatalf("%q, %v", got, err)
		}
		s.waitGone()
	}
	waitFor(t, "no connection is left", func() bool { return g.connections() == 0 })
}

// The guest gives up while Accept runs.
func TestResetWhileAccepting(t *testing.T) {
	accept, accepted := listenHost(t)
	proceed := make(chan bool)
	g := newGuest(t, Config{MaxConnections: 1, Accept: func(port uint32) (*os.File, error) {
		<-proceed
		return accept(port)
	}})
	request := header{srcCID: testCID, dstCID: hostCID, srcPort: 5, dstPort: 1024, kind: typeStream, op: opRequest, bufAlloc: 1 << 16}
	g.send(request, nil)
	request.op = opReset
	g.send(request, nil)
	// It still counts, so that the guest cannot have any number of them.
	request.op, request.srcPort = opRequest, 6
	g.send(request, nil)
	if h := g.packet(); h.op != opReset || h.dstPort != 6 {
		t.Errorf("got %+v, want a reset of the second request", h)
	}
	close(proceed)
	if _, err := (<-accepted).Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("host's end: %v", err)
	}
	waitFor(t, "no connection is left", func() bool { return g.connections() == 0 })
}

// Everything goes both ways at once, whole and in order.
func TestEcho(t *testing.T) {
	const size = 100 << 20
	g := newGuest(t, Config{})
	host, s := dial(t, g, 1, g.listen(1))
	go func() {
		copyAll(s, s)
		s.shutdown(shutdownSend)
	}()
	go func() {
		copyAll(host, stream(1, size))
		host.CloseWrite()
	}()
	wantStream(t, "echo", host, 1, size)
	s.waitGone()
}

// Both directions carry different data.
func TestBothWays(t *testing.T) {
	const size = 20 << 20
	accept, accepted := listenHost(t)
	g := newGuest(t, Config{Accept: accept})
	host, s := connect(t, g, 1024, 1, accepted)
	var wg sync.WaitGroup
	wg.Go(func() {
		copyAll(host, stream(1, size))
		host.CloseWrite()
	})
	wg.Go(func() {
		copyAll(s, stream(2, size))
		s.shutdown(shutdownSend)
	})
	wg.Go(func() { wantStream(t, "guest to host", host, 2, size) })
	wg.Go(func() { wantStream(t, "host to guest", s, 1, size) })
	wg.Wait()
	s.Close()
	s.waitGone()
	waitFor(t, "no connection is left", func() bool { return g.connections() == 0 })
}

func TestHalfClose(t *testing.T) {
	t.Run("guest first", func(t *testing.T) {
		g := newGuest(t, Config{})
		host, s := dial(t, g, 1, g.listen(1))
		s.Write([]byte("request"))
		s.shutdown(shutdownSend)
		if got, err := io.ReadAll(host); err != nil || string(got) != "request" {
			t.Fatalf("%q, %v", got, err)
		}
		host.Write([]byte("answer"))
		host.Close()
		if got, err := io.ReadAll(s); err != nil || string(got) != "answer" {
			t.Fatalf("%q, %v", got, err)
		}
		s.Close()
		waitFor(t, "no connection is left", func() bool { return g.connections() == 0 })
	})
	t.Run("host first", func(t *testing.T) {
		g := newGuest(t, Config{})
		host, s := dial(t, g, 1, g.listen(1))
		host.Write([]byte("request"))
		host.CloseWrite()
		if got, err := io.ReadAll(s); err != nil || string(got) != "request" {
			t.Fatalf("%q, %v", got, err)
		}
		s.Write([]byte("answer"))
		s.Close()
		if got, err := io.ReadAll(host); err != nil || string(got) != "answer" {
			t.Fatalf("%q, %v", got, err)
		}
		s.waitGone()
		waitFor(t, "no connection is left", func() bool { return g.connections() == 0 })
	})
	t.Run("guest reads no more", func(t *testing.T) {
		g := newGuest(t, Config{})
		host, s := dial(t, g, 1, g.listen(1))
		s.shutdown(shutdownReceive)
		waitFor(t, "the host's writer has got EPIPE", func() bool {
			_, err := host.Write([]byte("x"))
			return errors.Is(err, unix.EPIPE)
		})
		s.Write([]byte("still writing"))
		s.shutdown(shutdownSend)
		// Although some of what the host wrote was not read, no error.
		if got, err := io.ReadAll(host); err != nil || string(got) != "still writing" {
			t.Fatalf("%q, %v", got, err)
		}
		s.waitGone()
		waitFor(t, "no connection is left", func() bool { return g.connections() == 0 })
	})
	t.Run("host reads no more", func(t *testing.T) {
		g := newGuest(t, Config{})
		host, s := dial(t, g, 1, g.listen(1))
		if err := host.CloseRead(); err != nil {
			t.Fatal(err)
		}
		block := make([]byte, 10000)
		for { // the guest's writer gets an error, however much credit it needs
			if _, err := s.Write(block); err != nil {
				break
			}
		}
		host.Write([]byte("still writing"))
		host.Close()
		if got, err := io.ReadAll(s); err != nil || string(got) != "still writing" {
			t.Fatalf("%q, %v", got, err)
		}
		s.Close()
		waitFor(t, "no connection is left", func() bool { return g.connections() == 0 })
	})
}

// A guest that closes without having read what the host wrote is no error for
// the host's reader: it gets what the guest has written, and the end.
func TestGuestClosesWithoutReading(t *testing.T) {
	g := newGuest(t, Config{})
	host, s := dial(t, g, 1, g.listen(1))
	stopped := make(chan error)
	go func() { // more than the guest's credit, so that some stays in the socket
		_, err := copyAll(host, stream(1, 10<<20))
		stopped <- err
	}()
	s.waitFull()
	s.Write([]byte("last words"))
	s.Close()
	if err := <-stopped; !errors.Is(err, unix.EPIPE) {
		t.Errorf("the host's writer got %v", err)
	}
	if got, err := io.ReadAll(host); err != nil || string(got) != "last words" {
		t.Fatalf("%q, %v", got, err)
	}
	s.waitGone()
	waitFor(t, "no connection is left", func() bool { return g.connections() == 0 })
}

// What was written just before a close arrives, followed by the end.
func TestCloseLosesNothing(t *testing.T) {
	const size = 8 << 20
	for range 10 {
		g := newGuest(t, Config{})
		accept := g.listen(1)
		host, s := dial(t, g, 1, accept)
		go func() {
			copyAll(s, stream(3, size))
			s.Close()
		}()
		wantStream(t, "guest writes and closes", host, 3, size)
		s.waitGone()

		host, s = dial(t, g, 1, accept)
		go func() {
			copyAll(host, stream(4, size))
			host.Close()
		}()
		wantStream(t, "host writes and closes", s, 4, size)
		s.Close()
		waitFor(t, "no connection is left", func() bool { return g.connections() == 0 })
		g.reset()
	}
}

// The guest resets a connection at once after it has closed it, while most of
// the data is still in our buffers.
func TestResetAfterShutdownDeliversData(t *testing.T) {
	accept, accepted := listenHost(t)
	g := newGuest(t, Config{Accept: accept})
	host, s := connect(t, g, 1024, 1, accepted)
	const size = bufAlloc + 100000 // what fits the backlog, and something in the socket
	data, _ := io.ReadAll(stream(5, size))
	if _, err := s.Write(data); err != nil {
		t.Fatal(err)
	}
	s.shutdown(shutdownBoth)
	g.mu.Lock()
	s.control(opReset, 0)
	delete(g.sockets, s.key)
	g.mu.Unlock()
	// The ports are free again while the old connection is being drained.
	host2, s2 := connect(t, g, 1024, 1, accepted)
	wantStream(t, "reset connection", host, 5, size)
	s2.Write([]byte("new"))
	s2.Close()
	if got, err := io.ReadAll(host2); err != nil || string(got) != "new" {
		t.Fatalf("%q, %v", got, err)
	}
	waitFor(t, "no connection is left", func() bool { return g.connections() == 0 })
}

// A guest that does not confirm a close loses the connection anyway.
func TestShutdownTimeout(t *testing.T) {
	accept, accepted := listenHost(t)
	g := newGuest(t, Config{Accept: accept})
	g.device.mux.shutdownTimeout = 1
	g.send(header{srcCID: testCID, dstCID: hostCID, srcPort: 5, dstPort: 1024, kind: typeStream, op: opRequest, bufAlloc: 1 << 16}, nil)
	if h := g.packet(); h.op != opResponse {
		t.Fatalf("got %+v, want a response", h)
	}
	(<-accepted).Close()
	if h := g.packet(); h.op != opShutdown || h.flags != shutdownBoth {
		t.Fatalf("got %+v, want a shutdown", h)
	}
	if h := g.packet(); h.op != opReset {
		t.Fatalf("got %+v, want a reset", h)
	}
	waitFor(t, "no connection is left", func() bool { return g.connections() == 0 })
}
