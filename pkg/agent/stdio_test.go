package agent

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/internal/socktest"
)

// startTerminal has streams of a process carried that has a terminal, whose name
// is returned with the shim's end of its output.
func startTerminal(t *testing.T) (s *stdio, name string, shim *net.UnixConn) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	// As libcontainer's init sends it.
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[1])
	if err := unix.Sendmsg(fds[1], []byte("/dev/ptmx"), unix.UnixRights(int(master.Fd())), nil, 0); err != nil {
		t.Fatal(err)
	}
	stdout, shim := socktest.Pair(t)
	s = &stdio{terminal: true, stdout: stdout, consoleSocket: os.NewFile(uintptr(fds[0]), "console")}
	if err := s.started(); err != nil {
		t.Fatal(err)
	}
	return s, fmt.Sprintf("/dev/pts/%d", n), shim
}

// A terminal stays when all who have it close it, until the process has ended.
func TestTerminalReopened(t *testing.T) {
	s, name, shim := startTerminal(t)
	for i := range 10 {
		f, err := os.OpenFile(name, os.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			t.Fatalf("open %d: %v", i, err)
		}
		if _, err := fmt.Fprintln(f, "line", i); err != nil {
			t.Errorf("write %d: %v", i, err)
		}
		f.Close()
		want := fmt.Sprintf("line %d\r\n", i)
		got := make([]byte, len(want))
		if _, err := io.ReadFull(shim, got); err != nil || string(got) != want {
			t.Fatalf("output %q, %v; want %q", got, err, want)
		}
	}
	s.drain()
	if rest, err := io.ReadAll(shim); err != nil || len(rest) != 0 {
		t.Errorf("at the end: %q, %v", rest, err)
	}
}

// Who holds a terminal longer than its process lives is hung up on.
func TestTerminalHangup(t *testing.T) {
	s, name, _ := startTerminal(t)
	f, err := os.OpenFile(name, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s.drain()
	if _, err := io.WriteString(f, "late"); !errors.Is(err, unix.EIO) {
		t.Errorf("write: %v", err)
	}
	if n, err := f.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("read %d bytes, %v", n, err)
	}
}
