package passthrough

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse/fusetest"
)

// outside is a directory that no guest may reach, with a file in it.
type outside struct {
	dir string
	ino uint64
}

func newOutside(t testing.TB) outside {
	o := outside{dir: tempDir(t)}
	writeFile(t, filepath.Join(o.dir, "secret"), "secret")
	var st unix.Stat_t
	must(t, unix.Stat(filepath.Join(o.dir, "secret"), &st))
	o.ino = st.Ino
	return o
}

// check fails the test if the directory is not as it was.
func (o outside) check(t testing.TB) {
	t.Helper()
	o.checkBeside(t)
}

// checkBeside is check for a directory in which there is more.
func (o outside) checkBeside(t testing.TB, more ...string) {
	t.Helper()
	got, err := os.ReadFile(filepath.Join(o.dir, "secret"))
	if err != nil || string(got) != "secret" {
		t.Fatalf("the secret is %q, %v", got, err)
	}
	var st unix.Stat_t
	must(t, unix.Stat(filepath.Join(o.dir, "secret"), &st))
	if st.Nlink != 1 || st.Uid != 0 || st.Mode != unix.S_IFREG|0o644 || st.Ino != o.ino {
		t.Fatalf("the secret has changed: %+v", st)
	}
	if list, err := os.ReadDir(o.dir); err != nil || len(list) != 1+len(more) {
		t.Fatalf("beside the secret: %v, %v", list, err)
	}
}

// TestLinksLeadNowhere puts links of all kinds to a directory outside into the
// share, and does with them whatever a guest can.
func TestLinksLeadNowhere(t *testing.T) {
	o := newOutside(t)
	s := newShare(t)
	rel, err := filepath.Rel(s.dir, o.dir)
	must(t, err)
	must(t, os.Mkdir(s.path("dir"), 0o755))
	for name, target := range map[string]string{
		"absolute": o.dir, "relative": rel, "file": filepath.Join(o.dir, "secret"), "root": "/", "up": "..",
		"here": ".", "fd": "/proc/self/fd", "cwd": "/proc/self/cwd", "loop": "loop",
	} {
		must(t, os.Symlink(target, s.path(name)))
		e := s.mustLookup(t, root, name)
		if e.Attr.Mode&unix.S_IFMT != unix.S_IFLNK {
			t.Fatalf("%s was followed: %+v", name, e.Attr)
		}
		_, errno := s.Lookup(e.NodeID, "secret")
		want(t, name+": LOOKUP", errno, unix.ENOTDIR)
		_, errno = s.Open(e.NodeID, unix.O_RDWR)
		want(t, name+": OPEN", errno, unix.ELOOP)
		_, errno = s.Opendir(e.NodeID)
		want(t, name+": OPENDIR", errno, unix.ENOTDIR)
		_, _, errno = s.Create(root, name, unix.O_RDWR|unix.O_TRUNC, 0o644, 0)
		want(t, name+": CREATE", errno, unix.ESTALE)
		_, _, errno = s.Create(e.NodeID, "x", unix.O_RDWR, 0o644, 0)
		want(t, name+": CREATE in it", errno, unix.ENOTDIR)
		_, errno = s.Mkdir(e.NodeID, "x", 0o755, 0)
		want(t, name+": MKDIR in it", errno, unix.ENOTDIR)
		_, errno = s.Mkdir(root, name, 0o755, 0)
		want(t, name+": MKDIR", errno, unix.EEXIST)
		want(t, name+": UNLINK in it", s.Unlink(e.NodeID, "secret"), unix.ENOTDIR)
		want(t, name+": RENAME out of it", s.Rename(e.NodeID, "secret", root, "x"), unix.ENOTDIR)
		want(t, name+": RENAME into it", s.Rename(root, "dir", e.NodeID, "x"), unix.ENOTDIR)
		_, errno = s.Setattr(e.NodeID, fuse.SetattrIn{Valid: fuse.FattrSize})
		want(t, name+": truncate", errno, unix.EINVAL)
		_, errno = s.Setattr(e.NodeID, fuse.SetattrIn{Valid: fuse.FattrMode, Mode: 0o777})
		want(t, name+": chmod", errno, unix.EOPNOTSUPP)
		if _, errno := s.Setattr(e.NodeID, fuse.SetattrIn{Valid: fuse.FattrUID | fuse.FattrGID | fuse.FattrMtime, UID: 5, GID: 5}); errno != 0 {
			t.Errorf("%s: chown: %v", name, errno) // of the link
		}
		want(t, name+": SETXATTR", s.Setxattr(e.NodeID, "trusted.x", []byte("v"), 0, 0), 0)
		if l, errno := s.Link(e.NodeID, root, name+"2"); errno != 0 || l.Attr.Mode&unix.S_IFMT != unix.S_IFLNK {
			t.Errorf("%s: LINK: %+v, %v", name, l.Attr, errno)
		}
		want(t, name+": SYNCFS", s.Syncfs(e.NodeID), unix.ENOTDIR)
	}
	o.check(t)
	if n, err := unix.Getxattr(filepath.Join(o.dir, "secret"), "trusted.x", nil); err != unix.ENODATA {
		t.Errorf("the secret has an xattr: %d, %v", n, err)
	}
}

// TestMagicLinks: a proc file system below the root is a trap if its links are
// followed.
func TestMagicLinks(t *testing.T) {
	s := newShare(t)
	must(t, os.Mkdir(s.path("proc"), 0o755))
	must(t, unix.Mount("proc", s.path("proc"), "proc", 0, ""))
	t.Cleanup(func() { must(t, unix.Unmount(s.path("proc"), unix.MNT_DETACH)) })
	self := s.mustLookup(t, root, "proc", fmt.Sprint(os.Getpid()))
	for _, name := range []string{"root", "cwd", "exe"} {
		e := s.mustLookup(t, self.NodeID, name)
		if e.Attr.Mode&unix.S_IFMT != unix.S_IFLNK {
			t.Errorf("%s: %+v", name, e.Attr)
		}
		_, errno := s.Open(e.NodeID, unix.O_RDONLY)
		want(t, "OPEN of "+name, errno, unix.ELOOP)
		_, errno = s.Lookup(e.NodeID, "etc")
		want(t, "LOOKUP in "+name, errno, unix.ENOTDIR)
	}
	// It has no ACLs. An error would have the kernel deny access.
	_, errno := s.Getxattr(self.NodeID, aclAccess, 100)
	want(t, "GETXATTR of an ACL", errno, unix.ENODATA)
	fd := s.mustLookup(t, self.NodeID, "fd")
	list, errno := s.List(fd.NodeID, true)
	must(t, errno)
	for _, d := range list {
		if d.Entry.NodeID != 0 && d.Entry.Attr.Mode&unix.S_IFMT != unix.S_IFLNK {
			t.Errorf("%+v", d)
		}
	}
}

// TestSwappedUnderfoot looks things up while the host swaps a directory for a
// link to a directory outside.
func TestSwappedUnderfoot(t *testing.T) {
	o := newOutside(t)
	s := newShare(t, few)
	must(t, os.Mkdir(s.path("dir"), 0o755))
	writeFile(t, s.path("dir", "secret"), "mine")
	must(t, os.Symlink(o.dir, s.path("link")))
	stop := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				_ = unix.Renameat2(unix.AT_FDCWD, s.path("dir"), unix.AT_FDCWD, s.path("link"), unix.RENAME_EXCHANGE)
			}
		}
	}()
	for i := range 3000 {
		d, errno := s.Lookup(root, "dir")
		if errno != 0 {
			continue
		}
		switch i % 3 {
		case 0:
			if e, errno := s.Lookup(d.NodeID, "secret"); errno == 0 {
				if e.Attr.Ino == o.ino {
					t.Fatal("the secret was found")
				}
				if fh, errno := s.Open(e.NodeID, unix.O_RDWR); errno == 0 {
					if got, _ := s.Read(e.NodeID, fh, 0, 10); string(got) != "mine" {
						t.Fatalf("READ: %q", got)
					}
					s.Release(e.NodeID, fh)
				}
				s.Forget(e.NodeID, 1)
			}
		case 1:
			s.Create(d.NodeID, "new", unix.O_RDWR, 0o644, 0)
			s.Unlink(d.NodeID, "new")
		case 2:
			s.Setattr(d.NodeID, fuse.SetattrIn{Valid: fuse.FattrMode, Mode: 0o755})
			s.Mkdir(d.NodeID, "sub", 0o755, 0)
			s.Rmdir(d.NodeID, "sub")
		}
		s.Forget(d.NodeID, 1)
	}
	close(stop)
	<-stopped
	o.check(t)
}

// TestGiveAway: what is given to the caller must be what was created for him. What is
// another's is what the file system has made it, and stays so.
func TestGiveAway(t *testing.T) {
	s := newShare(t)
	writeFile(t, s.path("theirs"), "x")
	must(t, os.Link(s.path("theirs"), s.path("name")))
	must(t, os.Mkdir(s.path("dir"), 0o755))
	must(t, os.Chown(s.path("dir"), 7, 7))
	dir, errno := s.server.inodes.get(root)
	must(t, errno)
	defer s.server.inodes.put(dir)
	r := &request{}
	r.UID, r.GID = 1000, 1000
	for what, test := range map[string]struct {
		node newNode
		want unix.Errno
	}{
		"a file with another name": {newNode{dir: dir, name: "name", kind: unix.S_IFREG}, unix.ESTALE},
		"another type":             {newNode{dir: dir, name: "name", kind: unix.S_IFIFO}, unix.ESTALE},
		"another's, of this type":  {newNode{dir: dir, name: "dir", kind: unix.S_IFDIR}, 0},
		"another's":                {newNode{dir: dir, name: "dir", kind: unix.S_IFREG}, unix.ESTALE},
	} {
		fd, errno := openChild(dir.fd, test.node.name)
		must(t, errno)
		var st unix.Statx_t
		want(t, what, s.server.give(r, test.node, fd, &st), test.want)
		closeFD(fd)
	}
	for path, uid := range map[string]uint32{"theirs": 0, "dir": 7} {
		var st unix.Stat_t
		must(t, unix.Stat(s.path(path), &st))
		if st.Uid != uid {
			t.Errorf("%s was given to %d", path, st.Uid)
		}
	}
}

func TestSubmounts(t *testing.T) {
	s := newShare(t)
	must(t, os.Mkdir(s.path("mount"), 0o755))
	must(t, os.Mkdir(s.path("bind"), 0o755))
	writeFile(t, s.path("file"), "below")
	before := s.mustLookup(t, root, "mount")
	if before.Attr.Flags&fuse.AttrSubmount != 0 {
		t.Errorf("a directory is a submount: %+v", before.Attr)
	}
	// The host mounts things while the guest runs.
	other := tempDir(t)
	must(t, unix.Mount("tmpfs", other, "tmpfs", 0, "size=1m"))
	defer func() { must(t, unix.Unmount(other, unix.MNT_DETACH)) }()
	writeFile(t, filepath.Join(other, "a"), "above")
	must(t, os.Mkdir(filepath.Join(other, "sub"), 0o755))
	for from, to := range map[string]string{other: "mount", filepath.Join(other, "sub"): "bind", filepath.Join(other, "a"): "file"} {
		must(t, unix.Mount(from, s.path(to), "", unix.MS_BIND, ""))
		defer func() { must(t, unix.Unmount(s.path(to), unix.MNT_DETACH)) }()
	}
	list, errno := s.List(root, true)
	must(t, errno)
	plus := map[string]fuse.EntryOut{}
	for _, d := range list {
		plus[d.Name] = d.Entry
	}
	for _, name := range []string{"mount", "bind"} {
		e := s.mustLookup(t, root, name)
		if e.Attr.Flags&fuse.AttrSubmount == 0 || plus[name].Attr.Flags&fuse.AttrSubmount == 0 {
			t.Errorf("%s is no submount: %+v, %+v", name, e.Attr, plus[name].Attr)
		}
	}
	// A kernel that has not offered them takes the flag for another node.
	_, errno = s.InitWith(fuse.MajorVersion, fuse.MinorVersion, fusetest.KernelFlags&^fuse.Submounts)
	must(t, errno)
	if e := s.mustLookup(t, root, "mount"); e.Attr.Flags&fuse.AttrSubmount != 0 {
		t.Errorf("a submount, which was not negotiated: %+v", e.Attr)
	}
	s.Init()
	mount := s.mustLookup(t, root, "mount")
	if mount.NodeID == before.NodeID {
		t.Error("a mount point is the node that it covers")
	}
	sub := s.mustLookup(t, mount.NodeID, "sub")
	if sub.Attr.Flags&fuse.AttrSubmount != 0 {
		t.Errorf("a directory in a mount is a submount: %+v", sub.Attr)
	}
	// A file on another device has a number that is not its directory's device's.
	file := s.mustLookup(t, root, "file")
	var st unix.Stat_t
	must(t, unix.Stat(filepath.Join(other, "a"), &st))
	if file.Attr.Ino == st.Ino || file.Attr.Ino != plus["file"].Attr.Ino {
		t.Errorf("inode %#x, on the host %#x, READDIRPLUS %#x", file.Attr.Ino, st.Ino, plus["file"].Attr.Ino)
	}
	if a, errno := s.Getattr(file.NodeID); errno != 0 || a.Ino != file.Attr.Ino {
		t.Errorf("GETATTR: %+v, %v", a, errno)
	}
	if e := s.mustLookup(t, mount.NodeID, "a"); e.Attr.Ino != st.Ino || e.NodeID == file.NodeID {
		t.Errorf("below its own mount: %+v, node %d and %d", e.Attr, e.NodeID, file.NodeID)
	}
	// They are busy, and no way out.
	want(t, "UNLINK of a mount point", s.Unlink(root, "file"), unix.EBUSY)
	want(t, "RMDIR of a mount point", s.Rmdir(root, "mount"), unix.EBUSY)
	want(t, "RENAME of a mount point", s.Rename(root, "mount", root, "x"), unix.EBUSY)
	want(t, "RENAME across", s.Rename(mount.NodeID, "a", root, "x"), unix.EXDEV)
	_, errno = s.Link(file.NodeID, root, "x")
	want(t, "LINK across", errno, unix.EXDEV)
	fh, errno := s.Open(file.NodeID, unix.O_RDONLY)
	must(t, errno)
	if got, errno := s.Read(file.NodeID, fh, 0, 10); errno != 0 || string(got) != "above" {
		t.Errorf("READ: %q, %v", got, errno)
	}
	// Unmounted, the names lead to what was covered; what is open goes on.
	must(t, unix.Unmount(s.path("file"), unix.MNT_DETACH))
	defer func() { must(t, unix.Mount("/dev/null", s.path("file"), "", unix.MS_BIND, "")) }() // for the defer above
	if e := s.mustLookup(t, root, "file"); e.NodeID == file.NodeID || e.Attr.Size != 5 {
		t.Errorf("after unmount: %+v", e)
	}
	if got, errno := s.Read(file.NodeID, fh, 0, 10); errno != 0 || string(got) != "above" {
		t.Errorf("READ after unmount: %q, %v", got, errno)
	}
}

// What the host mounts below one of the share's mounts it can unmount, unless the
// guest has a file there open.
func TestHostUnmounts(t *testing.T) {
	s := newShare(t)
	volume, late := s.path("volume"), s.path("volume/late")
	must(t, os.Mkdir(volume, 0o755))
	must(t, unix.Mount("tmpfs", volume, "tmpfs", 0, "size=1m"))
	defer func() { must(t, unix.Unmount(volume, unix.MNT_DETACH)) }()
	must(t, os.Mkdir(late, 0o755))
	covered := s.mustLookup(t, root, "volume", "late")
	mount := func() {
		t.Helper()
		must(t, unix.Mount("tmpfs", late, "tmpfs", 0, "size=1m"))
		must(t, os.MkdirAll(late+"/dir/deep", 0o755))
		writeFile(t, late+"/dir/file", "contents")
	}
	unmount := func(what string, wanted unix.Errno) {
		t.Helper()
		errno, _ := unix.Unmount(late, 0).(unix.Errno)
		want(t, "unmount "+what, errno, wanted)
	}

	mount()
	dir := s.mustLookup(t, root, "volume", "late", "dir")
	file := s.mustLookup(t, dir.NodeID, "file")
	deep := s.mustLookup(t, dir.NodeID, "deep")
	if list, errno := s.List(dir.NodeID, true); errno != 0 || len(list) != 2 {
		t.Errorf("%v, %v", list, errno)
	}
	fh, errno := s.Open(file.NodeID, unix.O_RDONLY)
	must(t, errno)
	unmount("under an open file", unix.EBUSY)
	must(t, s.Release(file.NodeID, fh))
	// By their names, which may change, nodes are found again.
	must(t, s.Rename(dir.NodeID, "deep", dir.NodeID, "other"))
	must(t, s.Rename(dir.NodeID, "file", deep.NodeID, "moved"))
	if attr, errno := s.Getattr(file.NodeID); errno != 0 || attr.Size != 8 {
		t.Errorf("GETATTR: %+v, %v", attr, errno)
	}
	unmount("what the guest knows", 0)
	_, errno = s.Getattr(file.NodeID)
	want(t, "GETATTR of what is gone", errno, unix.ESTALE)
	if e := s.mustLookup(t, root, "volume", "late"); e.NodeID != covered.NodeID {
		t.Errorf("node %d is there, not %d", e.NodeID, covered.NodeID)
	}

	// Another one in its place is another one.
	mount()
	_, errno = s.Getattr(file.NodeID)
	want(t, "GETATTR of what is gone", errno, unix.ESTALE)
	again := s.mustLookup(t, root, "volume", "late", "dir", "file")
	if again.NodeID == file.NodeID {
		t.Error("it has the node of one that is gone")
	}
	// A file without a name is there until the guest has forgotten it.
	lateDir := s.mustLookup(t, root, "volume", "late")
	for _, make := range []func() (fuse.EntryOut, uint64, unix.Errno){
		func() (fuse.EntryOut, uint64, unix.Errno) {
			return s.Tmpfile(lateDir.NodeID, unix.O_RDWR, 0o600, 0)
		},
		func() (fuse.EntryOut, uint64, unix.Errno) {
			e, fh, errno := s.Create(lateDir.NodeID, "new", unix.O_RDWR, 0o600, 0)
			must(t, s.Unlink(lateDir.NodeID, "new"))
			return e, fh, errno
		},
	} {
		e, fh, errno := make()
		must(t, errno)
		must(t, s.Release(e.NodeID, fh))
		_, errno = s.Getattr(e.NodeID)
		want(t, "GETATTR without a name", errno, 0)
		unmount("under a file without a name", unix.EBUSY)
		s.Forget(e.NodeID, 1)
	}
	unmount("after that", 0)
}

func TestProcessUmask(t *testing.T) {
	s := newShare(t)
	// It does not count: the caller's does.
	defer unix.Umask(unix.Umask(0o777))
	e, errno := s.As(1, 2).Mkdir(root, "dir", 0o755, 0)
	if errno != 0 || e.Attr.Mode&0o777 != 0o755 {
		t.Errorf("%+v, %v", e.Attr, errno)
	}
}
