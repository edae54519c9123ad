// Command fsconformance checks that a file system behaves as POSIX and Linux
// say. It is what pjdfstest is, with what containers use besides: locks, xattrs,
// ACLs, rename flags, O_TMPFILE, holes and mappings.
//
//	fsconformance [-run regexp] [-omit regexp] [-entries n] [-no-skip] directory
//
// It makes a directory of its own in the one given, and removes it. Each check
// is a line: "PASS name", "FAIL name: why", or "SKIP name: why" where the file
// system says that it does not support something that is optional. The exit code
// is 1 if there was a FAIL, or a SKIP with -no-skip. It runs as root, and takes
// other ids for parts of the checks; CAP_SYS_ADMIN is not needed.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

func init() {
	// T.as must not get the main thread: that would outlive its goroutine, and
	// show the process to others with the wrong ids.
	runtime.LockOSThread()
}

func main() {
	run := flag.String("run", "", "run only the checks whose name matches this `regexp`")
	omit := flag.String("omit", "^$", "do not run the checks whose name matches this `regexp`")
	entries := flag.Int("entries", 100_000, "make a directory of `n` entries, and others of no more")
	noSkip := flag.Bool("no-skip", false, "fail if a check is skipped")
	flag.Parse()
	wanted, err1 := regexp.Compile(*run)
	unwanted, err2 := regexp.Compile(*omit)
	if err := errors.Join(err1, err2); flag.NArg() != 1 || err != nil {
		fmt.Fprintln(os.Stderr, "usage: fsconformance [-run regexp] [-omit regexp] [-entries n] [-no-skip] directory", errText(err))
		os.Exit(2)
	}
	sum, err := runAll(os.Stdout, flag.Arg(0), *entries, func(name string) bool {
		return wanted.MatchString(name) && !unwanted.MatchString(name)
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "fsconformance:", err)
		os.Exit(2)
	}
	fmt.Printf("%d passed, %d failed, %d skipped\n", sum.passed, sum.failed, sum.skipped)
	if sum.failed > 0 || *noSkip && sum.skipped > 0 {
		os.Exit(1)
	}
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// check is a named check.
type check struct {
	name string
	run  func(t *T)
}

type summary struct{ passed, failed, skipped int }

// runAll runs the checks that are wanted, by name, each in a directory of its
// own. entries is how large a directory they may make.
func runAll(out io.Writer, dir string, entries int, wanted func(name string) bool) (summary, error) {
	var sum summary
	base, err := os.MkdirTemp(dir, "fsconformance")
	if err != nil {
		return sum, err
	}
	defer os.RemoveAll(base)
	// Other ids must get through.
	if err := os.Chmod(base, 0o755); err != nil {
		return sum, err
	}
	unix.Umask(0)
	for i, c := range allChecks() {
		if !wanted(c.name) {
			continue
		}
		t := &T{dir: filepath.Join(base, fmt.Sprint(i)), entries: entries}
		if err := os.Mkdir(t.dir, 0o755); err != nil {
			return sum, err
		}
		done := make(chan struct{})
		go func() { // which failing ends
			defer close(done)
			c.run(t)
		}()
		<-done
		for _, f := range t.cleanup {
			f()
		}
		_ = os.RemoveAll(t.dir)
		switch {
		case len(t.failures) > 0:
			sum.failed++
			fmt.Fprintf(out, "FAIL %s: %s\n", c.name, strings.Join(t.failures, "; "))
		case t.skipped != "":
			sum.skipped++
			fmt.Fprintf(out, "SKIP %s: %s\n", c.name, t.skipped)
		default:
			sum.passed++
			fmt.Fprintf(out, "PASS %s\n", c.name)
		}
	}
	return sum, nil
}

func allChecks() []check {
	var all []check
	for _, list := range [][]check{
		pathChecks(), modeChecks, ownerChecks, createChecks, linkChecks, removeChecks, renameChecks,
		truncateChecks, timeChecks, openChecks, ioChecks, dirChecks, mmapChecks, lockChecks, xattrChecks, aclChecks,
	} {
		all = append(all, list...)
	}
	return all
}

// T is a check that runs.
type T struct {
	dir      string // its own, empty at the start
	entries  int    // of a directory, at most
	failures []string
	skipped  string
	cleanup  []func()
}

func (t *T) failf(format string, args ...any) {
	t.failures = append(t.failures, fmt.Sprintf(format, args...))
}

// must ends the check if something that it builds on fails.
func (t *T) must(err error) {
	if err != nil {
		_, _, line, _ := runtime.Caller(1)
		t.failf("preparation failed (line %d): %v", line, err)
		runtime.Goexit()
	}
}

// optional ends the check as skipped if err says that the file system does not
// support something.
func (t *T) optional(what string, err error) {
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOTTY) {
		t.skipped = what + ": " + err.Error()
		runtime.Goexit()
	}
}

// want records a failure unless err is the errno; 0 is success.
func (t *T) want(what string, err error, errno unix.Errno) {
	if errno == 0 && err == nil || errno != 0 && errors.Is(err, errno) {
		return
	}
	wanted := "success"
	if errno != 0 {
		wanted = unix.ErrnoName(errno)
	}
	t.failf("%s: got %v, want %s", what, err, wanted)
}

func (t *T) path(elem ...string) string { return filepath.Join(append([]string{t.dir}, elem...)...) }

// file makes a file and returns its path.
func (t *T) file(name, contents string, mode uint32) string {
	p := t.path(name)
	t.must(os.WriteFile(p, []byte(contents), 0o600))
	t.must(unix.Chmod(p, mode))
	return p
}

// mkdir makes a directory and returns its path.
func (t *T) mkdir(name string, mode uint32) string {
	p := t.path(name)
	t.must(unix.Mkdir(p, 0o700))
	t.must(unix.Chmod(p, mode))
	return p
}

// open opens a file until the check ends.
func (t *T) open(path string, flags int, mode uint32) int {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, mode)
	if err != nil {
		_, _, line, _ := runtime.Caller(1)
		t.failf("open (line %d): %v", line, err)
		runtime.Goexit()
	}
	t.cleanup = append(t.cleanup, func() { _ = unix.Close(fd) })
	return fd
}

func (t *T) stat(path string) unix.Stat_t {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.failf("lstat: %v", err)
	}
	return st
}

func (t *T) fstat(fd int) unix.Stat_t {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.failf("fstat: %v", err)
	}
	return st
}

func (t *T) wantMode(path string, mode uint32) {
	if st := t.stat(path); st.Mode&0o7777 != mode {
		t.failf("mode %#o, want %#o", st.Mode&0o7777, mode)
	}
}

func (t *T) wantOwner(path string, uid, gid uint32) {
	if st := t.stat(path); st.Uid != uid || st.Gid != gid {
		t.failf("owner %d:%d, want %d:%d", st.Uid, st.Gid, uid, gid)
	}
}

func (t *T) wantContents(path, contents string) {
	got, err := os.ReadFile(path)
	if err != nil || string(got) != contents {
		if len(got) > 40 {
			got = got[:40]
		}
		t.failf("contents %q, %v", got, err)
	}
}

func (t *T) wantAbsent(path string) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != unix.ENOENT {
		t.failf("%s: %v, want ENOENT", filepath.Base(path), err)
	}
}

// as runs f with other ids, and without capabilities unless uid is 0. If f ends the
// check, it is ended.
func (t *T) as(uid, gid int, groups []int, f func()) {
	done := make(chan bool, 1)
	go func() {
		returned := false
		defer func() { done <- returned }()
		// Raw system calls change this thread only. It is never unlocked, so it
		// ends with the goroutine.
		runtime.LockOSThread()
		if err := takeIDs(uid, gid, groups); err != nil {
			t.failf("taking the ids %d:%d: %v", uid, gid, err)
			return
		}
		f()
		returned = true
	}()
	if !<-done {
		runtime.Goexit()
	}
}
