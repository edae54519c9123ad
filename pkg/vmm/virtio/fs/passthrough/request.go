package passthrough

import (
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/buffers"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

const (
	// maxWrite is the largest READ or WRITE that is negotiated; the kernel sends
	// no more than 256 pages (FUSE_MAX_MAX_PAGES) without a sysctl.
	maxWrite = 1 << 20
	// xattrMax is XATTR_SIZE_MAX and XATTR_LIST_MAX.
	xattrMax = 64 << 10
	// maxArgs is the longest argument of any request, WRITE's data apart:
	// SETXATTR's.
	maxArgs = fuse.SetxattrInSize + nameMax + 1 + xattrMax
	// maxReply is the longest reply, READ's data apart: an xattr or a part of a
	// directory.
	maxReply = xattrMax
)

// request is one request and its reply. It is one goroutine's.
type request struct {
	fuse.InHeader
	// ticket is what Arrive returned for it.
	ticket uint64
	// args is a copy of what follows the header, without extensions, and for
	// WRITE without the data.
	args []byte
	// reply is the reply: room for its header, then what the handler appends.
	reply []byte
	// features are the flags that INIT negotiated.
	features uint64
	// data is the number of bytes of data that follow args in readable.
	data int
	// silent says that there is no reply, not even an error.
	silent bool
	// direct is the number of bytes of the reply that the handler has put into
	// the guest's buffers itself, after the header. reply is then empty.
	direct int
	// room is how many bytes fit into the guest's buffers after the header.
	room int

	readable, writable [][]byte
	window             [][]byte // scratch of READ and WRITE
	later              func(written uint32)
}

var requests = sync.Pool{New: func() any {
	return &request{args: make([]byte, 0, 512), reply: make([]byte, fuse.OutHeaderSize, 1024)}
}}

// recycle gives r back to the pool, without references to guest memory.
func (r *request) recycle() {
	clear(r.window)
	*r = request{args: r.args[:0], reply: r.reply[:fuse.OutHeaderSize], window: r.window[:0]}
	requests.Put(r)
}

// scratch returns the n bytes after those that reply has. What is put there
// becomes part of the reply when reply is resliced. n is at most maxReply.
func (r *request) scratch(n int) []byte {
	r.reply = slices.Grow(r.reply, n)
	return r.reply[len(r.reply) : len(r.reply)+n]
}

// finish puts the reply into the guest's buffers, which have room for its
// header at least, and returns its length.
func (r *request) finish(errno unix.Errno) uint32 {
	length := fuse.OutHeaderSize
	switch {
	case errno != 0:
	case r.direct > 0:
		length += r.direct
	case len(r.reply)-fuse.OutHeaderSize <= r.room:
		length = len(r.reply)
	default:
		errno = unix.EIO // the kernel has left no room for an answer it asked for
	}
	header := fuse.OutHeader{Len: uint32(length), Error: -int32(errno), Unique: r.Unique}
	reply := header.Append(r.reply[:0])
	if errno == 0 && r.direct == 0 {
		reply = reply[:length]
	}
	buffers.CopyTo(r.writable, reply, 0)
	return uint32(length)
}
