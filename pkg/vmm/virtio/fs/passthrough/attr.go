package passthrough

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

// deviceTable numbers the host's devices, so that inode numbers of two of them
// can be told apart in one of the guest's.
//
// The guest's kernel makes a directory that is a mount point the root of a
// device of its own, if it has SUBMOUNTS. A file that is one, or that overlayfs
// takes from a layer on another disk, stays on its directory's device: there its
// number could be another file's, and tools would take both for hard links.
type deviceTable struct {
	mu      sync.Mutex
	numbers map[uint64]uint64 // protected by mu; the host decides how many
}

// mix makes a number for a foreign inode: its own with the device's number in
// the bits that hardly any file system uses.
func (t *deviceTable) mix(key inodeKey) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.numbers == nil {
		t.numbers = map[uint64]uint64{}
	}
	number := t.numbers[key.dev]
	if number == 0 {
		number = uint64(len(t.numbers)) + 1
		t.numbers[key.dev] = number
	}
	return key.ino ^ number<<48
}

// guestIno is the inode number the guest is told of n, which st describes.
func (s *Server) guestIno(n *inode, st *unix.Statx_t) uint64 {
	if n.foreign {
		return s.devices.mix(keyOf(st))
	}
	return st.Ino
}

func guestTime(t unix.StatxTimestamp) fuse.Time { return fuse.Time{Sec: uint64(t.Sec), Nsec: t.Nsec} }

func (s *Server) attrOf(n *inode, st *unix.Statx_t) fuse.Attr {
	return fuse.Attr{
		Ino: s.guestIno(n, st), Size: st.Size, Blocks: st.Blocks,
		Atime: guestTime(st.Atime), Mtime: guestTime(st.Mtime), Ctime: guestTime(st.Ctime),
		Mode: uint32(st.Mode), Nlink: st.Nlink, UID: st.Uid, GID: st.Gid,
		Rdev: fuse.EncodeDev(st.Rdev_major, st.Rdev_minor), Blksize: st.Blksize,
	}
}

// versionLink is what the kubelet replaces when it updates a volume (its
// pkg/volume/util/atomic_writer.go): a symbolic link to the directory that holds the
// files. The directory before is removed at once.
const versionLink = "..data"

// entryOf tells of n, which st describes, found in dir under the name.
func (s *Server) entryOf(r *request, n *inode, st *unix.Statx_t, dir *inode, name string) fuse.EntryOut {
	e := fuse.EntryOut{NodeID: n.id, EntryValid: s.entryTimeout, AttrValid: s.attrTimeout, Attr: s.attrOf(n, st)}
	if n.kind == unix.S_IFLNK && name == versionLink {
		// The guest asks each time. A link that it believes, to a directory whose
		// own entry or whose files' it no longer does, leads to nothing until the
		// link is asked for as well.
		e.EntryValid = fuse.Time{}
	}
	if r.features&fuse.Submounts != 0 && n.kind == unix.S_IFDIR && (n.key.mnt != dir.key.mnt || n.key.dev != dir.key.dev) {
		e.Attr.Flags |= fuse.AttrSubmount
	}
	return e
}

// statFor fills st for GETATTR and STATX. With a handle that works for a file
// that nothing leads to any more.
func (s *Server) statFor(nodeID uint64, in fuse.GetattrIn, st *unix.Statx_t) (*inode, unix.Errno) {
	if in.Flags&fuse.GetattrFH != 0 {
		h, errno := s.handles.file(in.FH)
		if errno != 0 {
			return nil, errno
		}
		defer s.handles.put(h)
		return h.node, statFD(h.fd, st)
	}
	n, errno := s.inodes.get(nodeID)
	if errno != 0 {
		return nil, errno
	}
	defer s.inodes.put(n)
	return n, statFD(n.fd, st)
}

func (s *Server) getattr(r *request) unix.Errno {
	var st unix.Statx_t
	n, errno := s.statFor(r.NodeID, fuse.DecodeGetattrIn(r.args), &st)
	if errno != 0 {
		return errno
	}
	out := fuse.AttrOut{Valid: s.attrTimeout, Attr: s.attrOf(n, &st)}
	r.reply = out.Append(r.reply)
	return 0
}

func (s *Server) statx(r *request) unix.Errno {
	var st unix.Statx_t
	n, errno := s.statFor(r.NodeID, fuse.DecodeGetattrIn(r.args), &st)
	if errno != 0 {
		return errno
	}
	out := fuse.StatxOut{
		Valid: s.attrTimeout,
		Mask:  st.Mask & (unix.STATX_BASIC_STATS | unix.STATX_BTIME), Blksize: st.Blksize,
		Nlink: st.Nlink, UID: st.Uid, GID: st.Gid, Mode: st.Mode,
		Ino: s.guestIno(n, &st), Size: st.Size, Blocks: st.Blocks,
		Atime: guestTime(st.Atime), Btime: guestTime(st.Btime), Ctime: guestTime(st.Ctime), Mtime: guestTime(st.Mtime),
		RdevMajor: st.Rdev_major, RdevMinor: st.Rdev_minor,
	}
	r.reply = out.Append(r.reply)
	return 0
}

func (s *Server) setattr(r *request) unix.Errno {
	in := fuse.DecodeSetattrIn(r.args)
	n, errno := s.inodes.get(r.NodeID)
	if errno != 0 {
		return errno
	}
	try := func() unix.Errno { return s.setAttributes(r, n, &in) }
	finish := func(errno unix.Errno) unix.Errno {
		s.inodes.put(n)
		return errno
	}
	if in.Valid&(fuse.FattrSize|fuse.FattrFH) == fuse.FattrSize {
		return s.untilFree(r, leasePatience, try, finish) // the file is opened: see openFile
	}
	return finish(try())
}

func (s *Server) setAttributes(r *request, n *inode, in *fuse.SetattrIn) (errno unix.Errno) {
	// The owner first: the host clears set-id bits with it, which a mode of the
	// same request puts back. The kernel sends a request without any attribute
	// only for chown(-1, -1), which clears them too.
	const attributes = fuse.FattrMode | fuse.FattrUID | fuse.FattrGID | fuse.FattrSize | fuse.FattrAtime | fuse.FattrMtime
	if in.Valid&(fuse.FattrUID|fuse.FattrGID) != 0 || in.Valid&attributes == 0 {
		errno = s.setOwner(n, in)
	}
	if errno == 0 && in.Valid&fuse.FattrMode != 0 {
		errno = s.setMode(n, in.Mode)
	}
	if errno == 0 && in.Valid&fuse.FattrSize != 0 {
		errno = s.setSize(n, in)
	}
	if errno == 0 && in.Valid&(fuse.FattrAtime|fuse.FattrMtime) != 0 {
		errno = setTimes(n, in)
	}
	if errno != 0 {
		s.copiedUp(n) // as far as it has come
		return errno
	}
	var st unix.Statx_t
	if errno := statFD(n.fd, &st); errno != 0 {
		return errno
	}
	s.inodes.copiedUp(n, &st)
	out := fuse.AttrOut{Valid: s.attrTimeout, Attr: s.attrOf(n, &st)}
	r.reply = out.Append(r.reply)
	return 0
}

func chown(fd, uid, gid int) unix.Errno {
	return retry(func() error { return unix.Fchownat(fd, "", uid, gid, unix.AT_EMPTY_PATH) })
}

func (s *Server) setOwner(n *inode, in *fuse.SetattrIn) unix.Errno {
	uid, gid := -1, -1
	if in.Valid&fuse.FattrUID != 0 {
		uid = int(in.UID)
	}
	if in.Valid&fuse.FattrGID != 0 {
		gid = int(in.GID)
	}
	return chown(n.fd, uid, gid)
}

func (s *Server) setMode(n *inode, mode uint32) unix.Errno {
	if n.kind == unix.S_IFLNK {
		return unix.EOPNOTSUPP // as Linux says itself
	}
	errno := s.proc.chmod(n.fd, mode)
	if errno == unix.EROFS {
		// The mode that it has already is no change, and no error: the agent asks
		// for it to have the guest's kernel tell inotify watches of a change that
		// the host has made.
		var st unix.Statx_t
		if statFD(n.fd, &st) == 0 && uint32(st.Mode)&0o7777 == mode&0o7777 {
			return 0
		}
	}
	return errno
}

func (s *Server) setSize(n *inode, in *fuse.SetattrIn) unix.Errno {
	if n.kind != unix.S_IFREG || in.Size > 1<<63-1 {
		return unix.EINVAL
	}
	if in.Valid&fuse.FattrKillSuidgid != 0 {
		if errno := s.killSuidgid(n.fd); errno != 0 {
			return errno
		}
	}
	if in.Valid&fuse.FattrFH != 0 {
		h, errno := s.handles.file(in.FH)
		if errno != 0 {
			return errno
		}
		defer s.handles.put(h)
		if h.node != n || !h.writable {
			return unix.EBADF
		}
		return truncate(h.fd, in.Size)
	}
	fd, errno := s.reopen(n, unix.O_WRONLY)
	if errno != 0 {
		return errno
	}
	defer closeFD(fd)
	return truncate(fd, in.Size)
}

func truncate(fd int, size uint64) unix.Errno {
	return retry(func() error { return unix.Ftruncate(fd, int64(size)) })
}

// killSuidgid clears set-id bits as a write by an unprivileged process does
// (FUSE_HANDLE_KILLPRIV_V2). The host's kernel takes the server for privileged.
// It removes file capabilities itself.
func (s *Server) killSuidgid(fd int) unix.Errno {
	var st unix.Statx_t
	if errno := statFD(fd, &st); errno != 0 {
		return errno
	}
	kill := uint16(st.Mode & unix.S_ISUID)
	if st.Mode&unix.S_IXGRP != 0 {
		kill |= st.Mode & unix.S_ISGID
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || kill == 0 {
		return 0
	}
	return s.proc.chmod(fd, uint32(st.Mode&^kill))
}

func setTimes(n *inode, in *fuse.SetattrIn) unix.Errno {
	times := [2]unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Nsec: unix.UTIME_OMIT}}
	for i, t := range [2]struct {
		set, now uint32
		sec      uint64
		nsec     uint32
	}{
		{fuse.FattrAtime, fuse.FattrAtimeNow, in.Atime, in.AtimeNsec},
		{fuse.FattrMtime, fuse.FattrMtimeNow, in.Mtime, in.MtimeNsec},
	} {
		switch {
		case in.Valid&t.set == 0:
		case in.Valid&t.now != 0:
			times[i].Nsec = unix.UTIME_NOW
		case t.nsec >= 1e9: // the special values are not the guest's to send
			return unix.EINVAL
		default:
			times[i] = unix.Timespec{Sec: int64(t.sec), Nsec: int64(t.nsec)}
		}
	}
	return retry(func() error { return unix.UtimesNanoAt(n.fd, "", times[:], unix.AT_EMPTY_PATH) })
}
