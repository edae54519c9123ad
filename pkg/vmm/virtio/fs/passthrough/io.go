package passthrough

import (
	"math"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/buffers"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

// read puts the file's bytes straight into the guest's buffers.
func (s *Server) read(r *request) unix.Errno {
	in := fuse.DecodeReadIn(r.args)
	size := int(in.Size)
	if in.Offset > math.MaxInt64 || size > r.room {
		return unix.EINVAL
	}
	h, errno := s.handles.file(in.FH)
	if errno != 0 {
		return errno
	}
	defer s.handles.put(h)
	if !s.gate.Take(1, uint64(size)) {
		return unix.EINTR
	}
	defer func() { s.gate.GiveBack(uint64(size - r.direct)) }()
	r.window = buffers.Slice(r.window[:0], r.writable, fuse.OutHeaderSize, uint64(size))
	// A short reply means the end of the file to the kernel, who then takes the
	// file for shorter (fuse_short_read in fs/fuse/file.c): only a read of nothing is
	// the end. An error is the whole reply, whatever was read before: the kernel then
	// asks for what it needs page by page.
	for window := r.window; r.direct < size; {
		var n int
		errno := retry(func() (err error) {
			n, err = unix.Preadv2(h.fd, window, int64(in.Offset)+int64(r.direct), 0)
			return err
		})
		if errno != 0 {
			return errno
		}
		if n <= 0 {
			break
		}
		r.direct += n
		window = buffers.Skip(window, uint64(n))
	}
	return 0
}

// write gets its bytes straight from the guest's buffers.
func (s *Server) write(r *request) unix.Errno {
	in := fuse.DecodeWriteIn(r.args)
	size := int(in.Size)
	if in.Offset > math.MaxInt64 || size > r.data {
		return unix.EINVAL
	}
	h, errno := s.handles.file(in.FH)
	if errno != 0 {
		return errno
	}
	defer s.handles.put(h)
	if !h.writable {
		return unix.EBADF
	}
	if in.WriteFlags&fuse.WriteKillSuidgid != 0 {
		if errno := s.killSuidgid(h.fd); errno != 0 {
			return errno
		}
	}
	// Others may append to the file too, so where its end is only the host
	// knows. Pages written back have their place.
	flags := 0
	if in.Flags&unix.O_APPEND != 0 && in.WriteFlags&fuse.WriteCache == 0 {
		flags = unix.RWF_APPEND
	}
	if h.appendOnly && flags&unix.RWF_APPEND == 0 {
		return unix.EPERM // it would be appended; the host permits neither a mapping nor that
	}
	r.window = buffers.Slice(r.window[:0], r.readable, fuse.InHeaderSize+fuse.WriteInSize, uint64(size))
	written := 0
	for window := r.window; written < size; {
		var n int
		errno := retry(func() (err error) {
			n, err = unix.Pwritev2(h.fd, window, int64(in.Offset)+int64(written), flags)
			return err
		})
		if errno != 0 && written == 0 {
			return errno
		}
		if errno != 0 || n <= 0 {
			break
		}
		written += n
		window = buffers.Skip(window, uint64(n))
	}
	r.reply = fuse.AppendUint32Out(r.reply, uint32(written))
	return 0
}

func (s *Server) lseek(r *request) unix.Errno {
	in := fuse.DecodeLseekIn(r.args)
	if in.Whence != unix.SEEK_DATA && in.Whence != unix.SEEK_HOLE {
		return unix.EINVAL // the kernel does the others itself
	}
	if in.Offset > math.MaxInt64 {
		return unix.ENXIO
	}
	h, errno := s.handles.file(in.FH)
	if errno != 0 {
		return errno
	}
	defer s.handles.put(h)
	var at int64
	errno = retry(func() (err error) {
		at, err = unix.Seek(h.fd, int64(in.Offset), int(in.Whence))
		return err
	})
	if errno != 0 {
		return errno
	}
	r.reply = fuse.AppendUint64Out(r.reply, uint64(at))
	return 0
}

func (s *Server) fallocate(r *request) unix.Errno {
	in := fuse.DecodeFallocateIn(r.args)
	if in.Mode&^(unix.FALLOC_FL_KEEP_SIZE|unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_ZERO_RANGE) != 0 {
		return unix.EOPNOTSUPP
	}
	if in.Offset > math.MaxInt64 || in.Length > math.MaxInt64 {
		return unix.EFBIG
	}
	h, errno := s.writableFile(in.FH)
	if errno != 0 {
		return errno
	}
	defer s.handles.put(h)
	return retry(func() error { return unix.Fallocate(h.fd, in.Mode, int64(in.Offset), int64(in.Length)) })
}

// writableFile returns an open file for an operation that changes it as a write
// does. The kernel does not say whether the caller may keep set-id bits: they
// are cleared.
func (s *Server) writableFile(fh uint64) (*handle, unix.Errno) {
	h, errno := s.handles.file(fh)
	if errno != 0 {
		return nil, errno
	}
	if !h.writable {
		errno = unix.EBADF
	} else {
		errno = s.killSuidgid(h.fd)
	}
	if errno != 0 {
		s.handles.put(h)
	}
	return h, errno
}

// maxCopy bounds how long one COPY_FILE_RANGE keeps a worker. The guest asks
// again for the rest.
const maxCopy = 64 << 20

func (s *Server) copyFileRange(r *request) unix.Errno {
	in := fuse.DecodeCopyFileRangeIn(r.args)
	if in.Flags != 0 || in.OffIn > math.MaxInt64 || in.OffOut > math.MaxInt64 {
		return unix.EINVAL
	}
	from, errno := s.handles.file(in.FHIn)
	if errno != 0 {
		return errno
	}
	defer s.handles.put(from)
	to, errno := s.writableFile(in.FHOut)
	if errno != 0 {
		return errno
	}
	defer s.handles.put(to)
	length := min(in.Len, maxCopy)
	if !s.gate.Take(0, length) { // the operation is paid for
		return unix.EINTR
	}
	n := 0
	errno = retry(func() (err error) {
		offIn, offOut := int64(in.OffIn), int64(in.OffOut)
		n, err = unix.CopyFileRange(from.fd, &offIn, to.fd, &offOut, int(length), 0)
		return err
	})
	s.gate.GiveBack(length - uint64(max(n, 0)))
	if errno != 0 {
		return errno
	}
	r.reply = fuse.AppendUint32Out(r.reply, uint32(n))
	return 0
}
