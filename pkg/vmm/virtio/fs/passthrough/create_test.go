package passthrough

import (
	"fmt"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// withRoomFor calls f while the process can have so many further descriptors.
func withRoomFor(t *testing.T, count int, f func()) {
	t.Helper()
	// Descriptors are the lowest numbers that are free.
	var fds []int
	for range count + 1 {
		fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		must(t, err)
		fds = append(fds, fd)
	}
	for _, fd := range fds {
		closeFD(fd)
	}
	var limit unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(fds[count]), Max: limit.Max}))
	defer func() { must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)) }()
	f()
}

// What cannot be told of for want of a descriptor is not there: a second try is the
// first.
func TestCreateWithoutRoom(t *testing.T) {
	s := newShare(t)
	_, errno := s.Mkdir(root, "dir", 0o755, 0)
	must(t, errno)
	create := func() unix.Errno {
		_, _, errno := s.Create(root, "new", unix.O_RDWR, 0o644, 0)
		return errno
	}
	// The descriptor of a directory that nobody uses makes room.
	withRoomFor(t, 1, func() { want(t, "CREATE, with room for one", create(), 0) })
	must(t, s.Unlink(root, "new"))
	for name, test := range map[string]struct {
		room   int
		create func() unix.Errno
	}{
		"CREATE": {1, create},
		"MKDIR":  {0, func() unix.Errno { _, errno := s.Mkdir(root, "new", 0o755, 0); return errno }},
		"MKNOD":  {0, func() unix.Errno { _, errno := s.Mknod(root, "new", unix.S_IFIFO|0o644, 0, 0); return errno }},
	} {
		for s.server.inodes.shrink() {
		}
		withRoomFor(t, test.room, func() { want(t, name, test.create(), unix.ENFILE) })
		if _, err := os.Lstat(s.path("new")); !os.IsNotExist(err) {
			t.Errorf("%s that was refused: %v", name, err)
		}
		want(t, name+" again", test.create(), 0)
		must(t, os.Remove(s.path("new")))
	}
}

// Of several that there is not room for, those that are refused are not there.
func TestCreateAtTheNodeLimit(t *testing.T) {
	const side = 8
	s := newShare(t, func(c *Config) { c.Limits.Inodes = 2 })
	for round := range 100 {
		var all sync.WaitGroup
		var made [side]uint64
		for i := range side {
			all.Go(func() {
				name := fmt.Sprint(round, ".", i)
				if i%2 == 0 {
					e, _ := s.Mkdir(root, name, 0o755, 0)
					made[i] = e.NodeID
				} else if e, fh, errno := s.Create(root, name, unix.O_RDWR, 0o644, 0); errno == 0 {
					made[i] = e.NodeID
					s.Release(e.NodeID, fh)
				}
			})
		}
		all.Wait()
		for i, node := range made {
			name := fmt.Sprint(round, ".", i)
			if _, err := os.Lstat(s.path(name)); (err == nil) != (node != 0) {
				t.Fatalf("%s is node %d: %v", name, node, err)
			}
			if node != 0 {
				s.Forget(node, 1)
			}
		}
	}
}
