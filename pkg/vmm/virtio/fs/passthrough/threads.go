package passthrough

import (
	"fmt"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// threads runs system calls on threads with a file system context of their own
// (CLONE_FS). Two things live in that context: the umask, which the kernel
// applies or, in a directory with a default ACL, ignores; and the working
// directory, /proc/self/fd here, because xattrs of an O_PATH descriptor can
// only be reached by a path (fgetxattr refuses one, getxattrat is Linux 6.13).
type threads struct {
	proc int // /proc/self/fd
	max  int
	jobs chan func(*thread)

	mu      sync.Mutex
	started int // protected by mu
}

// thread is one of them.
type thread struct{ umask int } // -1 before it is set

func (th *thread) setUmask(umask uint32) {
	if mask := int(umask & 0o777); mask != th.umask {
		unix.Umask(mask)
		th.umask = mask
	}
}

// newThreads starts the first thread and fails if that is not possible. More,
// up to limit, start when they are needed.
func newThreads(proc, limit int) (*threads, error) {
	t := &threads{proc: proc, max: limit, jobs: make(chan func(*thread))}
	if err := t.grow(); err != nil {
		return nil, err
	}
	return t, nil
}

func (t *threads) grow() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.started == t.max {
		return nil
	}
	ready := make(chan error)
	goOnThread(func() {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			ready <- fmt.Errorf("unshare(CLONE_FS): %w", err)
			return
		}
		if err := unix.Fchdir(t.proc); err != nil {
			ready <- fmt.Errorf("working directory /proc/self/fd: %w", err)
			return
		}
		ready <- nil
		th := &thread{umask: -1}
		for job := range t.jobs {
			job(th)
		}
	})
	if err := <-ready; err != nil {
		return err
	}
	t.started++
	return nil
}

// goOnThread runs f in a goroutine that is locked to its thread, for good: the
// thread ends with it, because no other may run there. It is never the process's
// first thread, which does not end, and has what `as` would take from it: the signal
// that the process gets when the shim dies, PR_SET_PDEATHSIG.
func goOnThread(f func()) {
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			f()
			return
		}
		// Another goroutine gets another thread, as long as this one is locked.
		elsewhere := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(elsewhere)
			f()
		}()
		<-elsewhere
		runtime.UnlockOSThread()
	}()
}

// do runs f on one of the threads and waits for it.
func (t *threads) do(f func(*thread)) {
	done := make(chan struct{})
	job := func(th *thread) {
		f(th)
		close(done)
	}
	select {
	case t.jobs <- job: // one is idle
	default:
		_ = t.grow() // there is at least one
		t.jobs <- job
	}
	<-done
}

// withUmask runs f on one of the threads, with the given umask.
func (t *threads) withUmask(umask uint32, f func() error) (errno unix.Errno) {
	t.do(func(th *thread) {
		th.setUmask(umask)
		errno = retry(f)
	})
	return errno
}

// as runs f on one of the threads, which accesses files with these ids meanwhile,
// and goes back to the server's own.
func (t *threads) as(uid, gid uint32, umask uint32, f func() error) (errno unix.Errno) {
	t.do(func(th *thread) {
		th.setUmask(umask)
		ownGID, _ := unix.SetfsgidRetGid(int(gid)) // they fail by doing nothing
		ownUID, _ := unix.SetfsuidRetUid(int(uid))
		notDumpable()
		errno = retry(f)
		unix.SetfsuidRetUid(ownUID)
		unix.SetfsgidRetGid(ownGID)
		notDumpable()
	})
	return errno
}

// notDumpable follows a change of ids, which makes the process as dumpable as
// fs.suid_dumpable says, see commit_creds in kernel/cred.c: with systemd-coredump
// its memory could be dumped. It cannot fail.
func notDumpable() { _ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) }

// close ends the threads. No do may follow or be under way.
func (t *threads) close() { close(t.jobs) }
