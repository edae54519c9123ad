package main

import (
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// pathOp is a system call that takes a path.
type pathOp struct {
	name string
	// do calls it. What the path names must exist, unless creates.
	do      func(path string) error
	creates bool   // the last component
	writes  bool   // in the directory
	follows bool   // a link as the last component
	target  string // what has to be there: "file", "dir"
}

func ignoreFD(fd int, err error) error {
	if err == nil {
		_ = unix.Close(fd)
	}
	return err
}

var pathOps = []pathOp{
	{name: "chmod", do: func(p string) error { return unix.Chmod(p, 0o600) }, follows: true, target: "file"},
	{name: "chown", do: func(p string) error { return unix.Chown(p, -1, -1) }, follows: true, target: "file"},
	{name: "lchown", do: func(p string) error { return unix.Lchown(p, -1, -1) }, target: "file"},
	{name: "stat", do: func(p string) error { var st unix.Stat_t; return unix.Stat(p, &st) }, follows: true, target: "file"},
	{name: "lstat", do: func(p string) error { var st unix.Stat_t; return unix.Lstat(p, &st) }, target: "file"},
	{name: "open", do: func(p string) error { return ignoreFD(unix.Open(p, unix.O_RDONLY|unix.O_CLOEXEC, 0)) }, follows: true, target: "file"},
	{name: "truncate", do: func(p string) error { return unix.Truncate(p, 0) }, follows: true, target: "file"},
	{name: "utimensat", do: func(p string) error { return unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{{}, {}}, 0) }, follows: true, target: "file"},
	{name: "unlink", do: unix.Unlink, writes: true, target: "file"},
	{name: "rmdir", do: unix.Rmdir, writes: true, target: "dir"},
	{name: "open-create", do: func(p string) error {
		return ignoreFD(unix.Open(p, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o600))
	}, creates: true, writes: true},
	{name: "mkdir", do: func(p string) error { return unix.Mkdir(p, 0o700) }, creates: true, writes: true},
	{name: "mkfifo", do: func(p string) error { return unix.Mkfifo(p, 0o600) }, creates: true, writes: true},
	{name: "symlink", do: func(p string) error { return unix.Symlink("x", p) }, creates: true, writes: true},
	{name: "link-to", do: func(p string) error { return unix.Link(filepath.Join(baseOf(p), "source"), p) }, creates: true, writes: true},
	{name: "rename-to", do: func(p string) error { return unix.Rename(filepath.Join(baseOf(p), "source"), p) }, creates: true, writes: true},
	{name: "rename-from", do: func(p string) error { return unix.Rename(p, filepath.Join(baseOf(p), "renamed")) }, writes: true, target: "file"},
	{name: "link-from", do: func(p string) error { return unix.Link(p, filepath.Join(baseOf(p), "linked")) }, target: "file"},
}

// baseOf returns the check's directory: paths are two levels deeper at most.
func baseOf(p string) string {
	for len(p) > 1 {
		var st unix.Stat_t
		if unix.Lstat(filepath.Join(p, "source"), &st) == nil {
			return p
		}
		p = filepath.Dir(p)
	}
	return p
}

// pathChecks are the errors that every system call with a path has.
func pathChecks() []check {
	var all []check
	add := func(name string, f func(t *T)) { all = append(all, check{name, f}) }
	for _, op := range pathOps {
		prepare := func(t *T) {
			t.file("source", "", 0o644)
			t.mkdir("sub", 0o755)
			switch op.target {
			case "file":
				t.file("sub/x", "", 0o666)
			case "dir":
				t.mkdir("sub/x", 0o777)
			}
		}
		add(op.name+"/succeeds", func(t *T) {
			prepare(t)
			t.want(op.name, op.do(t.path("sub/x")), 0)
		})
		add(op.name+"/ENOTDIR", func(t *T) {
			prepare(t)
			t.file("file", "", 0o644)
			t.want(op.name, op.do(t.path("file/x")), unix.ENOTDIR)
		})
		add(op.name+"/ENOENT-parent", func(t *T) {
			prepare(t)
			t.want(op.name, op.do(t.path("absent/x")), unix.ENOENT)
		})
		add(op.name+"/ENAMETOOLONG-component", func(t *T) {
			prepare(t)
			t.want("256 bytes", op.do(t.dir+"/sub/"+strings.Repeat("n", 256)), unix.ENAMETOOLONG)
		})
		add(op.name+"/ENAMETOOLONG-path", func(t *T) {
			prepare(t)
			t.want("4096 bytes", op.do(t.dir+"/"+strings.Repeat("./", 2048)+"x"), unix.ENAMETOOLONG)
		})
		add(op.name+"/ELOOP", func(t *T) {
			prepare(t)
			t.must(unix.Symlink("loop2", t.path("loop1")))
			t.must(unix.Symlink("loop1", t.path("loop2")))
			t.want(op.name, op.do(t.path("loop1/x")), unix.ELOOP)
		})
		add(op.name+"/EACCES-search", func(t *T) {
			prepare(t)
			t.must(unix.Chmod(t.path("sub"), 0o600))
			t.must(unix.Chmod(t.dir, 0o777))
			t.must(unix.Chown(t.path("source"), 1000, 1000))
			t.must(unix.Chown(t.path("sub"), 1000, 1000))
			t.as(1000, 1000, nil, func() { t.want(op.name, op.do(t.path("sub/x")), unix.EACCES) })
		})
		if op.writes {
			add(op.name+"/EACCES-write", func(t *T) {
				prepare(t)
				t.must(unix.Chmod(t.dir, 0o777))
				t.must(unix.Chown(t.path("source"), 1000, 1000))
				t.as(1000, 1000, nil, func() { t.want(op.name, op.do(t.path("sub/x")), unix.EACCES) })
			})
		}
		if op.creates && op.name != "rename-to" {
			for _, kind := range []string{"file", "dir", "link", "fifo"} {
				add(op.name+"/EEXIST-"+kind, func(t *T) {
					prepare(t)
					p := t.path("sub/x")
					switch kind {
					case "file":
						t.file("sub/x", "", 0o644)
					case "dir":
						t.mkdir("sub/x", 0o755)
					case "link":
						t.must(unix.Symlink("absent", p))
					case "fifo":
						t.must(unix.Mkfifo(p, 0o644))
					}
					t.want(op.name, op.do(p), unix.EEXIST)
				})
			}
		}
		if !op.creates {
			add(op.name+"/ENOENT", func(t *T) {
				prepare(t)
				t.want(op.name, op.do(t.path("sub/absent")), unix.ENOENT)
			})
		}
		if op.follows {
			add(op.name+"/follows-link", func(t *T) {
				prepare(t)
				t.must(unix.Symlink("sub/x", t.path("link")))
				t.want(op.name, op.do(t.path("link")), 0)
				t.must(unix.Symlink("absent", t.path("dangling")))
				t.want(op.name, op.do(t.path("dangling")), unix.ENOENT)
				t.must(unix.Symlink("self", t.path("self")))
				t.want(op.name, op.do(t.path("self")), unix.ELOOP)
			})
		}
		add(op.name+"/long-name", func(t *T) {
			prepare(t)
			long := t.dir + "/sub/" + strings.Repeat("é", 127) + "n" // 255 bytes
			switch op.target {
			case "file", "dir":
				t.must(unix.Rename(t.path("sub/x"), long))
			}
			t.want("255 bytes", op.do(long), 0)
		})
	}
	return all
}
