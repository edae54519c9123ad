package passthrough

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// trap is a share with everything in it that has ever led a file server astray,
// and the watch over what is outside of it:
//
//	outside/secret            no guest may know of it
//	outside/exported/inner    bind-mounted at the share's "bind": its parent is outside
//	share/file, dir, fifo
//	share/link, up, relative  symbolic links out
//	share/fd                  bind mount of /proc/PID/fd, which is full of magic links
//	share/swap, swapped       a directory and a link out, which the host exchanges
type trap struct {
	*share
	t         testing.TB
	outside   outside
	watch     int
	forbidden map[inodeKey]string // without a mount
}

func newTrap(t testing.TB) *trap {
	o := newOutside(t)
	exported := filepath.Join(o.dir, "exported")
	must(t, os.Mkdir(exported, 0o755))
	writeFile(t, filepath.Join(exported, "inner"), "inner")
	dir := tempDir(t)
	path := func(name string) string { return filepath.Join(dir, name) }
	writeFile(t, path("file"), "contents")
	rel, err := filepath.Rel(dir, o.dir)
	must(t, err)
	for _, name := range []string{"dir", "bind", "fd", "swap"} {
		must(t, os.Mkdir(path(name), 0o755))
	}
	for name, target := range map[string]string{"link": o.dir, "up": "..", "relative": rel, "swapped": o.dir} {
		must(t, os.Symlink(target, path(name)))
	}
	must(t, unix.Mkfifo(path("fifo"), 0o666))
	for name, source := range map[string]string{"bind": exported, "fd": "/proc/" + strconv.Itoa(os.Getpid()) + "/fd"} {
		must(t, unix.Mount(source, path(name), "", unix.MS_BIND, ""))
		t.Cleanup(func() { must(t, unix.Unmount(path(name), unix.MNT_DETACH)) })
	}
	tr := &trap{share: newShareOf(t, dir, few), t: t, outside: o, forbidden: map[inodeKey]string{}}
	for _, p := range []string{o.dir, filepath.Join(o.dir, "secret"), scratch, "/", "/proc/self", "/proc"} {
		tr.forbidden[tr.keyOf(p)] = p
	}
	// An O_PATH descriptor tells no watch of itself; those are looked for in the
	// server's tables.
	tr.watch, err = unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	must(t, err)
	t.Cleanup(func() { closeFD(tr.watch) })
	for _, p := range []string{o.dir, filepath.Join(o.dir, "secret")} {
		_, err := unix.InotifyAddWatch(tr.watch, p, unix.IN_ALL_EVENTS)
		must(t, err)
	}
	return tr
}

func (tr *trap) keyOf(path string) inodeKey {
	var st unix.Statx_t
	must(tr.t, unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_BASIC_STATS, &st))
	return inodeKey{dev: unix.Mkdev(st.Dev_major, st.Dev_minor), ino: st.Ino}
}

// swap has the host exchange a directory for a link out of the share.
func (tr *trap) swap() {
	// Either may have been removed or moved by the guest.
	_ = unix.Renameat2(unix.AT_FDCWD, tr.path("swap"), unix.AT_FDCWD, tr.path("swapped"), unix.RENAME_EXCHANGE)
}

// look fails the test if the server knows of something outside.
func (tr *trap) look() {
	tr.t.Helper()
	tr.server.inodes.mu.Lock()
	defer tr.server.inodes.mu.Unlock()
	for key := range tr.server.inodes.byKey {
		if path, ok := tr.forbidden[inodeKey{dev: key.dev, ino: key.ino}]; ok {
			tr.t.Fatalf("the server has a node of %s", path)
		}
	}
}

// check fails the test if anything outside was opened, or has changed.
func (tr *trap) check() {
	tr.t.Helper()
	tr.look()
	events := make([]byte, 4096)
	if n, err := unix.Read(tr.watch, events); err != unix.EAGAIN {
		for b := events[:max(n, 0)]; len(b) >= unix.SizeofInotifyEvent; {
			name := int(binary.NativeEndian.Uint32(b[12:]))
			mask := binary.NativeEndian.Uint32(b[4:])
			who := string(b[unix.SizeofInotifyEvent:][:name])
			// The guest may well use what is mounted from there.
			if trimNUL(who) != "exported" {
				tr.t.Fatalf("outside of the share: event %#x of %q (%v)", mask, trimNUL(who), err)
			}
			b = b[unix.SizeofInotifyEvent+name:]
		}
	}
	tr.outside.checkBeside(tr.t, "exported")
}

func trimNUL(s string) string {
	for i := range len(s) {
		if s[i] == 0 {
			return s[:i]
		}
	}
	return s
}
