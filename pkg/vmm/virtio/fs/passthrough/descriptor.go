package passthrough

import (
	"time"

	"golang.org/x/sys/unix"
)

// unusedTime is how long the descriptor of a regular file is kept, or up to twice as
// long, after its last use. In the guest a lookup and an open are less than that apart.
const unusedTime = 5 * time.Second

// rest puts n, whose descriptor nobody uses any more, on its list. mu is held.
func (t *inodeTable) rest(n *inode) {
	list := &t.idle
	if n.kind == unix.S_IFREG && n.parent != nil {
		list = &t.files
		t.sweepLater()
	}
	t.uses++
	n.used = t.uses
	n.prev, n.next = list, list.next
	n.prev.next, n.next.prev = n, n
}

// sweepLater has sweep called, unless it will be anyhow. mu is held.
func (t *inodeTable) sweepLater() {
	if t.sweeper == nil {
		t.sweeping.Add(1)
		t.sweeper = time.AfterFunc(unusedTime, t.sweep)
	}
}

// sweep closes the descriptors of files that have not been used since it was called
// before.
func (t *inodeTable) sweep() {
	defer t.sweeping.Done()
	t.mu.Lock()
	defer t.unlock()
	for n := t.files.prev; n != &t.files && n.used <= t.swept; n = t.files.prev {
		t.closeIdle(n)
	}
	t.swept = t.uses
	t.sweeper = nil
	if t.files.prev != &t.files {
		t.sweepLater()
	}
}

// stopSweeping ends what sweepLater has started. The table has been cleared, and no
// node is pinned any more.
func (t *inodeTable) stopSweeping() {
	t.mu.Lock()
	if t.sweeper != nil && t.sweeper.Stop() {
		t.sweeper = nil
		t.sweeping.Done()
	}
	t.mu.Unlock()
	t.sweeping.Wait()
}

// trim takes descriptors that nobody uses from their nodes until no more than
// limit are open. mu is held.
func (t *inodeTable) trim(limit int) {
	for t.open > limit {
		n := t.victim()
		if n == nil {
			return
		}
		t.closeIdle(n)
	}
}

// closeIdle takes its descriptor, which nobody uses, from n. Without a name, n is no
// node any more then. mu is held.
func (t *inodeTable) closeIdle(n *inode) {
	t.leaveIdle(n)
	t.take(n)
	if n.parent == nil {
		t.kill(n)
	}
}

// victim is the node that was used longest ago, preferably one whose descriptor
// can be made again, or nil if all are in use. mu is held.
func (t *inodeTable) victim() *inode {
	file, other := t.files.prev, t.idle.prev
	n := other
	for range 64 {
		if n == &t.idle {
			break
		}
		if n.parent != nil {
			other = n
			break
		}
		n = n.prev
	}
	if file != &t.files && (other == &t.idle || other.parent == nil || file.used < other.used) {
		return file
	}
	if other == &t.idle {
		return nil
	}
	return other
}

// shrink closes descriptors that nobody uses, because the process has too many.
// It says whether there was one.
func (t *inodeTable) shrink() bool {
	t.mu.Lock()
	defer t.unlock()
	open := t.open
	t.trim(max(open-64, 0))
	return t.open < open
}

// makingRoom calls open, again after descriptors were closed if the process has
// too many.
func (t *inodeTable) makingRoom(open func() unix.Errno) unix.Errno {
	for {
		errno := open()
		if errno != unix.ENFILE || !t.shrink() {
			return errno
		}
	}
}

// openChild is openChild that makes room for its descriptor.
func (t *inodeTable) openChild(dir int, name string) (fd int, errno unix.Errno) {
	errno = t.makingRoom(func() (errno unix.Errno) {
		fd, errno = openChild(dir, name)
		return errno
	})
	return fd, errno
}

// reopen makes the descriptor of n again, and returns n pinned.
func (t *inodeTable) reopen(n *inode) (*inode, unix.Errno) {
	// A rename on its way may move a part of the path between two steps.
	const attempts = 3
	for range attempts {
		errno := t.reopenOnce(n)
		switch errno {
		case 0:
			return n, 0
		case unix.ENOENT, unix.ENOTDIR, unix.ESTALE, unix.ELOOP:
			continue
		}
		return nil, errno
	}
	return nil, unix.ESTALE
}

// step is a node on the way to another, with its name in the node before.
type step struct {
	node *inode
	name string
}

// reopenOnce walks from the closest ancestor that has a descriptor down to n,
// one component at a time, and leaves n pinned.
func (t *inodeTable) reopenOnce(n *inode) unix.Errno {
	t.mu.Lock()
	var steps []step
	at := n
	for at.fd < 0 {
		if at.parent == nil || len(steps) == maxDepth {
			t.mu.Unlock()
			return unix.ESTALE
		}
		steps = append(steps, step{at, at.name})
		at = at.parent
	}
	t.pin(at)
	t.mu.Unlock()
	for i := len(steps) - 1; i >= 0; i-- {
		fd, errno := t.openChild(at.fd, steps[i].name)
		if errno == 0 {
			errno = t.install(steps[i], at, fd)
		}
		t.put(at)
		if errno != 0 {
			return errno
		}
		at = steps[i].node
	}
	return 0
}

// install gives the step's node the descriptor fd, which was opened by its name in dir,
// if it is that node, and pins it.
func (t *inodeTable) install(step step, dir *inode, fd int) unix.Errno {
	n := step.node
	var st unix.Statx_t
	errno := statFD(fd, &st)
	overlay := errno == 0 && startsOverlay(fd, &st)
	t.mu.Lock()
	defer t.unlock()
	if errno == 0 && t.dirs[place{dir, step.name}] == n {
		t.renumber(n, &st)
	}
	if errno == 0 && (keyOf(&st) != n.key || uint32(st.Mode)&unix.S_IFMT != n.kind || !sameBirth(birthOf(&st), n.birth)) {
		errno = unix.ESTALE
	}
	if errno == 0 {
		n.born(birthOf(&st), overlay)
		t.give(n, fd) // n may have one by now, from another request
	} else {
		t.garbage = append(t.garbage, fd)
	}
	return errno
}
