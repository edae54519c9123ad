// Package socktest makes connections for tests.
package socktest

import (
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// Pair makes a connection and returns its ends, which are closed when the test
// ends, if they are not before.
func Pair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	a, b, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		a.Close()
		b.Close()
	})
	return a, b
}

// New makes a connection whose ends are the caller's.
func New() (a, b *net.UnixConn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "stream")
		c, err := net.FileConn(f) // duplicates the descriptor
		f.Close()
		if err != nil {
			return nil, nil, err
		}
		ends[i] = c.(*net.UnixConn)
	}
	return ends[0], ends[1], nil
}
