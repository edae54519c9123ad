package fusetest

import (
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

// The methods are named for the operations and return what the reply holds.

func (c *Client) Lookup(dir uint64, name string) (fuse.EntryOut, unix.Errno) {
	c.t.Helper()
	return c.entry(fuse.Lookup, dir, Pack(name))
}

func (c *Client) Forget(node, count uint64) { c.Send(fuse.Forget, node, Pack(count)) }

func (c *Client) BatchForget(nodes map[uint64]uint64) {
	args := Pack(uint32(len(nodes)), uint32(0))
	for node, count := range nodes {
		args = append(args, Pack(node, count)...)
	}
	c.Send(fuse.BatchForget, 0, args)
}

func (c *Client) Getattr(node uint64) (fuse.Attr, unix.Errno) {
	c.t.Helper()
	return c.attr(fuse.Getattr, node, make([]byte, fuse.GetattrInSize))
}

// Fgetattr is GETATTR with a handle.
func (c *Client) Fgetattr(node, fh uint64) (fuse.Attr, unix.Errno) {
	c.t.Helper()
	return c.attr(fuse.Getattr, node, Pack(fuse.GetattrFH, 0, fh))
}

// Statx returns mask and time of birth, and the inode number.
func (c *Client) Statx(node uint64) (mask uint32, birth fuse.Time, ino uint64, errno unix.Errno) {
	c.t.Helper()
	b, errno := c.Call(fuse.Statx, node, Pack(0, 0, uint64(0), 0, unix.STATX_BASIC_STATS|unix.STATX_BTIME), fuse.StatxOutSize)
	if errno != 0 {
		return 0, fuse.Time{}, 0, errno
	}
	sx := b[32:]
	return le.Uint32(sx), fuse.Time{Sec: le.Uint64(sx[80:]), Nsec: le.Uint32(sx[88:])}, le.Uint64(sx[32:]), 0
}

func (c *Client) Setattr(node uint64, in fuse.SetattrIn) (fuse.Attr, unix.Errno) {
	c.t.Helper()
	return c.attr(fuse.Setattr, node, Pack(in.Valid, 0, in.FH, in.Size, uint64(0), in.Atime, in.Mtime, in.Ctime,
		in.AtimeNsec, in.MtimeNsec, in.CtimeNsec, in.Mode, 0, in.UID, in.GID, 0))
}

func (c *Client) Readlink(node uint64) (string, unix.Errno) {
	c.t.Helper()
	b, errno := c.Call(fuse.Readlink, node, nil, 4095)
	return string(b), errno
}

func (c *Client) Symlink(dir uint64, name, target string) (fuse.EntryOut, unix.Errno) {
	c.t.Helper()
	return c.entry(fuse.Symlink, dir, Pack(name, target))
}

func (c *Client) Mknod(dir uint64, name string, mode, rdev, umask uint32) (fuse.EntryOut, unix.Errno) {
	c.t.Helper()
	return c.entry(fuse.Mknod, dir, Pack(mode, rdev, umask, 0, name))
}

func (c *Client) Mkdir(dir uint64, name string, mode, umask uint32) (fuse.EntryOut, unix.Errno) {
	c.t.Helper()
	return c.entry(fuse.Mkdir, dir, Pack(mode, umask, name))
}

func (c *Client) Unlink(dir uint64, name string) unix.Errno {
	c.t.Helper()
	return c.status(fuse.Unlink, dir, Pack(name))
}

func (c *Client) Rmdir(dir uint64, name string) unix.Errno {
	c.t.Helper()
	return c.status(fuse.Rmdir, dir, Pack(name))
}

func (c *Client) Rename(dir uint64, name string, newDir uint64, newName string) unix.Errno {
	c.t.Helper()
	return c.status(fuse.Rename, dir, Pack(newDir, name, newName))
}

func (c *Client) Rename2(dir uint64, name string, newDir uint64, newName string, flags uint32) unix.Errno {
	c.t.Helper()
	return c.status(fuse.Rename2, dir, Pack(newDir, flags, 0, name, newName))
}

func (c *Client) Link(node, dir uint64, name string) (fuse.EntryOut, unix.Errno) {
	c.t.Helper()
	return c.entry(fuse.Link, dir, Pack(node, name))
}

func (c *Client) open(op fuse.Opcode, node uint64, flags, fuseFlags uint32) (fh uint64, errno unix.Errno) {
	c.t.Helper()
	b, errno := c.Call(op, node, Pack(flags, fuseFlags), fuse.OpenOutSize)
	if errno != 0 {
		return 0, errno
	}
	return le.Uint64(b), 0
}

func (c *Client) Open(node uint64, flags uint32) (fh uint64, errno unix.Errno) {
	c.t.Helper()
	return c.open(fuse.Open, node, flags, 0)
}

// OpenKill is OPEN of a caller whose truncation clears set-id bits.
func (c *Client) OpenKill(node uint64, flags uint32) (fh uint64, errno unix.Errno) {
	c.t.Helper()
	return c.open(fuse.Open, node, flags, fuse.OpenKillSuidgid)
}

func (c *Client) Opendir(node uint64) (fh uint64, errno unix.Errno) {
	c.t.Helper()
	return c.open(fuse.Opendir, node, unix.O_RDONLY|unix.O_DIRECTORY, 0)
}

func (c *Client) create(op fuse.Opcode, dir uint64, name string, flags, mode, umask uint32) (fuse.EntryOut, uint64, unix.Errno) {
	c.t.Helper()
	b, errno := c.Call(op, dir, Pack(flags, mode, umask, 0, name), fuse.EntryOutSize+fuse.OpenOutSize)
	if errno != 0 {
		return fuse.EntryOut{}, 0, errno
	}
	return decodeEntry(b), le.Uint64(b[fuse.EntryOutSize:]), 0
}

func (c *Client) Create(dir uint64, name string, flags, mode, umask uint32) (entry fuse.EntryOut, fh uint64, errno unix.Errno) {
	c.t.Helper()
	return c.create(fuse.Create, dir, name, flags, unix.S_IFREG|mode, umask)
}

func (c *Client) Tmpfile(dir uint64, flags, mode, umask uint32) (entry fuse.EntryOut, fh uint64, errno unix.Errno) {
	c.t.Helper()
	return c.create(fuse.Tmpfile, dir, "#1", flags, unix.S_IFREG|mode, umask)
}

func (c *Client) Release(node, fh uint64) unix.Errno {
	c.t.Helper()
	return c.status(fuse.Release, node, Pack(fh, 0, 0, uint64(0)))
}

// ReleaseFlock is RELEASE of a file that had a flock lock.
func (c *Client) ReleaseFlock(node, fh uint64) unix.Errno {
	c.t.Helper()
	return c.status(fuse.Release, node, Pack(fh, 0, fuse.ReleaseFlockUnlock, uint64(0)))
}

func (c *Client) Releasedir(node, fh uint64) unix.Errno {
	c.t.Helper()
	return c.status(fuse.Releasedir, node, Pack(fh, 0, 0, uint64(0)))
}

func (c *Client) Flush(node, fh, owner uint64) unix.Errno {
	c.t.Helper()
	return c.status(fuse.Flush, node, Pack(fh, 0, 0, owner))
}

func (c *Client) Fsync(node, fh uint64, flags uint32) unix.Errno {
	c.t.Helper()
	return c.status(fuse.Fsync, node, Pack(fh, flags, 0))
}

func (c *Client) Fsyncdir(node, fh uint64) unix.Errno {
	c.t.Helper()
	return c.status(fuse.Fsyncdir, node, Pack(fh, 0, 0))
}

func (c *Client) Syncfs(node uint64) unix.Errno {
	c.t.Helper()
	return c.status(fuse.Syncfs, node, make([]byte, 8))
}

// pages splits n bytes as the kernel does, which has a buffer for each page.
func pages(n int) [][]byte {
	var b [][]byte
	for ; n > 0; n -= 4096 {
		b = append(b, make([]byte, min(n, 4096)))
	}
	return b
}

func (c *Client) Read(node, fh, offset uint64, size int) ([]byte, unix.Errno) {
	c.t.Helper()
	unique := c.Unique()
	args := Pack(fh, offset, size, 0, uint64(0), 0, 0)
	header := make([]byte, fuse.OutHeaderSize)
	data := pages(size)
	written := c.do([][]byte{c.Header(fuse.Read, node, unique, fuse.InHeaderSize+len(args)), args}, append([][]byte{header}, data...))
	length, errno := c.checkReply(fuse.Read, unique, header, written)
	var all []byte
	for _, p := range data {
		all = append(all, p...)
	}
	return all[:length], errno
}

func (c *Client) Write(node, fh, offset uint64, data []byte) (int, unix.Errno) {
	c.t.Helper()
	return c.WriteFlags(node, fh, offset, data, 0, 0)
}

// WriteFlags is WRITE with write_flags and the file's open flags.
func (c *Client) WriteFlags(node, fh, offset uint64, data []byte, writeFlags, flags uint32) (int, unix.Errno) {
	c.t.Helper()
	unique := c.Unique()
	args := Pack(fh, offset, len(data), writeFlags, uint64(0), flags, 0)
	readable := [][]byte{c.Header(fuse.Write, node, unique, fuse.InHeaderSize+len(args)+len(data)), args}
	for rest := data; len(rest) > 0; {
		n := min(len(rest), 4096)
		readable, rest = append(readable, rest[:n]), rest[n:]
	}
	header, body := make([]byte, fuse.OutHeaderSize), make([]byte, fuse.WriteOutSize)
	_, errno := c.checkReply(fuse.Write, unique, header, c.do(readable, [][]byte{header, body}))
	return int(le.Uint32(body)), errno
}

func (c *Client) Lseek(node, fh, offset uint64, whence uint32) (uint64, unix.Errno) {
	c.t.Helper()
	b, errno := c.Call(fuse.Lseek, node, Pack(fh, offset, whence, 0), fuse.LseekOutSize)
	if errno != 0 {
		return 0, errno
	}
	return le.Uint64(b), 0
}

func (c *Client) Fallocate(node, fh, offset, length uint64, mode uint32) unix.Errno {
	c.t.Helper()
	return c.status(fuse.Fallocate, node, Pack(fh, offset, length, mode, 0))
}

func (c *Client) CopyFileRange(node, fh, offset, toNode, toFH, toOffset, length uint64) (uint32, unix.Errno) {
	c.t.Helper()
	b, errno := c.Call(fuse.CopyFileRange, node, Pack(fh, offset, toNode, toFH, toOffset, length, uint64(0)), fuse.WriteOutSize)
	if errno != 0 {
		return 0, errno
	}
	return le.Uint32(b), 0
}

// Dirent is an entry of READDIR or READDIRPLUS.
type Dirent struct {
	Ino, Off uint64
	Type     uint32
	Name     string
	Entry    fuse.EntryOut // READDIRPLUS only
}

// Readdir returns the entries of one READDIR or, if plus, READDIRPLUS.
func (c *Client) Readdir(node, fh, offset uint64, size int, plus bool) ([]Dirent, unix.Errno) {
	c.t.Helper()
	op := fuse.Readdir
	if plus {
		op = fuse.Readdirplus
	}
	b, errno := c.Call(op, node, Pack(fh, offset, size, 0, uint64(0), 0, 0), size)
	var all []Dirent
	for len(b) > 0 {
		var d Dirent
		if plus {
			d.Entry = decodeEntry(b)
			b = b[fuse.EntryOutSize:]
		}
		d.Ino, d.Off, d.Type = le.Uint64(b), le.Uint64(b[8:]), le.Uint32(b[20:])
		n := int(le.Uint32(b[16:]))
		d.Name = string(b[fuse.DirentSize : fuse.DirentSize+n])
		b = b[(fuse.DirentSize+n+7)&^7:]
		all = append(all, d)
	}
	return all, errno
}

// List returns a directory's entries, without . and .., with requests of one
// page as the kernel's.
func (c *Client) List(node uint64, plus bool) ([]Dirent, unix.Errno) {
	c.t.Helper()
	fh, errno := c.Opendir(node)
	if errno != 0 {
		return nil, errno
	}
	defer c.Releasedir(node, fh)
	var all []Dirent
	for offset := uint64(0); ; {
		part, errno := c.Readdir(node, fh, offset, 4096, plus)
		if errno != 0 || len(part) == 0 {
			return all, errno
		}
		for _, d := range part {
			offset = d.Off
			if d.Name != "." && d.Name != ".." {
				all = append(all, d)
			}
		}
	}
}

func (c *Client) Statfs(node uint64) (fuse.StatfsOut, unix.Errno) {
	c.t.Helper()
	b, errno := c.Call(fuse.Statfs, node, nil, fuse.StatfsOutSize)
	if errno != 0 {
		return fuse.StatfsOut{}, errno
	}
	return fuse.StatfsOut{
		Blocks: le.Uint64(b), Bfree: le.Uint64(b[8:]), Bavail: le.Uint64(b[16:]), Files: le.Uint64(b[24:]), Ffree: le.Uint64(b[32:]),
		Bsize: le.Uint32(b[40:]), Namelen: le.Uint32(b[44:]), Frsize: le.Uint32(b[48:]),
	}, 0
}

func (c *Client) Setxattr(node uint64, name string, value []byte, flags, extFlags uint32) unix.Errno {
	c.t.Helper()
	return c.status(fuse.Setxattr, node, Pack(len(value), flags, extFlags, 0, name, value))
}

// Getxattr asks for at most size bytes, or for the length if size is 0.
func (c *Client) Getxattr(node uint64, name string, size int) ([]byte, unix.Errno) {
	c.t.Helper()
	return c.Call(fuse.Getxattr, node, Pack(size, 0, name), max(size, fuse.GetxattrOutSize))
}

func (c *Client) Listxattr(node uint64, size int) ([]byte, unix.Errno) {
	c.t.Helper()
	return c.Call(fuse.Listxattr, node, Pack(size, 0), max(size, fuse.GetxattrOutSize))
}

func (c *Client) Removexattr(node uint64, name string) unix.Errno {
	c.t.Helper()
	return c.status(fuse.Removexattr, node, Pack(name))
}

func lkArgs(fh, owner uint64, lock fuse.FileLock, flags uint32) []byte {
	return Pack(fh, owner, lock.Start, lock.End, lock.Type, lock.PID, flags, 0)
}

func (c *Client) Getlk(node, fh, owner uint64, lock fuse.FileLock) (fuse.FileLock, unix.Errno) {
	c.t.Helper()
	b, errno := c.Call(fuse.Getlk, node, lkArgs(fh, owner, lock, 0), fuse.LkOutSize)
	if errno != 0 {
		return fuse.FileLock{}, errno
	}
	return fuse.FileLock{Start: le.Uint64(b), End: le.Uint64(b[8:]), Type: le.Uint32(b[16:]), PID: le.Uint32(b[20:])}, 0
}

func (c *Client) Setlk(node, fh, owner uint64, lock fuse.FileLock, flags uint32) unix.Errno {
	c.t.Helper()
	return c.status(fuse.Setlk, node, lkArgs(fh, owner, lock, flags))
}

// Setlkw waits for the lock; unique is what Interrupt names.
func (c *Client) Setlkw(unique, node, fh, owner uint64, lock fuse.FileLock, flags uint32) unix.Errno {
	c.t.Helper()
	_, errno := c.CallAs(unique, fuse.Setlkw, node, lkArgs(fh, owner, lock, flags), 0)
	return errno
}

func (c *Client) Interrupt(unique uint64) { c.Send(fuse.Interrupt, 0, Pack(unique)) }

func (c *Client) Destroy() unix.Errno {
	c.t.Helper()
	return c.status(fuse.Destroy, 0, nil)
}
