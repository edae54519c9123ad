package passthrough

import (
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/buffers"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

// pending is what a handler returns that has taken the request over: it calls
// Server.complete later. It is no errno of Linux's.
const pending = unix.Errno(4095)

// operation is how a request is served.
type operation struct {
	// serve appends the reply to r.reply and returns 0, or an errno.
	serve func(s *Server, r *request) unix.Errno
	// args is the shortest argument, reply the room without which the request
	// is refused before it does anything, both in bytes.
	args, reply int
	flags       int
}

const (
	mutates  = 1 << iota // refused on a read-only share
	noReply              // not even an error
	anywhen              // before INIT too
	withData             // what follows args stays in the guest's buffers: request.data
	persists             // has something written back to the disk
)

var operations = [fuse.MaxOpcode]operation{
	fuse.Init:          {serve: (*Server).init, args: fuse.InitInSize, reply: fuse.InitOutSize, flags: anywhen},
	fuse.Destroy:       {serve: (*Server).destroy},
	fuse.Lookup:        {serve: (*Server).lookup, args: 2, reply: fuse.EntryOutSize},
	fuse.Forget:        {serve: (*Server).forget, args: fuse.ForgetInSize, flags: noReply},
	fuse.BatchForget:   {serve: (*Server).batchForget, args: fuse.BatchForgetInSize, flags: noReply},
	fuse.Interrupt:     {serve: (*Server).interrupt, args: fuse.InterruptInSize, flags: noReply},
	fuse.Getattr:       {serve: (*Server).getattr, args: fuse.GetattrInSize, reply: fuse.AttrOutSize},
	fuse.Statx:         {serve: (*Server).statx, args: fuse.StatxInSize, reply: fuse.StatxOutSize},
	fuse.Setattr:       {serve: (*Server).setattr, args: fuse.SetattrInSize, reply: fuse.AttrOutSize, flags: mutates},
	fuse.Readlink:      {serve: (*Server).readlink, reply: 1},
	fuse.Symlink:       {serve: (*Server).symlink, args: 3, reply: fuse.EntryOutSize, flags: mutates},
	fuse.Mknod:         {serve: (*Server).mknod, args: fuse.MknodInSize + 2, reply: fuse.EntryOutSize, flags: mutates},
	fuse.Mkdir:         {serve: (*Server).mkdir, args: fuse.MkdirInSize + 2, reply: fuse.EntryOutSize, flags: mutates},
	fuse.Unlink:        {serve: (*Server).unlink, args: 2, flags: mutates},
	fuse.Rmdir:         {serve: (*Server).rmdir, args: 2, flags: mutates},
	fuse.Rename:        {serve: (*Server).rename, args: fuse.RenameInSize + 4, flags: mutates},
	fuse.Rename2:       {serve: (*Server).rename2, args: fuse.Rename2InSize + 4, flags: mutates},
	fuse.Link:          {serve: (*Server).link, args: fuse.LinkInSize + 2, reply: fuse.EntryOutSize, flags: mutates},
	fuse.Create:        {serve: (*Server).create, args: fuse.CreateInSize + 2, reply: fuse.EntryOutSize + fuse.OpenOutSize, flags: mutates},
	fuse.Tmpfile:       {serve: (*Server).tmpfile, args: fuse.CreateInSize, reply: fuse.EntryOutSize + fuse.OpenOutSize, flags: mutates},
	fuse.Open:          {serve: (*Server).open, args: fuse.OpenInSize, reply: fuse.OpenOutSize},
	fuse.Release:       {serve: (*Server).releaseFile, args: fuse.ReleaseInSize},
	fuse.Flush:         {serve: (*Server).flush, args: fuse.FlushInSize},
	fuse.Fsync:         {serve: (*Server).fsync, args: fuse.FsyncInSize, flags: persists},
	fuse.Read:          {serve: (*Server).read, args: fuse.ReadInSize},
	fuse.Write:         {serve: (*Server).write, args: fuse.WriteInSize, reply: fuse.WriteOutSize, flags: mutates | withData},
	fuse.Lseek:         {serve: (*Server).lseek, args: fuse.LseekInSize, reply: fuse.LseekOutSize},
	fuse.Fallocate:     {serve: (*Server).fallocate, args: fuse.FallocateInSize, flags: mutates},
	fuse.CopyFileRange: {serve: (*Server).copyFileRange, args: fuse.CopyFileRangeInSize, reply: fuse.WriteOutSize, flags: mutates},
	fuse.Opendir:       {serve: (*Server).opendir, args: fuse.OpenInSize, reply: fuse.OpenOutSize},
	fuse.Readdir:       {serve: (*Server).readdir, args: fuse.ReadInSize},
	fuse.Readdirplus:   {serve: (*Server).readdirplus, args: fuse.ReadInSize},
	fuse.Releasedir:    {serve: (*Server).releaseDir, args: fuse.ReleaseInSize},
	fuse.Fsyncdir:      {serve: (*Server).fsyncDir, args: fuse.FsyncInSize, flags: persists},
	fuse.Statfs:        {serve: (*Server).statfs, reply: fuse.StatfsOutSize},
	fuse.Syncfs:        {serve: (*Server).syncfs, flags: persists},
	fuse.Setxattr:      {serve: (*Server).setxattr, args: fuse.SetxattrInShortSize + 2, flags: mutates},
	fuse.Getxattr:      {serve: (*Server).getxattr, args: fuse.GetxattrInSize + 2},
	fuse.Listxattr:     {serve: (*Server).listxattr, args: fuse.GetxattrInSize},
	fuse.Removexattr:   {serve: (*Server).removexattr, args: 2, flags: mutates},
	fuse.Getlk:         {serve: (*Server).getlk, args: fuse.LkInSize, reply: fuse.LkOutSize},
	fuse.Setlk:         {serve: (*Server).setlk, args: fuse.LkInSize},
	fuse.Setlkw:        {serve: (*Server).setlkw, args: fuse.LkInSize},
	fuse.Ioctl:         {serve: (*Server).ioctl, args: fuse.IoctlInSize},
}

// Handle serves one request. ticket is what Arrive returned for it, or 0. readable
// are the buffers that hold it, writable those for its reply. Both are guest memory:
// they may change at any time, and are used until the request is complete.
//
// It returns the number of bytes written, which is 0 for requests without a
// reply and for those too short to be answered. done == false says that later is
// called, or was, when the request is complete: it waits for a lock, a lease or its
// turn, or others had waited for theirs, which were then served in its stead. Handle
// may be called concurrently, and blocks as long as the host's file system does.
func (s *Server) Handle(ticket uint64, readable, writable [][]byte, later func(written uint32)) (written uint32, done bool) {
	r := requests.Get().(*request)
	r.ticket, r.readable, r.writable, r.later = ticket, readable, writable, later
	if !s.decode(r) {
		return s.finish(r, 0), true
	}
	key, counts := s.turnOf(r)
	if !counts {
		return s.serve(r)
	}
	if now, errno := s.turns.begin(key, r); errno != 0 {
		return s.finish(r, errno), true
	} else if !now {
		return 0, false
	}
	written, done = s.serve(r)
	for next := s.turns.end(key); next != nil; next = s.turns.end(key) {
		if done {
			later(written)
			done = false
		}
		if errno := s.dispatch(next); errno != pending {
			s.complete(next, errno)
		}
	}
	return written, done
}

// serve serves a request, and says what Handle does.
func (s *Server) serve(r *request) (written uint32, done bool) {
	if errno := s.dispatch(r); errno != pending {
		return s.finish(r, errno), true
	}
	return 0, false
}

// finish ends a request, and returns the number of bytes written.
func (s *Server) finish(r *request, errno unix.Errno) (written uint32) {
	s.releases.end(r.ticket)
	if !r.silent {
		written = r.finish(errno)
	}
	r.recycle()
	return written
}

// complete ends a request that Handle has said to be not done.
func (s *Server) complete(r *request, errno unix.Errno) {
	later := r.later
	later(s.finish(r, errno))
}

// operation is how r is served, if it is.
func (r *request) operation() operation {
	if r.Opcode < fuse.MaxOpcode {
		return operations[r.Opcode]
	}
	return operation{}
}

// decode decodes a request's header, and says whether the request can be answered, or
// is not to be.
func (s *Server) decode(r *request) bool {
	r.silent = true
	var header [fuse.InHeaderSize]byte
	if buffers.CopyFrom(r.readable, header[:], 0) < len(header) {
		s.complain(complainShape, "the guest sent a request without a header")
		return false
	}
	r.InHeader = fuse.DecodeInHeader(header[:])
	if r.operation().flags&noReply != 0 {
		return true
	}
	space := buffers.Len(r.writable)
	if space < fuse.OutHeaderSize {
		s.complain(complainShape, "the guest left no room for a reply", "opcode", r.Opcode)
		return false
	}
	r.silent, r.room = false, int(space)-fuse.OutHeaderSize
	return true
}

// dispatch checks the shape of a request and calls its handler.
func (s *Server) dispatch(r *request) unix.Errno {
	if r.Opcode != fuse.Release {
		// What has become of a RELEASE may be what awaits RELEASEs: it would wait for
		// itself.
		s.releases.end(r.ticket)
	}
	op := r.operation()
	if op.serve == nil {
		// The kernel does without. ACCESS is not sent with default_permissions,
		// SETUPMAPPING not without a DAX window; POLL and BMAP have no sense here.
		if r.Opcode >= fuse.MaxOpcode {
			s.complain(complainOpcode, "the guest asked for an unknown operation", "opcode", uint32(r.Opcode))
		}
		return unix.ENOSYS
	}
	// No overflow: a chain's buffers have at most 2^32 bytes.
	args := int(r.Len) - fuse.InHeaderSize - 8*int(r.ExtLen)
	if uint64(r.Len) > buffers.Len(r.readable) || args < op.args {
		s.complain(complainShape, "the guest sent a request that is too short", "opcode", r.Opcode)
		return unix.EINVAL
	}
	if op.flags&withData != 0 {
		r.data = args - op.args
		args = op.args
	}
	switch {
	case args > maxArgs:
		return unix.E2BIG
	case r.room < op.reply:
		s.complain(complainShape, "the guest left too little room for a reply", "opcode", r.Opcode)
		return unix.EIO
	case s.readOnly && op.flags&mutates != 0:
		return unix.EROFS
	}
	if session := s.session.Load(); session != nil {
		r.features = session.flags
	} else if op.flags&anywhen == 0 {
		return unix.EIO
	}
	if cap(r.args) < args {
		r.args = make([]byte, args)
	}
	r.args = r.args[:args]
	buffers.CopyFrom(r.readable, r.args, fuse.InHeaderSize)
	if op.flags&(mutates|persists) != 0 && !s.gate.Take(1, uint64(r.data)) {
		return unix.EINTR
	}
	return op.serve(s, r)
}
