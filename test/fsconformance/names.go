package main

import (
	"fmt"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// createChecks are those of mkdir, mknod, mkfifo, symlink and of what they
// have in common.
var createChecks = []check{
	{"create/umask", func(t *T) {
		// The umask is the process's: this check runs alone.
		defer unix.Umask(unix.Umask(0o027))
		t.must(unix.Mkdir(t.path("dir"), 0o777))
		t.must(unix.Mkfifo(t.path("fifo"), 0o666))
		t.open(t.path("file"), unix.O_CREAT|unix.O_RDWR, 0o666)
		t.must(unix.Mknod(t.path("node"), unix.S_IFREG|0o666, 0))
		t.wantMode(t.path("dir"), 0o750)
		t.wantMode(t.path("fifo"), 0o640)
		t.wantMode(t.path("file"), 0o640)
		t.wantMode(t.path("node"), 0o640)
	}},
	{"create/owner", func(t *T) {
		t.must(unix.Chmod(t.dir, 0o777))
		t.as(1000, 1001, nil, func() {
			t.must(unix.Mkdir(t.path("dir"), 0o755))
			t.must(unix.Mkfifo(t.path("fifo"), 0o644))
			t.must(unix.Symlink("x", t.path("link")))
			t.must(ignoreFD(unix.Open(t.path("file"), unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)))
		})
		for _, n := range []string{"dir", "fifo", "link", "file"} {
			t.wantOwner(t.path(n), 1000, 1001)
		}
	}},
	{"create/setgid-directory", func(t *T) {
		t.must(unix.Chown(t.dir, 0, 3000))
		t.must(unix.Chmod(t.dir, 0o2777))
		t.as(1000, 1001, nil, func() {
			t.must(unix.Mkdir(t.path("dir"), 0o755))
			t.must(unix.Mkfifo(t.path("fifo"), 0o644))
			t.must(ignoreFD(unix.Open(t.path("file"), unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o2755)))
		})
		for _, n := range []string{"dir", "fifo", "file"} {
			t.wantOwner(t.path(n), 1000, 3000)
		}
		t.wantMode(t.path("dir"), 0o2755)
		// Not for somebody outside of the group.
		t.wantMode(t.path("file"), 0o755)
	}},
	{"create/set-id-bits", func(t *T) {
		t.must(unix.Chmod(t.dir, 0o777))
		t.as(1000, 1001, nil, func() {
			t.must(ignoreFD(unix.Open(t.path("file"), unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o6755)))
		})
		t.wantMode(t.path("file"), 0o6755)
		t.wantOwner(t.path("file"), 1000, 1001)
	}},
	{"create/writable-despite-mode", func(t *T) {
		t.must(unix.Chmod(t.dir, 0o777))
		t.as(1000, 1000, nil, func() {
			fd, err := unix.Open(t.path("file"), unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC, 0)
			t.want("open", err, 0)
			_, err = unix.Write(fd, []byte("x"))
			t.want("write", err, 0)
			_ = unix.Close(fd)
			t.want("open again", ignoreFD(unix.Open(t.path("file"), unix.O_RDWR|unix.O_CLOEXEC, 0)), unix.EACCES)
		})
	}},
	{"mkdir/nlink", func(t *T) {
		d := t.mkdir("dir", 0o700)
		before := t.stat(d).Nlink
		t.must(unix.Mkdir(d+"/sub", 0o700))
		if got := t.stat(d).Nlink; before != 1 && got != before+1 { // 1: the file system does not count
			t.failf("%d links before, %d after", before, got)
		}
	}},
	{"mkdir/trailing-slash", func(t *T) { t.want("mkdir", unix.Mkdir(t.path("dir")+"/", 0o700), 0) }},
	{"mkdir/dot", func(t *T) {
		t.want("mkdir", unix.Mkdir(t.dir+"/.", 0o700), unix.EEXIST)
		t.want("mkdir", unix.Mkdir(t.dir+"/..", 0o700), unix.EEXIST)
	}},
	{"mkdir/deep", func(t *T) {
		p := t.dir
		for i := range 60 {
			p += fmt.Sprintf("/%d", i)
			t.must(unix.Mkdir(p, 0o700))
		}
		t.must(os.WriteFile(p+"/file", []byte("deep"), 0o600))
		t.wantContents(p+"/file", "deep")
	}},
	{"mknod/fifo", func(t *T) {
		p := t.path("fifo")
		t.must(unix.Mkfifo(p, 0o600))
		r := t.open(p, unix.O_RDONLY|unix.O_NONBLOCK, 0)
		w := t.open(p, unix.O_WRONLY, 0)
		_, err := unix.Write(w, []byte("through"))
		t.must(err)
		buf := make([]byte, 10)
		if n, err := unix.Read(r, buf); err != nil || string(buf[:n]) != "through" {
			t.failf("read %q, %v", buf[:n], err)
		}
	}},
	{"mknod/device", func(t *T) {
		p := t.path("null")
		t.must(unix.Mknod(p, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
		st := t.stat(p)
		if st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(1, 3) {
			t.failf("mode %#o, device %#x", st.Mode, st.Rdev)
		}
		p = t.path("block")
		t.must(unix.Mknod(p, unix.S_IFBLK|0o600, int(unix.Mkdev(300, 70000))))
		if st := t.stat(p); st.Mode&unix.S_IFMT != unix.S_IFBLK || st.Rdev != unix.Mkdev(300, 70000) {
			t.failf("mode %#o, device %#x", st.Mode, st.Rdev)
		}
	}},
	{"mknod/EPERM", func(t *T) {
		t.must(unix.Chmod(t.dir, 0o777))
		t.as(1000, 1000, nil, func() {
			t.want("mknod", unix.Mknod(t.path("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))), unix.EPERM)
		})
	}},
	{"mknod/socket", func(t *T) {
		// The path of a socket is short: go there.
		l, err := net.Listen("unix", shortPath(t))
		t.must(err)
		defer l.Close()
		c, err := net.Dial("unix", l.Addr().String())
		t.want("connect", err, 0)
		if err == nil {
			_ = c.Close()
		}
	}},
	{"symlink/targets", func(t *T) {
		for i, target := range []string{"x", "/", "../..", strings.Repeat("y", 255), strings.Repeat("z/", 2047) + "z", "with space\nand line"} {
			p := t.path(fmt.Sprint(i))
			t.want("symlink", unix.Symlink(target, p), 0)
			buf := make([]byte, 5000)
			n, err := unix.Readlink(p, buf)
			if err != nil || string(buf[:n]) != target {
				t.failf("readlink: %d bytes of %d, %v", n, len(target), err)
			}
			if st := t.stat(p); st.Size != int64(len(target)) || st.Mode != unix.S_IFLNK|0o777 {
				t.failf("size %d, mode %#o", st.Size, st.Mode)
			}
		}
		t.want("empty", unix.Symlink("", t.path("empty")), unix.ENOENT)
		t.want("too long", unix.Symlink(strings.Repeat("x", 4096), t.path("long")), unix.ENAMETOOLONG)
	}},
	{"symlink/readlink-of-file", func(t *T) {
		_, err := unix.Readlink(t.file("file", "", 0o600), make([]byte, 10))
		t.want("readlink", err, unix.EINVAL)
	}},
	{"names/bytes", func(t *T) {
		// Any byte but / and NUL.
		var name []byte
		for b := 1; b < 256; b++ {
			if b != '/' {
				name = append(name, byte(b))
			}
		}
		for len(name) > 0 {
			n := min(len(name), 100)
			p := t.dir + "/" + string(name[:n])
			t.must(os.WriteFile(p, nil, 0o600))
			t.want("unlink", unix.Unlink(p), 0)
			name = name[n:]
		}
	}},
	{"names/case", func(t *T) {
		t.file("Name", "1", 0o600)
		t.file("name", "2", 0o600)
		t.wantContents(t.path("Name"), "1")
	}},
}

// shortPath returns a path below /proc/self/fd for a name in the check's
// directory.
func shortPath(t *T) string {
	return fmt.Sprintf("/proc/self/fd/%d/s", t.open(t.dir, unix.O_RDONLY|unix.O_DIRECTORY, 0))
}

// linkChecks are link's.
var linkChecks = []check{
	{"link/same-inode", func(t *T) {
		p := t.file("file", "contents", 0o640)
		t.want("link", unix.Link(p, t.path("other")), 0)
		a, b := t.stat(p), t.stat(t.path("other"))
		if a.Ino != b.Ino || a.Dev != b.Dev || a.Nlink != 2 || b.Nlink != 2 {
			t.failf("inodes %d %d, links %d %d", a.Ino, b.Ino, a.Nlink, b.Nlink)
		}
		t.must(os.WriteFile(t.path("other"), []byte("changed"), 0))
		t.wantContents(p, "changed")
		t.must(unix.Chmod(p, 0o600))
		t.wantMode(t.path("other"), 0o600)
		t.must(unix.Unlink(p))
		if got := t.stat(t.path("other")).Nlink; got != 1 {
			t.failf("%d links after unlink", got)
		}
		t.wantContents(t.path("other"), "changed")
	}},
	{"link/directory", func(t *T) {
		t.want("link", unix.Link(t.mkdir("dir", 0o700), t.path("other")), unix.EPERM)
	}},
	{"link/of-a-link", func(t *T) {
		t.file("file", "", 0o600)
		t.must(unix.Symlink("file", t.path("link")))
		t.want("link", unix.Link(t.path("link"), t.path("other")), 0)
		if st := t.stat(t.path("other")); st.Mode&unix.S_IFMT != unix.S_IFLNK {
			t.failf("mode %#o, want a symbolic link", st.Mode)
		}
		t.want("follow", unix.Linkat(unix.AT_FDCWD, t.path("link"), unix.AT_FDCWD, t.path("third"), unix.AT_SYMLINK_FOLLOW), 0)
		if st := t.stat(t.path("third")); st.Mode&unix.S_IFMT != unix.S_IFREG {
			t.failf("mode %#o, want a file", st.Mode)
		}
	}},
	{"link/many", func(t *T) {
		p := t.file("file", "", 0o600)
		for i := range 500 {
			t.must(unix.Link(p, t.path(fmt.Sprint(i))))
		}
		if got := t.stat(p).Nlink; got != 501 {
			t.failf("%d links", got)
		}
	}},
	{"link/special", func(t *T) {
		t.must(unix.Mkfifo(t.path("fifo"), 0o600))
		t.want("link", unix.Link(t.path("fifo"), t.path("other")), 0)
	}},
}

// removeChecks are those of unlink and rmdir.
var removeChecks = []check{
	{"unlink/directory", func(t *T) { t.want("unlink", unix.Unlink(t.mkdir("dir", 0o700)), unix.EISDIR) }},
	{"unlink/kinds", func(t *T) {
		t.must(unix.Mkfifo(t.path("fifo"), 0o600))
		t.must(unix.Symlink("absent", t.path("link")))
		for _, n := range []string{"fifo", "link"} {
			t.want(n, unix.Unlink(t.path(n)), 0)
			t.wantAbsent(t.path(n))
		}
	}},
	{"unlink/open-file", func(t *T) {
		p := t.file("file", "contents", 0o600)
		fd := t.open(p, unix.O_RDWR, 0)
		t.must(unix.Unlink(p))
		t.wantAbsent(p)
		if st := t.fstat(fd); st.Nlink != 0 || st.Size != 8 {
			t.failf("links %d, size %d", st.Nlink, st.Size)
		}
		buf := make([]byte, 20)
		if n, err := unix.Pread(fd, buf, 0); err != nil || string(buf[:n]) != "contents" {
			t.failf("read %q, %v", buf[:n], err)
		}
		_, err := unix.Pwrite(fd, []byte("more"), 8)
		t.want("write", err, 0)
		t.want("fchmod", unix.Fchmod(fd, 0o640), 0)
		t.want("fchown", unix.Fchown(fd, 1, 1), 0)
		t.want("ftruncate", unix.Ftruncate(fd, 3), 0)
		t.want("fsync", unix.Fsync(fd), 0)
		if st := t.fstat(fd); st.Size != 3 || st.Uid != 1 || st.Mode&0o777 != 0o640 {
			t.failf("size %d, owner %d, mode %#o", st.Size, st.Uid, st.Mode)
		}
		// Its name is free.
		t.file("file", "new", 0o600)
		if n, err := unix.Pread(fd, buf, 0); err != nil || string(buf[:n]) != "con" {
			t.failf("read %q, %v", buf[:n], err)
		}
	}},
	{"unlink/sticky", func(t *T) {
		d := t.mkdir("dir", 0o1777)
		p := t.file("dir/file", "", 0o666)
		t.as(1000, 1000, nil, func() {
			t.want("unlink", unix.Unlink(p), unix.EPERM)
			t.want("rename", unix.Rename(p, d+"/other"), unix.EPERM)
		})
		t.must(unix.Chown(p, 1000, 1000))
		t.as(1000, 1000, nil, func() { t.want("own", unix.Unlink(p), 0) })
	}},
	{"rmdir/full", func(t *T) {
		d := t.mkdir("dir", 0o700)
		t.file("dir/file", "", 0o600)
		if err := unix.Rmdir(d); err != unix.ENOTEMPTY && err != unix.EEXIST {
			t.failf("rmdir: %v", err)
		}
	}},
	{"rmdir/file", func(t *T) { t.want("rmdir", unix.Rmdir(t.file("file", "", 0o600)), unix.ENOTDIR) }},
	{"rmdir/link", func(t *T) {
		t.mkdir("dir", 0o700)
		t.must(unix.Symlink("dir", t.path("link")))
		t.want("rmdir", unix.Rmdir(t.path("link")), unix.ENOTDIR)
	}},
	{"rmdir/dot", func(t *T) {
		d := t.mkdir("dir", 0o700)
		t.want("rmdir .", unix.Rmdir(d+"/."), unix.EINVAL)
		if err := unix.Rmdir(d + "/.."); err != unix.ENOTEMPTY && err != unix.EEXIST {
			t.failf("rmdir ..: %v", err)
		}
	}},
	{"rmdir/open-directory", func(t *T) {
		d := t.mkdir("dir", 0o700)
		fd := t.open(d, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		t.must(unix.Rmdir(d))
		t.want("create in it", ignoreFD(unix.Openat(fd, "x", unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)), unix.ENOENT)
		if n, err := unix.ReadDirent(fd, make([]byte, 4096)); err != nil && err != unix.ENOENT || n > 100 {
			t.failf("reading it: %d, %v", n, err)
		}
	}},
}

// renameChecks are rename's and renameat2's.
var renameChecks = []check{
	{"rename/replaces-file", func(t *T) {
		a, b := t.file("a", "a", 0o600), t.file("b", "b", 0o600)
		ino := t.stat(a).Ino
		fd := t.open(b, unix.O_RDONLY, 0)
		t.want("rename", unix.Rename(a, b), 0)
		t.wantAbsent(a)
		t.wantContents(b, "a")
		if st := t.stat(b); st.Ino != ino {
			t.failf("another inode: %d, %d", st.Ino, ino)
		}
		if st := t.fstat(fd); st.Nlink != 0 {
			t.failf("what was replaced has %d links", st.Nlink)
		}
	}},
	{"rename/hard-links-are-the-same", func(t *T) {
		a := t.file("a", "", 0o600)
		t.must(unix.Link(a, t.path("b")))
		t.want("rename", unix.Rename(a, t.path("b")), 0)
		if t.stat(a).Nlink != 2 {
			t.failf("rename of two names of a file did something")
		}
	}},
	{"rename/directories", func(t *T) {
		a, b := t.mkdir("a", 0o700), t.mkdir("b", 0o700)
		t.file("a/file", "x", 0o600)
		t.want("onto an empty one", unix.Rename(a, b), 0)
		t.wantContents(t.path("b/file"), "x")
		c := t.mkdir("c", 0o700)
		if err := unix.Rename(c, b); err != unix.ENOTEMPTY && err != unix.EEXIST {
			t.failf("onto a full one: %v", err)
		}
		f := t.file("f", "", 0o600)
		t.want("directory onto file", unix.Rename(c, f), unix.ENOTDIR)
		t.want("file onto directory", unix.Rename(f, c), unix.EISDIR)
		t.want("into itself", unix.Rename(b, b+"/sub"), unix.EINVAL)
		t.want(".", unix.Rename(b+"/.", t.path("d")), unix.EBUSY)
	}},
	{"rename/moved-tree-is-usable", func(t *T) {
		t.mkdir("a", 0o700)
		t.mkdir("a/b", 0o700)
		t.mkdir("c", 0o700)
		p := t.file("a/b/file", "1", 0o600)
		fd := t.open(p, unix.O_RDWR, 0)
		t.must(unix.Rename(t.path("a/b"), t.path("c/d")))
		_, err := unix.Pwrite(fd, []byte("2"), 0)
		t.want("write through an old descriptor", err, 0)
		t.wantContents(t.path("c/d/file"), "2")
		t.must(os.WriteFile(t.path("c/d/new"), []byte("3"), 0o600))
		t.wantAbsent(t.path("a/b"))
	}},
	{"rename/dotdot-follows", func(t *T) {
		t.mkdir("a", 0o700)
		t.mkdir("a/sub", 0o700)
		t.mkdir("b", 0o700)
		t.file("b/mark", "b", 0o600)
		fd := t.open(t.path("a/sub"), unix.O_RDONLY|unix.O_DIRECTORY, 0)
		t.must(unix.Rename(t.path("a/sub"), t.path("b/sub")))
		t.want("../mark", ignoreFD(unix.Openat(fd, "../mark", unix.O_RDONLY|unix.O_CLOEXEC, 0)), 0)
	}},
	{"rename/noreplace", func(t *T) {
		a, b := t.file("a", "a", 0o600), t.file("b", "b", 0o600)
		err := unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_NOREPLACE)
		t.want("onto something", err, unix.EEXIST)
		t.want("elsewhere", unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, t.path("c"), unix.RENAME_NOREPLACE), 0)
		t.wantContents(t.path("c"), "a")
	}},
	{"rename/exchange", func(t *T) {
		a, d := t.file("a", "a", 0o600), t.mkdir("d", 0o700)
		t.file("d/in", "in", 0o600)
		t.want("exchange", unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, d, unix.RENAME_EXCHANGE), 0)
		t.wantContents(t.path("d"), "a")
		t.wantContents(t.path("a/in"), "in")
		t.want("with nothing", unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, t.path("x"), unix.RENAME_EXCHANGE), unix.ENOENT)
	}},
	{"rename/whiteout", func(t *T) {
		a := t.file("a", "a", 0o600)
		err := unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, t.path("b"), unix.RENAME_WHITEOUT)
		if err == unix.EINVAL || err == unix.EPERM {
			t.skipped = "RENAME_WHITEOUT: " + err.Error() // overlayfs; CAP_MKNOD
			return
		}
		t.want("rename", err, 0)
		if st := t.stat(a); st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
			t.failf("mode %#o, device %#x: no whiteout", st.Mode, st.Rdev)
		}
	}},
	{"rename/bad-flags", func(t *T) {
		a := t.file("a", "", 0o600)
		t.want("flags", unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, t.path("b"), unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE), unix.EINVAL)
	}},
	{"rename/sticky-target", func(t *T) {
		t.mkdir("dir", 0o1777)
		p := t.file("dir/theirs", "", 0o666)
		t.must(unix.Chmod(t.dir, 0o777))
		t.as(1000, 1000, nil, func() {
			t.must(ignoreFD(unix.Open(t.path("dir/mine"), unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)))
			t.want("rename", unix.Rename(t.path("dir/mine"), p), unix.EPERM)
		})
	}},
}
