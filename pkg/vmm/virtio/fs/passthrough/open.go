package passthrough

import (
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

// openFlags are the flags with which the host's file is opened for the guest's.
//
// Not among them: O_APPEND, because the kernel writes mapped pages back through
// any handle, which would then append them (but see openNode); O_DIRECT, because the
// guest's buffers need not be aligned as the host's disk wants it; everything
// that has been dealt with when the node was looked up or created.
func openFlags(flags uint32) (int, unix.Errno) {
	if flags&unix.O_ACCMODE == unix.O_ACCMODE {
		return 0, unix.EINVAL
	}
	return int(flags & (unix.O_ACCMODE | unix.O_TRUNC | unix.O_SYNC | unix.O_DSYNC | unix.O_NOATIME)), 0
}

func writable(flags uint32) bool { return flags&unix.O_ACCMODE != unix.O_RDONLY }

// reopen opens n, a regular file or directory.
func (s *Server) reopen(n *inode, flags int) (fd int, errno unix.Errno) {
	errno = s.inodes.makingRoom(func() (errno unix.Errno) {
		fd, errno = s.proc.open(n.fd, flags)
		return errno
	})
	return fd, errno
}

// keepCache are the flags of a reply to OPEN. The kernel need not drop cached
// pages: it does when size or modification time change. If it may not cache
// attributes, it shall not cache contents.
func (s *Server) keepCache() uint32 {
	if s.attrTimeout == (fuse.Time{}) {
		return 0
	}
	return fuse.OpenKeepCache
}

// openNode opens n, a regular file, which the caller has pinned, and makes a
// handle of it that is in no table yet.
func (s *Server) openNode(n *inode, guestFlags, fuseFlags uint32) (*handle, unix.Errno) {
	flags, errno := openFlags(guestFlags)
	if errno != 0 {
		return nil, errno
	}
	if s.readOnly && (writable(guestFlags) || flags&unix.O_TRUNC != 0) {
		return nil, unix.EROFS
	}
	if flags&unix.O_TRUNC != 0 && fuseFlags&fuse.OpenKillSuidgid != 0 {
		if errno := s.killSuidgid(n.fd); errno != 0 {
			return nil, errno
		}
	}
	h := &handle{node: n, writable: writable(guestFlags)}
	h.fd, errno = s.reopen(n, flags)
	if errno == unix.EPERM && guestFlags&unix.O_APPEND != 0 {
		// An append-only file (chattr +a) is opened for writing with O_APPEND or not at
		// all. Everything that is written through this descriptor is appended.
		h.appendOnly = true
		h.fd, errno = s.reopen(n, flags|unix.O_APPEND)
	}
	if errno != 0 {
		return nil, errno
	}
	if writable(guestFlags) || flags&unix.O_TRUNC != 0 {
		s.copiedUp(n)
	}
	return h, 0
}

// copiedUp is to follow what may have changed n, which is pinned, if it was not open for
// writing.
func (s *Server) copiedUp(n *inode) {
	if !s.inodes.onOverlay(n) {
		return
	}
	var st unix.Statx_t
	if statFD(n.fd, &st) == 0 {
		s.inodes.copiedUp(n, &st)
	}
}

func (s *Server) open(r *request) unix.Errno {
	in := fuse.DecodeOpenIn(r.args)
	if errno := s.handles.room(); errno != 0 {
		return errno
	}
	n, errno := s.inodes.get(r.NodeID)
	if errno != 0 {
		return errno
	}
	switch n.kind {
	case unix.S_IFREG:
		return s.openFile(r, &in, n)
	case unix.S_IFDIR:
		errno = unix.EISDIR
	case unix.S_IFLNK:
		errno = unix.ELOOP
	default: // what it stands for is the guest's own
		errno = unix.ENXIO
	}
	s.inodes.put(n)
	return errno
}

// openFile opens n, a regular file whose pin becomes the handle's. It waits for a
// lease of the host's, as the host does, unless the guest says otherwise.
func (s *Server) openFile(r *request, in *fuse.OpenIn, n *inode) unix.Errno {
	var h *handle
	try := func() (errno unix.Errno) {
		h, errno = s.openNode(n, in.Flags, in.OpenFlags)
		return errno
	}
	finish := func(errno unix.Errno) unix.Errno {
		if errno != 0 {
			s.inodes.put(n)
			return errno
		}
		if errno := s.handles.add(h); errno != 0 {
			return errno
		}
		r.reply = fuse.AppendOpenOut(r.reply, h.id, s.keepCache())
		return 0
	}
	if in.Flags&unix.O_NONBLOCK != 0 {
		return finish(try())
	}
	return s.untilFree(r, leasePatience, try, finish)
}

func (s *Server) releaseFile(r *request) unix.Errno {
	in := fuse.DecodeReleaseIn(r.args)
	h, errno := s.handles.file(in.FH)
	if errno != 0 {
		return errno
	}
	defer s.handles.put(h)
	if in.ReleaseFlags&fuse.ReleaseFlockUnlock != 0 {
		s.unflock(h)
	}
	s.locks.closed(h)
	s.handles.release(h)
	return 0
}

// flush is sent for each close of a descriptor in the guest.
func (s *Server) flush(r *request) unix.Errno {
	in := fuse.DecodeFlushIn(r.args)
	h, errno := s.handles.file(in.FH)
	if errno != 0 {
		return errno
	}
	defer s.handles.put(h)
	s.locks.drop(lockKey{h.node.id, in.LockOwner})
	if !h.writable {
		return 0
	}
	// Closing any descriptor makes file systems like NFS say what went wrong
	// with earlier writes.
	fd, errno := s.duplicate(h)
	if errno != 0 {
		return errno
	}
	return hostErrno(unix.Close(fd))
}

func (s *Server) duplicate(h *handle) (fd int, errno unix.Errno) {
	errno = s.inodes.makingRoom(func() unix.Errno {
		return retry(func() (err error) {
			fd, err = unix.FcntlInt(uintptr(h.fd), unix.F_DUPFD_CLOEXEC, 0)
			return err
		})
	})
	return fd, errno
}

func (s *Server) fsync(r *request) unix.Errno {
	in := fuse.DecodeFsyncIn(r.args)
	h, errno := s.handles.file(in.FH)
	if errno != 0 {
		return errno
	}
	defer s.handles.put(h)
	return syncHandle(h, in.Flags)
}

func syncHandle(h *handle, flags uint32) unix.Errno {
	if flags&fuse.FsyncDatasync != 0 {
		return retry(func() error { return unix.Fdatasync(h.fd) })
	}
	return retry(func() error { return unix.Fsync(h.fd) })
}

// syncfs writes the file system of a directory out, on the host. One at a time:
// each is the work of the whole host.
func (s *Server) syncfs(r *request) unix.Errno {
	n, errno := s.inodes.getDir(r.NodeID)
	if errno != 0 {
		return errno
	}
	defer s.inodes.put(n)
	fd, errno := s.reopen(n, unix.O_RDONLY|unix.O_DIRECTORY)
	if errno != 0 {
		return errno
	}
	defer closeFD(fd)
	s.syncing.Lock()
	defer s.syncing.Unlock()
	return retry(func() error { return unix.Syncfs(fd) })
}

// ioctl refuses all: none is known to be harmless on the host. ENOSYS would be
// one too.
func (s *Server) ioctl(*request) unix.Errno { return unix.ENOTTY }
