package passthrough

import (
	"bytes"
	"os"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse/fusetest"
)

const root = fuse.RootID

func TestInit(t *testing.T) {
	s := newShare(t)
	out := s.Init()
	if out.Major != 7 || out.Minor != 41 || out.MaxWrite != 1<<20 || out.MaxPages != 256 {
		t.Errorf("INIT: %+v", out)
	}
	for name, flag := range map[string]uint64{
		"POSIX_LOCKS": fuse.PosixLocks, "FLOCK_LOCKS": fuse.FlockLocks, "DO_READDIRPLUS": fuse.DoReaddirplus,
		"POSIX_ACL": fuse.PosixACL, "SUBMOUNTS": fuse.Submounts, "HANDLE_KILLPRIV_V2": fuse.HandleKillprivV2,
		"MAX_PAGES": fuse.MaxPages, "ALLOW_IDMAP": fuse.AllowIDMap, "DONT_MASK": fuse.DontMask,
	} {
		if out.Flags&flag == 0 {
			t.Errorf("%s was not accepted", name)
		}
	}
	if out.Flags&(fuse.WritebackCache|fuse.ExportSupport|fuse.SecurityCtx) != 0 {
		t.Errorf("flags %#x", out.Flags)
	}
	if out, errno := s.InitWith(7, 31, fuse.AsyncRead|fuse.InitExt); errno != 0 || out.Minor != 31 || out.Flags != fuse.AsyncRead|fuse.InitExt {
		t.Errorf("INIT of an old kernel: %+v, %v", out, errno)
	}
	if out, errno := s.InitWith(8, 0, 0); errno != 0 || out.Major != 7 {
		t.Errorf("INIT of a new major version: %+v, %v", out, errno)
	}
	_, errno := s.InitWith(7, 30, 0)
	want(t, "INIT of too old a kernel", errno, unix.EPROTO)
	want(t, "DESTROY", s.Destroy(), 0)
	_, errno = s.Getattr(root)
	want(t, "GETATTR after DESTROY", errno, unix.EIO)
}

func TestLookupAndAttributes(t *testing.T) {
	s := newShare(t)
	writeFile(t, s.path("file"), "hello")
	must(t, os.Chown(s.path("file"), 1234, 5678))
	must(t, unix.Chmod(s.path("file"), 0o4755))
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, s.path("file"), []unix.Timespec{{Sec: -5, Nsec: 7}, {Sec: 1 << 33, Nsec: 9}}, 0))
	e := s.mustLookup(t, root, "file")
	a := e.Attr
	if e.NodeID == 0 || e.NodeID == root || e.EntryValid.Sec != 1 || e.AttrValid.Sec != 1 {
		t.Errorf("entry %+v", e)
	}
	if a.Size != 5 || a.Mode != unix.S_IFREG|0o4755 || a.UID != 1234 || a.GID != 5678 || a.Nlink != 1 {
		t.Errorf("attributes %+v", a)
	}
	if int64(a.Atime.Sec) != -5 || a.Atime.Nsec != 7 || a.Mtime.Sec != 1<<33 || a.Mtime.Nsec != 9 {
		t.Errorf("times %+v %+v", a.Atime, a.Mtime)
	}
	if got, errno := s.Getattr(e.NodeID); errno != 0 || got != a {
		t.Errorf("GETATTR %+v, %v; LOOKUP had %+v", got, errno, a)
	}
	mask, birth, ino, errno := s.Statx(e.NodeID)
	if errno != 0 || mask&unix.STATX_BASIC_STATS != unix.STATX_BASIC_STATS || ino != a.Ino {
		t.Errorf("STATX: mask %#x, inode %d, %v", mask, ino, errno)
	}
	if mask&unix.STATX_BTIME == 0 || birth.Sec == 0 {
		t.Errorf("STATX: no time of birth: %#x %v", mask, birth)
	}
	if again := s.mustLookup(t, root, "file"); again.NodeID != e.NodeID {
		t.Errorf("a second LOOKUP gave another node: %d, %d", again.NodeID, e.NodeID)
	}
	_, errno = s.Lookup(root, "absent")
	want(t, "LOOKUP of what is not there", errno, unix.ENOENT)
	_, errno = s.Lookup(e.NodeID, "x")
	want(t, "LOOKUP in a file", errno, unix.ENOTDIR)
	if st, errno := s.Statfs(root); errno != 0 || st.Namelen != 255 || st.Blocks == 0 {
		t.Errorf("STATFS: %+v, %v", st, errno)
	}
	want(t, "SYNCFS", s.Syncfs(root), 0)
	// Not cached at all.
	s = newShareOf(t, s.dir, func(c *Config) { c.AttrTimeout, c.EntryTimeout = 0, 0 })
	if e := s.mustLookup(t, root, "file"); e.EntryValid != (fuse.Time{}) || e.AttrValid != (fuse.Time{}) {
		t.Errorf("entry %+v", e)
	}
}

// The link that the kubelet replaces is asked for each time, however the guest has
// heard of it.
func TestVersionLink(t *testing.T) {
	s := newShare(t)
	for _, name := range []string{versionLink, "link"} {
		must(t, os.Symlink("..v1", s.path(name)))
	}
	must(t, os.Mkdir(s.path("sub"), 0o755))
	must(t, os.Mkdir(s.path("sub/"+versionLink), 0o755))
	made, errno := s.Symlink(s.mustLookup(t, root, "sub").NodeID, "made", "..v1")
	want(t, "SYMLINK", errno, 0)
	list, errno := s.List(root, true)
	want(t, "READDIRPLUS", errno, 0)
	plus := map[string]fuse.EntryOut{}
	for _, d := range list {
		plus[d.Name] = d.Entry
	}
	for _, test := range []struct {
		name  string
		entry fuse.EntryOut
		sec   uint64
	}{
		{"LOOKUP", s.mustLookup(t, root, versionLink), 0},
		{"READDIRPLUS", plus[versionLink], 0},
		{"LOOKUP of another link", s.mustLookup(t, root, "link"), 1},
		{"READDIRPLUS of another link", plus["link"], 1},
		{"SYMLINK of another name", made, 1},
		{"LOOKUP of a directory", s.mustLookup(t, s.mustLookup(t, root, "sub").NodeID, versionLink), 1},
	} {
		if got := test.entry.EntryValid; got != (fuse.Time{Sec: test.sec}) || test.entry.AttrValid.Sec != 1 {
			t.Errorf("%s: the name counts %v, attributes %v", test.name, got, test.entry.AttrValid)
		}
	}
}

func TestSetattr(t *testing.T) {
	s := newShare(t)
	e, fh := s.mustCreate(t, root, "file", "0123456789")
	for _, tc := range []struct {
		name  string
		in    fuse.SetattrIn
		check func(a fuse.Attr) bool
	}{
		{"mode", fuse.SetattrIn{Valid: fuse.FattrMode, Mode: 0o6711}, func(a fuse.Attr) bool { return a.Mode == unix.S_IFREG|0o6711 }},
		{"owner clears set-id bits", fuse.SetattrIn{Valid: fuse.FattrUID | fuse.FattrGID | fuse.FattrKillSuidgid, UID: 7, GID: 8},
			func(a fuse.Attr) bool { return a.UID == 7 && a.GID == 8 && a.Mode == unix.S_IFREG|0o711 }},
		{"group alone", fuse.SetattrIn{Valid: fuse.FattrGID, GID: 9}, func(a fuse.Attr) bool { return a.UID == 7 && a.GID == 9 }},
		{"size by node", fuse.SetattrIn{Valid: fuse.FattrSize, Size: 4}, func(a fuse.Attr) bool { return a.Size == 4 }},
		{"size by handle", fuse.SetattrIn{Valid: fuse.FattrSize | fuse.FattrFH, FH: fh, Size: 1 << 40}, func(a fuse.Attr) bool { return a.Size == 1<<40 }},
		{"times", fuse.SetattrIn{Valid: fuse.FattrAtime | fuse.FattrMtime, Atime: 1, AtimeNsec: 2, Mtime: 3, MtimeNsec: 4},
			func(a fuse.Attr) bool {
				return a.Atime == fuse.Time{Sec: 1, Nsec: 2} && a.Mtime == fuse.Time{Sec: 3, Nsec: 4}
			}},
		{"atime now", fuse.SetattrIn{Valid: fuse.FattrAtime | fuse.FattrAtimeNow},
			func(a fuse.Attr) bool { return a.Atime.Sec > 1e9 && a.Mtime == fuse.Time{Sec: 3, Nsec: 4} }},
	} {
		a, errno := s.Setattr(e.NodeID, tc.in)
		if errno != 0 || !tc.check(a) {
			t.Errorf("%s: %+v, %v", tc.name, a, errno)
		}
		if got, errno := s.Getattr(e.NodeID); errno != 0 || got != a {
			t.Errorf("%s: GETATTR says %+v, %v", tc.name, got, errno)
		}
	}
	// Set-id bits: a truncation clears them unless the caller may keep them.
	for _, tc := range []struct {
		name         string
		before, want uint32
		valid        uint32
	}{
		{"privileged", 0o6755, 0o6755, 0},
		{"unprivileged", 0o6755, 0o755, fuse.FattrKillSuidgid},
		{"unprivileged, not executable by the group", 0o6745, 0o2745, fuse.FattrKillSuidgid},
	} {
		_, errno := s.Setattr(e.NodeID, fuse.SetattrIn{Valid: fuse.FattrMode, Mode: tc.before})
		must(t, errno)
		a, errno := s.Setattr(e.NodeID, fuse.SetattrIn{Valid: fuse.FattrSize | tc.valid, Size: 5})
		if errno != 0 || a.Mode&0o7777 != tc.want {
			t.Errorf("truncate, %s: mode %#o, %v, want %#o", tc.name, a.Mode, errno, tc.want)
		}
	}
	// chown(-1, -1) arrives as a SETATTR of nothing and clears them too.
	_, errno := s.Setattr(e.NodeID, fuse.SetattrIn{Valid: fuse.FattrMode, Mode: 0o6755})
	must(t, errno)
	if a, errno := s.Setattr(e.NodeID, fuse.SetattrIn{}); errno != 0 || a.Mode&0o7777 != 0o755 {
		t.Errorf("chown(-1, -1): mode %#o, %v", a.Mode, errno)
	}
	link, errno := s.Symlink(root, "link", "nowhere")
	must(t, errno)
	if a, errno := s.Setattr(link.NodeID, fuse.SetattrIn{Valid: fuse.FattrUID | fuse.FattrMtime, UID: 3, Mtime: 77}); errno != 0 || a.UID != 3 || a.Mtime.Sec != 77 {
		t.Errorf("symbolic link: %+v, %v", a, errno)
	}
	_, errno = s.Setattr(link.NodeID, fuse.SetattrIn{Valid: fuse.FattrMode, Mode: 0o777})
	want(t, "mode of a symbolic link", errno, unix.EOPNOTSUPP)
	_, errno = s.Setattr(root, fuse.SetattrIn{Valid: fuse.FattrSize, Size: 1})
	want(t, "size of a directory", errno, unix.EINVAL)
	_, errno = s.Setattr(e.NodeID, fuse.SetattrIn{Valid: fuse.FattrMtime, MtimeNsec: 1e9})
	want(t, "nanoseconds out of range", errno, unix.EINVAL)
	_, errno = s.Setattr(e.NodeID, fuse.SetattrIn{Valid: fuse.FattrSize, Size: 1 << 63})
	want(t, "negative size", errno, unix.EINVAL)
	ro, errno := s.Open(e.NodeID, unix.O_RDONLY)
	must(t, errno)
	_, errno = s.Setattr(e.NodeID, fuse.SetattrIn{Valid: fuse.FattrSize | fuse.FattrFH, FH: ro, Size: 1})
	want(t, "size by a handle for reading", errno, unix.EBADF)
}

func TestReadWrite(t *testing.T) {
	s := newShare(t)
	e, fh := s.mustCreate(t, root, "file", "")
	data := make([]byte, 1<<20)
	for i := range data {
		data[i] = byte(i * 7 / 3)
	}
	const at = 5 << 30 // past 4 GiB; the file is sparse
	if n, errno := s.Write(e.NodeID, fh, at, data); errno != 0 || n != len(data) {
		t.Fatalf("WRITE: %d, %v", n, errno)
	}
	if got, errno := s.Read(e.NodeID, fh, at, len(data)); errno != 0 || !bytes.Equal(got, data) {
		t.Fatalf("READ: %d bytes, %v", len(got), errno)
	}
	if got, errno := s.Read(e.NodeID, fh, at+uint64(len(data))-10, 4096); errno != 0 || !bytes.Equal(got, data[len(data)-10:]) {
		t.Errorf("READ at the end: %d bytes, %v", len(got), errno)
	}
	if got, errno := s.Read(e.NodeID, fh, at+1<<30, 4096); errno != 0 || len(got) != 0 {
		t.Errorf("READ past the end: %d bytes, %v", len(got), errno)
	}
	if got, errno := s.Read(e.NodeID, fh, 1<<20, 64<<10); errno != 0 || !bytes.Equal(got, make([]byte, 64<<10)) {
		t.Errorf("READ in the hole: %d bytes, %v", len(got), errno)
	}
	// Holes.
	if off, errno := s.Lseek(e.NodeID, fh, 0, unix.SEEK_DATA); errno != 0 || off != at {
		t.Errorf("SEEK_DATA: %d, %v", off, errno)
	}
	if off, errno := s.Lseek(e.NodeID, fh, at, unix.SEEK_HOLE); errno != 0 || off != at+1<<20 {
		t.Errorf("SEEK_HOLE: %d, %v", off, errno)
	}
	_, errno := s.Lseek(e.NodeID, fh, at+2<<20, unix.SEEK_DATA)
	want(t, "SEEK_DATA past the end", errno, unix.ENXIO)
	_, errno = s.Lseek(e.NodeID, fh, 0, unix.SEEK_END)
	want(t, "SEEK_END", errno, unix.EINVAL)
	// Space.
	want(t, "FALLOCATE", s.Fallocate(e.NodeID, fh, 0, 8192, 0), 0)
	if a, errno := s.Getattr(e.NodeID); errno != 0 || a.Blocks != (1<<20+8192)/512 {
		t.Errorf("after FALLOCATE: %+v, %v", a, errno)
	}
	want(t, "punch", s.Fallocate(e.NodeID, fh, at, 8192, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE), 0)
	if got, errno := s.Read(e.NodeID, fh, at, 8192); errno != 0 || !bytes.Equal(got, make([]byte, 8192)) {
		t.Errorf("READ of what was punched: %v", errno)
	}
	want(t, "collapse", s.Fallocate(e.NodeID, fh, 0, 4096, unix.FALLOC_FL_COLLAPSE_RANGE), unix.EOPNOTSUPP)
	// Copies.
	to, toFH := s.mustCreate(t, root, "copy", "")
	if n, errno := s.CopyFileRange(e.NodeID, fh, at+8192, to.NodeID, toFH, 100, 50_000); errno != 0 || n != 50_000 {
		t.Errorf("COPY_FILE_RANGE: %d, %v", n, errno)
	}
	if got, errno := s.Read(to.NodeID, toFH, 100, 50_000); errno != 0 || !bytes.Equal(got, data[8192:58_192]) {
		t.Errorf("READ of the copy: %v", errno)
	}
	want(t, "FSYNC", s.Fsync(e.NodeID, fh, 0), 0)
	want(t, "FSYNC of data", s.Fsync(e.NodeID, fh, fuse.FsyncDatasync), 0)
	want(t, "FLUSH", s.Flush(e.NodeID, fh, 1), 0)
	want(t, "RELEASE", s.Release(e.NodeID, fh), 0)
	want(t, "RELEASE again", s.Release(e.NodeID, fh), unix.EBADF)
	_, errno = s.Read(e.NodeID, fh, 0, 10)
	want(t, "READ after RELEASE", errno, unix.EBADF)
	ro, errno := s.Open(e.NodeID, unix.O_RDONLY)
	must(t, errno)
	_, errno = s.Write(e.NodeID, ro, 0, []byte("x"))
	want(t, "WRITE to a handle for reading", errno, unix.EBADF)
	want(t, "FALLOCATE of a handle for reading", s.Fallocate(e.NodeID, ro, 0, 1, 0), unix.EBADF)
	wo, errno := s.Open(e.NodeID, unix.O_WRONLY)
	must(t, errno)
	_, errno = s.Read(e.NodeID, wo, 0, 10)
	want(t, "READ from a handle for writing", errno, unix.EBADF)
}

func TestAppend(t *testing.T) {
	s := newShare(t)
	e, fh := s.mustCreate(t, root, "log", "first,")
	// Somebody on the host writes to it too: the guest's idea of the end is old.
	f, err := os.OpenFile(s.path("log"), os.O_APPEND|os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteString("host,")
	must(t, err)
	must(t, f.Close())
	if _, errno := s.WriteFlags(e.NodeID, fh, 6, []byte("guest"), 0, unix.O_APPEND|unix.O_RDWR); errno != 0 {
		t.Fatal(errno)
	}
	// A page that is written back has its place, even through such a handle.
	if _, errno := s.WriteFlags(e.NodeID, fh, 0, []byte("FIRST"), fuse.WriteCache, unix.O_APPEND|unix.O_RDWR); errno != 0 {
		t.Fatal(errno)
	}
	got, err := os.ReadFile(s.path("log"))
	if err != nil || string(got) != "FIRST,host,guest" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestWriteClearsSetIDBits(t *testing.T) {
	s := newShare(t)
	e, fh := s.mustCreate(t, root, "file", "x")
	to, toFH := s.mustCreate(t, root, "other", "x")
	mode := func() uint32 {
		a, errno := s.Getattr(e.NodeID)
		must(t, errno)
		_, errno = s.Setattr(e.NodeID, fuse.SetattrIn{Valid: fuse.FattrMode, Mode: 0o6755})
		must(t, errno)
		return a.Mode & 0o7777
	}
	mode()
	for _, tc := range []struct {
		name string
		do   func() unix.Errno
		want uint32
	}{
		{"write, privileged", func() unix.Errno { _, errno := s.Write(e.NodeID, fh, 0, []byte("y")); return errno }, 0o6755},
		{"write", func() unix.Errno {
			_, errno := s.WriteFlags(e.NodeID, fh, 0, []byte("y"), fuse.WriteKillSuidgid, 0)
			return errno
		}, 0o755},
		{"fallocate", func() unix.Errno { return s.Fallocate(e.NodeID, fh, 0, 100, 0) }, 0o755},
		{"copy_file_range", func() unix.Errno {
			_, errno := s.CopyFileRange(to.NodeID, toFH, 0, e.NodeID, fh, 0, 1)
			return errno
		}, 0o755},
		{"open and truncate, privileged", func() unix.Errno { _, errno := s.Open(e.NodeID, unix.O_RDWR|unix.O_TRUNC); return errno }, 0o6755},
		{"open and truncate", func() unix.Errno { _, errno := s.OpenKill(e.NodeID, unix.O_RDWR|unix.O_TRUNC); return errno }, 0o755},
	} {
		must(t, tc.do())
		if got := mode(); got != tc.want {
			t.Errorf("%s: mode %#o, want %#o", tc.name, got, tc.want)
		}
	}
}

func TestCreateAsCaller(t *testing.T) {
	s := newShare(t)
	for _, name := range []string{"plain", "setgid", "acl"} {
		must(t, os.Mkdir(s.path(name), 0o777))
	}
	must(t, os.Chown(s.path("setgid"), 0, 777))
	must(t, unix.Chmod(s.path("setgid"), 0o2777))
	// Default ACL user::rwx group::rwx other::r-x: the umask does not count.
	acl := fusetest.Pack(2, uint16(1), uint16(7), ^uint32(0), uint16(4), uint16(7), ^uint32(0), uint16(0x20), uint16(5), ^uint32(0))
	must(t, unix.Setxattr(s.path("acl"), aclDefault, acl, 0))
	c := s.As(1000, 1001)
	for _, tc := range []struct {
		dir               string
		gid               uint32
		dirMode, fileMode uint32 // of what is created with 0777 and 0666
	}{
		{"plain", 1001, 0o750, 0o640},
		{"setgid", 777, 0o2750, 0o640},
		{"acl", 1001, 0o775, 0o664},
	} {
		dir := s.mustLookup(t, root, tc.dir).NodeID
		check := func(what string, e fuse.EntryOut, errno unix.Errno, mode uint32) {
			t.Helper()
			if errno != 0 || e.Attr.UID != 1000 || e.Attr.GID != tc.gid || e.Attr.Mode != mode {
				t.Errorf("%s in %s: %d:%d %#o, %v; want 1000:%d %#o", what, tc.dir, e.Attr.UID, e.Attr.GID, e.Attr.Mode, errno, tc.gid, mode)
			}
			if got, errno := s.Getattr(e.NodeID); errno != 0 || got != e.Attr {
				t.Errorf("%s in %s: GETATTR says %+v, %v", what, tc.dir, got, errno)
			}
		}
		const umask = 0o027
		e, errno := c.Mkdir(dir, "dir", 0o777, umask)
		check("MKDIR", e, errno, unix.S_IFDIR|tc.dirMode)
		e, errno = c.Mknod(dir, "fifo", unix.S_IFIFO|0o666, 0, umask)
		check("MKNOD fifo", e, errno, unix.S_IFIFO|tc.fileMode)
		e, errno = c.Mknod(dir, "socket", unix.S_IFSOCK|0o666, 0, umask)
		check("MKNOD socket", e, errno, unix.S_IFSOCK|tc.fileMode)
		e, errno = c.Mknod(dir, "char", unix.S_IFCHR|0o666, fuse.EncodeDev(1, 0x12345), umask)
		check("MKNOD char", e, errno, unix.S_IFCHR|tc.fileMode)
		if e.Attr.Rdev != fuse.EncodeDev(1, 0x12345) {
			t.Errorf("device %#x", e.Attr.Rdev)
		}
		e, errno = c.Mknod(dir, "file", unix.S_IFREG|0o666, 0, umask)
		check("MKNOD file", e, errno, unix.S_IFREG|tc.fileMode)
		e, errno = c.Symlink(dir, "link", "/target")
		check("SYMLINK", e, errno, unix.S_IFLNK|0o777)
		e, fh, errno := c.Create(dir, "created", unix.O_RDWR, 0o666, umask)
		check("CREATE", e, errno, unix.S_IFREG|tc.fileMode)
		want(t, "RELEASE", s.Release(e.NodeID, fh), 0)
		e, fh, errno = c.Create(dir, "suid", unix.O_WRONLY, 0o4711, umask)
		if errno != 0 || e.Attr.Mode&0o7000 != 0o4000 {
			t.Errorf("CREATE set-uid: %#o, %v", e.Attr.Mode, errno)
		}
		want(t, "RELEASE", s.Release(e.NodeID, fh), 0)
		e, fh, errno = c.Tmpfile(dir, unix.O_RDWR, 0o666, umask)
		check("TMPFILE", e, errno, unix.S_IFREG|tc.fileMode)
		want(t, "RELEASE", s.Release(e.NodeID, fh), 0)
	}
	_, errno := s.As(fuse.NoID, 0).Mkdir(root, "nobody", 0o777, 0)
	want(t, "MKDIR by nobody in particular", errno, unix.EINVAL)
	_, errno = c.Mkdir(root, "plain", 0o777, 0)
	want(t, "MKDIR of what exists", errno, unix.EEXIST)
}

func TestCreateOpen(t *testing.T) {
	s := newShare(t)
	e, fh := s.mustCreate(t, root, "file", "contents")
	_, _, errno := s.Create(root, "file", unix.O_RDWR|unix.O_EXCL, 0o644, 0)
	want(t, "CREATE with O_EXCL of what exists", errno, unix.EEXIST)
	for _, flags := range []uint32{unix.O_RDWR, unix.O_RDWR | unix.O_TRUNC} {
		_, _, errno = s.Create(root, "file", flags, 0o644, 0)
		want(t, "CREATE of what exists", errno, unix.ESTALE)
	}
	if got, errno := s.Read(e.NodeID, fh, 0, 100); errno != 0 || string(got) != "contents" {
		t.Errorf("READ: %q, %v", got, errno)
	}
	_, errno = s.Symlink(root, "link", "file")
	must(t, errno)
	_, _, errno = s.Create(root, "link", unix.O_RDWR, 0o644, 0)
	want(t, "CREATE where a link is", errno, unix.ESTALE)
	_, errno = s.Mkdir(root, "dir", 0o755, 0)
	must(t, errno)
	_, _, errno = s.Create(root, "dir", unix.O_RDWR, 0o644, 0)
	want(t, "CREATE where a directory is", errno, unix.ESTALE)
	_, errno = s.Open(e.NodeID, unix.O_ACCMODE)
	want(t, "OPEN with a bad access mode", errno, unix.EINVAL)
	// What the guest must not open here.
	for name, mode := range map[string]uint32{"fifo": unix.S_IFIFO, "socket": unix.S_IFSOCK, "char": unix.S_IFCHR, "block": unix.S_IFBLK} {
		e, errno := s.Mknod(root, name, mode|0o666, fuse.EncodeDev(1, 3), 0)
		must(t, errno)
		_, errno = s.Open(e.NodeID, unix.O_RDWR)
		want(t, "OPEN of a "+name, errno, unix.ENXIO)
		_, errno = s.Opendir(e.NodeID)
		want(t, "OPENDIR of a "+name, errno, unix.ENOTDIR)
	}
	_, errno = s.Open(s.mustLookup(t, root, "link").NodeID, unix.O_RDONLY)
	want(t, "OPEN of a link", errno, unix.ELOOP)
	_, errno = s.Open(root, unix.O_RDONLY)
	want(t, "OPEN of a directory", errno, unix.EISDIR)
	// O_TMPFILE, with and without a name later.
	tmp, tmpFH, errno := s.Tmpfile(root, unix.O_RDWR, 0o600, 0)
	must(t, errno)
	if _, errno := s.Write(tmp.NodeID, tmpFH, 0, []byte("tmp")); errno != 0 {
		t.Error(errno)
	}
	linked, errno := s.Link(tmp.NodeID, root, "named")
	if errno != 0 || linked.NodeID != tmp.NodeID || linked.Attr.Nlink != 1 {
		t.Errorf("LINK of a TMPFILE: %+v, %v", linked, errno)
	}
	if got, err := os.ReadFile(s.path("named")); err != nil || string(got) != "tmp" {
		t.Errorf("%q, %v", got, err)
	}
	tmp, _, errno = s.Tmpfile(root, unix.O_RDWR|unix.O_EXCL, 0o600, 0)
	must(t, errno)
	_, errno = s.Link(tmp.NodeID, root, "never")
	want(t, "LINK of a TMPFILE with O_EXCL", errno, unix.ENOENT)
	_, _, errno = s.Tmpfile(root, unix.O_RDONLY, 0o600, 0)
	want(t, "TMPFILE for reading", errno, unix.EINVAL)
}

func TestLinksAndRemoval(t *testing.T) {
	s := newShare(t)
	e, fh := s.mustCreate(t, root, "file", "contents")
	dir, errno := s.Mkdir(root, "dir", 0o755, 0)
	must(t, errno)
	hard, errno := s.Link(e.NodeID, dir.NodeID, "hard")
	if errno != 0 || hard.NodeID != e.NodeID || hard.Attr.Nlink != 2 {
		t.Errorf("LINK: %+v, %v", hard, errno)
	}
	_, errno = s.Link(dir.NodeID, root, "dir2")
	want(t, "LINK of a directory", errno, unix.EPERM)
	_, errno = s.Link(e.NodeID, root, "file")
	want(t, "LINK to what exists", errno, unix.EEXIST)
	link, errno := s.Symlink(root, "link", "../../../etc/passwd")
	must(t, errno)
	if target, errno := s.Readlink(link.NodeID); errno != 0 || target != "../../../etc/passwd" {
		t.Errorf("READLINK: %q, %v", target, errno)
	}
	if l, errno := s.Link(link.NodeID, root, "link2"); errno != 0 || l.Attr.Mode&unix.S_IFMT != unix.S_IFLNK || l.Attr.Nlink != 2 {
		t.Errorf("LINK of a symbolic link: %+v, %v", l, errno)
	}
	_, errno = s.Readlink(e.NodeID)
	want(t, "READLINK of a file", errno, unix.EINVAL)
	want(t, "RMDIR of a full directory", s.Rmdir(root, "dir"), unix.ENOTEMPTY)
	want(t, "RMDIR of a file", s.Rmdir(root, "file"), unix.ENOTDIR)
	want(t, "UNLINK of a directory", s.Unlink(root, "dir"), unix.EISDIR)
	want(t, "UNLINK", s.Unlink(root, "file"), 0)
	want(t, "UNLINK of the other name", s.Unlink(dir.NodeID, "hard"), 0)
	want(t, "UNLINK again", s.Unlink(dir.NodeID, "hard"), unix.ENOENT)
	want(t, "RMDIR", s.Rmdir(root, "dir"), 0)
	// An open file without a name goes on.
	if got, errno := s.Read(e.NodeID, fh, 0, 100); errno != 0 || string(got) != "contents" {
		t.Errorf("READ of an unlinked file: %q, %v", got, errno)
	}
	if a, errno := s.Getattr(e.NodeID); errno != 0 || a.Nlink != 0 {
		t.Errorf("GETATTR of an unlinked file: %+v, %v", a, errno)
	}
	if a, errno := s.Setattr(e.NodeID, fuse.SetattrIn{Valid: fuse.FattrSize | fuse.FattrMode, Size: 3, Mode: 0o600}); errno != 0 || a.Size != 3 {
		t.Errorf("SETATTR of an unlinked file: %+v, %v", a, errno)
	}
	if a, errno := s.Fgetattr(e.NodeID, fh); errno != 0 || a.Size != 3 {
		t.Errorf("GETATTR by handle: %+v, %v", a, errno)
	}
	// So does a directory.
	_, errno = s.Getattr(dir.NodeID)
	want(t, "GETATTR of a removed directory", errno, 0)
	_, errno = s.Mkdir(dir.NodeID, "in", 0o755, 0)
	want(t, "MKDIR in a removed directory", errno, unix.ENOENT)
}

func TestRename(t *testing.T) {
	s := newShare(t)
	a, errno := s.Mkdir(root, "a", 0o755, 0)
	must(t, errno)
	b, errno := s.Mkdir(root, "b", 0o755, 0)
	must(t, errno)
	x, _ := s.mustCreate(t, a.NodeID, "x", "x")
	y, _ := s.mustCreate(t, b.NodeID, "y", "y")
	node := func(dir uint64, name string) uint64 {
		e, errno := s.Lookup(dir, name)
		if errno != 0 {
			return 0
		}
		return e.NodeID
	}
	want(t, "NOREPLACE onto something", s.Rename2(a.NodeID, "x", b.NodeID, "y", unix.RENAME_NOREPLACE), unix.EEXIST)
	want(t, "EXCHANGE", s.Rename2(a.NodeID, "x", b.NodeID, "y", unix.RENAME_EXCHANGE), 0)
	if node(a.NodeID, "x") != y.NodeID || node(b.NodeID, "y") != x.NodeID {
		t.Error("EXCHANGE did not exchange")
	}
	want(t, "NOREPLACE", s.Rename2(a.NodeID, "x", a.NodeID, "z", unix.RENAME_NOREPLACE), 0)
	want(t, "RENAME onto something", s.Rename(a.NodeID, "z", b.NodeID, "y"), 0)
	if node(b.NodeID, "y") != y.NodeID || node(a.NodeID, "z") != 0 {
		t.Error("RENAME did not replace")
	}
	if st, errno := s.Getattr(x.NodeID); errno != 0 || st.Nlink != 0 {
		t.Errorf("what was replaced: %+v, %v", st, errno)
	}
	want(t, "WHITEOUT", s.Rename2(b.NodeID, "y", b.NodeID, "w", unix.RENAME_WHITEOUT), 0)
	if e := s.mustLookup(t, b.NodeID, "y"); e.Attr.Mode&unix.S_IFMT != unix.S_IFCHR || e.Attr.Rdev != 0 {
		t.Errorf("no whiteout: %+v", e.Attr)
	}
	want(t, "directory into itself", s.Rename(root, "a", a.NodeID, "c"), unix.EINVAL)
	want(t, "directory", s.Rename(root, "a", b.NodeID, "a"), 0)
	want(t, "directory onto a full one", s.Rename(b.NodeID, "a", root, "b"), unix.ENOTEMPTY)
	want(t, "unknown flag", s.Rename2(b.NodeID, "a", root, "c", 8), unix.EINVAL)
	want(t, "absent", s.Rename(root, "absent", root, "c"), unix.ENOENT)
}

func TestXattr(t *testing.T) {
	s := newShare(t)
	e, _ := s.mustCreate(t, root, "file", "")
	const name = "trusted.test" // tmpfs has user.* since Linux 6.6 only
	want(t, "SETXATTR", s.Setxattr(e.NodeID, name, []byte("value"), 0, 0), 0)
	want(t, "SETXATTR create", s.Setxattr(e.NodeID, name, []byte("v"), unix.XATTR_CREATE, 0), unix.EEXIST)
	want(t, "SETXATTR replace", s.Setxattr(e.NodeID, "trusted.other", []byte("v"), unix.XATTR_REPLACE, 0), unix.ENODATA)
	if v, errno := s.Getxattr(e.NodeID, name, 100); errno != 0 || string(v) != "value" {
		t.Errorf("GETXATTR: %q, %v", v, errno)
	}
	if v, errno := s.Getxattr(e.NodeID, name, 0); errno != 0 || !bytes.Equal(v, fusetest.Pack(5, 0)) {
		t.Errorf("GETXATTR of the length: %v, %v", v, errno)
	}
	_, errno := s.Getxattr(e.NodeID, name, 4)
	want(t, "GETXATTR into too little", errno, unix.ERANGE)
	// The host's own are hidden.
	must(t, unix.Setxattr(s.path("file"), "security.test", []byte("host"), 0))
	if list, errno := s.Listxattr(e.NodeID, 100); errno != 0 || string(list) != name+"\x00" {
		t.Errorf("LISTXATTR: %q, %v", list, errno)
	}
	if v, errno := s.Listxattr(e.NodeID, 0); errno != 0 || !bytes.Equal(v, fusetest.Pack(len(name)+1, 0)) {
		t.Errorf("LISTXATTR of the length: %v, %v", v, errno)
	}
	_, errno = s.Listxattr(e.NodeID, 4)
	want(t, "LISTXATTR into too little", errno, unix.ERANGE)
	_, errno = s.Getxattr(e.NodeID, "security.test", 100)
	want(t, "GETXATTR of the host's", errno, unix.EOPNOTSUPP)
	want(t, "SETXATTR of the host's", s.Setxattr(e.NodeID, "security.selinux", []byte("x"), 0, 0), unix.EOPNOTSUPP)
	want(t, "REMOVEXATTR of the host's", s.Removexattr(e.NodeID, "security.test"), unix.EOPNOTSUPP)
	want(t, "REMOVEXATTR", s.Removexattr(e.NodeID, name), 0)
	_, errno = s.Getxattr(e.NodeID, name, 100)
	want(t, "GETXATTR of what is not there", errno, unix.ENODATA)
	// Nodes that cannot be opened have xattrs too.
	fifo, errno := s.Mknod(root, "fifo", unix.S_IFIFO|0o600, 0, 0)
	must(t, errno)
	link, errno := s.Symlink(root, "link", "file")
	must(t, errno)
	for _, n := range []uint64{fifo.NodeID, link.NodeID} {
		want(t, "SETXATTR", s.Setxattr(n, name, []byte("value"), 0, 0), 0)
		if v, errno := s.Getxattr(n, name, 100); errno != 0 || string(v) != "value" {
			t.Errorf("GETXATTR: %q, %v", v, errno)
		}
	}
	_, errno = s.Getxattr(e.NodeID, name, 100)
	want(t, "GETXATTR of what a link points to", errno, unix.ENODATA)
	// ACLs: setting one clears the set-group-id bit for callers outside of the
	// group. user::rw- user:1:rwx group::r-- mask::rwx other::---
	acl := fusetest.Pack(2, uint16(1), uint16(6), ^uint32(0), uint16(2), uint16(7), 1, uint16(4), uint16(4), ^uint32(0),
		uint16(0x10), uint16(7), ^uint32(0), uint16(0x20), uint16(0), ^uint32(0))
	_, errno = s.Setattr(e.NodeID, fuse.SetattrIn{Valid: fuse.FattrMode, Mode: 0o2755})
	must(t, errno)
	want(t, "SETXATTR of an ACL", s.Setxattr(e.NodeID, aclAccess, acl, 0, 0), 0)
	if a, errno := s.Getattr(e.NodeID); errno != 0 || a.Mode&0o7777 != 0o2670 {
		t.Errorf("mode %#o, %v", a.Mode, errno)
	}
	want(t, "SETXATTR of an ACL", s.Setxattr(e.NodeID, aclAccess, acl, 0, fuse.SetxattrACLKillSgid), 0)
	if a, errno := s.Getattr(e.NodeID); errno != 0 || a.Mode&0o7777 != 0o670 {
		t.Errorf("mode %#o, %v", a.Mode, errno)
	}
	if v, errno := s.Getxattr(e.NodeID, aclAccess, 4096); errno != 0 || !bytes.Equal(v, acl) {
		t.Errorf("GETXATTR of the ACL: %v, %v", v, errno)
	}
	big := make([]byte, xattrMax)
	switch errno := s.Setxattr(e.NodeID, name, big, 0, 0); errno {
	case 0, unix.ENOSPC, unix.E2BIG: // the host decides
	default:
		t.Errorf("SETXATTR of the largest: %v", errno)
	}
}

func TestShortSetxattr(t *testing.T) {
	s := newShare(t)
	_, errno := s.InitWith(7, 31, 0) // without SETXATTR_EXT
	must(t, errno)
	_, errno = s.Call(fuse.Setxattr, root, fusetest.Pack(1, 0, "trusted.a", []byte("b")), 0)
	want(t, "SETXATTR", errno, 0)
	if v, errno := s.Getxattr(root, "trusted.a", 10); errno != 0 || string(v) != "b" {
		t.Errorf("GETXATTR: %q, %v", v, errno)
	}
}

func TestReadOnlyShare(t *testing.T) {
	rw := newShare(t)
	rw.mustCreate(t, root, "file", "contents")
	_, errno := rw.Mkdir(root, "dir", 0o755, 0)
	must(t, errno)
	s := newShareOf(t, rw.dir, readOnly)
	e := s.mustLookup(t, root, "file")
	fh, errno := s.Open(e.NodeID, unix.O_RDONLY)
	must(t, errno)
	if got, errno := s.Read(e.NodeID, fh, 0, 100); errno != 0 || string(got) != "contents" {
		t.Errorf("READ: %q, %v", got, errno)
	}
	for name, do := range map[string]func() unix.Errno{
		"OPEN for writing": func() unix.Errno { _, errno := s.Open(e.NodeID, unix.O_WRONLY); return errno },
		"OPEN, truncating": func() unix.Errno { _, errno := s.Open(e.NodeID, unix.O_RDONLY|unix.O_TRUNC); return errno },
		"CREATE":           func() unix.Errno { _, _, errno := s.Create(root, "x", unix.O_RDWR, 0o644, 0); return errno },
		"CREATE, existing": func() unix.Errno { _, _, errno := s.Create(root, "file", unix.O_RDONLY, 0o644, 0); return errno },
		"TMPFILE":          func() unix.Errno { _, _, errno := s.Tmpfile(root, unix.O_RDWR, 0o644, 0); return errno },
		"MKDIR":            func() unix.Errno { _, errno := s.Mkdir(root, "x", 0o755, 0); return errno },
		"MKNOD":            func() unix.Errno { _, errno := s.Mknod(root, "x", unix.S_IFIFO, 0, 0); return errno },
		"SYMLINK":          func() unix.Errno { _, errno := s.Symlink(root, "x", "y"); return errno },
		"LINK":             func() unix.Errno { _, errno := s.Link(e.NodeID, root, "x"); return errno },
		"UNLINK":           func() unix.Errno { return s.Unlink(root, "file") },
		"RMDIR":            func() unix.Errno { return s.Rmdir(root, "dir") },
		"RENAME":           func() unix.Errno { return s.Rename(root, "file", root, "x") },
		"RENAME2":          func() unix.Errno { return s.Rename2(root, "file", root, "x", 0) },
		"SETATTR": func() unix.Errno {
			_, errno := s.Setattr(e.NodeID, fuse.SetattrIn{Valid: fuse.FattrMode})
			return errno
		},
		"WRITE":           func() unix.Errno { _, errno := s.Write(e.NodeID, fh, 0, []byte("x")); return errno },
		"FALLOCATE":       func() unix.Errno { return s.Fallocate(e.NodeID, fh, 0, 1, 0) },
		"COPY_FILE_RANGE": func() unix.Errno { _, errno := s.CopyFileRange(e.NodeID, fh, 0, e.NodeID, fh, 4, 1); return errno },
		"SETXATTR":        func() unix.Errno { return s.Setxattr(e.NodeID, "user.x", nil, 0, 0) },
		"REMOVEXATTR":     func() unix.Errno { return s.Removexattr(e.NodeID, "user.x") },
	} {
		want(t, name, do(), unix.EROFS)
	}
	// A read-only bind mount inside a writable share is the host kernel's.
	must(t, unix.Mount(rw.path("dir"), rw.path("dir"), "", unix.MS_BIND, ""))
	defer func() { must(t, unix.Unmount(rw.path("dir"), unix.MNT_DETACH)) }()
	must(t, unix.Mount("", rw.path("dir"), "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	dir := rw.mustLookup(t, root, "dir")
	_, errno = rw.Mkdir(dir.NodeID, "x", 0o755, 0)
	want(t, "MKDIR in a read-only mount", errno, unix.EROFS)
	_, errno = rw.Setattr(dir.NodeID, fuse.SetattrIn{Valid: fuse.FattrMode, Mode: 0o700})
	want(t, "SETATTR of a read-only mount", errno, unix.EROFS)
	same, errno := rw.Setattr(dir.NodeID, fuse.SetattrIn{Valid: fuse.FattrMode, Mode: dir.Attr.Mode})
	if errno != 0 || same.Mode != dir.Attr.Mode {
		t.Errorf("SETATTR that changes nothing: mode %o, %v", same.Mode, errno)
	}
	_, errno = rw.Setattr(dir.NodeID, fuse.SetattrIn{Valid: fuse.FattrMode | fuse.FattrMtime, Mode: dir.Attr.Mode})
	want(t, "SETATTR of the time in a read-only mount", errno, unix.EROFS)
}

func TestDeviceNumbers(t *testing.T) {
	for _, tc := range [][2]uint32{{0, 0}, {1, 3}, {8, 255}, {8, 256}, {4095, 0xfffff}} {
		dev := fuse.EncodeDev(tc[0], tc[1])
		if major, minor := fuse.DecodeDev(dev); major != tc[0] || minor != tc[1] {
			t.Errorf("%v became %d, %d", tc, major, minor)
		}
	}
	var st syscall.Stat_t
	must(t, syscall.Stat("/dev/null", &st))
	if fuse.EncodeDev(unix.Major(st.Rdev), unix.Minor(st.Rdev)) != 0x103 {
		t.Error("/dev/null is not 1:3")
	}
}
