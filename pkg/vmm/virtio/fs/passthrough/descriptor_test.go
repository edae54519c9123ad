package passthrough

import (
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// nodeDescriptor is what the server has open to keep the node at hand, or -1.
func (s *share) nodeDescriptor(id uint64) int {
	s.server.inodes.mu.Lock()
	defer s.server.inodes.mu.Unlock()
	return s.server.inodes.byID[id].fd
}

// sweeps says whether the server is going to look for descriptors to close.
func (s *share) sweeps() bool {
	s.server.inodes.mu.Lock()
	defer s.server.inodes.mu.Unlock()
	return s.server.inodes.sweeper != nil
}

// TestDeletedByHost deletes on the host what the guest has read, and remembers.
func TestDeletedByHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := tempDir(t)
		must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755,size=16m"))
		t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
		free := func() uint64 {
			var st unix.Statfs_t
			must(t, unix.Statfs(dir, &st))
			return st.Bfree
		}
		s := newShareOf(t, dir)
		before := free()
		var nodes []uint64
		for _, name := range []string{"1", "2", "open", "3"} {
			writeFile(t, s.path(name), string(make([]byte, 1<<20)))
			e := s.mustLookup(t, root, name)
			nodes = append(nodes, e.NodeID)
			fh, errno := s.Open(e.NodeID, unix.O_RDONLY)
			must(t, errno)
			_, errno = s.Read(e.NodeID, fh, 0, 1<<20)
			must(t, errno)
			if name == "open" {
				defer func() {
					if got, errno := s.Read(e.NodeID, fh, 0, 1<<20); errno != 0 || len(got) != 1<<20 {
						t.Errorf("READ of a file that is open: %d bytes, %v", len(got), errno)
					}
				}()
			} else {
				must(t, s.Release(e.NodeID, fh))
			}
			must(t, unix.Unlink(s.path(name)))
		}
		time.Sleep(2*unusedTime + 1)
		synctest.Wait()
		const open = 1 << 20 / 4096
		if now := free(); now != before-open {
			t.Errorf("%d blocks are free, %d were before there were any files; one that takes %d is open", now, before, open)
		}
		_, errno := s.Getattr(nodes[0])
		want(t, "GETATTR of what was deleted", errno, unix.ESTALE)
		if s.sweeps() {
			t.Error("the server waits though there is nothing to close")
		}
	})
}

// What is in use keeps its descriptor, as do directories, and what only a descriptor
// leads to.
func TestUnusedDescriptors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShare(t)
		dir, errno := s.Mkdir(root, "dir", 0o755, 0)
		must(t, errno)
		nodes := map[string]uint64{"dir": dir.NodeID}
		for _, name := range []string{"used", "unused", "removed"} {
			e, fh := s.mustCreate(t, dir.NodeID, name, name)
			must(t, s.Release(e.NodeID, fh))
			nodes[name] = e.NodeID
		}
		must(t, s.Unlink(dir.NodeID, "removed"))
		before := map[string]int{}
		for name, node := range nodes {
			before[name] = s.nodeDescriptor(node)
		}
		for range 10 {
			time.Sleep(unusedTime - time.Millisecond)
			_, errno := s.Getattr(nodes["used"])
			must(t, errno)
		}
		for name, node := range nodes {
			want := before[name]
			if name == "unused" {
				want = -1
			}
			if fd := s.nodeDescriptor(node); fd != want {
				t.Errorf("%s has descriptor %d, had %d", name, fd, before[name])
			}
			if _, errno := s.Getattr(node); errno != 0 {
				t.Errorf("%s: GETATTR: %v", name, errno)
			}
		}
		if !s.sweeps() {
			t.Error("there are descriptors to close, and the server does not wait for it")
		}
		s.server.Reset()
		if s.sweeps() {
			t.Error("after the reset the server waits for something")
		}
	})
}
