package passthrough

import (
	"encoding/binary"
	"fmt"
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
//
// The directories, mounts and watches are made once for all: to unmount is slow.
type trap struct {
	*share
	t testing.TB
	*trapTree
}

type trapTree struct {
	dir       string
	outside   outside
	exported  string
	watch     int                 // inotify
	forbidden map[inodeKey]string // without a mount
}

var theTrapTree *trapTree

// newTrap makes the tree what it was, and a server for it.
func newTrap(t testing.TB) *trap {
	t.Helper()
	if theTrapTree == nil {
		theTrapTree = newTrapTree(t)
	}
	theTrapTree.fill(t)
	tr := &trap{share: newShareOf(t, theTrapTree.dir, few), t: t, trapTree: theTrapTree}
	tr.events() // of our own
	return tr
}

func newTrapTree(t testing.TB) *trapTree {
	make1 := func() string {
		dir, err := os.MkdirTemp(scratch, "trap")
		must(t, err)
		must(t, os.Chmod(dir, 0o755))
		return dir
	}
	tree := &trapTree{dir: make1(), outside: outside{dir: make1()}, forbidden: map[inodeKey]string{}}
	tree.exported = filepath.Join(tree.outside.dir, "exported")
	secret := filepath.Join(tree.outside.dir, "secret")
	writeFile(t, secret, "secret")
	must(t, os.Mkdir(tree.exported, 0o755))
	for name, source := range map[string]string{"bind": tree.exported, "fd": "/proc/" + strconv.Itoa(os.Getpid()) + "/fd"} {
		must(t, os.Mkdir(filepath.Join(tree.dir, name), 0o755))
		must(t, unix.Mount(source, filepath.Join(tree.dir, name), "", unix.MS_BIND, ""))
	}
	for _, path := range []string{tree.outside.dir, secret, scratch, "/", "/proc/self", "/proc"} {
		var st unix.Statx_t
		must(t, unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_BASIC_STATS, &st))
		tree.forbidden[inodeKey{dev: unix.Mkdev(st.Dev_major, st.Dev_minor), ino: st.Ino}] = path
		if path == secret {
			tree.outside.ino = st.Ino
		}
	}
	// An O_PATH descriptor tells no watch of itself; those are looked for in the
	// server's tables.
	var err error
	tree.watch, err = unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	must(t, err)
	for _, path := range []string{tree.outside.dir, secret} {
		_, err := unix.InotifyAddWatch(tree.watch, path, unix.IN_ALL_EVENTS)
		must(t, err)
	}
	return tree
}

// fill makes everything anew but what is mounted.
func (tree *trapTree) fill(t testing.TB) {
	for _, dir := range []string{tree.dir, tree.exported} {
		entries, err := os.ReadDir(dir)
		must(t, err)
		for _, e := range entries {
			if dir == tree.exported || e.Name() != "bind" && e.Name() != "fd" {
				must(t, os.RemoveAll(filepath.Join(dir, e.Name())))
			}
		}
		must(t, os.Chown(dir, 0, 0))
		must(t, os.Chmod(dir, 0o755))
	}
	path := func(name string) string { return filepath.Join(tree.dir, name) }
	writeFile(t, filepath.Join(tree.exported, "inner"), "inner")
	writeFile(t, path("file"), "contents")
	rel, err := filepath.Rel(tree.dir, tree.outside.dir)
	must(t, err)
	for _, name := range []string{"dir", "swap"} {
		must(t, os.Mkdir(path(name), 0o755))
	}
	for name, target := range map[string]string{"link": tree.outside.dir, "up": "..", "relative": rel, "swapped": tree.outside.dir} {
		must(t, os.Symlink(target, path(name)))
	}
	must(t, unix.Mkfifo(path("fifo"), 0o666))
}

// events are those outside of the share since they were last asked for; the guest
// may well use what is mounted from there.
func (tr *trap) events() (list []string) {
	tr.t.Helper()
	buffer := make([]byte, 16<<10)
	for {
		n, err := unix.Read(tr.watch, buffer)
		if err == unix.EAGAIN {
			return list
		}
		must(tr.t, err)
		for b := buffer[:n]; len(b) > 0; {
			length := int(binary.NativeEndian.Uint32(b[12:]))
			name := unix.ByteSliceToString(b[unix.SizeofInotifyEvent:][:length])
			if name != "exported" {
				list = append(list, fmt.Sprintf("event %#x of %q", binary.NativeEndian.Uint32(b[4:]), name))
			}
			b = b[unix.SizeofInotifyEvent+length:]
		}
	}
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
	if events := tr.events(); len(events) > 0 {
		tr.t.Fatalf("outside of the share: %v", events)
	}
	tr.outside.checkBeside(tr.t, "exported")
}
