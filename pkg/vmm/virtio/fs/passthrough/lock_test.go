package passthrough

import (
	"encoding/binary"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse/fusetest"
)

const endOfFile = 1<<63 - 1

func readLock(start, end uint64) fuse.FileLock {
	return fuse.FileLock{Start: start, End: end, Type: unix.F_RDLCK, PID: 11}
}

func writeLock(start, end uint64) fuse.FileLock {
	return fuse.FileLock{Start: start, End: end, Type: unix.F_WRLCK, PID: 22}
}

func unlock(start, end uint64) fuse.FileLock {
	return fuse.FileLock{Start: start, End: end, Type: unix.F_UNLCK}
}

func TestPosixLocks(t *testing.T) {
	s := newShare(t)
	e, fh := s.mustCreate(t, root, "file", "contents")
	set := func(owner uint64, l fuse.FileLock) unix.Errno { return s.Setlk(e.NodeID, fh, owner, l, 0) }
	want(t, "lock", set(1, writeLock(10, 19)), 0)
	want(t, "again", set(1, writeLock(10, 19)), 0)
	want(t, "by another", set(2, readLock(15, 15)), unix.EAGAIN)
	want(t, "before it", set(2, writeLock(0, 9)), 0)
	want(t, "after it", set(2, writeLock(20, endOfFile)), 0)
	got, errno := s.Getlk(e.NodeID, fh, 2, writeLock(0, endOfFile))
	if errno != 0 || got != writeLock(10, 19) {
		t.Errorf("GETLK: %+v, %v", got, errno)
	}
	got, errno = s.Getlk(e.NodeID, fh, 3, readLock(100, 100)) // who has none himself
	if errno != 0 || got.Type != unix.F_WRLCK || got.Start != 20 || got.End != endOfFile || got.PID != 22 {
		t.Errorf("GETLK to the end: %+v, %v", got, errno)
	}
	want(t, "split", set(1, unlock(12, 13)), 0)
	want(t, "the hole", set(3, writeLock(12, 13)), 0)
	want(t, "the rest", set(3, writeLock(14, 14)), unix.EAGAIN)
	// FLUSH is a close by the owner.
	want(t, "FLUSH", s.Flush(e.NodeID, fh, 1), 0)
	want(t, "after FLUSH", set(3, writeLock(10, 19)), 0)
	got, errno = s.Getlk(e.NodeID, fh, 3, writeLock(0, 19))
	if errno != 0 || got.Type != unix.F_WRLCK || got.Start != 0 || got.End != 9 {
		t.Errorf("GETLK: %+v, %v", got, errno)
	}
	want(t, "unlocking what nobody has locked", set(9, unlock(0, endOfFile)), 0)
}

// What is locked by way of a file that is open for reading only is bounded: it is
// locked anew when the owner uses one that is open for writing.
func TestReadLockLimit(t *testing.T) {
	s := newShare(t)
	e, rw := s.mustCreate(t, root, "file", "")
	ro, errno := s.Open(e.NodeID, unix.O_RDONLY)
	must(t, errno)
	for i := range uint64(maxReads) {
		must(t, s.Setlk(e.NodeID, ro, 1, readLock(2*i, 2*i), 0))
	}
	want(t, "one more", s.Setlk(e.NodeID, ro, 1, readLock(2*maxReads, 2*maxReads), 0), unix.ENOLCK)
	must(t, s.Setlk(e.NodeID, rw, 1, writeLock(2*maxReads, 2*maxReads), 0))
	must(t, s.Setlk(e.NodeID, ro, 1, readLock(2*maxReads+2, 2*maxReads+2), 0))
}

// What a GETLK costs does not grow with the owners for ever.
func TestHolderAmongMany(t *testing.T) {
	s := newShare(t)
	e, fh := s.mustCreate(t, root, "file", "contents")
	for owner := range uint64(maxAsked) + 1 {
		must(t, s.Setlk(e.NodeID, fh, owner, writeLock(owner, owner), 0))
		wanted := writeLock(0, 0)
		if owner == maxAsked {
			wanted.PID = 0
		}
		if got, errno := s.Getlk(e.NodeID, fh, 1000, readLock(0, 0)); errno != 0 || got != wanted {
			t.Fatalf("with %d owners: %+v, %v", owner+1, got, errno)
		}
	}
}

func TestPosixLocksOfTheHost(t *testing.T) {
	s := newShare(t)
	e, fh := s.mustCreate(t, root, "file", "contents")
	f, err := os.OpenFile(s.path("file"), os.O_RDWR, 0)
	must(t, err)
	must(t, unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: 5, Len: 5}))
	want(t, "what the host has", s.Setlk(e.NodeID, fh, 1, readLock(0, endOfFile), 0), unix.EAGAIN)
	if got, errno := s.Getlk(e.NodeID, fh, 1, readLock(0, endOfFile)); errno != 0 || got.Type != unix.F_WRLCK || got.Start != 5 || got.End != 9 || got.PID != 0 {
		t.Errorf("GETLK: %+v, %v", got, errno)
	}
	want(t, "what it has not", s.Setlk(e.NodeID, fh, 1, writeLock(0, 4), 0), 0)
	l := unix.Flock_t{Type: unix.F_WRLCK, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l); err != unix.EAGAIN {
		t.Errorf("the host, what the guest has: %v", err)
	}
	// A waiting guest notices that the host has unlocked.
	waited := make(chan unix.Errno)
	go func() { waited <- s.Setlkw(s.Unique(), e.NodeID, fh, 1, writeLock(0, endOfFile), 0) }()
	must(t, f.Close())
	want(t, "SETLKW", <-waited, 0)
}

func TestLockModes(t *testing.T) {
	s := newShare(t)
	e, rw := s.mustCreate(t, root, "file", "contents")
	ro, errno := s.Open(e.NodeID, unix.O_RDONLY)
	must(t, errno)
	want(t, "writing lock on a reading handle", s.Setlk(e.NodeID, ro, 1, writeLock(0, 10), 0), unix.EBADF)
	// One owner, two handles: a reading one first.
	want(t, "reading", s.Setlk(e.NodeID, ro, 1, readLock(0, 10), 0), 0)
	want(t, "upgrade", s.Setlk(e.NodeID, rw, 1, writeLock(5, 10), 0), 0)
	want(t, "another reads what was kept", s.Setlk(e.NodeID, rw, 2, readLock(0, 4), 0), 0)
	want(t, "another reads what is written", s.Setlk(e.NodeID, rw, 2, readLock(5, 5), 0), unix.EAGAIN)
	want(t, "upgrade of what another reads", s.Setlk(e.NodeID, rw, 1, writeLock(0, 4), 0), unix.EAGAIN)
	want(t, "a failed upgrade keeps the lock", s.Setlk(e.NodeID, rw, 3, writeLock(0, 4), 0), unix.EAGAIN)
	want(t, "unlock", s.Setlk(e.NodeID, ro, 1, unlock(0, endOfFile), 0), 0)
	want(t, "unlock", s.Setlk(e.NodeID, ro, 2, unlock(0, endOfFile), 0), 0)
	want(t, "all is free", s.Setlk(e.NodeID, rw, 3, writeLock(0, endOfFile), 0), 0)
}

// One owner with a lock by a reading handle and one by a writing handle has all it
// locked, and nothing that it did not get.
func TestLocksOfTwoHandles(t *testing.T) {
	s := newShare(t)
	e, rw := s.mustCreate(t, root, "file", "contents")
	ro, errno := s.Open(e.NodeID, unix.O_RDONLY)
	must(t, errno)
	for _, start := range []uint64{100, 110, 120} {
		want(t, "by the reading handle", s.Setlk(e.NodeID, ro, 1, readLock(start, start+9), 0), 0)
	}
	want(t, "unlock", s.Setlk(e.NodeID, ro, 1, unlock(105, 114), 0), 0)
	want(t, "by the writing handle", s.Setlk(e.NodeID, rw, 1, writeLock(200, 200), 0), 0)
	want(t, "by the reading handle again", s.Setlk(e.NodeID, ro, 1, readLock(300, endOfFile), 0), 0)
	for at, locked := range map[uint64]bool{99: false, 100: true, 104: true, 105: false, 114: false, 115: true, 129: true, 130: false, 200: true, 300: true} {
		got, errno := s.Getlk(e.NodeID, rw, 2, writeLock(at, at))
		if must(t, errno); locked != (got.Type != unix.F_UNLCK) {
			t.Errorf("byte %d, for another: %+v", at, got)
		}
		if got, errno = s.Getlk(e.NodeID, rw, 1, writeLock(at, at)); errno != 0 || got.Type != unix.F_UNLCK {
			t.Errorf("byte %d, for the owner: %+v, %v", at, got, errno)
		}
	}
	want(t, "another reads", s.Setlk(e.NodeID, rw, 2, readLock(0, 9), 0), 0)
	want(t, "what another reads", s.Setlk(e.NodeID, rw, 1, writeLock(0, 9), 0), unix.EAGAIN)
	want(t, "the other's upgrade", s.Setlk(e.NodeID, rw, 2, writeLock(0, 9), 0), 0)
}

func TestOFDLocksEndWithTheHandle(t *testing.T) {
	s := newShare(t)
	e, a := s.mustCreate(t, root, "file", "contents")
	b, errno := s.Open(e.NodeID, unix.O_RDWR)
	must(t, errno)
	// The kernel sends no FLUSH with an open file's own owner number.
	want(t, "lock", s.Setlk(e.NodeID, a, 100, writeLock(0, endOfFile), 0), 0)
	want(t, "FLUSH by a process", s.Flush(e.NodeID, a, 1), 0)
	want(t, "still held", s.Setlk(e.NodeID, b, 200, writeLock(0, endOfFile), 0), unix.EAGAIN)
	want(t, "RELEASE", s.Release(e.NodeID, a), 0)
	want(t, "free", s.Setlk(e.NodeID, b, 200, writeLock(0, endOfFile), 0), 0)
}

func TestFlock(t *testing.T) {
	s := newShare(t)
	e, a := s.mustCreate(t, root, "file", "contents")
	b, errno := s.Open(e.NodeID, unix.O_RDONLY)
	must(t, errno)
	flock := func(fh uint64, l fuse.FileLock) unix.Errno { return s.Setlk(e.NodeID, fh, fh, l, fuse.LkFlock) }
	all := func(l fuse.FileLock) fuse.FileLock { l.Start, l.End = 0, endOfFile; return l }
	want(t, "exclusive", flock(a, all(writeLock(0, 0))), 0)
	want(t, "shared", flock(b, all(readLock(0, 0))), unix.EAGAIN)
	want(t, "POSIX is apart", s.Setlk(e.NodeID, a, 1, writeLock(0, 10), 0), 0)
	want(t, "downgrade", flock(a, all(readLock(0, 0))), 0)
	want(t, "shared", flock(b, all(readLock(0, 0))), 0)
	want(t, "unlock", flock(b, all(unlock(0, 0))), 0)
	want(t, "exclusive", flock(a, all(writeLock(0, 0))), 0)
	waited := make(chan unix.Errno)
	go func() { waited <- s.Setlkw(s.Unique(), e.NodeID, b, b, all(writeLock(0, 0)), fuse.LkFlock) }()
	want(t, "RELEASE", s.ReleaseFlock(e.NodeID, a), 0)
	want(t, "SETLKW", <-waited, 0)
	f, err := os.Open(s.path("file"))
	must(t, err)
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); err != unix.EWOULDBLOCK {
		t.Errorf("the host: %v", err)
	}
}

func TestLockWaits(t *testing.T) {
	s := newShare(t, func(c *Config) { c.Limits.LockWaits = 8 })
	e, fh := s.mustCreate(t, root, "file", "contents")
	must(t, s.Setlk(e.NodeID, fh, 1, writeLock(0, endOfFile), 0))
	var uniques []uint64
	waited := make(chan unix.Errno, 8)
	for i := range 8 {
		unique := s.Unique()
		uniques = append(uniques, unique)
		go func() { waited <- s.Setlkw(unique, e.NodeID, fh, uint64(10+i), writeLock(0, endOfFile), 0) }()
	}
	// Wait until all wait, then one more is too many.
	for {
		s.server.locks.mu.Lock()
		n := len(s.server.locks.waits)
		s.server.locks.mu.Unlock()
		if n == 8 {
			break
		}
	}
	want(t, "one too many", s.Setlkw(s.Unique(), e.NodeID, fh, 99, writeLock(0, endOfFile), 0), unix.ENOLCK)
	s.Interrupt(uniques[3])
	s.Interrupt(uniques[3])
	want(t, "interrupted", <-waited, unix.EINTR)
	// Each that gets the lock gives it to the next.
	want(t, "unlock", s.Setlk(e.NodeID, fh, 1, unlock(0, endOfFile), 0), 0)
	for range 7 {
		want(t, "SETLKW", <-waited, 0)
		for i := range 8 {
			want(t, "unlock", s.Setlk(e.NodeID, fh, uint64(10+i), unlock(0, endOfFile), 0), 0)
		}
	}
	// Waits end with the session.
	must(t, s.Setlk(e.NodeID, fh, 1, writeLock(0, endOfFile), 0))
	go func() { waited <- s.Setlkw(s.Unique(), e.NodeID, fh, 2, writeLock(0, endOfFile), 0) }()
	s.server.Cancel()
	want(t, "cancelled", <-waited, unix.EINTR)
}

func TestLockLimit(t *testing.T) {
	s := newShare(t, func(c *Config) { c.Limits.Descriptors = 256 })
	e, fh := s.mustCreate(t, root, "file", "contents")
	n := 0
	for ; n < 1000; n++ {
		if errno := s.Setlk(e.NodeID, fh, uint64(n), readLock(0, 10), 0); errno != 0 {
			want(t, "too many owners", errno, unix.ENOLCK)
			break
		}
	}
	if n != 256/8 {
		t.Errorf("%d owners had locks", n)
	}
	must(t, s.Flush(e.NodeID, fh, 0))
	want(t, "after one has closed", s.Setlk(e.NodeID, fh, 5000, readLock(0, 10), 0), 0)
}

// A RELEASE that the guest makes a request for a lock, after it has arrived, does not
// wait for itself.
func TestReleaseBecomesLock(t *testing.T) {
	s := newShare(t)
	e, fh := s.mustCreate(t, root, "file", "contents")
	must(t, s.Setlk(e.NodeID, fh, 1, writeLock(0, 10), 0))
	for _, op := range []fuse.Opcode{fuse.Setlk, fuse.Getlk} {
		args := fusetest.Pack(fh, uint64(2), uint64(0), uint64(10), uint32(unix.F_WRLCK), uint32(0), uint32(0), uint32(0))
		request := append(s.Header(fuse.Release, e.NodeID, s.Unique(), fuse.InHeaderSize+len(args)), args...)
		ticket := s.server.Arrive([][]byte{request})
		binary.LittleEndian.PutUint32(request[4:], uint32(op))
		answered := make(chan bool)
		go func() {
			s.server.Handle(ticket, [][]byte{request}, [][]byte{make([]byte, 64)}, nil)
			close(answered)
		}()
		select {
		case <-answered:
		case <-time.After(10 * time.Second):
			t.Errorf("%v is not answered", op)
		}
	}
}

// TestConcurrentLocks is for the race detector: owners come and go.
func TestConcurrentLocks(t *testing.T) {
	s := newShare(t)
	e, fh := s.mustCreate(t, root, "file", "contents")
	var counter int // protected by the lock
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			owner := uint64(i)
			for range 100 {
				if errno := s.Setlkw(s.Unique(), e.NodeID, fh, owner, writeLock(0, 0), 0); errno != 0 {
					t.Errorf("SETLKW: %v", errno)
					return
				}
				counter++
				if i%2 == 0 {
					s.Flush(e.NodeID, fh, owner)
				} else {
					s.Setlk(e.NodeID, fh, owner, unlock(0, 0), 0)
				}
			}
		})
	}
	all.Wait()
	if counter != 800 {
		t.Errorf("%d", counter)
	}
}
