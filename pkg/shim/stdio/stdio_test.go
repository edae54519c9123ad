package stdio

import (
	"bytes"
	"context"
	"errors"
	"hash/crc32"
	"io"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/internal/fdtest"
	"github.com/microvm-runtime/microvm/pkg/internal/socktest"
)

func fifo(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := unix.Mkfifo(path, 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t *testing.T, c Config) *Streams {
	t.Helper()
	s, err := Open(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// reader opens a fifo as a client does, which never waits.
func reader(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func content(n int) []byte {
	p := make([]byte, n)
	rand.New(rand.NewSource(1)).Read(p)
	return p
}

// All that was written before the guest's end was closed arrives, on each
// stream of its own.
func TestOutputIsComplete(t *testing.T) {
	stdout, stderr := fifo(t, "stdout"), fifo(t, "stderr")
	s := open(t, Config{Stdout: stdout, Stderr: stderr})
	if in, out, err := s.Wants(); in || !out || !err {
		t.Fatalf("wants %v %v %v", in, out, err)
	}
	type result struct {
		sum uint32
		n   int
	}
	read := func(path string) <-chan result {
		done := make(chan result, 1)
		f := reader(t, path)
		go func() {
			data, err := io.ReadAll(f)
			if err != nil {
				t.Error(err)
			}
			done <- result{crc32.ChecksumIEEE(data), len(data)}
		}()
		return done
	}
	out, errs := read(stdout), read(stderr)
	ours1, guest1 := socktest.Pair(t)
	ours2, guest2 := socktest.Pair(t)
	s.Copy(nil, ours1, ours2)

	big, small := content(8<<20), []byte("a warning")
	go func() {
		guest1.Write(big)
		guest1.Close()
	}()
	guest2.Write(small)
	guest2.CloseWrite()

	if err := s.Drain(time.Minute); err != nil {
		t.Error(err)
	}
	if got, want := <-out, (result{crc32.ChecksumIEEE(big), len(big)}); got != want {
		t.Errorf("stdout %v, want %v", got, want)
	}
	if got, want := <-errs, (result{crc32.ChecksumIEEE(small), len(small)}); got != want {
		t.Errorf("stderr %v, want %v", got, want)
	}
}

// A client that went away does not hold the process's exit up, nor does it
// break the stream for the next client.
func TestOutputWithoutReader(t *testing.T) {
	path := fifo(t, "stdout")
	s := open(t, Config{Stdout: path})
	ours, guest := socktest.Pair(t)
	s.Copy(nil, ours, nil)
	first := reader(t, path)
	guest.Write([]byte("one"))
	p := make([]byte, 3)
	if _, err := io.ReadFull(first, p); err != nil {
		t.Fatal(err)
	}
	first.Close()

	guest.Write([]byte("two"))
	second := reader(t, path)
	if _, err := io.ReadFull(second, p); err != nil || string(p) != "two" {
		t.Errorf("second client: %q, %v", p, err)
	}
	second.Close()

	go func() {
		guest.Write(content(1 << 20)) // more than fifo and socket hold
		guest.Close()
	}()
	if err := s.Drain(50 * time.Millisecond); err == nil {
		t.Error("drained without a reader")
	}
	s.Close()
	if err := s.Drain(time.Minute); err != nil {
		t.Errorf("after Close: %v", err)
	}
}

// A guest that says that a process has ended and does not end its output holds
// up neither the exit nor the client.
func TestOutputWithoutEnd(t *testing.T) {
	stdout, stderr := fifo(t, "stdout"), fifo(t, "stderr")
	s := open(t, Config{Stdout: stdout, Stderr: stderr})
	client := reader(t, stdout)
	ours1, guest1 := socktest.Pair(t)
	ours2, guest2 := socktest.Pair(t)
	s.Copy(nil, ours1, ours2)
	guest1.Write([]byte("all"))
	guest2.CloseWrite()
	if err := s.Drain(50 * time.Millisecond); err == nil || !strings.Contains(err.Error(), "guest") {
		t.Errorf("drained: %v", err)
	}
	if data, err := io.ReadAll(client); err != nil || string(data) != "all" {
		t.Errorf("client: %q, %v", data, err)
	}
}

// A client that does not read for too long gets everything all the same.
func TestOutputOfSlowReader(t *testing.T) {
	path := fifo(t, "stdout")
	s := open(t, Config{Stdout: path})
	ours, guest := socktest.Pair(t)
	s.Copy(nil, ours, nil)
	big := content(1 << 20) // more than fifo and socket hold
	go func() {
		guest.Write(big)
		guest.Close()
	}()
	if err := s.Drain(50 * time.Millisecond); err == nil || !strings.Contains(err.Error(), "client") {
		t.Errorf("drained without a reader: %v", err)
	}
	if data, err := io.ReadAll(reader(t, path)); err != nil || !bytes.Equal(data, big) {
		t.Errorf("%d bytes of %d, %v", len(data), len(big), err)
	}
}

func TestInput(t *testing.T) {
	path := fifo(t, "stdin")
	s := open(t, Config{Stdin: path})
	ours, guest := socktest.Pair(t)
	s.Copy(ours, nil, nil)
	startStdin(t, s)

	send := func(text string) {
		w, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, text); err != nil {
			t.Error(err)
		}
		w.Close()
	}
	p := make([]byte, 5)
	for _, text := range []string{"first", "later"} { // a client that comes again
		send(text)
		if _, err := io.ReadFull(guest, p); err != nil || string(p) != text {
			t.Fatalf("%q, %v", p, err)
		}
	}
	send("last.")
	s.CloseStdin()
	s.CloseStdin()
	rest, err := io.ReadAll(guest)
	if err != nil || string(rest) != "last." {
		t.Errorf("until end of file: %q, %v", rest, err)
	}
	// Only half of the connection is closed.
	if _, err := guest.Write([]byte("x")); err != nil {
		t.Error(err)
	}
}

// A process that does not read its stdin does not keep Close waiting.
func TestCloseWhileInputIsStuck(t *testing.T) {
	path := fifo(t, "stdin")
	s := open(t, Config{Stdin: path})
	ours, _ := socktest.Pair(t)
	s.Copy(ours, nil, nil)
	startStdin(t, s)
	w, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	written := make(chan struct{})
	go func() {
		w.Write(content(4 << 20))
		close(written)
	}()
	s.Close()
	w.Close()
	<-written
}

// A client that comes to its end before the process starts would not say
// CloseStdin: it must not find a reader until then.
func TestInputStartsWithTheProcess(t *testing.T) {
	path := fifo(t, "stdin")
	s := open(t, Config{Stdin: path})
	ours, guest := socktest.Pair(t)
	s.Copy(ours, nil, nil)
	if w, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0); !errors.Is(err, unix.ENXIO) {
		w.Close()
		t.Fatalf("the fifo has a reader before the process starts: %v", err)
	}
	s.CloseStdin()
	startStdin(t, s)
	startStdin(t, s) // has no effect
	if rest, err := io.ReadAll(guest); err != nil || len(rest) != 0 {
		t.Errorf("%q, %v", rest, err)
	}
}

func startStdin(t *testing.T, s *Streams) {
	t.Helper()
	if err := s.StartStdin(); err != nil {
		t.Fatal(err)
	}
}

func TestTerminalHasOneOutput(t *testing.T) {
	s := open(t, Config{Stdin: fifo(t, "stdin"), Stdout: fifo(t, "stdout"), Stderr: "/nonexistent", Terminal: true})
	if in, out, err := s.Wants(); !in || !out || err {
		t.Errorf("wants %v %v %v", in, out, err)
	}
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "logs", "container log")
	for range 2 { // appended to
		s := open(t, Config{Stdout: "file://" + strings.ReplaceAll(path, " ", "%20"), Stderr: path2uri(path)})
		ours1, guest1 := socktest.Pair(t)
		ours2, guest2 := socktest.Pair(t)
		s.Copy(nil, ours1, ours2)
		guest1.Write([]byte("line\n"))
		guest1.Close()
		guest2.Write([]byte("line\n"))
		guest2.Close()
		if err := s.Drain(time.Minute); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(path)
	if err != nil || string(data) != strings.Repeat("line\n", 4) {
		t.Errorf("%q, %v", data, err)
	}
}

func path2uri(path string) string { return "file://" + strings.ReplaceAll(path, " ", "%20") }

// script is a logging program.
func script(t *testing.T, body string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "logger")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLogger(t *testing.T) {
	result := filepath.Join(t.TempDir(), "result")
	program := script(t, `
echo "$CONTAINER_NAMESPACE/$CONTAINER_ID $*" > "$2"
printf x >&5; exec 5>&-
cat <&3 >> "$2"
cat <&4 >> "$2"
echo end >> "$2"
`)
	for _, scheme := range []string{"binary", "binary-v2"} {
		uri := scheme + "://" + program + "?a=" + result + "&b"
		s := open(t, Config{ID: "c1", Namespace: "ns", Stdout: uri, Stderr: uri})
		ours1, guest1 := socktest.Pair(t)
		ours2, guest2 := socktest.Pair(t)
		s.Copy(nil, ours1, ours2)
		guest1.Write([]byte("out\n"))
		guest2.Write([]byte("err\n"))
		guest1.Close()
		guest2.Close()
		if err := s.Drain(time.Minute); err != nil {
			t.Fatal(err)
		}
		s.Close() // waits for the program
		data, err := os.ReadFile(result)
		if want := "ns/c1 a " + result + " b\nout\nerr\nend\n"; err != nil || string(data) != want {
			t.Errorf("%s: %q, %v, want %q", scheme, data, err, want)
		}
	}
}

func TestLoggerThatFails(t *testing.T) {
	for _, test := range []struct{ uri, want string }{
		{"binary:///nonexistent", "no such file"},
		{"binary-v2://" + script(t, "exit 1"), "without becoming ready"},
	} {
		_, err := Open(context.Background(), Config{ID: "c1", Namespace: "ns", Stdout: test.uri})
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: error %v does not say %q", test.uri, err, test.want)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	_, err := Open(ctx, Config{Stdout: "binary://" + script(t, "exec sleep 1000")})
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a program that hangs: %v", err)
	}
}

func TestBadStreams(t *testing.T) {
	for _, test := range []struct {
		config Config
		want   string
	}{
		{Config{Stdout: "/nonexistent/fifo"}, "stdout: stat /nonexistent/fifo"},
		{Config{Stderr: "/nonexistent/fifo"}, "stderr"},
		{Config{Stdin: "/nonexistent/fifo"}, "stdin"},
		{Config{Stdout: "npipe://./pipe/x"}, "npipe:// are not supported"},
		{Config{Stdin: "file:///etc/passwd"}, "file:// are not supported"},
		{Config{Stdout: "fifo://%zz"}, "stream address"},
		{Config{Stdout: t.TempDir()}, "directory"},
	} {
		_, err := Open(context.Background(), test.config)
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v: error %v does not say %q", test.config, err, test.want)
		}
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v is not the client's doing", test.config, err)
		}
	}
}

// That there are no descriptors is not the client's fault.
func TestNoDescriptors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "stdout")
	if err := unix.Mkfifo(path, 0o700); err != nil {
		t.Fatal(err)
	}
	var err error
	fdtest.WithoutRoom(t, func() { _, err = Open(context.Background(), Config{Stdout: path}) })
	if !errdefs.IsResourceExhausted(err) || errdefs.IsInvalidArgument(err) {
		t.Errorf("open: %v", err)
	}
}

// Without connected streams there is nothing to wait for.
func TestNoStreams(t *testing.T) {
	s := open(t, Config{})
	s.Copy(nil, nil, nil)
	if err := s.Drain(time.Minute); err != nil {
		t.Error(err)
	}
	s.CloseStdin()
}

func BenchmarkOutput(b *testing.B) {
	path := filepath.Join(b.TempDir(), "stdout")
	if err := unix.Mkfifo(path, 0o700); err != nil {
		b.Fatal(err)
	}
	s, err := Open(context.Background(), Config{Stdout: path})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	f, err := os.OpenFile(path, os.O_RDONLY, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	ours, guest := socktest.Pair(b)
	s.Copy(nil, ours, nil)
	chunk := bytes.Repeat([]byte("x"), 64<<10)
	b.SetBytes(int64(len(chunk)))
	go func() {
		for range b.N {
			guest.Write(chunk)
		}
		guest.Close()
	}()
	if _, err := io.Copy(io.Discard, f); err != nil {
		b.Fatal(err)
	}
}
