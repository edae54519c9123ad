package agent

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/opencontainers/runc/libcontainer/system"
	"golang.org/x/sys/unix"
)

// userHZ is the unit of start times in /proc/PID/stat: USER_HZ, which is 100 on
// every architecture but alpha (include/asm-generic/param.h).
const userHZ = 100

// Reaper reaps the processes that nobody else waits for: as first process of
// the guest the agent becomes the parent of every orphan. It must leave alone
// the children which libcontainer and os/exec wait for themselves; a process
// that is reaped by the wrong one has lost its exit status.
//
// Whoever makes child processes calls Begin first and Done afterwards with the
// one that stays; who has waited for that one calls Release. A zombie is an
// orphan if nobody owns it and it was started before every Begin that has had
// no Done: libcontainer makes intermediate processes whose ids it alone knows.
type Reaper struct {
	wake chan struct{}

	mu     sync.Mutex
	owned  map[int]struct{}
	starts map[*ReaperStart]struct{}
}

// ReaperStart is a stretch of time in which child processes are made.
type ReaperStart struct {
	reaper *Reaper
	ticks  uint64 // since boot, of 1/userHZ s
}

// NewReaper returns a reaper that does nothing until Run.
func NewReaper() *Reaper {
	return &Reaper{
		wake:   make(chan struct{}, 1),
		owned:  make(map[int]struct{}),
		starts: make(map[*ReaperStart]struct{}),
	}
}

// Begin announces that child processes are about to be made.
func (r *Reaper) Begin() (*ReaperStart, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return nil, fmt.Errorf("read the time since boot: %w", err)
	}
	s := &ReaperStart{reaper: r, ticks: uint64(ts.Nano()) / (1e9 / userHZ)}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.starts[s] = struct{}{}
	return s, nil
}

// Done ends what Begin began. pid is the child that the caller will wait for,
// 0 if there is none.
func (s *ReaperStart) Done(pid int) {
	r := s.reaper
	r.mu.Lock()
	delete(r.starts, s)
	if pid > 0 {
		r.owned[pid] = struct{}{}
	}
	r.mu.Unlock()
	r.Wake()
}

// Release is called when pid, which Done named, has been waited for.
func (r *Reaper) Release(pid int) {
	r.mu.Lock()
	delete(r.owned, pid)
	r.mu.Unlock()
	r.Wake()
}

// Wake makes Run look for orphans. To be called for each SIGCHLD.
func (r *Reaper) Wake() {
	select {
	case r.wake <- struct{}{}:
	default: // Run will look anyway
	}
}

// Run reaps orphans, for ever.
func (r *Reaper) Run() {
	for range r.wake {
		r.reap()
	}
}

// reap reaps every orphan that it finds before it meets a zombie which is
// someone's. That one's Done or Release brings it back.
func (r *Reaper) reap() {
	for {
		pid, err := firstZombie()
		if err != nil || pid == 0 || !r.isOrphan(pid) {
			return
		}
		// A zombie keeps its id, so this is the process that was looked at.
		if _, err := unix.Wait4(pid, nil, unix.WNOHANG, nil); err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

func (r *Reaper) isOrphan(pid int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.owned[pid]; ok {
		return false
	}
	if len(r.starts) == 0 {
		return true
	}
	stat, err := system.Stat(pid)
	if err != nil {
		// Not a zombie any more: someone was faster.
		return errors.Is(err, os.ErrNotExist)
	}
	for s := range r.starts {
		if stat.StartTime >= s.ticks {
			return false
		}
	}
	return true
}
