//go:build privileged

package passthrough

import (
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse/fusetest"
)

// A volume whose server does not answer takes as many workers as a mount may have,
// and no other volume waits for it.
func TestVolumeHangs(t *testing.T) {
	const workers, reads = 24, 64
	// The volume is a file system that answers READ when it is told to.
	back := tempDir(t)
	writeFile(t, back+"/file", "of the volume")
	var answer sync.Cond
	answer.L = new(sync.Mutex)
	hangs := true // protected by answer.L
	setHangs := func(to bool) {
		answer.L.Lock()
		defer answer.L.Unlock()
		hangs = to
		answer.Broadcast()
	}
	volume := mountBehind(t, back, refusing(func(h fuse.InHeader, _ []byte) unix.Errno {
		answer.L.Lock()
		defer answer.L.Unlock()
		for h.Opcode == fuse.Read && hangs {
			answer.Wait()
		}
		return 0
	}))
	t.Cleanup(func() { setHangs(false) })

	s := newShare(t)
	must(t, os.Mkdir(s.path("volume"), 0o755))
	must(t, unix.Mount(volume, s.path("volume"), "", unix.MS_BIND, ""))
	t.Cleanup(func() { must(t, unix.Unmount(s.path("volume"), unix.MNT_DETACH)) })
	writeFile(t, s.path("file"), "of another")
	worker := make(chan struct{}, workers)
	s.Client = fusetest.New(t, func(readable, writable [][]byte) uint32 {
		later := make(chan uint32, 1)
		worker <- struct{}{}
		written, done := s.server.Handle(0, readable, writable, func(n uint32) { later <- n })
		<-worker
		if !done {
			written = <-later
		}
		return written
	})
	open := func(names ...string) (node, fh uint64) {
		node = s.mustLookup(t, root, names...).NodeID
		fh, errno := s.Open(node, unix.O_RDONLY)
		must(t, errno)
		return node, fh
	}
	hung, hungFH := open("volume", "file")
	other, otherFH := open("file")
	type result struct {
		data  string
		errno unix.Errno
	}
	results := make(chan result)
	hang := func() {
		t.Helper()
		// What the host has cached does not hang. Not os.Open: see mountShare.
		fd, err := unix.Open(volume+"/file", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		must(t, err)
		must(t, unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED))
		must(t, unix.Close(fd))
		setHangs(true)
		for range reads {
			go func() {
				data, errno := s.Read(hung, hungFH, 0, 100)
				results <- result{string(data), errno}
			}()
		}
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
			served, waiting := s.served(hung)
			if served == 16 && waiting == reads-16 {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%d requests are served, %d wait", served, waiting)
			}
		}
	}
	hang()
	answered := make(chan result)
	go func() {
		data, errno := s.Read(other, otherFH, 0, 100)
		answered <- result{string(data), errno}
	}()
	select {
	case got := <-answered:
		if got != (result{"of another", 0}) {
			t.Errorf("READ of another volume: %+v", got)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("READ of another volume is not answered")
	}
	setHangs(false)
	for range reads {
		if got := <-results; got != (result{"of the volume", 0}) {
			t.Errorf("READ of the volume, in the end: %+v", got)
		}
	}
	if served, waiting := s.served(hung); served != 0 || waiting != 0 {
		t.Errorf("%d requests are served, %d wait", served, waiting)
	}

	// What waits ends with the session, what is being served when the host lets it.
	hang()
	s.server.Cancel()
	for range reads - 16 {
		want(t, "READ that waited, cancelled", (<-results).errno, unix.EINTR)
	}
	setHangs(false)
	for range 16 {
		want(t, "READ that was served", (<-results).errno, 0)
	}
}
