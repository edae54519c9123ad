package passthrough

import (
	"os"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

// leased takes a lease on a file, as Samba and the host's NFS server do, and returns
// what gives it up. It is one for reading: for another the host permits no descriptor
// of the file, as the server has.
func leased(t *testing.T, path string) (giveUp func()) {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	t.Cleanup(func() { _ = f.Close() })
	_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_RDLCK)
	must(t, err)
	return func() {
		_, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
		must(t, err)
	}
}

// waits is closed when so many requests wait.
func (s *share) waits(count int) <-chan struct{} {
	reached := make(chan struct{})
	go func() {
		defer close(reached)
		for n := -1; n != count; time.Sleep(time.Millisecond) {
			s.server.locks.mu.Lock()
			n = len(s.server.locks.waits)
			s.server.locks.mu.Unlock()
		}
	}()
	return reached
}

func TestLease(t *testing.T) {
	s := newShare(t)
	e, fh := s.mustCreate(t, root, "file", "contents")
	must(t, s.Release(e.NodeID, fh))
	open := func(flags uint32) func() unix.Errno {
		return func() unix.Errno {
			fh, errno := s.Open(e.NodeID, flags)
			if errno == 0 {
				s.Release(e.NodeID, fh)
			}
			return errno
		}
	}
	truncate := func() unix.Errno {
		_, errno := s.Setattr(e.NodeID, fuse.SetattrIn{Valid: fuse.FattrSize, Size: 3})
		return errno
	}
	ended := make(chan unix.Errno)
	for _, test := range []struct {
		name string
		do   func() unix.Errno
	}{
		{"OPEN", open(unix.O_WRONLY)},
		{"SETATTR of the size", truncate},
	} {
		giveUp := leased(t, s.path("file"))
		go func() { ended <- test.do() }()
		select {
		case errno := <-ended:
			t.Fatalf("%s: %v", test.name, errno)
		case <-s.waits(1):
		}
		giveUp()
		want(t, test.name, <-ended, 0)
	}
	if a, errno := s.Getattr(e.NodeID); errno != 0 || a.Size != 3 {
		t.Errorf("GETATTR: %+v, %v", a, errno)
	}
	leased(t, s.path("file"))
	want(t, "OPEN with O_NONBLOCK", open(unix.O_WRONLY|unix.O_NONBLOCK)(), unix.EAGAIN)
	want(t, "OPEN that the lease permits", open(unix.O_RDONLY)(), 0)
	for _, do := range []func() unix.Errno{open(unix.O_WRONLY), truncate} {
		go func() { ended <- do() }()
	}
	<-s.waits(2)
	s.server.Cancel()
	want(t, "cancelled", <-ended, unix.EINTR)
	want(t, "cancelled", <-ended, unix.EINTR)
	s.server.Reset()
	if n := s.openDescriptors(); n != 1 {
		t.Errorf("%d descriptors are left", n)
	}
}

// What never stops to say EAGAIN is not waited for without end.
func TestLeasePatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		locks := newLockTable(1, 1)
		start, ended := time.Now(), make(chan unix.Errno)
		must(t, locks.wait(1, leasePatience, func() unix.Errno { return unix.EAGAIN }, func(errno unix.Errno) { ended <- errno }))
		want(t, "the end", <-ended, unix.EAGAIN)
		if took := time.Since(start); took != leasePatience {
			t.Errorf("after %v", took)
		}
	})
}
