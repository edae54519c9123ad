package passthrough

import (
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

func (s *Server) unlink(r *request) unix.Errno { return s.remove(r, 0) }
func (s *Server) rmdir(r *request) unix.Errno  { return s.remove(r, unix.AT_REMOVEDIR) }

func (s *Server) remove(r *request, flags int) unix.Errno {
	name, errno := oneName(r.args)
	if errno != 0 {
		return errno
	}
	dir, errno := s.inodes.getDir(r.NodeID)
	if errno != 0 {
		return errno
	}
	defer s.inodes.put(dir)
	// The guest may use the node after it has no name any more.
	n := s.known(dir, name)
	if n != nil {
		defer s.inodes.put(n)
	}
	errno = retry(func() error { return unix.Unlinkat(dir.fd, name, flags) })
	if errno == 0 && n != nil {
		s.inodes.unplaced(n, dir, name)
	}
	return errno
}

// known returns the node that is name in dir, if the guest knows it, pinned: it
// keeps its descriptor though it may be about to lose its name.
func (s *Server) known(dir *inode, name string) *inode {
	var st unix.Statx_t
	if errno := statChild(dir.fd, name, &st); errno != 0 {
		return nil
	}
	return s.inodes.find(&st, dir, name)
}

func (s *Server) rename(r *request) unix.Errno {
	return s.move(r, fuse.DecodeUint64(r.args), 0, r.args[fuse.RenameInSize:])
}

func (s *Server) rename2(r *request) unix.Errno {
	in := fuse.DecodeRename2In(r.args)
	if in.Flags&^(unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE|unix.RENAME_WHITEOUT) != 0 {
		return unix.EINVAL
	}
	return s.move(r, in.NewDir, uint(in.Flags), r.args[fuse.Rename2InSize:])
}

func (s *Server) move(r *request, newDirID uint64, flags uint, names []byte) unix.Errno {
	oldName, names, errno := cutName(names)
	if errno != 0 {
		return errno
	}
	newName, errno := oneName(names)
	if errno != 0 {
		return errno
	}
	oldDir, errno := s.inodes.getDir(r.NodeID)
	if errno != 0 {
		return errno
	}
	defer s.inodes.put(oldDir)
	newDir, errno := s.inodes.getDir(newDirID)
	if errno != 0 {
		return errno
	}
	defer s.inodes.put(newDir)
	var moved *inode
	if s.inodes.onOverlay(oldDir) {
		// While it has a descriptor it is found by its number: see overlay.
		if moved = s.known(oldDir, oldName); moved != nil {
			defer s.inodes.put(moved)
		}
	}
	replaced := s.known(newDir, newName)
	if replaced != nil {
		defer s.inodes.put(replaced)
	}
	rename := func() error { return unix.Renameat2(oldDir.fd, oldName, newDir.fd, newName, flags) }
	if _, errno := s.orAsOther(r, newDir, 0, retry(rename), rename); errno != 0 {
		return errno
	}
	if moved != nil {
		s.copiedUp(moved)
	}
	if replaced != nil {
		s.copiedUp(replaced)
		s.inodes.unplaced(replaced, newDir, newName)
	}
	s.placeAgain(newDir, newName)
	if flags&unix.RENAME_EXCHANGE != 0 {
		s.placeAgain(oldDir, oldName)
	}
	return 0
}

// placeAgain tells the table of nodes what is name in dir now.
func (s *Server) placeAgain(dir *inode, name string) {
	var st unix.Statx_t
	if statChild(dir.fd, name, &st) == 0 {
		s.inodes.moved(&st, dir, name)
	}
}
