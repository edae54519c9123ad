package shim

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// logPipe is a log as containerd reads it, and what reads all that is in it now.
func logPipe(t *testing.T) (*logWriter, func() []string) {
	t.Helper()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unix.Close(fds[0])
		unix.Close(fds[1])
	})
	return newLogWriter(fds[1]), func() []string {
		var all strings.Builder
		buffer := make([]byte, 64<<10)
		for {
			n, err := unix.Read(fds[0], buffer)
			if err != nil {
				return strings.SplitAfter(strings.TrimSuffix(all.String(), "\n"), "\n")
			}
			all.Write(buffer[:n])
		}
	}
}

func writeLines(t *testing.T, w *logWriter, n int) {
	t.Helper()
	for i := range n {
		line := fmt.Sprintf("line %d\n", i)
		if k, err := w.Write([]byte(line)); k != len(line) || err != nil {
			t.Fatalf("wrote %d, %v", k, err) // the logger would complain to stderr
		}
	}
}

// However many lines a guest causes, the log gets so many, and then says how many
// it did not get.
func TestLogLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, read := logPipe(t)
		writeLines(t, w, 10000)
		lines := read()
		if len(lines) != logBurst || lines[logBurst-1] != fmt.Sprintf("line %d", logBurst-1) {
			t.Errorf("%d lines, the last is %q", len(lines), lines[len(lines)-1])
		}
		time.Sleep(time.Second)
		writeLines(t, w, 10000)
		lines = read()
		if want := fmt.Sprintf("\"%d lines of the shim's log were dropped\"", 10000-logBurst); !strings.Contains(lines[0], want) {
			t.Errorf("%q is not about %s", lines[0], want)
		}
		if len(lines) != 1+logPerSecond || lines[1] != "line 0\n" {
			t.Errorf("%d lines a second later, the second is %q", len(lines), lines[1])
		}
		time.Sleep(time.Hour) // no more than at the beginning
		writeLines(t, w, 10000)
		if lines := read(); len(lines) != 1+logBurst {
			t.Errorf("%d lines an hour later", len(lines))
		}
	})
}

// A log that nobody reads holds up nobody; what did not fit into it is counted.
func TestLogWithoutReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, read := logPipe(t)
		if _, err := unix.FcntlInt(uintptr(w.fd), unix.F_SETPIPE_SZ, 4096); err != nil {
			t.Fatal(err)
		}
		writeLines(t, w, logBurst)
		kept := len(read())
		if kept == 0 || kept >= logBurst {
			t.Fatalf("%d lines fit", kept)
		}
		time.Sleep(time.Second)
		writeLines(t, w, 1)
		lines := read()
		if want := fmt.Sprintf("\"%d lines of the shim's log were dropped\"", logBurst-kept); len(lines) != 2 || !strings.Contains(lines[0], want) {
			t.Errorf("%q, not about %s", lines, want)
		}
	})
}
