package passthrough

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

// turns bounds how many requests are served at a time on each of the host's mounts.
// A volume whose server is gone hangs, with all that ask for it: they must not take
// the workers of the others, which are the root file systems and volumes of a whole
// pod. What is too much for its mount waits without a worker; there is no more of it
// than there is room in the guest's queues. Its methods may be called concurrently.
type turns struct {
	max int

	mu      sync.Mutex // protects what follows
	by      map[turnKey]turn
	stopped bool // by cancel
}

// turnKey is what has turns of its own. RELEASEs have, because what is served may wait
// for them (see order): they wait for nothing but the host.
type turnKey struct {
	mnt     uint64
	release bool
}

type turn struct {
	served  int
	waiting []*request // in the order in which they came
}

// turnOf says whose turn r is to wait for, if for any: what is about no node, or one
// the guest does not know, does not wait for the host.
func (s *Server) turnOf(r *request) (key turnKey, counts bool) {
	if r.silent {
		return key, false
	}
	s.inodes.mu.Lock()
	defer s.inodes.mu.Unlock()
	n := s.inodes.byID[r.NodeID]
	if n == nil {
		return key, false
	}
	return turnKey{mnt: n.key.mnt, release: r.Opcode == fuse.Release}, true
}

// begin says whether r may be served, until end. Else end returns it later, or cancel
// does; after cancel the errno is EINTR.
func (t *turns) begin(key turnKey, r *request) (now bool, _ unix.Errno) {
	limit := t.max
	if key.release {
		limit = (limit + 3) / 4
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	of := t.by[key]
	if of.served < limit {
		of.served++
		t.by[key] = of
		return true, 0
	}
	if t.stopped {
		return false, unix.EINTR
	}
	of.waiting = append(of.waiting, r)
	t.by[key] = of
	return false, 0
}

// end ends the turn of a request that was served, and returns the one whose turn it
// is now, or nil.
func (t *turns) end(key turnKey) (next *request) {
	t.mu.Lock()
	defer t.mu.Unlock()
	of := t.by[key]
	if len(of.waiting) > 0 {
		next, of.waiting = of.waiting[0], of.waiting[1:]
	} else {
		of.served--
	}
	if t.by[key] = of; of.served == 0 {
		delete(t.by, key)
	}
	return next
}

// cancel returns all that wait. None does before restart.
func (t *turns) cancel() (waiting []*request) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stopped = true
	for key, of := range t.by {
		waiting = append(waiting, of.waiting...)
		of.waiting = nil
		t.by[key] = of
	}
	return waiting
}

func (t *turns) restart() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stopped = false
}
