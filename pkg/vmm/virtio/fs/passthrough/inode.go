package passthrough

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

// inodeKey is what makes two lookups the same node. The mount counts: the same
// file below two mounts may be writable through one of them only.
type inodeKey struct{ dev, ino, mnt uint64 }

func keyOf(st *unix.Statx_t) inodeKey {
	return inodeKey{dev: unix.Mkdev(st.Dev_major, st.Dev_minor), ino: st.Ino, mnt: st.Mnt_id}
}

// inode is a node the guest knows.
//
// While it has a descriptor, the host cannot give its inode number to another
// file. Descriptors are few, so one that has not been used for a while is
// closed, and made again from the node's parent and name when it is needed; the
// node must then be the same by key, type and time of birth. On overlayfs the time
// of birth does not count: what is copied up, itself or on the way to what is below
// it, gets that of the copy. Nor does the number of a directory on an overlayfs that
// gives none that last: that is the same if it is where it was. Would it be another
// node, the guest's kernel would unmount all that is mounted below.
//
// A descriptor keeps what the host deletes on its disk. That of a regular file is
// closed some seconds after its last use: see sweep.
//
// A descriptor also keeps the host from unmounting what it is on. Mounts in the
// share itself are made for the guest, and who makes them knows. Below these
// there are others of the host's own, whose umount(8) is not to fail because the
// guest has once looked at a file: there, a descriptor is open only while a
// request needs it, or an open file in the guest does.
type inode struct {
	id      uint64
	key     inodeKey // changes, protected by inodeTable.mu; but mnt and a directory's dev do not
	kind    uint32   // type, S_IFMT
	foreign bool     // not a directory, and on another device than its directory

	// What follows is protected by inodeTable.mu.

	birth    int64    // time of birth in nanoseconds, 0 where it does not count or the host has none
	overlay  *overlay // that it is on, or nil
	lookups  uint64   // what the guest must FORGET
	children int      // nodes whose parent this is
	removed  bool     // no longer in the table: it has neither lookups nor children

	parent *inode // nil for the root, and where no name is known
	name   string // in parent
	brief  bool   // on a mount that is below another in the share

	fd         int    // O_PATH, -1 while closed
	pins       int    // users of fd
	used       uint64 // inodeTable.uses at the end of its last use
	prev, next *inode // in inodeTable.idle or files, while fd is open and pins is 0
}

// overlay is an overlayfs in the share.
type overlay struct {
	// restless says that the host gives a directory another inode number each time that
	// it comes back into its memory, because the layers are on several file systems. It
	// shows in that other files are not on the device of the directories: see "Inode
	// properties" in the kernel's Documentation/filesystems/overlayfs.rst. It is
	// protected by inodeTable.mu.
	restless bool
}

// place is a name in a directory.
type place struct {
	dir  *inode
	name string
}

// inodeTable holds the nodes. Its methods may be called concurrently. Those
// that return an inode pin it: its descriptor stays open until put.
type inodeTable struct {
	maxInodes, maxOpen int

	mu     sync.Mutex // protects what follows, and the inodes' fields
	byID   map[uint64]*inode
	byKey  map[inodeKey]*inode
	dirs   map[place]*inode // directories on overlayfs, but for those where one starts
	lastID uint64
	root   *inode
	idle   inode  // list head: descriptors nobody uses, most recently used first
	files  inode  // likewise, those of regular files that have a name
	uses   uint64 // how many have ended
	open   int    // open descriptors
	// sweeper runs sweep while there are files. What was used last when it ran before is
	// swept.
	sweeper  *time.Timer
	swept    uint64
	sweeping sync.WaitGroup // for sweeper
	// garbage are descriptors that unlock closes: closing the last descriptor of
	// a deleted file can take the host long.
	garbage []int
}

// newInodeTable makes a table with the root, whose descriptor it takes over.
func newInodeTable(rootFD int, maxInodes, maxOpen int) (*inodeTable, unix.Errno) {
	var st unix.Statx_t
	if errno := statFD(rootFD, &st); errno != 0 {
		return nil, errno
	}
	root := &inode{id: fuse.RootID, key: keyOf(&st), kind: unix.S_IFDIR, fd: rootFD, pins: 1}
	root.born(0, onOverlay(rootFD))
	t := &inodeTable{maxInodes: maxInodes, maxOpen: maxOpen, root: root}
	t.init()
	return t, 0
}

func (t *inodeTable) init() {
	t.byID = map[uint64]*inode{fuse.RootID: t.root}
	t.byKey = map[inodeKey]*inode{t.root.key: t.root}
	t.dirs = map[place]*inode{}
	t.lastID = max(t.lastID, fuse.RootID)
	t.idle.prev, t.idle.next = &t.idle, &t.idle
	t.files.prev, t.files.next = &t.files, &t.files
	t.open = 1
	t.root.children = 0
}

func birthOf(st *unix.Statx_t) int64 {
	if st.Mask&unix.STATX_BTIME == 0 {
		return 0
	}
	return st.Btime.Sec*1e9 + int64(st.Btime.Nsec)
}

func onOverlay(fd int) bool {
	var st unix.Statfs_t
	return retry(func() error { return unix.Fstatfs(fd, &st) }) == 0 && st.Type == unix.OVERLAYFS_SUPER_MAGIC
}

// startsOverlay says whether an overlayfs is mounted on what fd is open on. All else
// is on the same file system as its directory.
func startsOverlay(fd int, st *unix.Statx_t) bool {
	return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 && onOverlay(fd)
}

// sameBirth says whether two times of birth can be the same file's.
func sameBirth(a, b int64) bool { return a == b || a == 0 || b == 0 }

// unlock releases mu and closes the descriptors that were let go of meanwhile.
func (t *inodeTable) unlock() {
	garbage := t.garbage
	t.garbage = nil
	t.mu.Unlock()
	for _, fd := range garbage {
		closeFD(fd)
	}
}

// get returns the node with the given id.
func (t *inodeTable) get(id uint64) (*inode, unix.Errno) {
	t.mu.Lock()
	n := t.byID[id]
	if n == nil || n.lookups == 0 && n != t.root {
		t.mu.Unlock()
		return nil, unix.ESTALE
	}
	if n.fd >= 0 {
		t.pin(n)
		t.mu.Unlock()
		return n, 0
	}
	t.mu.Unlock()
	return t.reopen(n)
}

// getDir is get for requests about a directory's entries.
func (t *inodeTable) getDir(id uint64) (*inode, unix.Errno) {
	n, errno := t.get(id)
	if errno == 0 && n.kind != unix.S_IFDIR {
		t.put(n)
		return nil, unix.ENOTDIR
	}
	return n, errno
}

// room says whether the guest may learn of more nodes. It is asked before
// anything is created.
func (t *inodeTable) room() unix.Errno {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.byID) >= t.maxInodes {
		return unix.ENFILE
	}
	return 0
}

// add finds or makes the node that st describes and counts a lookup. fd, an
// O_PATH descriptor of it, becomes the table's; without one (-1) the node's is
// made when it is first needed. dir, which the caller has pinned, and name say
// where it is; dir is nil if it has no name. The node is pinned only if fd was
// given.
func (t *inodeTable) add(fd int, st *unix.Statx_t, dir *inode, name string) (*inode, unix.Errno) {
	key, kind, birth := keyOf(st), uint32(st.Mode)&unix.S_IFMT, birthOf(st)
	overlay := fd >= 0 && startsOverlay(fd, st)
	t.mu.Lock()
	defer t.unlock()
	n := t.known(st, dir, name)
	if n != nil && n.fd < 0 && (n.kind != kind || !sameBirth(n.birth, birth)) {
		// Another file with the number of one that is gone.
		t.kill(n)
		n = nil
	}
	if n == nil {
		if len(t.byID) >= t.maxInodes {
			if fd >= 0 {
				t.garbage = append(t.garbage, fd)
			}
			return nil, unix.ENFILE
		}
		t.lastID++
		n = &inode{id: t.lastID, key: key, kind: kind, fd: -1}
		n.foreign = kind != unix.S_IFDIR && dir != nil && dir.key.dev != key.dev
		if dir != nil && dir.overlay != nil && dir.key.mnt == key.mnt {
			n.overlay = dir.overlay
			n.overlay.restless = n.overlay.restless || n.foreign
		}
		t.byID[n.id] = n
		t.byKey[key] = n
	}
	n.lookups++
	n.born(birth, overlay)
	t.place(n, dir, name)
	t.give(n, fd)
	return n, 0
}

// again counts another lookup of the node that st describes and that is name in
// dir, which the caller has pinned. It returns nil if the guest does not know it.
func (t *inodeTable) again(st *unix.Statx_t, dir *inode, name string) *inode {
	t.mu.Lock()
	defer t.unlock()
	n := t.known(st, dir, name)
	if n == nil || n.fd < 0 && (n.kind != uint32(st.Mode)&unix.S_IFMT || !sameBirth(n.birth, birthOf(st))) {
		return nil
	}
	n.lookups++
	t.place(n, dir, name)
	return n
}

// known returns the node that st, of the host, describes by its key, or by its place
// name in dir where its number does not last, or nil. mu is held.
func (t *inodeTable) known(st *unix.Statx_t, dir *inode, name string) *inode {
	if n := t.byKey[keyOf(st)]; n != nil {
		return n
	}
	n := t.dirs[place{dir, name}]
	if n == nil || !t.renumber(n, st) {
		return nil
	}
	return n
}

// renumber gives n, if it is a directory whose number does not last, the number of st,
// which describes what is in n's place. mu is held.
func (t *inodeTable) renumber(n *inode, st *unix.Statx_t) bool {
	key := keyOf(st)
	if n.kind != unix.S_IFDIR || uint32(st.Mode)&unix.S_IFMT != unix.S_IFDIR || n.overlay == nil || !n.overlay.restless ||
		n.fd >= 0 || // so the host has it in memory, with its number
		n.key.mnt != key.mnt || n.key.dev != key.dev || t.byKey[key] != nil {
		return false
	}
	t.setKey(n, key)
	return true
}

// setKey changes the number of n, and the device if that differs. mu is held.
func (t *inodeTable) setKey(n *inode, key inodeKey) {
	if t.byKey[n.key] == n {
		delete(t.byKey, n.key)
	}
	n.key.ino = key.ino
	// A directory's is read without the lock, and is not even written as it is.
	if n.key.dev != key.dev {
		n.key.dev = key.dev
	}
	if t.byKey[key] == nil {
		t.byKey[key] = n
	}
}

// copiedUp records that n, which the caller has pinned, is what st says now, after
// something that makes overlayfs copy a file up. Where the lower file has several names,
// or cannot be told again, the copy is another one.
func (t *inodeTable) copiedUp(n *inode, st *unix.Statx_t) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if key := keyOf(st); n.overlay != nil && !n.removed && n.key != key && n.key.mnt == key.mnt {
		t.setKey(n, key)
	}
}

// onOverlay says whether n is on an overlayfs.
func (t *inodeTable) onOverlay(n *inode) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return n.overlay != nil
}

// born records when n was born, if that counts, which it does not where an overlayfs
// starts or n is on one anyhow. mu is held.
func (n *inode) born(birth int64, startsOverlay bool) {
	if startsOverlay && n.overlay == nil {
		n.overlay = &overlay{}
	}
	if n.birth = birth; n.overlay != nil {
		n.birth = 0
	}
}

// give gives n the descriptor fd, unless it has one or fd is -1, and pins it.
// mu is held.
func (t *inodeTable) give(n *inode, fd int) {
	switch {
	case fd < 0:
	case n.fd >= 0:
		t.garbage = append(t.garbage, fd)
		t.pin(n)
	default:
		n.fd, n.pins = fd, 1
		t.open++
		t.trim(t.maxOpen)
	}
}

// take takes its descriptor, which nobody uses, from n. mu is held.
func (t *inodeTable) take(n *inode) {
	t.garbage = append(t.garbage, n.fd)
	n.fd = -1
	t.open--
}

// pin keeps n's open descriptor open. mu is held.
func (t *inodeTable) pin(n *inode) {
	if n.pins == 0 {
		t.leaveIdle(n)
	}
	n.pins++
}

// leaveIdle removes n from the list. mu is held.
func (t *inodeTable) leaveIdle(n *inode) {
	n.prev.next, n.next.prev = n.next, n.prev
	n.prev, n.next = nil, nil
}

// put ends the use of a node that was pinned.
func (t *inodeTable) put(n *inode) {
	t.mu.Lock()
	defer t.unlock()
	n.pins--
	switch {
	case n.pins > 0:
	case n.removed, n.brief && n.parent != nil:
		t.take(n)
	default:
		t.rest(n)
		t.trim(t.maxOpen)
	}
}

// forget takes back count lookups of a node. It says whether the guest had
// them: a count too large is its mistake and taken as all of them.
func (t *inodeTable) forget(id, count uint64) bool {
	if id == fuse.RootID {
		return true
	}
	t.mu.Lock()
	defer t.unlock()
	n := t.byID[id]
	if n == nil || n.lookups == 0 {
		return false
	}
	known := count <= n.lookups
	n.lookups -= min(count, n.lookups)
	t.collect(n)
	return known
}

// collect removes n from the table if nothing needs it, and then its parent
// likewise. mu is held.
func (t *inodeTable) collect(n *inode) {
	for n != nil && n != t.root && n.lookups == 0 && n.children == 0 && !n.removed {
		n.removed = true
		delete(t.byID, n.id)
		if t.byKey[n.key] == n {
			delete(t.byKey, n.key)
		}
		if n.fd >= 0 && n.pins == 0 {
			t.leaveIdle(n)
			t.take(n)
		}
		parent := n.parent
		t.setPlace(n, nil, "")
		if parent != nil {
			parent.children--
		}
		n = parent
	}
}

// kill makes n, which has no descriptor, a node that nothing leads to any more.
// mu is held.
func (t *inodeTable) kill(n *inode) {
	if t.byKey[n.key] == n {
		delete(t.byKey, n.key)
	}
	parent := n.parent
	t.setPlace(n, nil, "")
	if parent != nil {
		parent.children--
		t.collect(parent)
	}
}

// place records where n is. mu is held.
func (t *inodeTable) place(n, dir *inode, name string) {
	if n == t.root || n.parent == dir && n.name == name {
		return
	}
	if dir != nil {
		n.brief = dir.brief || n.key.mnt != dir.key.mnt && dir.key.mnt != t.root.key.mnt
		if n.kind == unix.S_IFDIR && !t.mayContain(dir, n) {
			dir = nil
		} else {
			dir.children++
		}
	}
	old := n.parent
	t.setPlace(n, dir, name)
	if n.overlay != nil && n.kind != unix.S_IFDIR && dir != nil && n.fd >= 0 && n.pins == 0 {
		// A file of the image can have several names. If it is changed, overlayfs makes
		// another one of that by which it was opened: it shall be the last.
		t.leaveIdle(n)
		t.take(n)
	}
	if old != nil {
		old.children--
		t.collect(old)
	}
}

// setPlace is place without the counts of children. mu is held.
func (t *inodeTable) setPlace(n, dir *inode, name string) {
	if n.kind == unix.S_IFDIR && n.overlay != nil {
		if old := (place{n.parent, n.name}); t.dirs[old] == n {
			delete(t.dirs, old)
		}
		if dir != nil {
			t.dirs[place{dir, name}] = n
		}
	}
	n.parent, n.name = dir, name
}

// maxDepth is how many directories deep a node may be whose descriptor is made
// again. Deeper ones keep theirs as long as there is room.
const maxDepth = 1024

// mayContain says whether n may become a child of dir. What is known of places
// may be outdated, when directories were moved on the host: if dir is thought
// to be below n, whatever in between is directly below n has lost its place.
// mu is held.
func (t *inodeTable) mayContain(dir, n *inode) bool {
	if dir == n {
		return false
	}
	depth := 0
	for p := dir; p != nil; p = p.parent {
		if depth++; depth > maxDepth {
			return false
		}
		if p.parent == n {
			n.children--
			t.setPlace(p, nil, "")
			return true
		}
	}
	return true
}

// moved records that st, of the host, is now name in dir. The caller has dir
// pinned.
func (t *inodeTable) moved(st *unix.Statx_t, dir *inode, name string) {
	t.mu.Lock()
	defer t.unlock()
	if n := t.byKey[keyOf(st)]; n != nil {
		t.place(n, dir, name)
	}
}

// find returns the node that st describes, or nil if the guest does not know
// it. It is what name is in dir, which the caller has pinned.
func (t *inodeTable) find(st *unix.Statx_t, dir *inode, name string) *inode {
	t.mu.Lock()
	n := t.known(st, dir, name)
	if n == nil {
		t.unlock()
		return nil
	}
	t.place(n, dir, name)
	if n.fd >= 0 {
		t.pin(n)
		t.unlock()
		return n
	}
	t.unlock()
	n, errno := t.reopen(n)
	if errno != 0 {
		return nil
	}
	return n
}

// unplaced records that name in dir is no longer n's.
func (t *inodeTable) unplaced(n, dir *inode, name string) {
	t.mu.Lock()
	defer t.unlock()
	if n.parent == dir && n.name == name {
		t.place(n, nil, "")
	}
}

// clear forgets every node but the root. Nodes that are pinned go when they are
// put.
func (t *inodeTable) clear() {
	t.mu.Lock()
	defer t.unlock()
	for _, n := range t.byID {
		if n == t.root {
			continue
		}
		n.lookups, n.children, n.parent, n.name, n.removed = 0, 0, nil, "", true
		if n.fd >= 0 && n.pins == 0 {
			t.leaveIdle(n)
			t.take(n)
		}
	}
	open := t.open // those that are pinned, and the root's
	t.init()
	t.open = open
}
