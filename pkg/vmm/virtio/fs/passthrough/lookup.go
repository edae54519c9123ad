package passthrough

import (
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

func (s *Server) lookup(r *request) unix.Errno {
	name, errno := oneName(r.args)
	if errno != 0 {
		return errno
	}
	dir, errno := s.inodes.getDir(r.NodeID)
	if errno != 0 {
		return errno
	}
	defer s.inodes.put(dir)
	return s.replyEntry(r, dir, name)
}

// find makes what name is in dir a node, with one more lookup. The node is
// pinned.
func (s *Server) find(dir *inode, name string, st *unix.Statx_t) (*inode, unix.Errno) {
	fd, errno := s.inodes.openChild(dir.fd, name)
	if errno != 0 {
		return nil, errno
	}
	if errno := statFD(fd, st); errno != 0 {
		closeFD(fd)
		return nil, errno
	}
	return s.inodes.add(fd, st, dir, name)
}

// replyEntry replies with what name is in dir. Mostly the guest knows that, and
// asks because it is to believe it no longer: such a node need not be opened.
func (s *Server) replyEntry(r *request, dir *inode, name string) unix.Errno {
	var st unix.Statx_t
	errno := statChild(dir.fd, name, &st)
	if errno != 0 {
		return errno
	}
	n := s.inodes.again(&st, dir, name)
	if n == nil {
		if n, errno = s.find(dir, name, &st); errno != 0 {
			return errno
		}
		defer s.inodes.put(n)
	}
	entry := s.entryOf(r, n, &st, dir, name)
	r.reply = entry.Append(r.reply)
	return 0
}

func (s *Server) forget(r *request) unix.Errno {
	s.forgetOne(fuse.ForgetOne{NodeID: r.NodeID, Nlookup: fuse.DecodeUint64(r.args)})
	return 0
}

func (s *Server) forgetOne(f fuse.ForgetOne) {
	if !s.inodes.forget(f.NodeID, f.Nlookup) {
		s.complain(complainForget, "the guest forgot a node that it did not have")
	}
}

func (s *Server) batchForget(r *request) unix.Errno {
	count := fuse.DecodeUint32(r.args)
	rest := r.args[fuse.BatchForgetInSize:]
	for ; count > 0 && len(rest) >= fuse.ForgetOneSize; count-- {
		s.forgetOne(fuse.DecodeForgetOne(rest))
		rest = rest[fuse.ForgetOneSize:]
	}
	return 0
}

func (s *Server) readlink(r *request) unix.Errno {
	n, errno := s.inodes.get(r.NodeID)
	if errno != 0 {
		return errno
	}
	defer s.inodes.put(n)
	if n.kind != unix.S_IFLNK {
		return unix.EINVAL
	}
	buf := r.scratch(min(r.room, targetMax))
	var length int
	errno = retry(func() (err error) {
		length, err = unix.Readlinkat(n.fd, "", buf)
		return err
	})
	if errno != 0 {
		return errno
	}
	r.reply = r.reply[:len(r.reply)+length]
	return 0
}

func (s *Server) statfs(r *request) unix.Errno {
	n, errno := s.inodes.get(r.NodeID)
	if errno != 0 {
		return errno
	}
	defer s.inodes.put(n)
	var st unix.Statfs_t
	if errno := retry(func() error { return unix.Fstatfs(n.fd, &st) }); errno != 0 {
		return errno
	}
	r.reply = fuse.StatfsOut{
		Blocks: st.Blocks, Bfree: st.Bfree, Bavail: st.Bavail, Files: st.Files, Ffree: st.Ffree,
		Bsize: uint32(st.Bsize), Namelen: uint32(st.Namelen), Frsize: uint32(st.Frsize),
	}.Append(r.reply)
	return 0
}
