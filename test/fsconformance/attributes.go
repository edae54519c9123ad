package main

import (
	"time"

	"golang.org/x/sys/unix"
)

// modeChecks are chmod's.
var modeChecks = []check{
	{"chmod/all-bits", func(t *T) {
		for _, kind := range []string{"file", "dir", "fifo"} {
			p := t.path(kind)
			switch kind {
			case "file":
				t.file(kind, "", 0o600)
			case "dir":
				t.mkdir(kind, 0o700)
			case "fifo":
				t.must(unix.Mkfifo(p, 0o600))
			}
			for _, mode := range []uint32{0, 0o111, 0o222, 0o444, 0o777, 0o1777, 0o2755, 0o4711, 0o7777} {
				t.want(kind, unix.Chmod(p, mode), 0)
				t.wantMode(p, mode)
			}
			t.must(unix.Chmod(p, 0o700))
		}
	}},
	{"chmod/fchmod", func(t *T) {
		p := t.file("file", "", 0o600)
		t.want("fchmod", unix.Fchmod(t.open(p, unix.O_RDONLY, 0), 0o4640), 0)
		t.wantMode(p, 0o4640)
	}},
	{"chmod/ctime", func(t *T) {
		p := t.file("file", "", 0o600)
		before := t.stat(p).Ctim
		time.Sleep(20 * time.Millisecond)
		t.must(unix.Chmod(p, 0o640))
		if !after(t.stat(p).Ctim, before) {
			t.failf("ctime did not change")
		}
	}},
	{"chmod/EPERM-not-owner", func(t *T) {
		p := t.file("file", "", 0o666)
		t.as(1000, 1000, nil, func() { t.want("chmod", unix.Chmod(p, 0o600), unix.EPERM) })
		t.wantMode(p, 0o666)
	}},
	{"chmod/owner", func(t *T) {
		p := t.file("file", "", 0o666)
		t.must(unix.Chown(p, 1000, 1000))
		t.as(1000, 1000, nil, func() { t.want("chmod", unix.Chmod(p, 0o640), 0) })
		t.wantMode(p, 0o640)
	}},
	{"chmod/sgid-cleared-for-outsider", func(t *T) {
		p := t.file("file", "", 0o755)
		t.must(unix.Chown(p, 1000, 2000))
		t.as(1000, 1000, nil, func() { t.want("chmod", unix.Chmod(p, 0o2755), 0) })
		t.wantMode(p, 0o755)
		t.as(1000, 1000, []int{2000}, func() { t.want("chmod", unix.Chmod(p, 0o2755), 0) })
		t.wantMode(p, 0o2755)
	}},
	{"chmod/permissions-count-at-once", func(t *T) {
		p := t.file("file", "x", 0o600)
		read := func() error { return ignoreFD(unix.Open(p, unix.O_RDONLY|unix.O_CLOEXEC, 0)) }
		t.as(1000, 1000, nil, func() { t.want("open", read(), unix.EACCES) })
		t.must(unix.Chmod(p, 0o644))
		t.as(1000, 1000, nil, func() { t.want("open", read(), 0) })
		t.must(unix.Chmod(p, 0o600))
		t.as(1000, 1000, nil, func() { t.want("open", read(), unix.EACCES) })
	}},
}

// ownerChecks are chown's.
var ownerChecks = []check{
	{"chown/ids", func(t *T) {
		p := t.file("file", "", 0o600)
		for _, id := range [][4]int{{1, 2, 1, 2}, {-1, 3, 1, 3}, {4, -1, 4, 3}, {-1, -1, 4, 3}, {1 << 31, 1<<32 - 2, 1 << 31, 1<<32 - 2}} {
			t.want("chown", unix.Chown(p, id[0], id[1]), 0)
			t.wantOwner(p, uint32(id[2]), uint32(id[3]))
		}
	}},
	{"chown/kinds", func(t *T) {
		d := t.mkdir("dir", 0o700)
		t.must(unix.Mkfifo(t.path("fifo"), 0o600))
		t.must(unix.Symlink("absent", t.path("link")))
		for _, p := range []string{d, t.path("fifo"), t.path("link")} {
			t.want("lchown", unix.Lchown(p, 12, 34), 0)
			t.wantOwner(p, 12, 34)
		}
	}},
	{"chown/lchown-spares-target", func(t *T) {
		p := t.file("file", "", 0o600)
		t.must(unix.Chown(p, 5, 6))
		t.must(unix.Symlink("file", t.path("link")))
		t.want("lchown", unix.Lchown(t.path("link"), 7, 8), 0)
		t.wantOwner(p, 5, 6)
		t.want("chown", unix.Chown(t.path("link"), 9, 10), 0)
		t.wantOwner(p, 9, 10)
		t.wantOwner(t.path("link"), 7, 8)
	}},
	{"chown/clears-set-id-bits", func(t *T) {
		p := t.file("file", "", 0o6755)
		t.want("chown", unix.Chown(p, 1, 1), 0)
		t.wantMode(p, 0o755)
		t.must(unix.Chmod(p, 0o6755))
		t.want("chown", unix.Chown(p, -1, -1), 0)
		t.wantMode(p, 0o755)
		t.must(unix.Chmod(p, 0o6755))
		t.want("fchown", unix.Fchown(t.open(p, unix.O_RDONLY, 0), 2, -1), 0)
		t.wantMode(p, 0o755)
	}},
	{"chown/keeps-sgid-without-group-execute", func(t *T) {
		p := t.file("file", "", 0o2744)
		t.must(unix.Chown(p, 1, 0))
		t.wantMode(p, 0o2744)
	}},
	{"chown/keeps-directory-bits", func(t *T) {
		p := t.mkdir("dir", 0o7777)
		t.want("chown", unix.Chown(p, 1, 1), 0)
		t.wantMode(p, 0o7777)
	}},
	{"chown/owner-changes-group", func(t *T) {
		p := t.file("file", "", 0o6755)
		t.must(unix.Chown(p, 1000, 1000))
		t.must(unix.Chmod(p, 0o6755))
		t.as(1000, 1000, []int{2000}, func() {
			t.want("to one's group", unix.Chown(p, -1, 2000), 0)
			t.want("to another group", unix.Chown(p, -1, 3000), unix.EPERM)
			t.want("to another owner", unix.Chown(p, 1001, -1), unix.EPERM)
		})
		t.wantOwner(p, 1000, 2000)
		t.wantMode(p, 0o755)
	}},
	{"chown/EPERM-not-owner", func(t *T) {
		p := t.file("file", "", 0o666)
		t.as(1000, 1000, nil, func() { t.want("chown", unix.Chown(p, 1000, 1000), unix.EPERM) })
	}},
}

func after(a, b unix.Timespec) bool { return a.Nano() > b.Nano() }

// timeChecks are utimensat's, and what changes times besides.
var timeChecks = []check{
	{"utimensat/values", func(t *T) {
		p := t.file("file", "", 0o600)
		for _, ts := range [][2]unix.Timespec{
			{{Sec: 1, Nsec: 2}, {Sec: 3, Nsec: 4}},
			{{Sec: 1<<31 - 1}, {Sec: 1 << 31, Nsec: 999_999_000}},
			{{Sec: 0}, {Sec: 1_000_000_000, Nsec: 123_456_000}},
		} {
			t.want("utimensat", unix.UtimesNanoAt(unix.AT_FDCWD, p, ts[:], 0), 0)
			if st := t.stat(p); st.Atim != ts[0] || st.Mtim != ts[1] {
				t.failf("times %v %v, want %v", st.Atim, st.Mtim, ts)
			}
		}
	}},
	{"utimensat/before-1970", func(t *T) {
		p := t.file("file", "", 0o600)
		ts := []unix.Timespec{{Sec: -10, Nsec: 5000}, {Sec: -1, Nsec: 7000}}
		t.want("utimensat", unix.UtimesNanoAt(unix.AT_FDCWD, p, ts, 0), 0)
		if st := t.stat(p); st.Atim != ts[0] || st.Mtim != ts[1] {
			t.failf("times %v %v, want %v", st.Atim, st.Mtim, ts)
		}
	}},
	{"utimensat/omit-and-now", func(t *T) {
		p := t.file("file", "", 0o600)
		t.must(unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{{Sec: 1}, {Sec: 2}}, 0))
		t.want("omit atime", unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: 5}}, 0), 0)
		if st := t.stat(p); st.Atim.Sec != 1 || st.Mtim.Sec != 5 {
			t.failf("times %v %v", st.Atim, st.Mtim)
		}
		t.want("mtime now", unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Nsec: unix.UTIME_NOW}}, 0), 0)
		if st := t.stat(p); st.Atim.Sec != 1 || st.Mtim.Sec < 1e9 {
			t.failf("times %v %v", st.Atim, st.Mtim)
		}
	}},
	{"utimensat/link", func(t *T) {
		p := t.file("file", "", 0o600)
		before := t.stat(p).Mtim
		t.must(unix.Symlink("file", t.path("link")))
		t.want("nofollow", unix.UtimesNanoAt(unix.AT_FDCWD, t.path("link"), []unix.Timespec{{Sec: 1}, {Sec: 2}}, unix.AT_SYMLINK_NOFOLLOW), 0)
		if st := t.stat(t.path("link")); st.Mtim.Sec != 2 {
			t.failf("mtime of the link %v", st.Mtim)
		}
		if t.stat(p).Mtim != before {
			t.failf("the target's mtime changed")
		}
	}},
	{"utimensat/rights", func(t *T) {
		p := t.file("file", "", 0o666)
		now := []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_NOW}}
		t.as(1000, 1000, nil, func() {
			t.want("now, who may write", unix.UtimesNanoAt(unix.AT_FDCWD, p, now, 0), 0)
			t.want("a time, who may write", unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{{Sec: 1}, {Sec: 1}}, 0), unix.EPERM)
		})
		t.must(unix.Chmod(p, 0o644))
		t.as(1000, 1000, nil, func() { t.want("now, who may not", unix.UtimesNanoAt(unix.AT_FDCWD, p, now, 0), unix.EACCES) })
		t.must(unix.Chown(p, 1000, 1000))
		t.as(1000, 1000, nil, func() {
			t.want("a time, the owner", unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{{Sec: 1}, {Sec: 1}}, 0), 0)
		})
	}},
	{"times/write", func(t *T) {
		p := t.file("file", "x", 0o600)
		fd := t.open(p, unix.O_RDWR, 0)
		t.must(unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{{Sec: 1}, {Sec: 1}}, 0))
		_, err := unix.Pwrite(fd, []byte("y"), 0)
		t.must(err)
		if st := t.fstat(fd); st.Mtim.Sec < 1e9 || st.Ctim.Sec < 1e9 {
			t.failf("mtime %v, ctime %v", st.Mtim, st.Ctim)
		}
	}},
	{"times/directory", func(t *T) {
		d := t.mkdir("dir", 0o700)
		old := []unix.Timespec{{Sec: 1}, {Sec: 1}}
		for _, op := range []struct {
			name string
			do   func() error
		}{
			{"mkdir", func() error { return unix.Mkdir(d+"/d", 0o700) }},
			{"rmdir", func() error { return unix.Rmdir(d + "/d") }},
			{"create", func() error { return unix.Mknod(d+"/f", unix.S_IFREG|0o600, 0) }},
			{"link", func() error { return unix.Link(d+"/f", d+"/g") }},
			{"rename", func() error { return unix.Rename(d+"/g", d+"/h") }},
			{"unlink", func() error { return unix.Unlink(d + "/h") }},
			{"symlink", func() error { return unix.Symlink("x", d+"/s") }},
		} {
			t.must(unix.UtimesNanoAt(unix.AT_FDCWD, d, old, 0))
			t.want(op.name, op.do(), 0)
			if st := t.stat(d); st.Mtim.Sec == 1 {
				t.failf("%s did not change the directory's mtime", op.name)
			}
		}
	}},
	{"times/link-changes-ctime", func(t *T) {
		p := t.file("file", "", 0o600)
		before := t.stat(p).Ctim
		time.Sleep(20 * time.Millisecond)
		t.must(unix.Link(p, t.path("other")))
		if !after(t.stat(p).Ctim, before) {
			t.failf("ctime did not change")
		}
	}},
	{"times/birth", func(t *T) {
		p := t.file("file", "", 0o600)
		var st unix.Statx_t
		t.must(unix.Statx(unix.AT_FDCWD, p, 0, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st))
		if st.Mask&unix.STATX_BTIME == 0 {
			t.skipped = "no time of birth"
			return
		}
		if now := time.Now().Unix(); st.Btime.Sec < now-60 || st.Btime.Sec > now+60 {
			t.failf("born at %d, now is %d", st.Btime.Sec, now)
		}
	}},
}
