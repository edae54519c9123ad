package passthrough

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse/fusetest"
)

func (s *share) mountOf(node uint64) uint64 {
	s.server.inodes.mu.Lock()
	defer s.server.inodes.mu.Unlock()
	return s.server.inodes.byID[node].key.mnt
}

// served returns how many requests are being served on the mount of a node, and how
// many wait.
func (s *share) served(node uint64) (served, waiting int) {
	key := turnKey{mnt: s.mountOf(node)}
	s.server.turns.mu.Lock()
	defer s.server.turns.mu.Unlock()
	of := s.server.turns.by[key]
	return of.served, len(of.waiting)
}

// A request for a lock that has its mount's only turn waits for the RELEASE before it,
// which waits for its own turn.
func TestReleaseWaitsForItsTurn(t *testing.T) {
	s := newShare(t, func(c *Config) { c.Limits.PerMount = 1 })
	e, a := s.mustCreate(t, root, "file", "contents")
	b, errno := s.Open(e.NodeID, unix.O_RDWR)
	must(t, errno)
	must(t, s.Setlk(e.NodeID, a, 1, writeLock(0, endOfFile), fuse.LkFlock))
	turns, key := &s.server.turns, turnKey{mnt: s.mountOf(e.NodeID), release: true}
	if now, errno := turns.begin(key, nil); !now { // another RELEASE is being served
		t.Fatal(errno)
	}
	args := fusetest.Pack(a, 0, fuse.ReleaseFlockUnlock, uint64(0))
	request := [][]byte{append(s.Header(fuse.Release, e.NodeID, s.Unique(), fuse.InHeaderSize+len(args)), args...)}
	answered := make(chan uint32, 1)
	if _, done := s.server.Handle(s.server.Arrive(request), request, [][]byte{make([]byte, fuse.OutHeaderSize)}, func(n uint32) { answered <- n }); done {
		t.Fatal("RELEASE does not wait")
	}
	locked := make(chan unix.Errno)
	go func() { locked <- s.Setlk(e.NodeID, b, 2, writeLock(0, endOfFile), fuse.LkFlock) }()
	for served := 0; served == 0; time.Sleep(time.Millisecond) {
		served, _ = s.served(e.NodeID)
	}
	next := turns.end(key)
	if next == nil {
		t.Fatal("it is nobody's turn")
	}
	later := next.later
	written, _ := s.server.serve(next)
	later(written)
	if n := <-answered; n != fuse.OutHeaderSize {
		t.Errorf("RELEASE: %d bytes", n)
	}
	want(t, "SETLK", <-locked, 0)
	if next := turns.end(key); next != nil {
		t.Errorf("it is the turn of %v", next.Opcode)
	}
}
