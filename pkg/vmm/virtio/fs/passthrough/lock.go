package passthrough

import (
	"math"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

// POSIX locks belong to a process and a file: closing any descriptor drops them
// all. OFD and flock locks belong to an open file. On the host, flock locks are
// taken on the handle's descriptor, and all others as OFD locks, on a descriptor
// for each owner and node, which is closed when the owner's locks end.
//
// The guest does not wait for the answer to RELEASE, which ends the locks of an
// open file. Requests are served concurrently: one that finds a lock looks again
// when the RELEASEs that have arrived before are done.

// lockKey is an owner of POSIX or OFD locks on a node. The owner is a number of
// the guest kernel's.
type lockKey struct{ node, owner uint64 }

// lockRequest is a checked request for a lock.
type lockRequest struct {
	key    lockKey
	flock  bool
	pid    uint32
	handle *handle
	lock   unix.Flock_t
}

// decodeLock checks a request and takes its handle, which the caller puts.
func (s *Server) decodeLock(r *request) (lockRequest, unix.Errno) {
	in := fuse.DecodeLkIn(r.args)
	req := lockRequest{flock: in.Flags&fuse.LkFlock != 0, pid: in.Lock.PID}
	switch in.Lock.Type {
	case unix.F_RDLCK, unix.F_WRLCK, unix.F_UNLCK:
	default:
		return req, unix.EINVAL
	}
	if in.Lock.Start > in.Lock.End || in.Lock.End > math.MaxInt64 {
		return req, unix.EINVAL
	}
	req.lock = unix.Flock_t{Type: int16(in.Lock.Type), Start: int64(in.Lock.Start)}
	if in.Lock.End != math.MaxInt64 { // else to the end, however far that moves
		req.lock.Len = int64(in.Lock.End-in.Lock.Start) + 1
	}
	var errno unix.Errno
	if req.handle, errno = s.handles.file(in.FH); errno != 0 {
		return req, errno
	}
	req.key = lockKey{req.handle.node.id, in.Owner}
	return req, 0
}

func (s *Server) getlk(r *request) unix.Errno {
	req, errno := s.decodeLock(r)
	if errno != 0 {
		return errno
	}
	defer s.handles.put(req.handle)
	if req.flock || req.lock.Type == unix.F_UNLCK {
		return unix.EINVAL
	}
	test := func() (found unix.Flock_t, errno unix.Errno) {
		found = req.lock
		if o := s.locks.find(req.key); o != nil {
			errno = o.test(&found)
		} else {
			errno = testLock(req.handle.fd, &found)
		}
		return found, errno
	}
	found, errno := test()
	if errno == 0 && found.Type != unix.F_UNLCK {
		s.releases.await()
		found, errno = test()
	}
	if errno != 0 {
		return errno
	}
	out := fuse.FileLock{Type: unix.F_UNLCK}
	if found.Type != unix.F_UNLCK {
		out = fuse.FileLock{Start: uint64(found.Start), End: math.MaxInt64, Type: uint32(found.Type), PID: s.locks.holder(&req, &found)}
		if found.Len != 0 {
			out.End = out.Start + uint64(found.Len) - 1
		}
	}
	r.reply = out.Append(r.reply)
	return 0
}

func (s *Server) setlk(r *request) unix.Errno {
	req, errno := s.decodeLock(r)
	if errno != 0 {
		return errno
	}
	defer s.handles.put(req.handle)
	if errno = s.setLock(&req); errno == unix.EAGAIN {
		s.releases.await()
		errno = s.setLock(&req)
	}
	return errno
}

// setlkw waits for the lock.
func (s *Server) setlkw(r *request) unix.Errno {
	req, errno := s.decodeLock(r)
	if errno != 0 {
		return errno
	}
	return s.untilFree(r, 0, func() unix.Errno { return s.setLock(&req) }, func(errno unix.Errno) unix.Errno {
		s.handles.put(req.handle)
		return errno
	})
}

// untilFree ends the request with what finish makes of try's errno. If that is EAGAIN
// try is called again until it is not, or patience (0 is without end) is at its end,
// in a goroutine: a worker cannot be spared as long as others like. Linux sends no
// INTERRUPT over virtio-fs, so a process of the guest's that waits here cannot be
// killed until what it waits for is free or the device is reset.
func (s *Server) untilFree(r *request, patience time.Duration, try func() unix.Errno, finish func(unix.Errno) unix.Errno) unix.Errno {
	errno := try()
	if errno != unix.EAGAIN {
		return finish(errno)
	}
	errno = s.locks.wait(r.Unique, patience, try, func(errno unix.Errno) { s.complete(r, finish(errno)) })
	if errno != 0 {
		return finish(errno)
	}
	return pending
}

// leasePatience is how long an open waits for a lease. The host takes it from its
// holder itself, after /proc/sys/fs/lease-break-time, which is 45 seconds unless
// somebody has changed it.
const leasePatience = time.Minute

func (s *Server) interrupt(r *request) unix.Errno {
	s.locks.interrupt(fuse.DecodeUint64(r.args))
	return 0
}

// setLock sets or removes a lock, without waiting: EAGAIN says that somebody
// else has it.
func (s *Server) setLock(req *lockRequest) unix.Errno {
	var errno unix.Errno
	switch {
	case req.flock:
		errno = s.flock(req.handle, req.lock.Type)
	case req.lock.Type == unix.F_UNLCK:
		if o := s.locks.find(req.key); o != nil {
			errno = o.set(req.lock)
		}
	default:
		errno = s.setPosixLock(req)
	}
	switch errno {
	case 0:
		s.locks.notify() // it may be less than was held before
	case unix.EACCES:
		errno = unix.EAGAIN // POSIX lets fcntl say either
	}
	return errno
}

func (s *Server) flock(h *handle, kind int16) unix.Errno {
	how := unix.LOCK_UN
	switch kind {
	case unix.F_RDLCK:
		how = unix.LOCK_SH
	case unix.F_WRLCK:
		how = unix.LOCK_EX
	}
	return retry(func() error { return unix.Flock(h.fd, how|unix.LOCK_NB) })
}

// unflock drops a flock lock before its handle is closed, which may be later
// than the guest's RELEASE.
func (s *Server) unflock(h *handle) {
	if s.flock(h, unix.F_UNLCK) == 0 {
		s.locks.notify()
	}
}

func (s *Server) setPosixLock(req *lockRequest) unix.Errno {
	h := req.handle
	if req.lock.Type == unix.F_WRLCK && !h.writable {
		return unix.EBADF
	}
	h.locked.Store(true)
	open := func(flags int) (int, unix.Errno) {
		if h.appendOnly {
			flags |= unix.O_APPEND
		}
		return s.reopen(h.node, flags)
	}
	for {
		o, errno := s.locks.owner(req)
		if errno != 0 {
			return errno
		}
		errno = o.ensure(h.writable, open)
		if errno == 0 {
			errno = o.set(req.lock)
		}
		if errno != errDropped {
			return errno
		}
	}
}
