package passthrough

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// errDropped is what an owner's methods return after it was dropped.
const errDropped = unix.Errno(4093)

// maxReads bounds what is locked through a descriptor that is not writable, and so
// what one request may have to set anew: each time the host goes through the
// owner's other locks.
const maxReads = 1024

// lockOwner holds the locks of one owner on one node.
type lockOwner struct {
	handle uint64 // that set a lock last; protected by lockTable.mu
	pid    uint32 // in the guest; protected by lockTable.mu

	mu sync.Mutex // protects what follows, and the descriptor from being closed
	// fd is open on the node, or -1. A file that the guest has open only for reading
	// is not opened for writing: on overlayfs that would copy it.
	fd       int
	writable bool
	// reads is what is locked while fd is not writable: for reading, as nothing else
	// can be. When fd makes way for one that is, for which the host's locks of the
	// old one would be a stranger's, they are set anew.
	reads   spans
	dropped bool
}

// ensure opens the node if it is not open so that a lock can be set through a
// handle that is writable or not.
func (o *lockOwner) ensure(writable bool, open func(flags int) (int, unix.Errno)) unix.Errno {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case o.dropped:
		return errDropped
	case o.fd >= 0 && (o.writable || !writable):
		return 0
	}
	choices := []int{unix.O_RDONLY}
	if writable {
		choices = []int{unix.O_RDWR, unix.O_WRONLY}
	}
	fd, errno := openOr(open, choices...)
	if errno != 0 {
		return errno
	}
	for _, s := range o.reads {
		// Nothing is in the way of it: what is there now is no stranger's write lock.
		if errno := applyLock(fd, s.readLock()); errno != 0 {
			closeFD(fd)
			return errno
		}
	}
	if o.fd >= 0 {
		closeFD(o.fd)
	}
	o.fd, o.writable, o.reads = fd, writable, nil
	return 0
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
	if o.fd < 0 {
		return 0 // nothing was locked, so nothing is unlocked
	}
	if !o.writable && l.Type != unix.F_UNLCK && len(o.reads) >= maxReads {
		return unix.ENOLCK
	}
	errno := applyLock(o.fd, l)
	if errno == 0 && !o.writable {
		o.reads = o.reads.set(l)
	}
	return errno
}

func applyLock(fd int, l unix.Flock_t) unix.Errno {
	return retry(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l) })
}

// test replaces l by a lock of somebody else's that is in its way, or sets its
// type to F_UNLCK.
func (o *lockOwner) test(l *unix.Flock_t) unix.Errno {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.fd < 0 {
		l.Type = unix.F_UNLCK // dropped, or never had a lock
		return 0
	}
	return testLock(o.fd, l)
}

func testLock(fd int, l *unix.Flock_t) unix.Errno {
	l.Pid = 0 // OFD locks have none
	return retry(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, l) })
}

func (o *lockOwner) drop() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.fd >= 0 {
		closeFD(o.fd)
	}
	o.fd, o.reads, o.dropped = -1, nil, true
}

// lockTable holds the owners of POSIX and OFD locks, and what waits for locks
// of any kind, and for leases. Its methods may be called concurrently.
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
		o = &lockOwner{fd: -1}
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

// maxAsked is of how many owners holder finds out which one has a lock: each time the
// host goes through the locks of all owners.
const maxAsked = 64

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
	if len(candidates) > maxAsked {
		return 0
	}
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

// Locks and leases can also be held by others, whose unlocking nobody tells us of: a
// wait looks by itself, less and less often.
const (
	firstLook = 5 * time.Millisecond
	lastLook  = 250 * time.Millisecond
)

// wait calls try until it returns something else than EAGAIN, or patience, unless it
// is 0, is at its end, and then done. It returns at once, with an error if too many
// are waiting: done is not called then.
func (t *lockTable) wait(unique uint64, patience time.Duration, try func() unix.Errno, done func(unix.Errno)) unix.Errno {
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
		var expired <-chan time.Time
		if patience > 0 {
			expired = time.After(patience)
		}
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
				case <-expired:
				case <-interrupted:
					errno = unix.EINTR
				case <-stop:
					errno = unix.EINTR
				}
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
