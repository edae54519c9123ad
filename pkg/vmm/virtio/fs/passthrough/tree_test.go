package passthrough

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/internal/fdtest"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

// few makes nodes lose their descriptors almost at once.
func few(c *Config) { c.Limits.Nodes = 8 }

// openDescriptors counts those the server has for nodes.
func (s *share) openDescriptors() int {
	s.server.inodes.mu.Lock()
	defer s.server.inodes.mu.Unlock()
	return s.server.inodes.open
}

func TestReaddir(t *testing.T) {
	s := newShare(t)
	names := map[string]uint32{"file": unix.DT_REG, "dir": unix.DT_DIR, "fifo": unix.DT_FIFO, "link": unix.DT_LNK}
	writeFile(t, s.path("file"), "x")
	must(t, os.Mkdir(s.path("dir"), 0o755))
	must(t, unix.Mkfifo(s.path("fifo"), 0o644))
	must(t, os.Symlink("x", s.path("link")))
	for _, plus := range []bool{false, true} {
		list, errno := s.List(root, plus)
		if errno != 0 || len(list) != len(names) {
			t.Fatalf("%v, %v", list, errno)
		}
		for _, d := range list {
			if d.Type != names[d.Name] {
				t.Errorf("%s has type %d", d.Name, d.Type)
			}
			e := s.mustLookup(t, root, d.Name)
			if d.Ino != e.Attr.Ino {
				t.Errorf("%s: inode %d, LOOKUP says %d", d.Name, d.Ino, e.Attr.Ino)
			}
			if plus && (d.Entry.NodeID != e.NodeID || d.Entry.Attr != e.Attr) {
				t.Errorf("%s: %+v, LOOKUP says %+v", d.Name, d.Entry, e)
			}
		}
	}
	// . and .. are there, without a lookup, and do not tell of what is above.
	fh, errno := s.Opendir(root)
	must(t, errno)
	list, errno := s.Readdir(root, fh, 0, 4096, true)
	must(t, errno)
	dots := 0
	self, errno := s.Getattr(root)
	must(t, errno)
	for _, d := range list {
		if d.Name == "." || d.Name == ".." {
			dots++
			if d.Entry.NodeID != 0 || d.Ino != self.Ino {
				t.Errorf("%+v", d)
			}
		}
	}
	if dots != 2 {
		t.Errorf("%d of . and ..", dots)
	}
	want(t, "FSYNCDIR", s.Fsyncdir(root, fh), 0)
	want(t, "RELEASEDIR", s.Releasedir(root, fh), 0)
	_, errno = s.Readdir(root, fh, 0, 4096, true)
	want(t, "READDIR after RELEASEDIR", errno, unix.EBADF)
}

func TestReaddirPositions(t *testing.T) {
	s := newShare(t)
	for i := range 500 {
		writeFile(t, s.path(fmt.Sprintf("file-%d", i)), "")
	}
	fh, errno := s.Opendir(root)
	must(t, errno)
	var offsets []uint64
	var names []string
	for offset := uint64(0); ; {
		part, errno := s.Readdir(root, fh, offset, 1024, false)
		must(t, errno)
		if len(part) == 0 {
			break
		}
		for _, d := range part {
			offset = d.Off
			names, offsets = append(names, d.Name), append(offsets, d.Off)
		}
	}
	if len(names) != 502 {
		t.Fatalf("%d names", len(names))
	}
	// From anywhere, in any order.
	for range 200 {
		i := rand.IntN(len(names) - 1)
		part, errno := s.Readdir(root, fh, offsets[i], 200, false)
		if errno != 0 || len(part) == 0 || part[0].Name != names[i+1] {
			t.Fatalf("after %q: %+v, %v, want %q", names[i], part, errno, names[i+1])
		}
	}
	// From the start it is read anew.
	writeFile(t, s.path("new"), "")
	found := false
	for offset := uint64(0); ; {
		part, errno := s.Readdir(root, fh, offset, 4096, false)
		must(t, errno)
		if len(part) == 0 {
			break
		}
		for _, d := range part {
			offset = d.Off
			found = found || d.Name == "new"
		}
	}
	if !found {
		t.Error("a new entry is missing after a rewind")
	}
}

func TestHundredThousandEntries(t *testing.T) {
	const count = 100_000
	s := newShare(t, func(c *Config) { c.Limits.Nodes = 256 })
	dir, errno := s.Mkdir(root, "dir", 0o755, 0)
	must(t, errno)
	fd, err := unix.Open(s.path("dir"), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fd)
	for i := range count {
		must(t, unix.Mknodat(fd, fmt.Sprintf("%06d", i), unix.S_IFREG|0o644, 0))
	}
	list, errno := s.List(dir.NodeID, true)
	if errno != 0 || len(list) != count {
		t.Fatalf("%d entries, %v", len(list), errno)
	}
	if n := s.openDescriptors(); n > 256 {
		t.Errorf("%d descriptors are open", n)
	}
	seen := map[string]bool{}
	for _, d := range list {
		if d.Entry.NodeID == 0 || seen[d.Name] {
			t.Fatalf("%+v", d)
		}
		seen[d.Name] = true
	}
	// Each can be used.
	for i := 0; i < count; i += 97 {
		if a, errno := s.Getattr(list[i].Entry.NodeID); errno != 0 || a.Ino != list[i].Ino {
			t.Fatalf("%s: %+v, %v", list[i].Name, a, errno)
		}
	}
	if n := s.openDescriptors(); n > 256 {
		t.Errorf("%d descriptors are open", n)
	}
	for _, d := range list {
		s.Forget(d.Entry.NodeID, 1)
	}
	if n := len(s.server.inodes.byID); n != 2 {
		t.Errorf("%d nodes are left", n)
	}
}

func TestNodeLimit(t *testing.T) {
	s := newShare(t, func(c *Config) { c.Limits.Inodes = 10 })
	for i := range 20 {
		writeFile(t, s.path(fmt.Sprint(i)), "")
	}
	// READDIRPLUS goes on without nodes.
	list, errno := s.List(root, true)
	if errno != 0 || len(list) != 20 {
		t.Fatalf("%d entries, %v", len(list), errno)
	}
	known := 0
	for _, d := range list {
		if d.Entry.NodeID != 0 {
			known++
		}
	}
	if known != 9 {
		t.Errorf("%d nodes besides the root", known)
	}
	_, errno = s.Lookup(root, list[19].Name)
	want(t, "LOOKUP", errno, unix.ENFILE)
	_, errno = s.Mkdir(root, "new", 0o755, 0)
	want(t, "MKDIR", errno, unix.ENFILE)
	_, _, errno = s.Create(root, "new", unix.O_RDWR, 0o644, 0)
	want(t, "CREATE", errno, unix.ENFILE)
	if _, err := os.Lstat(s.path("new")); !os.IsNotExist(err) {
		t.Errorf("something was created: %v", err)
	}
	s.Forget(list[0].Entry.NodeID, 1)
	_, errno = s.Lookup(root, list[19].Name)
	want(t, "LOOKUP after a FORGET", errno, 0)
}

func TestHandleLimit(t *testing.T) {
	s := newShare(t, func(c *Config) { c.Limits.Descriptors, c.Limits.Nodes = 128, 16 })
	e, fh := s.mustCreate(t, root, "file", "")
	n := 1
	for ; n < 1000; n++ {
		if _, errno := s.Open(e.NodeID, unix.O_RDONLY); errno != 0 {
			want(t, "OPEN", errno, unix.ENFILE)
			break
		}
	}
	if n != (128-16-16)/2 {
		t.Errorf("%d handles", n)
	}
	_, errno := s.Opendir(root)
	want(t, "OPENDIR", errno, unix.ENFILE)
	_, _, errno = s.Create(root, "new", unix.O_RDWR, 0o644, 0)
	want(t, "CREATE", errno, unix.ENFILE)
	if _, err := os.Lstat(s.path("new")); !os.IsNotExist(err) {
		t.Errorf("something was created: %v", err)
	}
	must(t, s.Release(e.NodeID, fh))
	_, errno = s.Open(e.NodeID, unix.O_RDONLY)
	want(t, "OPEN after a RELEASE", errno, 0)
}

// All there is to be had at once: locks by two handles of each owner, files, nodes.
func TestDescriptorLimit(t *testing.T) {
	const limit = 256
	s := newShare(t, func(c *Config) { c.Limits.Descriptors, c.Limits.Nodes = limit, 16 })
	before := fdtest.Count(t)
	e, rw := s.mustCreate(t, root, "file", "")
	ro, errno := s.Open(e.NodeID, unix.O_RDONLY)
	must(t, errno)
	owners := uint64(0)
	for s.Setlk(e.NodeID, ro, owners, readLock(owners, owners), 0) == 0 {
		must(t, s.Setlk(e.NodeID, rw, owners, readLock(owners, owners), 0))
		owners++
	}
	files := 2
	for ; ; files++ {
		if _, _, errno := s.Create(root, fmt.Sprint(files), unix.O_RDWR, 0o644, 0); errno != 0 {
			want(t, "CREATE", errno, unix.ENFILE)
			break
		}
	}
	if n := fdtest.Count(t) - before; n > limit {
		t.Errorf("%d descriptors for %d owners of locks and %d files, at most %d were to be", n, owners, files, limit)
	}
}

func TestThousandOpenFiles(t *testing.T) {
	s := newShare(t, few)
	type open struct {
		e  fuse.EntryOut
		fh uint64
	}
	var files []open
	for i := range 1000 {
		e, fh := s.mustCreate(t, root, fmt.Sprint(i), fmt.Sprint("contents of ", i))
		files = append(files, open{e, fh})
	}
	for i, f := range files {
		if got, errno := s.Read(f.e.NodeID, f.fh, 0, 100); errno != 0 || string(got) != fmt.Sprint("contents of ", i) {
			t.Fatalf("%d: %q, %v", i, got, errno)
		}
	}
	for i, f := range files {
		must(t, s.Unlink(root, fmt.Sprint(i)))
		must(t, s.Release(f.e.NodeID, f.fh))
		s.Forget(f.e.NodeID, 1)
	}
	if n := s.openDescriptors(); n != 1 {
		t.Errorf("%d descriptors are left", n)
	}
}

// TestDescriptorsComeBack uses nodes whose descriptors were closed, while the
// tree changes.
func TestDescriptorsComeBack(t *testing.T) {
	s := newShare(t, few)
	var nodes []uint64
	dir := uint64(root)
	for i := range 40 { // root/0/1/2/...
		e, errno := s.Mkdir(dir, fmt.Sprint(i), 0o755, 0)
		must(t, errno)
		nodes = append(nodes, e.NodeID)
		dir = e.NodeID
	}
	file, fh := s.mustCreate(t, dir, "file", "deep")
	must(t, s.Release(file.NodeID, fh))
	flood := func() { // of other nodes, so that those lose their descriptors
		t.Helper()
		for i := range 20 {
			e, errno := s.Mkdir(root, fmt.Sprint("x", i), 0o755, 0)
			must(t, errno)
			must(t, s.Rmdir(root, fmt.Sprint("x", i)))
			s.Forget(e.NodeID, 1)
		}
		for i := range 16 {
			e, errno := s.Lookup(nodes[0], "1")
			must(t, errno)
			s.Forget(e.NodeID, 1)
			_ = i
		}
		if n := s.openDescriptors(); n > 8 {
			t.Errorf("%d descriptors are open", n)
		}
	}
	check := func(what string) {
		t.Helper()
		flood()
		fh, errno := s.Open(file.NodeID, unix.O_RDONLY)
		if errno != 0 {
			t.Fatalf("%s: OPEN: %v", what, errno)
		}
		if got, errno := s.Read(file.NodeID, fh, 0, 100); errno != 0 || string(got) != "deep" {
			t.Errorf("%s: READ: %q, %v", what, got, errno)
		}
		must(t, s.Release(file.NodeID, fh))
		for _, n := range nodes {
			if _, errno := s.Getattr(n); errno != 0 {
				t.Errorf("%s: GETATTR: %v", what, errno)
			}
		}
	}
	check("as created")
	must(t, s.Rename(nodes[10], "11", root, "moved"))
	check("after the guest has moved a part")
	must(t, s.Rename2(root, "moved", nodes[3], "4", unix.RENAME_EXCHANGE))
	check("after an exchange")
	must(t, s.Rename(nodes[len(nodes)-1], "file", nodes[0], "renamed"))
	check("after the file was moved")
	_, errno := s.Link(file.NodeID, root, "second")
	must(t, errno)
	must(t, s.Unlink(nodes[0], "renamed"))
	check("after the other name was removed")
	// Parents that the guest forgot are still on the way.
	for _, n := range nodes[1:] {
		s.Forget(n, 1)
	}
	nodes = nodes[:1]
	check("after FORGET of parents")
	// A file without any name stays, while it is one of few.
	must(t, s.Unlink(root, "second"))
	if a, errno := s.Getattr(file.NodeID); errno != 0 || a.Nlink != 0 {
		t.Errorf("without a name: %+v, %v", a, errno)
	}
}

// TestCopyUp changes what an overlay has in its lower directory: what is copied up
// stays the node that it is, though its descriptor was closed before or after.
func TestCopyUp(t *testing.T) {
	for _, list := range []bool{false, true} {
		t.Run(fmt.Sprintf("listed first %v", list), func(t *testing.T) {
			s := overlayShare(t, false, func(dir string) {
				for _, d := range []string{"run", "var/lib/data"} {
					must(t, os.MkdirAll(filepath.Join(dir, d), 0o755))
				}
				writeFile(t, dir+"/var/lib/file", "1")
			}, few)
			if list {
				_, errno := s.List(root, true)
				must(t, errno)
			}
			rootfs := s.mustLookup(t, root, "rootfs").NodeID
			known := map[string]uint64{}
			for _, path := range []string{"run", "var", "var/lib", "var/lib/data", "var/lib/file"} {
				known[path] = s.mustLookup(t, rootfs, strings.Split(path, "/")...).NodeID
			}
			// One directory is in use all the time; those above it are closed.
			flood := func(names string) {
				for i := range 20 {
					e, fh := s.mustCreate(t, rootfs, fmt.Sprint(names, i), "")
					must(t, s.Release(e.NodeID, fh))
					_, errno := s.Getattr(known["var/lib/data"])
					must(t, errno)
				}
			}
			_, errno := s.Mkdir(known["run"], "new", 0o755, 0)
			must(t, errno)
			flood("before")
			_, errno = s.Mkdir(known["var/lib/data"], "new", 0o755, 0)
			must(t, errno)
			_, errno = s.Setattr(known["var/lib/file"], fuse.SetattrIn{Valid: fuse.FattrMode, Mode: 0o600})
			must(t, errno)
			flood("after")
			for path, node := range known {
				if now := s.mustLookup(t, rootfs, strings.Split(path, "/")...).NodeID; now != node {
					t.Errorf("%s was node %d, and is %d", path, node, now)
				}
				if _, errno := s.Getattr(node); errno != 0 {
					t.Errorf("%s, for who has it as a working directory: GETATTR: %v", path, errno)
				}
			}
		})
	}
}

func TestHostMovesThings(t *testing.T) {
	s := newShare(t, few)
	must(t, os.MkdirAll(s.path("a", "b"), 0o755))
	writeFile(t, s.path("a", "b", "file"), "1")
	a := s.mustLookup(t, root, "a")
	b := s.mustLookup(t, a.NodeID, "b")
	file := s.mustLookup(t, b.NodeID, "file")
	forgetDescriptors := func() {
		for i := range 20 {
			writeFile(t, s.path(fmt.Sprint("x", i)), "")
			s.mustLookup(t, root, fmt.Sprint("x", i))
		}
	}
	forgetDescriptors()
	// Another file in its place is not the same node.
	must(t, os.Rename(s.path("a", "b", "file"), s.path("kept")))
	writeFile(t, s.path("a", "b", "file"), "2")
	_, errno := s.Getattr(file.NodeID)
	want(t, "GETATTR of what was replaced", errno, unix.ESTALE)
	other := s.mustLookup(t, b.NodeID, "file")
	if other.NodeID == file.NodeID {
		t.Error("another file has the same node")
	}
	// Found again it is usable again.
	if e := s.mustLookup(t, root, "kept"); e.NodeID != file.NodeID {
		t.Errorf("node %d, was %d", e.NodeID, file.NodeID)
	}
	forgetDescriptors()
	if _, errno := s.Getattr(file.NodeID); errno != 0 {
		t.Error(errno)
	}
	// Directories that swap places must make no circle.
	forgetDescriptors()
	must(t, os.Rename(s.path("a", "b"), s.path("b")))
	must(t, os.Rename(s.path("a"), s.path("b", "a")))
	if e := s.mustLookup(t, root, "b", "a"); e.NodeID != a.NodeID {
		t.Errorf("a is node %d, was %d", e.NodeID, a.NodeID)
	}
	forgetDescriptors()
	for _, n := range []uint64{a.NodeID, b.NodeID} {
		if _, errno := s.Getattr(n); errno != 0 && errno != unix.ESTALE {
			t.Error(errno)
		}
	}
	s.mustLookup(t, root, "b", "a")
	if _, errno := s.Getattr(a.NodeID); errno != 0 {
		t.Error(errno)
	}
	// Another file with the same inode number, as tmpfs does not give again: a
	// type that differs is enough to tell.
	must(t, os.Remove(s.path("kept")))
	_, errno = s.Getattr(file.NodeID)
	if errno != unix.ESTALE && errno != 0 {
		t.Errorf("GETATTR of what the host removed: %v", errno)
	}
}

// TestMoves moves directories at random, by the guest and by the host, and
// checks that the table never loses its way or its mind.
func TestMoves(t *testing.T) {
	s := newShare(t, few)
	r := rand.New(rand.NewPCG(1, 2))
	var names []string
	for i := range 12 {
		n := fmt.Sprint("d", i)
		names = append(names, n)
		must(t, os.Mkdir(s.path(n), 0o755))
	}
	// paths finds where each directory is now.
	paths := func() map[string]string {
		found := map[string]string{}
		must(t, filepath.WalkDir(s.dir, func(p string, d os.DirEntry, err error) error {
			if p != s.dir {
				found[d.Name()] = p
			}
			return err
		}))
		return found
	}
	lookups := map[uint64]uint64{}
	lookup := func(path string) uint64 {
		node := uint64(root)
		rel, _ := filepath.Rel(s.dir, path)
		if rel == "." {
			return node
		}
		for _, name := range strings.Split(rel, "/") {
			e, errno := s.Lookup(node, name)
			if errno != 0 {
				t.Fatalf("LOOKUP %s: %v", path, errno)
			}
			lookups[e.NodeID]++
			node = e.NodeID
		}
		return node
	}
	for range 500 {
		at := paths()
		what, where := names[r.IntN(len(names))], names[r.IntN(len(names))]
		from, to := at[what], at[where]
		if r.IntN(4) == 0 {
			to = s.dir
		}
		if strings.HasPrefix(to+"/", from+"/") || filepath.Dir(from) == to {
			continue
		}
		if r.IntN(2) == 0 {
			must(t, os.Rename(from, filepath.Join(to, what)))
		} else {
			oldDir, newDir := lookup(filepath.Dir(from)), lookup(to)
			if errno := s.Rename(oldDir, what, newDir, what); errno != 0 {
				t.Fatalf("RENAME: %v", errno)
			}
		}
		if r.IntN(3) == 0 {
			for node, n := range lookups {
				s.Forget(node, n)
				delete(lookups, node)
				break
			}
		}
		lookup(paths()[names[r.IntN(len(names))]])
		if n := s.openDescriptors(); n > 8 {
			t.Fatalf("%d descriptors are open", n)
		}
	}
	for node, n := range lookups {
		s.Forget(node, n)
	}
	s.server.inodes.mu.Lock()
	defer s.server.inodes.mu.Unlock()
	if len(s.server.inodes.byID) != 1 || s.server.inodes.root.children != 0 || s.server.inodes.open != 1 {
		t.Errorf("%d nodes are left, the root has %d children, %d descriptors", len(s.server.inodes.byID), s.server.inodes.root.children, s.server.inodes.open)
	}
}

// TestConcurrentTree is for the race detector.
func TestConcurrentTree(t *testing.T) {
	s := newShare(t, few)
	for i := range 4 {
		must(t, os.Mkdir(s.path(fmt.Sprint("dir", i)), 0o755))
	}
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 0))
			for range 300 {
				name := fmt.Sprint("dir", r.IntN(4))
				dir, errno := s.Lookup(root, name)
				if errno != 0 {
					continue // it is being moved
				}
				file := fmt.Sprint("file", r.IntN(5))
				switch r.IntN(6) {
				case 0:
					if e, fh, errno := s.Create(dir.NodeID, file, unix.O_RDWR, 0o644, 0); errno == 0 {
						s.Write(e.NodeID, fh, 0, []byte("data"))
						s.Release(e.NodeID, fh)
						s.Forget(e.NodeID, 1)
					}
				case 1:
					s.Unlink(dir.NodeID, file)
				case 2:
					if list, _ := s.List(dir.NodeID, true); len(list) > 0 {
						for _, d := range list {
							s.Getattr(d.Entry.NodeID)
							if d.Entry.NodeID != 0 {
								s.Forget(d.Entry.NodeID, 1)
							}
						}
					}
				case 3:
					s.Rename(dir.NodeID, file, dir.NodeID, "other"+file)
				case 4:
					s.Rename2(root, name, root, fmt.Sprint("dir", r.IntN(4)), unix.RENAME_EXCHANGE)
				case 5:
					if e, errno := s.Lookup(dir.NodeID, file); errno == 0 {
						s.Setxattr(e.NodeID, "trusted.x", []byte("v"), 0, 0)
						s.Forget(e.NodeID, 1)
					}
				}
				s.Forget(dir.NodeID, 1)
			}
		})
	}
	all.Wait()
	if n := len(s.server.inodes.byID); n != 1 {
		t.Errorf("%d nodes are left", n)
	}
	must(t, s.Destroy())
}
