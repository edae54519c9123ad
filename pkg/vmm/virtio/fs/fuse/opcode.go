// Package fuse is the wire format of the FUSE protocol, version 7.41, as
// Linux's include/uapi/linux/fuse.h defines it. The protocol is in the byte
// order of the guest; every guest of ours is little-endian.
//
// Structures that the server receives have a Decode function, which is given at
// least the structure's size; structures that it sends have an Append method.
package fuse

import "fmt"

// Version of the protocol. Minor versions add; a server answers with the
// smaller of both sides' minors.
const (
	MajorVersion = 7
	MinorVersion = 41
	// OldestMinor is the oldest minor the server talks to: 7.31 is Linux 5.4's.
	// Structures have not changed size since.
	OldestMinor = 31
)

// RootID is the node id of the share's root. It needs no lookup and ignores
// FORGET.
const RootID = 1

// Opcode is the operation of a request.
type Opcode uint32

// Operations, enum fuse_opcode.
const (
	Lookup        Opcode = 1
	Forget        Opcode = 2 // no reply
	Getattr       Opcode = 3
	Setattr       Opcode = 4
	Readlink      Opcode = 5
	Symlink       Opcode = 6
	Mknod         Opcode = 8
	Mkdir         Opcode = 9
	Unlink        Opcode = 10
	Rmdir         Opcode = 11
	Rename        Opcode = 12
	Link          Opcode = 13
	Open          Opcode = 14
	Read          Opcode = 15
	Write         Opcode = 16
	Statfs        Opcode = 17
	Release       Opcode = 18
	Fsync         Opcode = 20
	Setxattr      Opcode = 21
	Getxattr      Opcode = 22
	Listxattr     Opcode = 23
	Removexattr   Opcode = 24
	Flush         Opcode = 25
	Init          Opcode = 26
	Opendir       Opcode = 27
	Readdir       Opcode = 28
	Releasedir    Opcode = 29
	Fsyncdir      Opcode = 30
	Getlk         Opcode = 31
	Setlk         Opcode = 32
	Setlkw        Opcode = 33
	Access        Opcode = 34
	Create        Opcode = 35
	Interrupt     Opcode = 36 // no reply
	Bmap          Opcode = 37
	Destroy       Opcode = 38
	Ioctl         Opcode = 39
	Poll          Opcode = 40
	NotifyReply   Opcode = 41
	BatchForget   Opcode = 42 // no reply
	Fallocate     Opcode = 43
	Readdirplus   Opcode = 44
	Rename2       Opcode = 45
	Lseek         Opcode = 46
	CopyFileRange Opcode = 47
	SetupMapping  Opcode = 48
	RemoveMapping Opcode = 49
	Syncfs        Opcode = 50
	Tmpfile       Opcode = 51
	Statx         Opcode = 52

	// MaxOpcode is one past the largest operation known here.
	MaxOpcode Opcode = 53
)

var opcodeNames = [MaxOpcode]string{
	Lookup: "LOOKUP", Forget: "FORGET", Getattr: "GETATTR", Setattr: "SETATTR", Readlink: "READLINK",
	Symlink: "SYMLINK", Mknod: "MKNOD", Mkdir: "MKDIR", Unlink: "UNLINK", Rmdir: "RMDIR", Rename: "RENAME",
	Link: "LINK", Open: "OPEN", Read: "READ", Write: "WRITE", Statfs: "STATFS", Release: "RELEASE",
	Fsync: "FSYNC", Setxattr: "SETXATTR", Getxattr: "GETXATTR", Listxattr: "LISTXATTR",
	Removexattr: "REMOVEXATTR", Flush: "FLUSH", Init: "INIT", Opendir: "OPENDIR", Readdir: "READDIR",
	Releasedir: "RELEASEDIR", Fsyncdir: "FSYNCDIR", Getlk: "GETLK", Setlk: "SETLK", Setlkw: "SETLKW",
	Access: "ACCESS", Create: "CREATE", Interrupt: "INTERRUPT", Bmap: "BMAP", Destroy: "DESTROY",
	Ioctl: "IOCTL", Poll: "POLL", NotifyReply: "NOTIFY_REPLY", BatchForget: "BATCH_FORGET",
	Fallocate: "FALLOCATE", Readdirplus: "READDIRPLUS", Rename2: "RENAME2", Lseek: "LSEEK",
	CopyFileRange: "COPY_FILE_RANGE", SetupMapping: "SETUPMAPPING", RemoveMapping: "REMOVEMAPPING",
	Syncfs: "SYNCFS", Tmpfile: "TMPFILE", Statx: "STATX",
}

// String returns the operation's name without its FUSE_ prefix.
func (o Opcode) String() string {
	if o < MaxOpcode && opcodeNames[o] != "" {
		return opcodeNames[o]
	}
	return fmt.Sprintf("opcode %d", uint32(o))
}
