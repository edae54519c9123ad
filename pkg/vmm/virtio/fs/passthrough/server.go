package passthrough

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

// Config is what a Server shares, and how.
type Config struct {
	// Root is the directory to share, O_PATH suffices. It stays the caller's.
	Root *os.File
	// ProcSelfFD is a descriptor of the process's /proc/self/fd. It stays the
	// caller's. Nil opens that path.
	ProcSelfFD *os.File
	// ReadOnly makes everything that changes the share fail with EROFS.
	ReadOnly bool
	// AttrTimeout and EntryTimeout are how long the guest may believe what it
	// was told of a node and of a name. DefaultTimeout suits shares that
	// somebody else may change; zero makes the guest ask each time.
	AttrTimeout, EntryTimeout time.Duration
	// Limits bounds what the guest can make the server hold.
	Limits Limits
	// Limit is what the server may do to the host's disks, with all that share it;
	// nil is no limit. Counted are the bytes that are read, written and copied, and
	// as operations these requests and those that change something or have it
	// written back. Lookups and the like are not: as a rule the host has in memory
	// what they ask for, and the start of one container makes thousands.
	Limit *ratelimit.Limiter
	// Log gets what the guest does wrong, once for each kind. Nil discards it.
	Log *slog.Logger
}

// DefaultTimeout is the usual AttrTimeout and EntryTimeout.
const DefaultTimeout = time.Second

// Limits bounds what a guest can make a Server hold. Where one is reached the
// guest gets ENFILE, or ENOLCK for locks.
type Limits struct {
	// Inodes is the number of nodes, at some 300 bytes of memory each. Zero is
	// 1<<20.
	Inodes int
	// Descriptors is the number of descriptors the server may have open; they
	// are for nodes (see Nodes), open files, which take two, and lock owners.
	// Zero is what the process may have (RLIMIT_NOFILE) without 512.
	Descriptors int
	// Nodes is the number of descriptors that may be open just to keep nodes at
	// hand, with those that are in use. Zero is a quarter of Descriptors, but at
	// most 16384.
	Nodes int
	// LockWaits is the number of requests that may wait for a lock or a lease. Zero is 256.
	LockWaits int
	// Threads is the number of threads for xattrs and for creating files, which
	// start when they are needed. Zero is 64.
	Threads int
	// PerMount is the number of requests that are served at a time on one mount of
	// the host's; RELEASEs, a quarter of that, are counted apart. The others wait. Zero
	// is 16.
	PerMount int
}

func (l Limits) withDefaults() (Limits, error) {
	if l.Inodes == 0 {
		l.Inodes = 1 << 20
	}
	if l.LockWaits == 0 {
		l.LockWaits = 256
	}
	if l.Threads == 0 {
		l.Threads = 64
	}
	if l.PerMount == 0 {
		l.PerMount = 16
	}
	if l.Descriptors == 0 {
		var limit unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			return l, fmt.Errorf("RLIMIT_NOFILE: %w", err)
		}
		l.Descriptors = int(min(limit.Cur, math.MaxInt32)) - 512
	}
	if l.Nodes == 0 {
		l.Nodes = min(l.Descriptors/4, 16384)
	}
	if l.Inodes < 2 || l.Nodes < 1 || l.Nodes > l.Descriptors/2 || l.LockWaits < 1 || l.Threads < 1 || l.PerMount < 1 || l.Descriptors < 64 {
		return l, fmt.Errorf("limits are too small: %+v", l)
	}
	return l, nil
}

// session is what INIT negotiated.
type session struct{ flags uint64 }

// Server serves one share to one guest.
type Server struct {
	readOnly     bool
	attrTimeout  fuse.Time
	entryTimeout fuse.Time
	log          *slog.Logger
	gate         *ratelimit.Gate
	uid, gid     uint32 // whose what the server creates is

	proc    procDir
	threads *threads
	inodes  *inodeTable
	handles *handleTable
	locks   *lockTable
	devices deviceTable
	// releases are the RELEASE requests that have arrived.
	releases order
	turns    turns

	session atomic.Pointer[session] // nil before INIT
	syncing sync.Mutex              // one SYNCFS at a time
	logged  [numComplaints]atomic.Bool
}

// New makes a server. Close releases it.
func New(c Config) (*Server, error) {
	if c.Root == nil {
		return nil, errors.New("no directory to share")
	}
	limits, err := c.Limits.withDefaults()
	if err != nil {
		return nil, err
	}
	if c.AttrTimeout < 0 || c.EntryTimeout < 0 {
		return nil, errors.New("negative cache timeout")
	}
	s := &Server{
		readOnly:     c.ReadOnly,
		attrTimeout:  timeout(c.AttrTimeout),
		entryTimeout: timeout(c.EntryTimeout),
		log:          c.Log,
		gate:         c.Limit.NewGate(),
		uid:          uint32(os.Geteuid()),
		gid:          uint32(os.Getegid()),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	proc, err := openProc(c.ProcSelfFD)
	if err != nil {
		return nil, fmt.Errorf("descriptor directory: %w", err)
	}
	s.proc = procDir(proc)
	root, err := openRoot(c.Root)
	if err != nil {
		closeFD(proc)
		return nil, fmt.Errorf("directory to share: %w", err)
	}
	owners := limits.Descriptors / 8
	var errno unix.Errno
	if s.inodes, errno = newInodeTable(root, limits.Inodes, limits.Nodes); errno != 0 {
		closeFD(proc)
		closeFD(root)
		return nil, fmt.Errorf("directory to share: %w", errno)
	}
	s.handles = newHandleTable(s.inodes, (limits.Descriptors-limits.Nodes-owners)/2)
	s.locks = newLockTable(owners, limits.LockWaits)
	s.turns = turns{max: limits.PerMount, by: map[turnKey]turn{}}
	if s.threads, err = newThreads(proc, limits.Threads); err != nil {
		closeFD(proc)
		closeFD(root)
		return nil, err
	}
	return s, nil
}

func timeout(d time.Duration) fuse.Time {
	return fuse.Time{Sec: uint64(d / time.Second), Nsec: uint32(d % time.Second)}
}

// openProc returns a descriptor of /proc/self/fd.
func openProc(given *os.File) (int, error) {
	var fd int
	var err error
	if given != nil {
		fd, err = unix.FcntlInt(given.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	} else {
		fd, err = unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return -1, err
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err == nil && st.Type == unix.PROC_SUPER_MAGIC {
		return fd, nil
	}
	closeFD(fd)
	return -1, errors.New("not in a proc file system")
}

// openRoot returns an O_PATH descriptor of the directory.
func openRoot(given *os.File) (int, error) {
	return unix.Openat(int(given.Fd()), ".", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}

// Cancel makes every request that waits for a lock, a lease, its turn or the limit
// fail with EINTR, and those that would, until Reset.
func (s *Server) Cancel() {
	s.locks.cancel()
	s.gate.Close()
	for _, r := range s.turns.cancel() {
		s.complete(r, unix.EINTR)
	}
}

// Reset ends the guest's session: everything it held is released. No request
// may be under way, except those that wait for locks or leases.
func (s *Server) Reset() {
	s.Cancel()
	s.locks.waiting.Wait()
	s.release()
	s.inodes.stopSweeping()
	s.session.Store(nil)
	s.locks.restart()
	s.turns.restart()
	s.gate.Open()
}

// release gives up what the guest holds. Requests may be under way.
func (s *Server) release() {
	s.handles.clear()
	s.locks.clear()
	s.inodes.clear()
}

// Close releases everything. No request may be under way or follow.
func (s *Server) Close() {
	s.Reset()
	s.threads.close()
	closeFD(s.inodes.root.fd)
	closeFD(int(s.proc))
}

// complaint is a kind of mistake of the guest's that is logged once.
type complaint int

const (
	complainShape complaint = iota
	complainOpcode
	complainForget
	numComplaints
)

func (s *Server) complain(c complaint, message string, args ...any) {
	if !s.logged[c].Swap(true) {
		s.log.Warn(message+" (logged once)", args...)
	}
}
