//go:build privileged

package passthrough

import (
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func newTestThreads(t *testing.T, limit int) *threads {
	t.Helper()
	proc, err := unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	must(t, err)
	threads, err := newThreads(proc, limit)
	must(t, err)
	t.Cleanup(func() {
		threads.close()
		_ = unix.Close(proc)
	})
	return threads
}

// TestIDsLeaveNoDump: who acts with other ids is not dumped, whatever the host does
// with programs that change theirs.
func TestIDsLeaveNoDump(t *testing.T) {
	threads := newTestThreads(t, 1)
	dumpable := func(when string) {
		if n, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); err != nil || n != 0 {
			t.Errorf("%s the process is dumpable: %d, %v", when, n, err)
		}
	}
	const setting = "/proc/sys/fs/suid_dumpable"
	before, err := os.ReadFile(setting)
	must(t, err)
	must(t, os.WriteFile(setting, []byte("2"), 0)) // as systemd-coredump has it, for a moment
	errno := threads.as(1000, 1000, 0o022, func() error {
		dumpable("meanwhile")
		return nil
	})
	must(t, os.WriteFile(setting, before, 0))
	dumpable("afterwards")
	if errno != 0 {
		t.Error(errno)
	}
}

// TestNotOnTheFirstThread: the process still ends with its parent, see goOnThread.
func TestNotOnTheFirstThread(t *testing.T) {
	const all = 64
	threads := newTestThreads(t, all)
	// Every idle thread is taken, the first one among them.
	for range all - 1 {
		must(t, threads.grow())
	}
	var callers, busy sync.WaitGroup
	busy.Add(all)
	for range all {
		callers.Go(func() {
			threads.do(func(*thread) {
				if unix.Gettid() == unix.Getpid() {
					t.Error("it is the first thread")
				}
				busy.Done()
				busy.Wait()
			})
		})
	}
	callers.Wait()
}
