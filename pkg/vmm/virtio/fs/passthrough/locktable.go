package passthrough

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// errDropped is what an owner's methods return after it was dropped.
const errDropped = unix.Errno(4093)

// lockOwner holds the locks of one owner on one node.
type lockOwner struct {
	handle uint64 // that set a lock last; protected by lockTable.mu
	pid    uint32 // in the guest; protected by lockTable.mu

	mu sync.Mutex // protects what follows, and the descriptors from being closed
	// ro and rw are open on the node for reading and for both, or -1. A file
	// that the guest has open only for reading is not opened for writing: on
	// overlayfs that would copy it.
	ro, rw  int
	dropped bool
}

// ensure opens the node if it is not open so that a lock can be set through a
// handle that is writable or not.
func (o *lockOwner) ensure(writable bool, open func(flags int) (int, unix.Errno)) (errno unix.Errno) {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case o.dropped:
		return errDropped
	case writable && o.rw < 0:
		o.rw, errno = openOr(open, unix.O_RDWR, unix.O_WRONLY)
	case !writable && o.ro < 0 && o.rw < 0:
		o.ro, errno = openOr(open, unix.O_RDONLY)
	}
	return errno
}

// openOr opens with the first flags that the host permits.
func openOr(open func(flags int) (int, unix.Errno), choices ...int) (fd int, errno unix.Errno) {
	for _, flags := range choices {
		if fd, errno = open(flags); errno != unix.EACCES {
			break
		}
	}
	if errno != 0 {
		return -1, errno
	}
	return fd, 0
}

// set sets or removes a lock.
func (o *lockOwner) set(l unix.Flock_t) unix.Errno {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.dropped {
		if l.Type == unix.F_UNLCK {
			return 0
		}
		return errDropped
	}
	unlock, reader := l, l
	unlock.Type, reader.Type = unix.F_UNLCK, unix.F_RDLCK
	switch {
	case o.rw < 0:
		return applyLock(o.ro, l)
	case o.ro < 0:
		return applyLock(o.rw, l)
	}
	// The host takes the two for strangers. What was locked through ro moves.
	if errno := applyLock(o.ro, unlock); errno != 0 {
		return errno
	}
	errno := applyLock(o.rw, l)
	if errno != 0 && l.Type != unix.F_UNLCK {
		// Back to what it may have been, rather than nothing.
		_ = applyLock(o.ro, reader)
	}
	return errno
}

func applyLock(fd int, l unix.Flock_t) unix.Errno {
	if fd < 0 {
		return 0 // nothing was locked, so nothing is unlocked
	}
	return retry(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l) })
}

// test replaces l by a lock of somebody else's that is in its way, or sets its
// type to F_UNLCK.
func (o *lockOwner) test(l *unix.Flock_t) unix.Errno {
	o.mu.Lock()
	defer o.mu.Unlock()
	fd := o.rw
	if fd < 0 {
		fd = o.ro
	}
	if fd < 0 {
		l.Type = unix.F_UNLCK // dropped, or never had a lock
		return 0
	}
	return testLock(fd, l)
}

func testLock(fd int, l *unix.Flock_t) unix.Errno {
	l.Pid = 0 // OFD locks have none
	return retry(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, l) })
}

func (o *lockOwner) drop() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, fd := range []int{o.ro, o.rw} {
		if fd >= 0 {
			closeFD(fd)
		}
	}
	o.ro, o.rw, o.dropped = -1, -1, true
}

// lockTable holds the owners of POSIX and OFD locks, and what waits for locks
// of any kind. Its methods may be called concurrently.
type lockTable struct {
	maxOwners, maxWaits int
	waiting             sync.WaitGroup

	mu      sync.Mutex // protects what follows
	owners  map[lockKey]*lockOwner
	waits   map[uint64]chan struct{} // by the request's unique; closed by interrupt
	changed chan struct{}            // closed when a lock may have become free
	stop    chan struct{}            // closed by cancel
}

func newLockTable(maxOwners, maxWaits int) *lockTable {
	return &lockTable{
		maxOwners: maxOwners, maxWaits: maxWaits,
		owners: map[lockKey]*lockOwner{}, waits: map[uint64]chan struct{}{},
		changed: make(chan struct{}), stop: make(chan struct{}),
	}
}

// find returns the owner, or nil if it has no locks.
func (t *lockTable) find(key lockKey) *lockOwner {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.owners[key]
}

// owner returns the owner of the lock that req asks for.
func (t *lockTable) owner(req *lockRequest) (*lockOwner, unix.Errno) {
	t.mu.Lock()
	defer t.mu.Unlock()
	o := t.owners[req.key]
	if o == nil {
		if len(t.owners) >= t.maxOwners {
			return nil, unix.ENOLCK
		}
		o = &lockOwner{ro: -1, rw: -1}
		t.owners[req.key] = o
	}
	o.handle, o.pid = req.handle.id, req.pid
	return o, 0
}

// drop ends all locks of an owner: the process has closed the file.
func (t *lockTable) drop(key lockKey) {
	t.mu.Lock()
	o := t.owners[key]
	delete(t.owners, key)
	t.mu.Unlock()
	if o != nil {
		o.drop()
		t.notify()
	}
}

// closed ends the locks that belong to a handle: OFD locks. POSIX locks set
// through it have been dropped by FLUSH.
func (t *lockTable) closed(h *handle) {
	if !h.locked.Load() {
		return
	}
	var keys []lockKey
	t.mu.Lock()
	for key, o := range t.owners {
		if key.node == h.node.id && o.handle == h.id {
			keys = append(keys, key)
		}
	}
	t.mu.Unlock()
	for _, key := range keys {
		t.drop(key)
	}
}

// holder returns the process of the guest that has found, a lock in the way of
// req, or 0 if it is not the guest's or cannot be told.
func (t *lockTable) holder(req *lockRequest, found *unix.Flock_t) uint32 {
	type candidate struct {
		owner *lockOwner
		pid   uint32
	}
	var candidates []candidate
	t.mu.Lock()
	for key, o := range t.owners {
		if key.node == req.key.node && key != req.key {
			candidates = append(candidates, candidate{o, o.pid})
		}
	}
	t.mu.Unlock()
	for _, c := range candidates {
		// Only the holder itself does not see the lock.
		seen := req.lock
		if errno := c.owner.test(&seen); errno == 0 && (seen.Type != found.Type || seen.Start != found.Start || seen.Len != found.Len) {
			return c.pid
		}
	}
	return 0
}

// notify makes those who wait for locks try again.
func (t *lockTable) notify() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.waits) > 0 {
		close(t.changed)
		t.changed = make(chan struct{})
	}
}

// Locks can also be held by others, whose unlocking nobody tells us of: a wait
// looks by itself, less and less often.
const (
	firstLook = 5 * time.Millisecond
	lastLook  = 250 * time.Millisecond
)

// wait calls try until it returns something else than EAGAIN, and then done. It
// returns at once, with an error if too many are waiting: done is not called
// then.
func (t *lockTable) wait(unique uint64, try func() unix.Errno, done func(unix.Errno)) unix.Errno {
	interrupted := make(chan struct{})
	t.mu.Lock()
	if _, taken := t.waits[unique]; taken || len(t.waits) >= t.maxWaits {
		t.mu.Unlock()
		return unix.ENOLCK
	}
	t.waits[unique] = interrupted
	t.waiting.Add(1)
	stop := t.stop
	t.mu.Unlock()
	go func() {
		defer t.waiting.Done()
		timer := time.NewTimer(firstLook)
		defer timer.Stop()
		look := firstLook
		for {
			t.mu.Lock()
			changed := t.changed
			t.mu.Unlock()
			errno := try()
			if errno == unix.EAGAIN {
				select {
				case <-changed:
					continue
				case <-timer.C:
					look = min(2*look, lastLook)
					timer.Reset(look)
					continue
				case <-interrupted:
				case <-stop:
				}
				errno = unix.EINTR
			}
			t.mu.Lock()
			delete(t.waits, unique)
			t.mu.Unlock()
			done(errno)
			return
		}
	}()
	return 0
}

// interrupt ends the wait of a request, if it is waiting.
func (t *lockTable) interrupt(unique uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if w := t.waits[unique]; w != nil {
		select {
		case <-w:
		default:
			close(w)
		}
	}
}

// cancel ends all waits, and those that start before restart.
func (t *lockTable) cancel() {
	t.mu.Lock()
	defer t.mu.Unlock()
	select {
	case <-t.stop:
	default:
		close(t.stop)
	}
}

// restart permits waits again after cancel.
func (t *lockTable) restart() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stop = make(chan struct{})
}

// clear drops all owners.
func (t *lockTable) clear() {
	t.mu.Lock()
	all := t.owners
	t.owners = map[lockKey]*lockOwner{}
	t.mu.Unlock()
	for _, o := range all {
		o.drop()
	}
	t.notify()
}
