package passthrough

import (
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

// specialBits are put on a new file after it was given to its owner: giving it
// away clears them, and nobody shall run it with the server's rights before.
const specialBits = unix.S_ISUID | unix.S_ISGID

// newNode is a node that is being created.
type newNode struct {
	dir  *inode
	name string // in dir, "" for a file without a name
	kind uint32 // S_IFMT
	mode uint32 // as the guest asked
	// own says that it was made with the caller's ids.
	own bool
}

// orAsOther calls make, which makes a name in dir, again with other ids if the
// first try ended in EOVERFLOW: through a mount that maps ids (mount_setattr(2))
// only those can make a name whose own ids it maps, and the server's it does not.
// The other ids are the caller's, or of a request without any, as those that make
// no new node are, the directory's: whose name it is makes no difference.
func (s *Server) orAsOther(r *request, dir *inode, umask uint32, errno unix.Errno, make func() error) (other bool, _ unix.Errno) {
	if errno != unix.EOVERFLOW {
		return false, errno
	}
	uid, gid := r.UID, r.GID
	if uid == fuse.NoID || gid == fuse.NoID {
		var st unix.Statx_t
		if errno := statFD(dir.fd, &st); errno != 0 {
			return false, errno
		}
		uid, gid = st.Uid, st.Gid
	}
	return true, s.threads.as(uid, gid, umask, make)
}

// newIn returns the directory in which the request creates something.
func (s *Server) newIn(r *request) (*inode, unix.Errno) {
	if r.UID == fuse.NoID || r.GID == fuse.NoID {
		return nil, unix.EINVAL
	}
	if errno := s.inodes.room(); errno != 0 {
		return nil, errno
	}
	return s.inodes.getDir(r.NodeID)
}

// newEntry calls create, which makes the node with the given permissions, with
// the caller's umask. Then it gives the node to the caller and replies with its
// entry.
func (s *Server) newEntry(r *request, node newNode, umask uint32, create func(dir int, mode uint32) error) (errno unix.Errno) {
	if node.dir, errno = s.newIn(r); errno != 0 {
		return errno
	}
	defer s.inodes.put(node.dir)
	make := func() error { return create(node.dir.fd, node.mode&^specialBits) }
	node.own, errno = s.orAsOther(r, node.dir, umask, s.threads.withUmask(umask, make), make)
	if errno != 0 {
		return errno
	}
	fd, errno := s.inodes.openChild(node.dir.fd, node.name)
	if errno != 0 {
		if errno != unix.ENOENT { // somebody has removed it
			s.discard(node)
		}
		return errno
	}
	var st unix.Statx_t
	if errno := s.give(r, node, fd, &st); errno != 0 {
		closeFD(fd)
		return errno
	}
	n, errno := s.inodes.add(fd, &st, node.dir, node.name)
	if errno != 0 {
		s.discard(node)
		return errno
	}
	defer s.inodes.put(n)
	entry := s.entryOf(r, n, &st, node.dir, node.name)
	r.reply = entry.Append(r.reply)
	return 0
}

// give makes the caller the owner of the new node, which fd is open on, and
// fills st. If that fails the node is removed.
func (s *Server) give(r *request, node newNode, fd int, st *unix.Statx_t) unix.Errno {
	if errno := statFD(fd, st); errno != 0 {
		return errno
	}
	uid, gid := -1, -1
	if st.Uid != r.UID {
		uid = int(r.UID)
	}
	if st.Gid != r.GID {
		inherited, errno := s.inheritsGroup(node.dir, st)
		if errno != 0 {
			return errno
		}
		if !inherited {
			gid = int(r.GID)
		}
	}
	special := uint32(0)
	if node.kind == unix.S_IFREG {
		special = node.mode & specialBits
	}
	if uid < 0 && gid < 0 && special == 0 {
		return 0
	}
	maker := s.uid
	if node.own {
		maker = r.UID
	}
	if st.Uid != maker && uint32(st.Mode)&unix.S_IFMT == node.kind {
		// The file system decides itself whose a new node is: NFS with all_squash,
		// SMB, exFAT. What is not ours is not given away.
		return 0
	}
	// Somebody on the host may have put another node in its place, to have us
	// give that away.
	if uint32(st.Mode)&unix.S_IFMT != node.kind || node.kind != unix.S_IFDIR && st.Nlink > 1 {
		return unix.ESTALE
	}
	errno := unix.Errno(0)
	if uid >= 0 || gid >= 0 {
		errno = chown(fd, uid, gid)
	}
	if errno == 0 && special != 0 {
		errno = s.proc.chmod(fd, uint32(st.Mode)|special)
	}
	if errno != 0 {
		s.discard(node)
		return errno
	}
	return statFD(fd, st)
}

// inheritsGroup says whether a new node has got its group from its directory,
// because that is set-gid or the host's mount says so (grpid).
func (s *Server) inheritsGroup(dir *inode, st *unix.Statx_t) (bool, unix.Errno) {
	if st.Gid != s.gid {
		return true, 0
	}
	var parent unix.Statx_t
	errno := statFD(dir.fd, &parent)
	return parent.Mode&unix.S_ISGID != 0, errno
}

// discard removes a node that was created but cannot be given to the caller, or not
// told of.
func (s *Server) discard(node newNode) {
	flags := 0
	if node.kind == unix.S_IFDIR {
		flags = unix.AT_REMOVEDIR
	}
	if node.name != "" {
		_ = retry(func() error { return unix.Unlinkat(node.dir.fd, node.name, flags) })
	}
}

func (s *Server) mknod(r *request) unix.Errno {
	in := fuse.DecodeMknodIn(r.args)
	name, errno := oneName(r.args[fuse.MknodInSize:])
	if errno != 0 {
		return errno
	}
	kind := in.Mode & unix.S_IFMT
	dev := 0
	switch kind {
	case unix.S_IFREG, unix.S_IFIFO, unix.S_IFSOCK:
	case unix.S_IFCHR, unix.S_IFBLK:
		dev = int(unix.Mkdev(fuse.DecodeDev(in.Rdev)))
	default:
		return unix.EINVAL
	}
	node := newNode{name: name, kind: kind, mode: in.Mode & 0o7777}
	return s.newEntry(r, node, in.Umask, func(dir int, mode uint32) error {
		return unix.Mknodat(dir, name, kind|mode, dev)
	})
}

func (s *Server) mkdir(r *request) unix.Errno {
	in := fuse.DecodeMkdirIn(r.args)
	name, errno := oneName(r.args[fuse.MkdirInSize:])
	if errno != 0 {
		return errno
	}
	node := newNode{name: name, kind: unix.S_IFDIR, mode: in.Mode & 0o7777}
	return s.newEntry(r, node, in.Umask, func(dir int, mode uint32) error {
		return unix.Mkdirat(dir, name, mode)
	})
}

func (s *Server) symlink(r *request) unix.Errno {
	name, rest, errno := cutName(r.args)
	if errno != 0 {
		return errno
	}
	target, rest, errno := cutString(rest, targetMax)
	if errno != 0 {
		return errno
	}
	if len(rest) != 0 {
		return unix.EINVAL
	}
	return s.newEntry(r, newNode{name: name, kind: unix.S_IFLNK}, 0, func(dir int, _ uint32) error {
		return unix.Symlinkat(target, dir, name)
	})
}

func (s *Server) link(r *request) unix.Errno {
	old := fuse.DecodeUint64(r.args)
	name, errno := oneName(r.args[fuse.LinkInSize:])
	if errno != 0 {
		return errno
	}
	n, errno := s.inodes.get(old)
	if errno != 0 {
		return errno
	}
	defer s.inodes.put(n)
	if n.kind == unix.S_IFDIR {
		return unix.EPERM
	}
	dir, errno := s.inodes.getDir(r.NodeID)
	if errno != 0 {
		return errno
	}
	defer s.inodes.put(dir)
	link := func() error {
		if errno := s.proc.link(n.fd, dir.fd, name); errno != 0 {
			return errno
		}
		return nil
	}
	if _, errno := s.orAsOther(r, dir, 0, hostErrno(link()), link); errno != 0 {
		return errno
	}
	var st unix.Statx_t
	if errno := statFD(n.fd, &st); errno != 0 {
		return errno
	}
	s.inodes.copiedUp(n, &st)
	// The table finds n by what st says, and learns its new name.
	n, errno = s.inodes.add(-1, &st, dir, name)
	if errno != 0 {
		return errno
	}
	entry := s.entryOf(r, n, &st, dir, name)
	r.reply = entry.Append(r.reply)
	return 0
}

// create creates a file and opens it.
func (s *Server) create(r *request) unix.Errno {
	in := fuse.DecodeCreateIn(r.args)
	name, errno := oneName(r.args[fuse.CreateInSize:])
	if errno != 0 {
		return errno
	}
	return s.createFile(r, &in, name, name, unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW)
}

// tmpfile creates a file without a name and opens it. The name that follows
// the argument is none.
func (s *Server) tmpfile(r *request) unix.Errno {
	in := fuse.DecodeCreateIn(r.args)
	if in.Flags&unix.O_ACCMODE == unix.O_RDONLY {
		return unix.EINVAL
	}
	// With O_EXCL, LINK will not give it a name.
	return s.createFile(r, &in, ".", "", unix.O_TMPFILE|int(in.Flags&unix.O_EXCL))
}

// createFile creates and opens path, which is a name in the request's directory
// or ".", with flags.
func (s *Server) createFile(r *request, in *fuse.CreateIn, path, name string, flags int) unix.Errno {
	open, errno := openFlags(in.Flags)
	if errno != 0 {
		return errno
	}
	if errno := s.handles.room(); errno != 0 {
		return errno
	}
	node := newNode{name: name, kind: unix.S_IFREG, mode: in.Mode & 0o7777}
	if node.dir, errno = s.newIn(r); errno != 0 {
		return errno
	}
	defer s.inodes.put(node.dir)
	how := unix.OpenHow{
		Flags:   uint64(open | flags | unix.O_CLOEXEC | unix.O_NOCTTY | unix.O_NONBLOCK),
		Mode:    uint64(node.mode &^ specialBits),
		Resolve: resolve,
	}
	fd := -1
	errno = s.inodes.makingRoom(func() unix.Errno {
		make := func() (err error) {
			fd, err = unix.Openat2(node.dir.fd, path, &how)
			return err
		}
		node.own, errno = s.orAsOther(r, node.dir, in.Umask, s.threads.withUmask(in.Umask, make), make)
		return errno
	})
	if errno == unix.EEXIST && in.Flags&unix.O_EXCL == 0 {
		// It has appeared since the guest looked. The guest shall look again, and
		// check what it finds: of what CREATE opens it checks nothing (FMODE_CREATED
		// in fuse_create_open).
		return unix.ESTALE
	}
	if errno != 0 {
		return errno
	}
	var st unix.Statx_t
	if errno := s.give(r, node, fd, &st); errno != 0 {
		closeFD(fd)
		return errno
	}
	var anchor int
	errno = s.inodes.makingRoom(func() (errno unix.Errno) {
		anchor, errno = s.proc.open(fd, unix.O_PATH)
		return errno
	})
	if errno != 0 {
		closeFD(fd)
		s.discard(node)
		return errno
	}
	place := node.dir
	if name == "" {
		place = nil
	}
	n, errno := s.inodes.add(anchor, &st, place, name)
	if errno != 0 {
		closeFD(fd)
		s.discard(node)
		return errno
	}
	entry := s.entryOf(r, n, &st, node.dir, name)
	h := &handle{node: n, fd: fd, writable: writable(in.Flags)}
	if errno := s.handles.add(h); errno != 0 {
		s.inodes.forget(entry.NodeID, 1)
		return errno
	}
	r.reply = entry.Append(r.reply)
	r.reply = fuse.AppendOpenOut(r.reply, h.id, s.keepCache())
	return 0
}
