package passthrough

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse/fusetest"
)

// The tests need root: they give files away, make device nodes and mount. They
// do so in a mount namespace of their own, on a tmpfs, so that nothing is left
// and the fuzz test cannot fill a disk.
const inNamespace = "MICROVM_TEST_MOUNT_NAMESPACE"

// scratch is where the tests' directories are.
var scratch string

func TestMain(m *testing.M) {
	if os.Getenv(inNamespace) == "" {
		if err := enterNamespace(); err != nil {
			fmt.Fprintln(os.Stderr, "cannot run the tests (they need root):", err)
			os.Exit(1)
		}
	}
	unix.Umask(0)
	dir, err := os.MkdirTemp("", "passthrough")
	if err == nil {
		err = unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256m")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "cannot run the tests:", err)
		os.Exit(1)
	}
	scratch = dir
	code := m.Run()
	_ = unix.Unmount(dir, unix.MNT_DETACH)
	_ = os.Remove(dir)
	os.Exit(code)
}

// enterNamespace executes this program again in a new mount namespace.
func enterNamespace() error {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	return unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), inNamespace+"=1"))
}

// share is a directory, a server for it, and a guest.
type share struct {
	*fusetest.Client
	dir    string
	server *Server
}

// tempDir makes a directory that is removed when the test ends.
func tempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(scratch, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// newShare serves a new directory to a guest that has sent INIT.
func newShare(t testing.TB, change ...func(*Config)) *share {
	t.Helper()
	return newShareOf(t, tempDir(t), change...)
}

func newShareOf(t testing.TB, dir string, change ...func(*Config)) *share {
	t.Helper()
	root, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	c := Config{Root: root, AttrTimeout: DefaultTimeout, EntryTimeout: DefaultTimeout}
	for _, f := range change {
		f(&c)
	}
	server, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Close)
	s := &share{Client: fusetest.New(t, handle1(server)), dir: dir, server: server}
	s.Init()
	return s
}

// handle1 makes a server's Handle a function that returns when the request is
// complete.
func handle1(s *Server) fusetest.Do {
	return func(readable, writable [][]byte) uint32 {
		later := make(chan uint32, 1)
		written, done := s.Handle(0, readable, writable, func(n uint32) { later <- n })
		if !done {
			written = <-later
		}
		return written
	}
}

func readOnly(c *Config) { c.ReadOnly = true }

// path is a path on the host.
func (s *share) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

// must fails the test if there is an error, of the host's or of the guest's.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil && err != unix.Errno(0) {
		t.Fatal(err)
	}
}

// want fails the test unless got is the errno wanted.
func want(t testing.TB, what string, got, wanted unix.Errno) {
	t.Helper()
	if got != wanted {
		t.Errorf("%s: %v, want %v", what, got, wanted)
	}
}

// mustLookup looks up a name, or a path below the root.
func (s *share) mustLookup(t testing.TB, dir uint64, names ...string) fuse.EntryOut {
	t.Helper()
	var e fuse.EntryOut
	for _, name := range names {
		var errno unix.Errno
		if e, errno = s.Lookup(dir, name); errno != 0 {
			t.Fatalf("LOOKUP %q: %v", name, errno)
		}
		dir = e.NodeID
	}
	return e
}

// mustCreate creates a file with the given contents and leaves it open.
func (s *share) mustCreate(t testing.TB, dir uint64, name, contents string) (fuse.EntryOut, uint64) {
	t.Helper()
	e, fh, errno := s.Create(dir, name, unix.O_RDWR, 0o644, 0)
	if errno != 0 {
		t.Fatalf("CREATE %q: %v", name, errno)
	}
	if contents != "" {
		if n, errno := s.Write(e.NodeID, fh, 0, []byte(contents)); errno != 0 || n != len(contents) {
			t.Fatalf("WRITE %q: %d, %v", name, n, errno)
		}
	}
	return e, fh
}

func writeFile(t testing.TB, path, contents string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(contents), 0o644); err != nil {
		t.Fatal(err)
	}
}
