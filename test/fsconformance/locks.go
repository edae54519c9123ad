package main

import (
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// POSIX locks belong to a process, so other processes are needed: this program
// again, as a helper that takes a lock, says so, and holds it until its input
// ends.
const helperEnv = "FSCONFORMANCE_LOCK"

func init() {
	if args := os.Getenv(helperEnv); args != "" {
		os.Exit(lockHelper(strings.Split(args, "\n")))
	}
}

// lockHelper locks a file: kind, type, start, length, path. It exits with 3 if
// the lock is taken. With "exit" it just ends.
func lockHelper(args []string) int {
	if args[0] == "exit" {
		return 0
	}
	number := func(i int) int64 { n, _ := strconv.ParseInt(args[i], 10, 64); return n }
	fd, err := unix.Open(args[4], unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return 2
	}
	lock := unix.Flock_t{Type: int16(number(1)), Start: number(2), Len: number(3)}
	switch args[0] {
	case "posix":
		err = unix.FcntlFlock(uintptr(fd), unix.F_SETLK, &lock)
	case "posix-wait":
		err = unix.FcntlFlock(uintptr(fd), unix.F_SETLKW, &lock)
	case "ofd":
		err = unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lock)
	case "flock":
		err = unix.Flock(fd, int(number(1))|unix.LOCK_NB)
	case "flock-wait":
		err = unix.Flock(fd, int(number(1)))
	}
	if err == unix.EAGAIN || err == unix.EACCES {
		return 3
	}
	if err != nil {
		return 4
	}
	_, _ = os.Stdout.WriteString("locked\n")
	_, _ = os.Stdin.Read(make([]byte, 1))
	return 0
}

// helper is a process that holds a lock, or waits for it.
type helper struct {
	cmd    *exec.Cmd
	locked chan bool // one value: it has the lock, or has ended without
	end    func()
}

func (t *T) helper(kind string, lockType int, start, length int64, path string) *helper {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), helperEnv+"="+strings.Join([]string{
		kind, strconv.Itoa(lockType), strconv.FormatInt(start, 10), strconv.FormatInt(length, 10), path,
	}, "\n"))
	in, err := cmd.StdinPipe()
	t.must(err)
	out, err := cmd.StdoutPipe()
	t.must(err)
	t.must(cmd.Start())
	h := &helper{cmd: cmd, locked: make(chan bool, 1)}
	go func() {
		n, _ := out.Read(make([]byte, 10))
		h.locked <- n > 0
	}()
	ended := false
	h.end = func() {
		if !ended {
			ended = true
			_ = in.Close()
			_ = cmd.Wait()
		}
	}
	t.cleanup = append(t.cleanup, h.end)
	return h
}

// otherGets says whether another process gets the lock at once, and ends it.
func (t *T) otherGets(kind string, lockType int, start, length int64, path string) bool {
	h := t.helper(kind, lockType, start, length, path)
	defer h.end()
	return <-h.locked
}

func (t *T) wantOther(what string, want bool, kind string, lockType int, start, length int64, path string) {
	if got := t.otherGets(kind, lockType, start, length, path); got != want {
		t.failf("%s: another process gets the lock: %v, want %v", what, got, want)
	}
}

func posixLock(fd int, kind int16, start, length int64) error {
	return unix.FcntlFlock(uintptr(fd), unix.F_SETLK, &unix.Flock_t{Type: kind, Start: start, Len: length})
}

func ofdLock(fd int, kind int16, start, length int64) error {
	return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: kind, Start: start, Len: length})
}

var lockChecks = []check{
	{"lock/posix-ranges", func(t *T) {
		p := t.file("file", "", 0o600)
		fd := t.open(p, unix.O_RDWR, 0)
		t.want("lock", posixLock(fd, unix.F_WRLCK, 10, 10), 0)
		t.wantOther("the range", false, "posix", unix.F_RDLCK, 15, 1, p)
		t.wantOther("before it", true, "posix", unix.F_WRLCK, 0, 10, p)
		t.wantOther("after it", true, "posix", unix.F_WRLCK, 20, 0, p)
		t.want("split", posixLock(fd, unix.F_UNLCK, 14, 2), 0)
		t.wantOther("the hole", true, "posix", unix.F_WRLCK, 14, 2, p)
		t.wantOther("the rest", false, "posix", unix.F_WRLCK, 16, 1, p)
		t.want("downgrade", posixLock(fd, unix.F_RDLCK, 0, 0), 0)
		t.wantOther("reading together", true, "posix", unix.F_RDLCK, 0, 0, p)
		t.wantOther("writing", false, "posix", unix.F_WRLCK, 0, 0, p)
		t.want("unlock", posixLock(fd, unix.F_UNLCK, 0, 0), 0)
		t.wantOther("all", true, "posix", unix.F_WRLCK, 0, 0, p)
	}},
	{"lock/posix-close-drops-all", func(t *T) {
		p := t.file("file", "", 0o600)
		fd := t.open(p, unix.O_RDWR, 0)
		t.must(posixLock(fd, unix.F_WRLCK, 0, 0))
		second, err := unix.Open(p, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		t.must(err)
		t.wantOther("before the close", false, "posix", unix.F_WRLCK, 0, 0, p)
		t.must(unix.Close(second))
		t.wantOther("after the close of another descriptor", true, "posix", unix.F_WRLCK, 0, 0, p)
	}},
	{"lock/posix-own-process", func(t *T) {
		p := t.file("file", "", 0o600)
		a, b := t.open(p, unix.O_RDWR, 0), t.open(p, unix.O_RDWR, 0)
		t.must(posixLock(a, unix.F_WRLCK, 0, 0))
		t.want("through another descriptor", posixLock(b, unix.F_WRLCK, 0, 0), 0)
	}},
	{"lock/posix-modes", func(t *T) {
		p := t.file("file", "", 0o600)
		t.want("writing lock, reading descriptor", posixLock(t.open(p, unix.O_RDONLY, 0), unix.F_WRLCK, 0, 0), unix.EBADF)
		t.want("reading lock, writing descriptor", posixLock(t.open(p, unix.O_WRONLY, 0), unix.F_RDLCK, 0, 0), unix.EBADF)
		ro, rw := t.open(p, unix.O_RDONLY, 0), t.open(p, unix.O_RDWR, 0)
		t.want("reading", posixLock(ro, unix.F_RDLCK, 0, 0), 0)
		t.want("upgrade through another", posixLock(rw, unix.F_WRLCK, 0, 0), 0)
		t.wantOther("reading", false, "posix", unix.F_RDLCK, 0, 0, p)
		t.want("unlock through the first", posixLock(ro, unix.F_UNLCK, 0, 0), 0)
		t.wantOther("unlocked", true, "posix", unix.F_WRLCK, 0, 0, p)
	}},
	{"lock/posix-getlk", func(t *T) {
		p := t.file("file", "", 0o600)
		fd := t.open(p, unix.O_RDWR, 0)
		h := t.helper("posix", unix.F_WRLCK, 100, 50, p)
		if !<-h.locked {
			t.failf("the other process got no lock")
			return
		}
		l := unix.Flock_t{Type: unix.F_RDLCK}
		t.want("getlk", unix.FcntlFlock(uintptr(fd), unix.F_GETLK, &l), 0)
		if l.Type != unix.F_WRLCK || l.Start != 100 || l.Len != 50 || int(l.Pid) != h.cmd.Process.Pid {
			t.failf("%+v, want process %d", l, h.cmd.Process.Pid)
		}
		l = unix.Flock_t{Type: unix.F_RDLCK, Len: 100}
		t.want("getlk", unix.FcntlFlock(uintptr(fd), unix.F_GETLK, &l), 0)
		if l.Type != unix.F_UNLCK {
			t.failf("%+v, want F_UNLCK", l)
		}
	}},
	{"lock/posix-wait", func(t *T) {
		p := t.file("file", "", 0o600)
		fd := t.open(p, unix.O_RDWR, 0)
		t.must(posixLock(fd, unix.F_WRLCK, 0, 0))
		h := t.helper("posix-wait", unix.F_WRLCK, 0, 0, p)
		select {
		case got := <-h.locked:
			t.failf("the other did not wait (%v)", got)
			return
		case <-time.After(300 * time.Millisecond):
		}
		t.must(posixLock(fd, unix.F_UNLCK, 0, 0))
		if !<-h.locked {
			t.failf("the other got no lock")
		}
	}},
	{"lock/posix-exit-drops", func(t *T) {
		p := t.file("file", "", 0o600)
		fd := t.open(p, unix.O_RDWR, 0)
		h := t.helper("posix", unix.F_WRLCK, 0, 0, p)
		<-h.locked
		t.want("held", posixLock(fd, unix.F_WRLCK, 0, 0), unix.EAGAIN)
		t.must(h.cmd.Process.Kill())
		_ = h.cmd.Wait()
		t.want("after its end", posixLock(fd, unix.F_WRLCK, 0, 0), 0)
	}},
	{"lock/ofd", func(t *T) {
		p := t.file("file", "", 0o600)
		a, b := t.open(p, unix.O_RDWR, 0), t.open(p, unix.O_RDWR, 0)
		t.want("first", ofdLock(a, unix.F_WRLCK, 0, 10), 0)
		t.want("second open file, same process", ofdLock(b, unix.F_WRLCK, 5, 10), unix.EAGAIN)
		t.want("elsewhere", ofdLock(b, unix.F_WRLCK, 10, 10), 0)
		t.want("POSIX against it", posixLock(b, unix.F_WRLCK, 0, 1), unix.EAGAIN)
		t.wantOther("another process", false, "posix", unix.F_WRLCK, 0, 1, p)
		dup, err := unix.FcntlInt(uintptr(a), unix.F_DUPFD_CLOEXEC, 0)
		t.must(err)
		t.want("through a duplicate", ofdLock(dup, unix.F_RDLCK, 0, 10), 0)
		t.must(unix.Close(dup))
		t.want("closing a duplicate drops nothing", ofdLock(b, unix.F_WRLCK, 5, 1), unix.EAGAIN)
	}},
	{"lock/ofd-close-drops", func(t *T) {
		p := t.file("file", "", 0o600)
		a, err := unix.Open(p, unix.O_RDWR|unix.O_CLOEXEC, 0)
		t.must(err)
		t.must(ofdLock(a, unix.F_WRLCK, 0, 0))
		t.must(unix.Close(a))
		t.want("after the close", ofdLock(t.open(p, unix.O_RDWR, 0), unix.F_WRLCK, 0, 0), 0)
	}},
	{"lock/flock", func(t *T) {
		p := t.file("file", "", 0o600)
		a, b := t.open(p, unix.O_RDONLY, 0), t.open(p, unix.O_RDONLY, 0)
		t.want("exclusive", unix.Flock(a, unix.LOCK_EX|unix.LOCK_NB), 0)
		t.want("second open file", unix.Flock(b, unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
		t.wantOther("another process", false, "flock", unix.LOCK_SH, 0, 0, p)
		t.want("shared", unix.Flock(a, unix.LOCK_SH|unix.LOCK_NB), 0)
		t.want("shared by two", unix.Flock(b, unix.LOCK_SH|unix.LOCK_NB), 0)
		t.want("upgrade", unix.Flock(b, unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK)
		t.want("unlock", unix.Flock(a, unix.LOCK_UN), 0)
		t.want("exclusive", unix.Flock(b, unix.LOCK_EX|unix.LOCK_NB), 0)
	}},
	{"lock/flock-close-drops", func(t *T) {
		p := t.file("file", "", 0o600)
		a, err := unix.Open(p, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		t.must(err)
		t.must(unix.Flock(a, unix.LOCK_EX))
		t.must(unix.Close(a))
		t.wantOther("after the close", true, "flock", unix.LOCK_EX, 0, 0, p)
	}},
	{"lock/flock-wait", func(t *T) {
		p := t.file("file", "", 0o600)
		fd := t.open(p, unix.O_RDWR, 0)
		t.must(unix.Flock(fd, unix.LOCK_EX))
		h := t.helper("flock-wait", unix.LOCK_EX, 0, 0, p)
		select {
		case got := <-h.locked:
			t.failf("the other did not wait (%v)", got)
			return
		case <-time.After(300 * time.Millisecond):
		}
		t.must(unix.Flock(fd, unix.LOCK_UN))
		if !<-h.locked {
			t.failf("the other got no lock")
		}
	}},
	{"lock/flock-and-posix-are-apart", func(t *T) {
		p := t.file("file", "", 0o600)
		fd := t.open(p, unix.O_RDWR, 0)
		t.must(unix.Flock(fd, unix.LOCK_EX))
		t.wantOther("POSIX", true, "posix", unix.F_WRLCK, 0, 0, p)
	}},
}
