package passthrough

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit"
	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit/ratelimittest"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

// TestLimit repeats operations on a file of 4 KiB for the time that they are to
// take.
func TestLimit(t *testing.T) {
	const size = 4096
	byBytes := ratelimit.Limits{Bytes: ratelimit.Rate{PerSecond: size, Burst: size}}
	byOperations := ratelimit.Limits{Operations: ratelimit.Rate{PerSecond: 10, Burst: 10}}
	data := make([]byte, size)
	type file struct {
		*share
		node, fh uint64
	}
	for _, test := range []struct {
		name   string
		limits ratelimit.Limits
		count  int
		do     func(f file) unix.Errno
		want   time.Duration
	}{
		{"writes, by bytes", byBytes, 10, func(f file) unix.Errno { _, errno := f.Write(f.node, f.fh, 0, data); return errno }, 10 * time.Second},
		{"reads, by bytes", byBytes, 10, func(f file) unix.Errno { _, errno := f.Read(f.node, f.fh, 0, size); return errno }, 10 * time.Second},
		{"reads past the end, by bytes", byBytes, 10, func(f file) unix.Errno { _, errno := f.Read(f.node, f.fh, size, size); return errno }, time.Second},
		{"refused reads, by bytes", byBytes, 10, func(f file) unix.Errno { f.Read(f.node, 12345, 0, size); return 0 }, 0},
		{"copies, by bytes", byBytes, 10, func(f file) unix.Errno {
			_, errno := f.CopyFileRange(f.node, f.fh, 0, f.node, f.fh, size, size)
			return errno
		}, 10 * time.Second},
		{"copies of nothing, by bytes", byBytes, 10, func(f file) unix.Errno {
			_, errno := f.CopyFileRange(f.node, f.fh, 1<<20, f.node, f.fh, 0, size)
			return errno
		}, time.Second},
		{"reads, by operations", byOperations, 29, func(f file) unix.Errno { _, errno := f.Read(f.node, f.fh, 0, 1); return errno }, 2 * time.Second},
		{"writes, by operations", byOperations, 29, func(f file) unix.Errno { _, errno := f.Write(f.node, f.fh, 0, data[:1]); return errno }, 2 * time.Second},
		{"fsync", byOperations, 29, func(f file) unix.Errno { return f.Fsync(f.node, f.fh, 0) }, 2 * time.Second},
		{"syncfs", byOperations, 29, func(f file) unix.Errno { return f.Syncfs(root) }, 2 * time.Second},
		{"setattr", byOperations, 29, func(f file) unix.Errno {
			_, errno := f.Setattr(f.node, fuse.SetattrIn{Valid: fuse.FattrMode, Mode: 0o600})
			return errno
		}, 2 * time.Second},
		{"mkdir and rmdir", byOperations, 14, func(f file) unix.Errno {
			if _, errno := f.Mkdir(root, "dir", 0o755, 0); errno != 0 {
				return errno
			}
			return f.Rmdir(root, "dir")
		}, 1900 * time.Millisecond},
		{"lookups and open", byOperations, 50, func(f file) unix.Errno {
			e, errno := f.Lookup(root, "file")
			if errno != 0 {
				return errno
			}
			fh, errno := f.Open(e.NodeID, unix.O_RDONLY)
			if errno != 0 {
				return errno
			}
			f.Forget(e.NodeID, 1)
			return f.Release(f.node, fh)
		}, 0},
		{"attributes and directories", byOperations, 50, func(f file) unix.Errno {
			if _, errno := f.Getattr(f.node); errno != 0 {
				return errno
			}
			_, errno := f.List(root, true)
			return errno
		}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			clock := ratelimittest.New()
			limit, err := ratelimit.New(test.limits, clock)
			must(t, err)
			s := newShare(t, func(c *Config) { c.Limit = limit })
			e, fh := s.mustCreate(t, root, "file", string(data)) // one operation, and 4096 bytes
			if test.limits == byOperations {
				clock.Advance(100 * time.Millisecond) // as if it had been one only
			}
			got := clock.While(func() {
				for range test.count {
					if errno := test.do(file{s, e.NodeID, fh}); errno != 0 {
						t.Errorf("%v", errno)
					}
				}
			})
			ratelimittest.Took(t, "it", got, test.want, 0)
		})
	}
}

// TestLimitCancelled resets the server while requests wait for time that does
// not pass.
func TestLimitCancelled(t *testing.T) {
	clock := ratelimittest.New()
	limit, err := ratelimit.New(ratelimit.Limits{Operations: ratelimit.Rate{PerSecond: 1, Burst: 1}}, clock)
	must(t, err)
	s := newShare(t, func(c *Config) { c.Limit = limit })
	_, errno := s.Mkdir(root, "first", 0o755, 0) // takes all there is
	must(t, errno)
	results := make(chan unix.Errno)
	for _, name := range []string{"second", "third"} {
		go func() {
			_, errno := s.Mkdir(root, name, 0o755, 0)
			results <- errno
		}()
	}
	clock.AwaitTimer()
	if _, errno := s.Lookup(root, "first"); errno != 0 {
		t.Errorf("LOOKUP: %v", errno)
	}
	s.server.Cancel()
	for range 2 {
		want(t, "MKDIR, cancelled", <-results, unix.EINTR)
	}
	s.server.Reset()
	s.Init()
	if _, errno := s.Lookup(root, "second"); errno != unix.ENOENT {
		t.Errorf("LOOKUP of what was not to be made: %v", errno)
	}
	clock.While(func() {
		if _, errno := s.Mkdir(root, "second", 0o755, 0); errno != 0 {
			t.Errorf("MKDIR after the reset: %v", errno)
		}
	})
}
