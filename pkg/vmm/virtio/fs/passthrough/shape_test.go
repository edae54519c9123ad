package passthrough

import (
	"encoding/binary"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse/fusetest"
)

// sample is an argument for op that is well-formed, with the given handle, other
// node and name where it has them.
func sample(op fuse.Opcode, fh, node uint64, name string) []byte {
	pack := fusetest.Pack
	switch op {
	case fuse.Init:
		return pack(7, 41, 0, 0)
	case fuse.Lookup, fuse.Unlink, fuse.Rmdir:
		return pack(name)
	case fuse.Forget, fuse.Interrupt:
		return pack(uint64(1))
	case fuse.BatchForget:
		return pack(1, 0, node, uint64(1))
	case fuse.Getattr:
		return pack(fuse.GetattrFH, 0, fh)
	case fuse.Statx:
		return pack(fuse.GetattrFH, 0, fh, 0, 0)
	case fuse.Setattr:
		return pack(fuse.FattrSize|fuse.FattrFH, 0, fh, make([]byte, fuse.SetattrInSize-16))
	case fuse.Symlink:
		return pack(name, "target")
	case fuse.Mknod:
		return pack(unix.S_IFREG|0o644, 0, 0, 0, name)
	case fuse.Mkdir:
		return pack(0o755, 0, name)
	case fuse.Rename:
		return pack(node, name, "new")
	case fuse.Rename2:
		return pack(node, 0, 0, name, "new")
	case fuse.Link:
		return pack(node, name)
	case fuse.Create, fuse.Tmpfile:
		return pack(unix.O_RDWR, unix.S_IFREG|0o644, 0, 0, name)
	case fuse.Open, fuse.Opendir:
		return pack(unix.O_RDONLY, 0)
	case fuse.Release, fuse.Releasedir:
		return pack(fh, 0, 0, uint64(0))
	case fuse.Flush:
		return pack(fh, 0, 0, uint64(0))
	case fuse.Fsync, fuse.Fsyncdir:
		return pack(fh, 0, 0)
	case fuse.Read, fuse.Readdir, fuse.Readdirplus:
		return pack(fh, uint64(0), 1024, 0, uint64(0), 0, 0)
	case fuse.Write:
		return pack(fh, uint64(0), 4, 0, uint64(0), 0, 0, []byte("data"))
	case fuse.Lseek:
		return pack(fh, uint64(0), unix.SEEK_DATA, 0)
	case fuse.Fallocate:
		return pack(fh, uint64(0), uint64(100), 0, 0)
	case fuse.CopyFileRange:
		return pack(fh, uint64(0), node, fh, uint64(0), uint64(10), uint64(0))
	case fuse.Setxattr:
		return pack(1, 0, 0, 0, "user."+name, []byte("v"))
	case fuse.Getxattr:
		return pack(100, 0, "user."+name)
	case fuse.Listxattr:
		return pack(100, 0)
	case fuse.Removexattr:
		return pack("user." + name)
	case fuse.Getlk, fuse.Setlk, fuse.Setlkw:
		return pack(fh, uint64(1), uint64(0), uint64(10), unix.F_RDLCK, 1, 0, 0)
	case fuse.Ioctl:
		return make([]byte, fuse.IoctlInSize)
	}
	return nil // Destroy, Readlink, Statfs, Syncfs
}

// served calls f for every operation that is served.
func served(f func(op fuse.Opcode, o operation)) {
	for op, o := range operations {
		if o.serve != nil {
			f(fuse.Opcode(op), o)
		}
	}
}

// raw sends readable and checks that the answer is an error of the given kind,
// or none at all for requests without a reply.
func (s *share) raw(t *testing.T, what string, o operation, readable []byte, room int, wanted ...unix.Errno) {
	t.Helper()
	out := make([]byte, max(room, 0))
	n, done := s.server.Handle(0, [][]byte{readable}, [][]byte{out}, func(uint32) {})
	if !done {
		t.Errorf("%s: waits", what)
		return
	}
	if o.flags&noReply != 0 || room < fuse.OutHeaderSize {
		if n != 0 {
			t.Errorf("%s: a reply of %d bytes", what, n)
		}
		return
	}
	errno := unix.Errno(-int32(binary.LittleEndian.Uint32(out[4:])))
	if n != fuse.OutHeaderSize || binary.LittleEndian.Uint32(out) != n {
		t.Errorf("%s: a reply of %d bytes: %x", what, n, out)
		return
	}
	for _, w := range wanted {
		if errno == w {
			return
		}
	}
	t.Errorf("%s: %v, want one of %v", what, errno, wanted)
}

const badID = 0xdeadbeefcafe

func TestBadRequests(t *testing.T) {
	s := newShare(t)
	e, fh := s.mustCreate(t, root, "file", "contents")
	served(func(op fuse.Opcode, o operation) {
		name := op.String()
		args := sample(op, fh, e.NodeID, "name")
		whole := append(s.Header(op, root, 1, fuse.InHeaderSize+len(args)), args...)
		withLen := func(n int) []byte {
			b := append([]byte(nil), whole...)
			binary.LittleEndian.PutUint32(b, uint32(n))
			return b
		}
		// Lengths.
		for n := range fuse.InHeaderSize {
			if got, done := s.server.Handle(0, [][]byte{whole[:n]}, [][]byte{make([]byte, 1024)}, nil); got != 0 || !done {
				t.Errorf("%s: %d bytes of a header: %d bytes of reply", name, n, got)
			}
		}
		for n := range o.args {
			short := withLen(fuse.InHeaderSize + n)[:fuse.InHeaderSize+n]
			s.raw(t, name+" with a short argument", o, short, 1024, unix.EINVAL)
		}
		s.raw(t, name+" with a length below the header's", o, withLen(fuse.InHeaderSize-1), 1024, unix.EINVAL)
		s.raw(t, name+" with length 0", o, withLen(0), 1024, unix.EINVAL)
		s.raw(t, name+" with a length past its end", o, withLen(len(whole)+1), 1024, unix.EINVAL)
		s.raw(t, name+" with length 2^32-1", o, withLen(1<<32-1), 1024, unix.EINVAL)
		ext := append([]byte(nil), whole...)
		binary.LittleEndian.PutUint16(ext[36:], 0xffff)
		s.raw(t, name+" with extensions past its end", o, ext, 1024, unix.EINVAL)
		if o.flags&(withData|noReply) == 0 {
			long := append(withLen(fuse.InHeaderSize+maxArgs+1), make([]byte, maxArgs+1)...)
			s.raw(t, name+" with an argument too long", o, long, 1024, unix.E2BIG)
		}
		// Room.
		for room := range fuse.OutHeaderSize + o.reply {
			s.raw(t, name+" without room", o, whole, room, unix.EIO)
		}
	})
	// Nothing of that was done.
	if list, errno := s.List(root, false); errno != 0 || len(list) != 1 {
		t.Errorf("%v, %v", list, errno)
	}
}

func TestBeforeInit(t *testing.T) {
	s := newShare(t)
	must(t, s.Destroy())
	served(func(op fuse.Opcode, o operation) {
		if o.flags&anywhen != 0 {
			return
		}
		args := sample(op, 1, 1, "name")
		s.raw(t, op.String()+" before INIT", o, append(s.Header(op, root, 1, fuse.InHeaderSize+len(args)), args...), 1024, unix.EIO)
	})
}

func TestUnsupported(t *testing.T) {
	s := newShare(t)
	for op := range fuse.Opcode(100) {
		if op < fuse.MaxOpcode && operations[op].serve != nil {
			continue
		}
		_, errno := s.Call(op, root, make([]byte, 100), 100)
		want(t, op.String(), errno, unix.ENOSYS)
	}
	for _, op := range []fuse.Opcode{4096, 1 << 20, 1<<32 - 1} {
		_, errno := s.Call(op, root, nil, 0)
		want(t, op.String(), errno, unix.ENOSYS)
	}
	_, errno := s.Call(fuse.Ioctl, root, make([]byte, fuse.IoctlInSize), 0)
	want(t, "IOCTL", errno, unix.ENOTTY)
}

// TestForgedIDs uses node ids and handles that were never given, of another
// kind, and given back.
func TestForgedIDs(t *testing.T) {
	s := newShare(t)
	file, fh := s.mustCreate(t, root, "file", "contents")
	dirFH, errno := s.Opendir(root)
	must(t, errno)
	gone, goneFH := s.mustCreate(t, root, "gone", "")
	must(t, s.Release(gone.NodeID, goneFH))
	s.Forget(gone.NodeID, 1)
	usesHandle := map[fuse.Opcode]bool{fuse.Getattr: true, fuse.Statx: true, fuse.Setattr: true, fuse.Release: true, fuse.Releasedir: true,
		fuse.Flush: true, fuse.Fsync: true, fuse.Fsyncdir: true, fuse.Read: true, fuse.Readdir: true, fuse.Readdirplus: true, fuse.Write: true,
		fuse.Lseek: true, fuse.Fallocate: true, fuse.CopyFileRange: true, fuse.Getlk: true, fuse.Setlk: true, fuse.Setlkw: true}
	ofDir := map[fuse.Opcode]bool{fuse.Releasedir: true, fuse.Fsyncdir: true, fuse.Readdir: true, fuse.Readdirplus: true}
	noNode := map[fuse.Opcode]bool{fuse.Init: true, fuse.Destroy: true, fuse.Ioctl: true}
	served(func(op fuse.Opcode, o operation) {
		send := func(what string, node, fh, other uint64, wanted ...unix.Errno) {
			t.Helper()
			args := sample(op, fh, other, "file")
			s.raw(t, op.String()+" with "+what, o, append(s.Header(op, node, 1, fuse.InHeaderSize+len(args)), args...), 4096, wanted...)
		}
		switch {
		case noNode[op] || o.flags&noReply != 0:
		case usesHandle[op]:
			wrongKind := dirFH
			if ofDir[op] {
				wrongKind = fh
			}
			for what, id := range map[string]uint64{"a forged handle": badID, "handle 0": 0, "a released handle": goneFH, "a handle of the other kind": wrongKind} {
				send(what, file.NodeID, id, file.NodeID, unix.EBADF)
			}
		default:
			for what, id := range map[string]uint64{"a forged node": badID, "node 0": 0, "a forgotten node": gone.NodeID, "node -1": ^uint64(0)} {
				send(what, id, fh, file.NodeID, unix.ESTALE)
			}
		}
		switch op {
		case fuse.Link, fuse.Rename, fuse.Rename2:
			send("another node that is forged", root, fh, badID, unix.ESTALE)
		case fuse.CopyFileRange:
			args := fusetest.Pack(fh, uint64(0), file.NodeID, uint64(badID), uint64(0), uint64(10), uint64(0))
			_, errno := s.Call(op, file.NodeID, args, fuse.WriteOutSize)
			want(t, "COPY_FILE_RANGE to a forged handle", errno, unix.EBADF)
		case fuse.Lookup, fuse.Unlink, fuse.Rmdir, fuse.Mkdir, fuse.Mknod, fuse.Symlink, fuse.Create, fuse.Tmpfile, fuse.Opendir, fuse.Syncfs:
			send("a file as the directory", file.NodeID, fh, root, unix.ENOTDIR)
		}
	})
	// What gets no reply must do no harm.
	for _, id := range []uint64{badID, 0, gone.NodeID, root} {
		s.Forget(id, 1)
		s.Forget(id, ^uint64(0))
		s.BatchForget(map[uint64]uint64{id: 1 << 63})
	}
	s.Forget(file.NodeID, 1000) // more than there were
	_, errno = s.Getattr(file.NodeID)
	want(t, "GETATTR after too many FORGETs", errno, unix.ESTALE)
	if got, errno := s.Read(file.NodeID, fh, 0, 100); errno != 0 || string(got) != "contents" {
		t.Errorf("an open file after too many FORGETs: %q, %v", got, errno)
	}
	// A count that lies about its length.
	s.Send(fuse.BatchForget, 0, fusetest.Pack(1<<31, 0, uint64(root), uint64(1)))
	s.Interrupt(badID)
	if _, errno := s.Getattr(root); errno != 0 {
		t.Errorf("the root: %v", errno)
	}
}

func TestBadNames(t *testing.T) {
	s := newShare(t)
	e, _ := s.mustCreate(t, root, "file", "contents")
	writeFile(t, s.path("..", "outside"), "secret")
	t.Cleanup(func() { os.Remove(s.path("..", "outside")) }) // the tests share the directory
	names := map[string][]byte{
		"empty":               []byte("\x00"),
		".":                   []byte(".\x00"),
		"..":                  []byte("..\x00"),
		"slash":               []byte("/\x00"),
		"absolute":            []byte("/etc/passwd\x00"),
		"path up":             []byte("../outside\x00"),
		"path down":           []byte("dir/file\x00"),
		"trailing slash":      []byte("file/\x00"),
		"no NUL":              []byte("file"),
		"something after NUL": []byte("file\x00/\x00"),
	}
	long := []byte(strings.Repeat("x", 256) + "\x00")
	type where struct{ before, after []byte }
	pack := fusetest.Pack
	ops := map[fuse.Opcode][]where{
		fuse.Lookup:  {{}},
		fuse.Unlink:  {{}},
		fuse.Rmdir:   {{}},
		fuse.Symlink: {{nil, pack("target")}},
		fuse.Mknod:   {{pack(unix.S_IFREG|0o644, 0, 0, 0), nil}},
		fuse.Mkdir:   {{pack(0o755, 0), nil}},
		fuse.Create:  {{pack(unix.O_RDWR, 0o644, 0, 0), nil}},
		fuse.Link:    {{pack(e.NodeID), nil}},
		fuse.Rename:  {{pack(uint64(root)), pack("new")}, {pack(uint64(root), "file"), nil}},
		fuse.Rename2: {{pack(uint64(root), 0, 0), pack("new")}, {pack(uint64(root), 0, 0, "file"), nil}},
	}
	for op, places := range ops {
		for _, w := range places {
			for what, name := range names {
				args := pack(w.before, name, w.after)
				if what == "no NUL" && w.after != nil {
					continue // then it is another name
				}
				_, errno := s.Call(op, root, args, 1024)
				want(t, op.String()+" of "+what, errno, unix.EINVAL)
			}
			_, errno := s.Call(op, root, pack(w.before, long, w.after), 1024)
			want(t, op.String()+" of a long name", errno, unix.ENAMETOOLONG)
		}
	}
	_, errno := s.Symlink(root, "link", strings.Repeat("x", 4096))
	want(t, "SYMLINK to a long target", errno, unix.ENAMETOOLONG)
	want(t, "xattr name", s.Setxattr(e.NodeID, "user."+strings.Repeat("x", 251), nil, 0, 0), unix.ERANGE)
	if list, errno := s.List(root, false); errno != 0 || len(list) != 1 {
		t.Errorf("something was made: %v, %v", list, errno)
	}
}

func TestBadArguments(t *testing.T) {
	s := newShare(t)
	e, fh := s.mustCreate(t, root, "file", "contents")
	_, errno := s.Mknod(root, "x", unix.S_IFDIR|0o755, 0, 0)
	want(t, "MKNOD of a directory", errno, unix.EINVAL)
	_, errno = s.Mknod(root, "x", 0, 0, 0)
	want(t, "MKNOD of nothing", errno, unix.EINVAL)
	_, errno = s.Mknod(root, "x", unix.S_IFLNK|0o777, 0, 0)
	want(t, "MKNOD of a link", errno, unix.EINVAL)
	_, errno = s.Read(e.NodeID, fh, 1<<63, 10)
	want(t, "READ at a negative offset", errno, unix.EINVAL)
	_, errno = s.Call(fuse.Read, e.NodeID, fusetest.Pack(fh, uint64(0), 101, 0, uint64(0), 0, 0), 100)
	want(t, "READ of more than there is room for", errno, unix.EINVAL)
	_, errno = s.Write(e.NodeID, fh, 1<<63, []byte("x"))
	want(t, "WRITE at a negative offset", errno, unix.EINVAL)
	_, errno = s.Write(e.NodeID, fh, 1<<63-1, []byte("xx"))
	if errno != unix.EFBIG && errno != unix.EINVAL {
		t.Errorf("WRITE past the largest offset: %v", errno)
	}
	_, errno = s.Call(fuse.Write, e.NodeID, fusetest.Pack(fh, uint64(0), 5, 0, uint64(0), 0, 0, []byte("data")), fuse.WriteOutSize)
	want(t, "WRITE of more than was sent", errno, unix.EINVAL)
	want(t, "FALLOCATE of too much", s.Fallocate(e.NodeID, fh, 1<<63, 1, 0), unix.EFBIG)
	want(t, "FALLOCATE of nothing", s.Fallocate(e.NodeID, fh, 0, 0, 0), unix.EINVAL)
	_, errno = s.Lseek(e.NodeID, fh, 1<<63, unix.SEEK_HOLE)
	want(t, "LSEEK to a negative offset", errno, unix.ENXIO)
	_, errno = s.CopyFileRange(e.NodeID, fh, 1<<63, e.NodeID, fh, 0, 10)
	want(t, "COPY_FILE_RANGE from a negative offset", errno, unix.EINVAL)
	_, errno = s.Call(fuse.CopyFileRange, e.NodeID, fusetest.Pack(fh, uint64(0), e.NodeID, fh, uint64(100), uint64(10), uint64(1)), fuse.WriteOutSize)
	want(t, "COPY_FILE_RANGE with flags", errno, unix.EINVAL)
	dirFH, errno := s.Opendir(root)
	must(t, errno)
	_, errno = s.Readdir(root, dirFH, 1<<63, 4096, false)
	want(t, "READDIR at a negative offset", errno, unix.EINVAL)
	_, errno = s.Readdir(root, dirFH, 0, 10, false)
	want(t, "READDIR into too little", errno, unix.EINVAL)
	for name, l := range map[string]fuse.FileLock{
		"type":     {Type: 7},
		"order":    {Start: 10, End: 9, Type: unix.F_RDLCK},
		"end":      {End: 1 << 63, Type: unix.F_RDLCK},
		"the lot":  {Start: ^uint64(0), End: ^uint64(0), Type: ^uint32(0)},
		"big type": {Type: 1 << 16},
	} {
		want(t, "SETLK with a bad "+name, s.Setlk(e.NodeID, fh, 1, l, 0), unix.EINVAL)
		want(t, "SETLK of flock with a bad "+name, s.Setlk(e.NodeID, fh, 1, l, fuse.LkFlock), unix.EINVAL)
		_, errno := s.Getlk(e.NodeID, fh, 1, l)
		want(t, "GETLK with a bad "+name, errno, unix.EINVAL)
	}
	_, errno = s.Call(fuse.Setxattr, e.NodeID, fusetest.Pack(5, 0, 0, 0, "user.x", []byte("v")), 0)
	want(t, "SETXATTR with a length that lies", errno, unix.EINVAL)
	want(t, "SETXATTR with unknown flags", s.Setxattr(e.NodeID, "user.x", nil, 8, 0), unix.EINVAL)
	_, errno = s.Call(fuse.Setxattr, e.NodeID, fusetest.Pack(0, 0, "x"), 0)
	want(t, "SETXATTR, short", errno, unix.EINVAL)
}
