package passthrough

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// handle is an open file or directory.
type handle struct {
	id         uint64
	node       *inode // pinned
	fd         int
	writable   bool
	appendOnly bool        // fd has O_APPEND, because the host permits nothing else
	dir        *dirStream  // nil for files
	locked     atomic.Bool // POSIX or OFD locks were set through it

	refs int // the table's and that of each request; protected by handleTable.mu
}

// handleTable holds what the guest has open. Its methods may be called
// concurrently.
type handleTable struct {
	inodes *inodeTable
	max    int

	mu     sync.Mutex // protects what follows
	byID   map[uint64]*handle
	lastID uint64
}

func newHandleTable(inodes *inodeTable, limit int) *handleTable {
	return &handleTable{inodes: inodes, max: limit, byID: map[uint64]*handle{}}
}

// add makes h an open handle, with its fd and its pinned node, and sets its id.
// On error both are released.
func (t *handleTable) add(h *handle) unix.Errno {
	t.mu.Lock()
	full := len(t.byID) >= t.max
	if !full {
		t.lastID++
		h.id, h.refs = t.lastID, 1
		t.byID[h.id] = h
	}
	t.mu.Unlock()
	if full {
		t.close(h)
		return unix.ENFILE
	}
	return 0
}

// room says whether another handle may be opened.
func (t *handleTable) room() unix.Errno {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.byID) >= t.max {
		return unix.ENFILE
	}
	return 0
}

func (t *handleTable) get(id uint64, dir bool) (*handle, unix.Errno) {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := t.byID[id]
	if h == nil || (h.dir != nil) != dir {
		return nil, unix.EBADF
	}
	h.refs++
	return h, 0
}

// file returns an open file, which put gives back.
func (t *handleTable) file(id uint64) (*handle, unix.Errno) { return t.get(id, false) }

// directory returns an open directory, which put gives back.
func (t *handleTable) directory(id uint64) (*handle, unix.Errno) { return t.get(id, true) }

func (t *handleTable) put(h *handle) {
	t.mu.Lock()
	h.refs--
	last := h.refs == 0
	t.mu.Unlock()
	if last {
		t.close(h)
	}
}

// release ends a handle. It is closed when the last request that uses it ends.
func (t *handleTable) release(h *handle) {
	t.mu.Lock()
	_, open := t.byID[h.id]
	delete(t.byID, h.id)
	t.mu.Unlock()
	if open { // else another RELEASE of the same handle was faster
		t.put(h)
	}
}

func (t *handleTable) close(h *handle) {
	if h.dir != nil {
		h.dir.drop() // nobody else has h any more
	}
	closeFD(h.fd)
	t.inodes.put(h.node)
}

// clear releases all handles.
func (t *handleTable) clear() {
	t.mu.Lock()
	all := t.byID
	t.byID = map[uint64]*handle{}
	t.mu.Unlock()
	for _, h := range all {
		t.put(h)
	}
}
