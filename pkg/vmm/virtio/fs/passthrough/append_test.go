package passthrough

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

// A file that may only be appended to (chattr +a) can be, and nothing else.
func TestAppendOnlyFile(t *testing.T) {
	s := newShare(t)
	writeFile(t, s.path("log"), "1,")
	f, err := os.Open(s.path("log"))
	must(t, err)
	defer f.Close()
	const appendOnly = 0x20 // FS_APPEND_FL
	must(t, unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, appendOnly))
	defer func() { must(t, unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, 0)) }()
	e := s.mustLookup(t, root, "log")
	_, errno := s.Open(e.NodeID, unix.O_WRONLY)
	want(t, "OPEN without O_APPEND", errno, unix.EPERM)
	_, errno = s.Open(e.NodeID, unix.O_WRONLY|unix.O_APPEND|unix.O_TRUNC)
	want(t, "OPEN with O_TRUNC", errno, unix.EPERM)
	fh, errno := s.Open(e.NodeID, unix.O_RDWR|unix.O_APPEND)
	must(t, errno)
	_, errno = s.WriteFlags(e.NodeID, fh, 0, []byte("2,"), 0, unix.O_APPEND|unix.O_RDWR)
	want(t, "WRITE", errno, 0)
	want(t, "SETLK", s.Setlk(e.NodeID, fh, 1, fuse.FileLock{End: 1<<63 - 1, Type: unix.F_WRLCK}, 0), 0)
	// What has its place would end up elsewhere.
	_, errno = s.WriteFlags(e.NodeID, fh, 0, []byte("3,"), 0, unix.O_RDWR)
	want(t, "WRITE after O_APPEND was taken off", errno, unix.EPERM)
	_, errno = s.WriteFlags(e.NodeID, fh, 0, []byte("3,"), fuse.WriteCache, unix.O_APPEND|unix.O_RDWR)
	want(t, "WRITE of a mapped page", errno, unix.EPERM)
	_, errno = s.Setattr(e.NodeID, fuse.SetattrIn{Valid: fuse.FattrSize | fuse.FattrFH, FH: fh})
	want(t, "SETATTR of the size", errno, unix.EPERM)
	if got, err := os.ReadFile(s.path("log")); err != nil || string(got) != "1,2," {
		t.Errorf("%q, %v", got, err)
	}
}
