//go:build privileged

package passthrough

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

// handler is Server.Handle, or what is in front of it.
type handler func(ticket uint64, readable, writable [][]byte, later func(written uint32)) (written uint32, done bool)

// mountShare mounts a server with the kernel of this machine as the client,
// through /dev/fuse, and returns where. It is the client that a guest has, but
// for submounts and for what virtio-fs alone does.
//
// This process must not open its files by os.Open and the like: these add them to an
// epoll instance, for which the kernel asks the server (POLL), while Go's runtime takes
// that for a call that does not block, and may not let the server run.
func mountShare(t testing.TB, dir string, change ...func(*Config)) string {
	t.Helper()
	return mountBehind(t, dir, func(h handler) handler { return h }, change...)
}

// mountBehind is mountShare for a server that has something in front of it.
func mountBehind(t testing.TB, dir string, front func(handler) handler, change ...func(*Config)) string {
	t.Helper()
	root, err := os.Open(dir)
	must(t, err)
	c := Config{Root: root, AttrTimeout: DefaultTimeout, EntryTimeout: DefaultTimeout}
	for _, f := range change {
		f(&c)
	}
	server, err := New(c)
	must(t, err)
	must(t, root.Close())
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	must(t, err)
	at := tempDir(t)
	must(t, unix.Mount("share", at, "fuse.share", unix.MS_NOSUID,
		fmt.Sprintf("fd=%d,rootmode=40755,user_id=0,group_id=0,default_permissions,allow_other", fd)))
	var readers sync.WaitGroup
	for range 8 {
		readers.Go(func() { serveDevice(t.Errorf, front(server.Handle), fd) })
	}
	t.Cleanup(func() {
		forgetAll(t, server, at)
		if err := unix.Unmount(at, 0); err != nil {
			t.Errorf("unmount: %v", err)
			_ = unix.Unmount(at, unix.MNT_FORCE|unix.MNT_DETACH)
		}
		readers.Wait()
		checkNothingHeld(t, server)
		server.Close()
		_ = unix.Close(fd)
	})
	return at
}

// serveDevice answers requests until the file system is unmounted.
func serveDevice(failed func(format string, args ...any), handle handler, fd int) {
	in, out := make([]byte, maxWrite+4096), make([]byte, maxWrite+4096)
	for {
		n, err := unix.Read(fd, in)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EAGAIN) {
			continue
		}
		if err != nil {
			if !errors.Is(err, unix.ENODEV) {
				failed("/dev/fuse: %v", err)
			}
			return
		}
		op := fuse.DecodeInHeader(in).Opcode
		answer := out // out may be another buffer when reply is called
		reply := func(n uint32) {
			// ENOENT: the request was interrupted.
			if _, err := unix.Write(fd, answer[:n]); err != nil && !errors.Is(err, unix.ENOENT) {
				failed("reply to %v: %v (%x)", op, err, answer[:min(n, 64)])
			}
		}
		written, done := handle(0, [][]byte{in[:n]}, [][]byte{answer}, reply)
		if !done { // the buffers are still needed
			in, out = make([]byte, maxWrite+4096), make([]byte, maxWrite+4096)
			continue
		}
		if written > 0 {
			reply(written)
		}
	}
}

// refusing is a front that answers with an errno what refuse has one for.
func refusing(refuse func(h fuse.InHeader, args []byte) unix.Errno) func(handler) handler {
	return func(handle handler) handler {
		return func(ticket uint64, readable, writable [][]byte, later func(uint32)) (uint32, bool) {
			in := readable[0]
			h := fuse.DecodeInHeader(in)
			errno := refuse(h, in[fuse.InHeaderSize:])
			if errno == 0 {
				return handle(ticket, readable, writable, later)
			}
			return uint32(copy(writable[0], fuse.OutHeader{Len: fuse.OutHeaderSize, Error: -int32(errno), Unique: h.Unique}.Append(nil))), true
		}
	}
}

// forgetAll has the client forget what it knows, which it does not tell of when it
// is unmounted: it gives up names that nobody uses when it is mounted again.
func forgetAll(t testing.TB, s *Server, at string) {
	t.Helper()
	for range 1000 {
		must(t, unix.Mount("", at, "", unix.MS_REMOUNT|unix.MS_NOSUID, ""))
		s.inodes.mu.Lock()
		left := len(s.inodes.byID)
		s.inodes.mu.Unlock()
		if left == 1 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// checkNothingHeld looks for what the kernel has given back but the server has
// not.
func checkNothingHeld(t testing.TB, s *Server) {
	t.Helper()
	s.inodes.mu.Lock()
	defer s.inodes.mu.Unlock()
	if len(s.inodes.byID) != 1 || s.inodes.open != 1 || s.inodes.root.children != 0 {
		t.Errorf("%d nodes and %d descriptors are left, the root has %d children", len(s.inodes.byID), s.inodes.open, s.inodes.root.children)
	}
	if n := len(s.handles.byID); n != 0 {
		t.Errorf("%d handles are left", n)
	}
	if n := len(s.locks.owners); n != 0 {
		t.Errorf("%d lock owners are left", n)
	}
}

// buildConformance builds test/fsconformance.
func buildConformance(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "fsconformance")
	build := exec.Command("go", "build", "-o", program, "github.com/microvm-runtime/microvm/test/fsconformance")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return program
}

// conform runs test/fsconformance in a directory.
func conform(t *testing.T, program, omit, at string) {
	t.Helper()
	cmd := exec.Command(program, "-no-skip", "-omit", omit, at)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if !strings.HasPrefix(lines.Text(), "PASS") {
			t.Log(lines.Text())
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("fsconformance: %v", err)
	}
}

// big is what once is enough for.
const big = "dir/many-entries"

// TestConformance runs test/fsconformance on a mounted share.
func TestConformance(t *testing.T) {
	program := buildConformance(t)
	overlay := func(t *testing.T) string {
		// As the root file system of a container is. The whiteout of a rename
		// is not for those who see the overlay merged.
		dir := tempDir(t)
		for _, d := range []string{"lower", "upper", "work", "merged"} {
			must(t, os.Mkdir(filepath.Join(dir, d), 0o755))
		}
		must(t, unix.Mount("overlay", dir+"/merged", "overlay", 0, fmt.Sprintf("lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", dir)))
		t.Cleanup(func() { must(t, unix.Unmount(dir+"/merged", unix.MNT_DETACH)) })
		return dir + "/merged"
	}
	tmpfs := func(t *testing.T) string { return tempDir(t) }
	// Where no descriptor is kept. The client's mount has to go before the server's.
	const below = "volume/late"
	twoMounts := func(t *testing.T) string {
		dir := tempDir(t)
		for _, at := range []string{filepath.Join(dir, filepath.Dir(below)), filepath.Join(dir, below)} {
			must(t, os.Mkdir(at, 0o755))
			must(t, unix.Mount("tmpfs", at, "tmpfs", 0, "mode=755"))
			t.Cleanup(func() { must(t, unix.Unmount(at, 0)) })
		}
		return dir
	}
	for _, tc := range []struct {
		name   string
		dir    func(t *testing.T) string
		at     string
		omit   string
		change func(*Config)
	}{
		{"defaults", tmpfs, ".", "^$", func(*Config) {}},
		{"overlay", overlay, ".", big + "|rename/whiteout", func(*Config) {}},
		{"uncached", tmpfs, ".", big, func(c *Config) { c.AttrTimeout, c.EntryTimeout = 0, 0 }},
		// So few that descriptors are closed and made again all the time.
		{"few descriptors", tmpfs, ".", big, func(c *Config) { c.Limits.Descriptors, c.Limits.Nodes = 4096, 16 }},
		{"overlay, few descriptors", overlay, ".", big + "|rename/whiteout", func(c *Config) { c.Limits.Descriptors, c.Limits.Nodes = 4096, 16 }},
		{"mount below a mount", twoMounts, below, big, func(*Config) {}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			conform(t, program, tc.omit, filepath.Join(mountShare(t, tc.dir(t), tc.change), tc.at))
		})
	}
}

// A direct write that appends, of more than a request, ends up in order.
func TestDirectAppend(t *testing.T) {
	const chunk, chunks = 1 << 20, 8
	buf, err := unix.Mmap(-1, 0, chunk*chunks, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	must(t, err)
	defer unix.Munmap(buf)
	for i := range buf {
		buf[i] = byte('a' + i/chunk)
	}
	dir := tempDir(t)
	name := filepath.Join(mountShare(t, dir), "file")
	for range 5 {
		fd, err := unix.Open(name, unix.O_CREAT|unix.O_WRONLY|unix.O_APPEND|unix.O_DIRECT, 0o644)
		must(t, err)
		for range 2 {
			n, err := unix.Write(fd, buf)
			if err != nil || n != len(buf) {
				t.Errorf("wrote %d bytes, %v", n, err)
			}
		}
		must(t, unix.Close(fd))
		got, err := os.ReadFile(filepath.Join(dir, "file")) // not name: see mountShare
		must(t, err)
		if !bytes.Equal(got, append(buf[:len(buf):len(buf)], buf...)) {
			var order []byte
			for i := 0; i < len(got); i += chunk {
				order = append(order, got[i])
			}
			t.Errorf("%d bytes, in the order %s", len(got), order)
		}
		must(t, os.Remove(name))
	}
}

// Two who append to a file by turns, through mounts of their own, lose nothing: the
// kernel of neither knows where the end is.
func TestAppendOfTwo(t *testing.T) {
	const size, rounds = 4096, 5
	buf, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	must(t, err)
	defer unix.Munmap(buf)
	for _, direct := range []int{0, unix.O_DIRECT} {
		dir := tempDir(t)
		var fds []int
		for _, flags := range []int{direct, 0} {
			fd, err := unix.Open(filepath.Join(mountShare(t, dir), "log"), unix.O_CREAT|unix.O_WRONLY|unix.O_APPEND|flags, 0o644)
			must(t, err)
			defer unix.Close(fd)
			fds = append(fds, fd)
		}
		var expected []byte
		for range rounds {
			for i, fd := range fds {
				copy(buf, bytes.Repeat([]byte{byte('a' + i)}, size))
				if n, err := unix.Write(fd, buf); err != nil || n != size {
					t.Fatalf("wrote %d bytes, %v", n, err)
				}
				expected = append(expected, buf...)
			}
		}
		got, err := os.ReadFile(filepath.Join(dir, "log"))
		must(t, err)
		if !bytes.Equal(got, expected) {
			t.Errorf("flags %#x: of %d bytes there are %d, or not in order", direct, len(expected), len(got))
		}
	}
}

// A volume of the host's with a bad place: to who reads the file it is an error, and
// not the end.
func TestReadError(t *testing.T) {
	const size, bad = 1 << 20, 300 << 10
	dir := tempDir(t)
	contents := bytes.Repeat([]byte("0123456789abcdef"), size/16)
	must(t, os.WriteFile(filepath.Join(dir, "file"), contents, 0o644))
	volume := mountBehind(t, dir, refusing(func(h fuse.InHeader, args []byte) unix.Errno {
		if h.Opcode == fuse.Read {
			if in := fuse.DecodeReadIn(args); in.Offset+uint64(in.Size) > bad {
				return unix.EIO
			}
		}
		return 0
	}))
	share := mountShare(t, volume)
	buf, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	must(t, err)
	defer unix.Munmap(buf)
	for _, flags := range []int{0, unix.O_DIRECT} {
		for _, piece := range []int{4 << 10, 64 << 10, size} {
			fd, err := unix.Open(filepath.Join(share, "file"), unix.O_RDONLY|flags, 0)
			must(t, err)
			at := 0
			for {
				var n int
				if n, err = unix.Pread(fd, buf[:piece], int64(at)); n <= 0 {
					break
				}
				if !bytes.Equal(buf[:n], contents[at:at+n]) {
					t.Fatalf("%d bytes at %d are not what is there", n, at)
				}
				at += n
			}
			must(t, unix.Close(fd))
			if err != unix.EIO || at > bad {
				t.Errorf("flags %#x, by %d bytes: %d bytes, then %v", flags, piece, at, err)
			}
		}
	}
}

// A file that somebody else makes just before CREATE is opened as any other is: with
// a look at whose it is.
func TestCreateOfWhatHasAppeared(t *testing.T) {
	must(t, os.Chmod(scratch, 0o755))
	dir := tempDir(t)
	must(t, os.Chmod(dir, 0o1777))
	modes := map[string]os.FileMode{"secret": 0o600, "public": 0o666}
	share := mountBehind(t, dir, refusing(func(h fuse.InHeader, args []byte) unix.Errno {
		if h.Opcode == fuse.Create {
			name := string(bytes.TrimRight(args[fuse.CreateInSize:], "\x00"))
			if err := os.WriteFile(filepath.Join(dir, name), []byte("root's"), modes[name]); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		return 0
	}))
	open := func(name string) (fd int, err error) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			runtime.LockOSThread() // for good: these ids are the thread's
			if _, err = unix.SetfsgidRetGid(1000); err == nil {
				_, err = unix.SetfsuidRetUid(1000)
			}
			if err == nil {
				fd, err = unix.Open(filepath.Join(share, name), unix.O_CREAT|unix.O_RDWR, 0o644)
			}
		}()
		<-done
		return fd, err
	}
	if _, err := open("secret"); err != unix.EACCES {
		t.Errorf("a file that only root may open: %v", err)
	}
	fd, err := open("public")
	must(t, err)
	defer unix.Close(fd)
	var buf [10]byte
	if n, err := unix.Pread(fd, buf[:], 0); err != nil || string(buf[:n]) != "root's" {
		t.Errorf("a file that all may open: %q, %v", buf[:n], err)
	}
}
