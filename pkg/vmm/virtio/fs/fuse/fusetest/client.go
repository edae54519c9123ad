// Package fusetest is a FUSE client for tests: it lays requests out in memory
// as Linux's virtio-fs driver does, and decodes replies.
package fusetest

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

var le = binary.LittleEndian

// Do carries a request to the server: it fills writable and returns how many
// bytes were written.
type Do func(readable, writable [][]byte) (written uint32)

// Client sends requests. Its methods may be called concurrently, and fail the
// test when a reply breaks the protocol.
type Client struct {
	// UID, GID and PID are the caller of the requests.
	UID, GID, PID uint32

	t      testing.TB
	do     Do
	unique *atomic.Uint64
}

// New makes a client whose requests do carries.
func New(t testing.TB, do Do) *Client { return &Client{t: t, do: do, unique: new(atomic.Uint64)} }

// As returns a client of the same server with another caller.
func (c *Client) As(uid, gid uint32) *Client {
	other := *c
	other.UID, other.GID = uid, gid
	return &other
}

// Pack encodes fields one after the other: integers by their size, strings with
// a NUL, bytes as they are.
func Pack(fields ...any) []byte {
	var b []byte
	for _, f := range fields {
		switch v := f.(type) {
		case uint16:
			b = le.AppendUint16(b, v)
		case uint32:
			b = le.AppendUint32(b, v)
		case int:
			b = le.AppendUint32(b, uint32(v))
		case uint64:
			b = le.AppendUint64(b, v)
		case string:
			b = append(append(b, v...), 0)
		case []byte:
			b = append(b, v...)
		default:
			panic(fmt.Sprintf("fusetest: cannot pack %T", f))
		}
	}
	return b
}

// Unique returns a number for the next request.
func (c *Client) Unique() uint64 { return c.unique.Add(2) }

// Header encodes a request's header.
func (c *Client) Header(op fuse.Opcode, node, unique uint64, length int) []byte {
	return Pack(uint32(length), uint32(op), unique, node, c.UID, c.GID, c.PID, uint16(0), uint16(0))
}

// Call sends a request with the given argument and returns the reply's body, of
// which it accepts room bytes.
func (c *Client) Call(op fuse.Opcode, node uint64, args []byte, room int) ([]byte, unix.Errno) {
	c.t.Helper()
	return c.CallAs(c.Unique(), op, node, args, room)
}

// CallAs is Call with a chosen unique.
func (c *Client) CallAs(unique uint64, op fuse.Opcode, node uint64, args []byte, room int) ([]byte, unix.Errno) {
	c.t.Helper()
	readable := [][]byte{c.Header(op, node, unique, fuse.InHeaderSize+len(args))}
	if len(args) > 0 {
		readable = append(readable, args)
	}
	writable := [][]byte{make([]byte, fuse.OutHeaderSize)}
	if room > 0 {
		writable = append(writable, make([]byte, room))
	}
	written := c.do(readable, writable)
	length, errno := c.checkReply(op, unique, writable[0], written)
	if length == 0 {
		return nil, errno
	}
	return writable[1][:length], errno
}

// checkReply checks the header of a reply and returns the length of its body.
func (c *Client) checkReply(op fuse.Opcode, unique uint64, header []byte, written uint32) (int, unix.Errno) {
	c.t.Helper()
	length, errno, echoed := le.Uint32(header), -int32(le.Uint32(header[4:])), le.Uint64(header[8:])
	switch {
	case written < fuse.OutHeaderSize || length != written:
		c.t.Fatalf("%v: %d bytes written, the header says %d", op, written, length)
	case echoed != unique:
		c.t.Fatalf("%v: reply to request %d, sent %d", op, echoed, unique)
	case errno < 0 || errno >= 512:
		c.t.Fatalf("%v: error %d, which the kernel does not take", op, errno)
	case errno != 0 && written != fuse.OutHeaderSize:
		c.t.Fatalf("%v: error %v with a body of %d bytes", op, unix.Errno(errno), written-fuse.OutHeaderSize)
	}
	return int(written) - fuse.OutHeaderSize, unix.Errno(errno)
}

// Send sends a request that gets no reply.
func (c *Client) Send(op fuse.Opcode, node uint64, args []byte) {
	c.t.Helper()
	if n := c.do([][]byte{append(c.Header(op, node, c.Unique(), fuse.InHeaderSize+len(args)), args...)}, nil); n != 0 {
		c.t.Fatalf("%v: %d bytes written, it has no reply", op, n)
	}
}

// InitOut is the part of INIT's reply that matters.
type InitOut struct {
	Major, Minor, MaxReadahead, MaxWrite uint32
	Flags                                uint64
	MaxPages                             uint16
}

// KernelFlags are what Linux 6.12 offers for a virtio-fs without DAX.
const KernelFlags = 0x3<<0 | 1<<3 | 1<<4 | 1<<5 | 1<<6 | 7<<7 | 1<<10 | 1<<11 | 1<<12 | 1<<13 | 1<<14 | 1<<15 |
	1<<16 | 1<<17 | 1<<18 | 1<<19 | 1<<20 | 1<<21 | 1<<22 | 1<<23 | 1<<24 | 1<<25 | 1<<27 | 1<<28 | 1<<29 | 1<<30 |
	1<<32 | 1<<34 | 1<<35 | 1<<36 | 1<<38 | 1<<39 | 1<<40

// Init negotiates as Linux 6.12 does.
func (c *Client) Init() InitOut {
	c.t.Helper()
	out, errno := c.InitWith(fuse.MajorVersion, fuse.MinorVersion, KernelFlags)
	if errno != 0 {
		c.t.Fatalf("INIT: %v", errno)
	}
	return out
}

// InitWith negotiates a version and flags.
func (c *Client) InitWith(major, minor uint32, flags uint64) (InitOut, unix.Errno) {
	c.t.Helper()
	args := Pack(major, minor, 128<<10, uint32(flags), uint32(flags>>32), make([]byte, 44))
	b, errno := c.Call(fuse.Init, 0, args, fuse.InitOutSize)
	if errno != 0 {
		return InitOut{}, errno
	}
	return InitOut{
		Major: le.Uint32(b), Minor: le.Uint32(b[4:]), MaxReadahead: le.Uint32(b[8:]),
		Flags:    uint64(le.Uint32(b[12:])) | uint64(le.Uint32(b[32:]))<<32,
		MaxWrite: le.Uint32(b[20:]), MaxPages: le.Uint16(b[28:]),
	}, 0
}

func decodeAttr(b []byte) fuse.Attr {
	return fuse.Attr{
		Ino: le.Uint64(b), Size: le.Uint64(b[8:]), Blocks: le.Uint64(b[16:]),
		Atime: fuse.Time{Sec: le.Uint64(b[24:]), Nsec: le.Uint32(b[48:])},
		Mtime: fuse.Time{Sec: le.Uint64(b[32:]), Nsec: le.Uint32(b[52:])},
		Ctime: fuse.Time{Sec: le.Uint64(b[40:]), Nsec: le.Uint32(b[56:])},
		Mode:  le.Uint32(b[60:]), Nlink: le.Uint32(b[64:]), UID: le.Uint32(b[68:]), GID: le.Uint32(b[72:]),
		Rdev: le.Uint32(b[76:]), Blksize: le.Uint32(b[80:]), Flags: le.Uint32(b[84:]),
	}
}

func decodeEntry(b []byte) fuse.EntryOut {
	return fuse.EntryOut{
		NodeID:     le.Uint64(b),
		EntryValid: fuse.Time{Sec: le.Uint64(b[16:]), Nsec: le.Uint32(b[32:])},
		AttrValid:  fuse.Time{Sec: le.Uint64(b[24:]), Nsec: le.Uint32(b[36:])},
		Attr:       decodeAttr(b[40:]),
	}
}

func (c *Client) entry(op fuse.Opcode, node uint64, args []byte) (fuse.EntryOut, unix.Errno) {
	c.t.Helper()
	b, errno := c.Call(op, node, args, fuse.EntryOutSize)
	if errno != 0 {
		return fuse.EntryOut{}, errno
	}
	if len(b) != fuse.EntryOutSize {
		c.t.Fatalf("%v: reply of %d bytes", op, len(b))
	}
	return decodeEntry(b), 0
}

func (c *Client) attr(op fuse.Opcode, node uint64, args []byte) (fuse.Attr, unix.Errno) {
	c.t.Helper()
	b, errno := c.Call(op, node, args, fuse.AttrOutSize)
	if errno != 0 {
		return fuse.Attr{}, errno
	}
	if len(b) != fuse.AttrOutSize {
		c.t.Fatalf("%v: reply of %d bytes", op, len(b))
	}
	return decodeAttr(b[16:]), 0
}

func (c *Client) status(op fuse.Opcode, node uint64, args []byte) unix.Errno {
	c.t.Helper()
	b, errno := c.Call(op, node, args, 0)
	if len(b) != 0 {
		c.t.Fatalf("%v: reply of %d bytes", op, len(b))
	}
	return errno
}
