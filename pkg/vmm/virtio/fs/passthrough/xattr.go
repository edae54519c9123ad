package passthrough

import (
	"bytes"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

const (
	aclAccess  = "system.posix_acl_access"
	aclDefault = "system.posix_acl_default"
)

// xattrAllowed says whether the guest may see and change an xattr. Labels and
// integrity measurements (security.selinux, .apparmor, .ima, .evm ...) are the
// host's: its kernel acts on them, the guest's has its own policy or none.
func xattrAllowed(name string) bool {
	switch {
	case strings.HasPrefix(name, "user."), strings.HasPrefix(name, "trusted."):
		return true
	}
	return name == "security.capability" || name == aclAccess || name == aclDefault
}

// xattrName takes the name of an xattr from the start of p.
func xattrName(p []byte) (name string, rest []byte, errno unix.Errno) {
	name, rest, errno = cutString(p, nameMax) // XATTR_NAME_MAX is the same
	switch {
	case errno == unix.ENAMETOOLONG:
		errno = unix.ERANGE // as xattr(7) system calls say
	case errno == 0 && !xattrAllowed(name):
		errno = unix.EOPNOTSUPP
	}
	return name, rest, errno
}

// xattr calls f with a path of the node.
func (s *Server) xattr(nodeID uint64, f func(path string) error) unix.Errno {
	n, errno := s.inodes.get(nodeID)
	if errno != 0 {
		return errno
	}
	defer s.inodes.put(n)
	return s.xattrOf(n, f)
}

// xattrOf is xattr for a node that the caller has pinned.
func (s *Server) xattrOf(n *inode, f func(path string) error) (errno unix.Errno) {
	path := strconv.Itoa(n.fd) // in /proc/self/fd, the thread's directory
	s.threads.do(func(*thread) { errno = retry(func() error { return f(path) }) })
	return errno
}

// changeXattr is xattr for an f that changes the node.
func (s *Server) changeXattr(nodeID uint64, f func(path string) error) unix.Errno {
	n, errno := s.inodes.get(nodeID)
	if errno != 0 {
		return errno
	}
	defer s.inodes.put(n)
	errno = s.xattrOf(n, f)
	s.copiedUp(n)
	return errno
}

func (s *Server) setxattr(r *request) unix.Errno {
	size, ext := fuse.SetxattrInShortSize, r.features&fuse.SetxattrExt != 0
	if ext {
		size = fuse.SetxattrInSize
	}
	if len(r.args) < size {
		return unix.EINVAL
	}
	in := fuse.DecodeSetxattrIn(r.args, ext)
	name, value, errno := xattrName(r.args[size:])
	if errno != 0 {
		return errno
	}
	if int(in.Size) != len(value) || in.Flags&^(unix.XATTR_CREATE|unix.XATTR_REPLACE) != 0 {
		return unix.EINVAL
	}
	errno = s.changeXattr(r.NodeID, func(path string) error { return unix.Setxattr(path, name, value, int(in.Flags)) })
	if errno == 0 && name == aclAccess && in.SetxattrFlags&fuse.SetxattrACLKillSgid != 0 {
		// The host would have cleared it for the caller, but not for us.
		return s.killSgid(r.NodeID)
	}
	return errno
}

func (s *Server) killSgid(nodeID uint64) unix.Errno {
	n, errno := s.inodes.get(nodeID)
	if errno != 0 {
		return errno
	}
	defer s.inodes.put(n)
	var st unix.Statx_t
	if errno := statFD(n.fd, &st); errno != 0 || st.Mode&unix.S_ISGID == 0 {
		return errno
	}
	return s.proc.chmod(n.fd, uint32(st.Mode)&^unix.S_ISGID)
}

func (s *Server) removexattr(r *request) unix.Errno {
	name, rest, errno := xattrName(r.args)
	if errno != 0 {
		return errno
	}
	if len(rest) != 0 {
		return unix.EINVAL
	}
	return s.changeXattr(r.NodeID, func(path string) error { return unix.Removexattr(path, name) })
}

func (s *Server) getxattr(r *request) unix.Errno {
	size := fuse.DecodeUint32(r.args)
	name, rest, errno := xattrName(r.args[fuse.GetxattrInSize:])
	if errno != 0 {
		return errno
	}
	if len(rest) != 0 {
		return unix.EINVAL
	}
	value := r.scratch(min(int(size), r.room, xattrMax)) // empty asks for the length
	n := 0
	errno = s.xattr(r.NodeID, func(path string) (err error) {
		n, err = unix.Getxattr(path, name, value)
		return err
	})
	if errno == unix.EOPNOTSUPP && (name == aclAccess || name == aclDefault) {
		// The kernel, who asks when it checks permissions, would deny access. A
		// file system of the host's without ACLs has none to give.
		errno = unix.ENODATA
	}
	if errno != 0 {
		return errno
	}
	return replyXattr(r, size, n)
}

func (s *Server) listxattr(r *request) unix.Errno {
	list := r.scratch(xattrMax)
	n := 0
	errno := s.xattr(r.NodeID, func(path string) (err error) {
		n, err = unix.Listxattr(path, list)
		return err
	})
	if errno != 0 {
		return errno
	}
	return replyXattr(r, fuse.DecodeUint32(r.args), len(filterXattrs(list[:n])))
}

// replyXattr replies with the first n bytes of the scratch buffer or, if the
// guest asks for size 0, with that number.
func replyXattr(r *request, size uint32, n int) unix.Errno {
	switch {
	case size == 0 && r.room >= fuse.GetxattrOutSize:
		r.reply = fuse.AppendUint32Out(r.reply, uint32(n))
	case n > int(size) || n > r.room:
		return unix.ERANGE
	default:
		r.reply = r.reply[:len(r.reply)+n]
	}
	return 0
}

// filterXattrs drops the names that the guest may not see, in place.
func filterXattrs(list []byte) []byte {
	kept := list[:0]
	for len(list) > 0 {
		end := bytes.IndexByte(list, 0) + 1
		if end == 0 {
			break
		}
		if xattrAllowed(string(list[:end-1])) {
			kept = append(kept, list[:end]...)
		}
		list = list[end:]
	}
	return kept
}
