package passthrough

import (
	"bytes"
	"encoding/binary"
	"math"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

// direntBuffer is how much of a directory is read from the host at a time. It
// has room for some 50 of the longest names.
const direntBuffer = 16 << 10

var direntBuffers = sync.Pool{New: func() any { return new([direntBuffer]byte) }}

// dirStream is where an open directory is being read.
type dirStream struct {
	mu   sync.Mutex          // protects what follows
	buf  *[direntBuffer]byte // from direntBuffers, nil when nothing is left in it
	rest []byte              // of buf: entries not given out yet
	next uint64              // position of the first entry of rest
}

// dirent is an entry as getdents64 returns it.
type dirent struct {
	ino, off uint64
	kind     uint8
	name     []byte // in dirStream.buf
}

// peek returns the next entry, or false at the directory's end. mu is held.
func (d *dirStream) peek(fd int) (e dirent, more bool, errno unix.Errno) {
	if len(d.rest) == 0 {
		if d.buf == nil {
			d.buf = direntBuffers.Get().(*[direntBuffer]byte)
		}
		n := 0
		errno := retry(func() (err error) {
			n, err = unix.Getdents(fd, d.buf[:])
			return err
		})
		if errno != 0 || n == 0 {
			d.drop()
			return dirent{}, false, errno
		}
		d.rest = d.buf[:n]
	}
	// struct linux_dirent64: ino, off, u16 reclen, u8 type, name
	length := binary.NativeEndian.Uint16(d.rest[16:])
	name := d.rest[19:length]
	if i := bytes.IndexByte(name, 0); i >= 0 {
		name = name[:i]
	}
	return dirent{
		ino: binary.NativeEndian.Uint64(d.rest), off: binary.NativeEndian.Uint64(d.rest[8:]),
		kind: d.rest[18], name: name,
	}, true, 0
}

// advance goes past e, which peek returned. mu is held.
func (d *dirStream) advance(e dirent) {
	d.next = e.off
	d.rest = d.rest[binary.NativeEndian.Uint16(d.rest[16:]):]
}

// drop gives the buffer back. mu is held.
func (d *dirStream) drop() {
	if d.buf != nil {
		direntBuffers.Put(d.buf)
	}
	d.buf, d.rest = nil, nil
}

// seek goes to a position that was given out, or to the start, which looks at
// the directory anew. mu is held.
func (d *dirStream) seek(fd int, off uint64) unix.Errno {
	if off == d.next && off != 0 {
		return 0
	}
	if off > math.MaxInt64 {
		return unix.EINVAL
	}
	d.drop()
	d.next = math.MaxUint64 // nowhere, should that fail
	errno := retry(func() error {
		_, err := unix.Seek(fd, int64(off), unix.SEEK_SET)
		return err
	})
	if errno == 0 {
		d.next = off
	}
	return errno
}

func (s *Server) opendir(r *request) unix.Errno {
	if errno := s.handles.room(); errno != 0 {
		return errno
	}
	n, errno := s.inodes.getDir(r.NodeID)
	if errno != 0 {
		return errno
	}
	fd, errno := s.reopen(n, unix.O_RDONLY|unix.O_DIRECTORY)
	if errno != 0 {
		s.inodes.put(n)
		return errno
	}
	h := &handle{node: n, fd: fd, dir: &dirStream{}}
	if errno := s.handles.add(h); errno != 0 {
		return errno
	}
	r.reply = fuse.AppendOpenOut(r.reply, h.id, s.keepCache())
	return 0
}

func (s *Server) releaseDir(r *request) unix.Errno {
	h, errno := s.handles.directory(fuse.DecodeReleaseIn(r.args).FH)
	if errno != 0 {
		return errno
	}
	defer s.handles.put(h)
	s.handles.release(h)
	return 0
}

func (s *Server) fsyncDir(r *request) unix.Errno {
	in := fuse.DecodeFsyncIn(r.args)
	h, errno := s.handles.directory(in.FH)
	if errno != 0 {
		return errno
	}
	defer s.handles.put(h)
	return syncHandle(h, in.Flags)
}

func (s *Server) readdir(r *request) unix.Errno {
	return s.list(r, func(out *fuse.Dirent, h *handle, e dirent) { r.reply = out.Append(r.reply) }, 0)
}

// readdirplus looks each entry up too. It opens none: the nodes get their
// descriptors if and when the guest uses them.
func (s *Server) readdirplus(r *request) unix.Errno {
	return s.list(r, func(out *fuse.Dirent, h *handle, e dirent) {
		entry := s.lookupEntry(r, h.node, e)
		if entry.NodeID != 0 {
			out.Ino = entry.Attr.Ino
		}
		r.reply = entry.Append(r.reply)
		r.reply = out.Append(r.reply)
	}, fuse.EntryOutSize)
}

// list appends entries to the reply, by emit, while they fit. extra is what
// emit appends for each besides the entry itself.
func (s *Server) list(r *request, emit func(out *fuse.Dirent, h *handle, e dirent), extra int) unix.Errno {
	in := fuse.DecodeReadIn(r.args)
	h, errno := s.handles.directory(in.FH)
	if errno != 0 {
		return errno
	}
	defer s.handles.put(h)
	room := min(int(in.Size), r.room, maxReply)
	r.scratch(room)
	h.dir.mu.Lock()
	defer h.dir.mu.Unlock()
	if errno := h.dir.seek(h.fd, in.Offset); errno != 0 {
		return errno
	}
	for {
		e, more, errno := h.dir.peek(h.fd)
		if errno != 0 && len(r.reply) == fuse.OutHeaderSize {
			return errno
		}
		if errno != 0 || !more {
			return 0
		}
		out := fuse.Dirent{Ino: e.ino, Off: e.off, Type: uint32(e.kind), Name: e.name}
		if h.node == s.inodes.root && string(e.name) == ".." {
			out.Ino = h.node.key.ino // what is above is not the guest's to know
		}
		if extra+out.Size() > room {
			if len(r.reply) == fuse.OutHeaderSize {
				return unix.EINVAL // as getdents says of a buffer too small
			}
			return 0
		}
		room -= extra + out.Size()
		emit(&out, h, e)
		h.dir.advance(e)
	}
}

// lookupEntry looks up e, of dir. An entry with node id 0 tells the kernel that
// it has to ask again if it is interested.
func (s *Server) lookupEntry(r *request, dir *inode, e dirent) fuse.EntryOut {
	name := string(e.name)
	if name == "." || name == ".." {
		return fuse.EntryOut{}
	}
	var st unix.Statx_t
	if statChild(dir.fd, name, &st) != 0 {
		return fuse.EntryOut{}
	}
	n, errno := s.inodes.add(-1, &st, dir, name)
	if errno != 0 {
		return fuse.EntryOut{}
	}
	return s.entryOf(r, n, &st, dir, name)
}
