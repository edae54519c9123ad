package fuse

import "encoding/binary"

var le = binary.LittleEndian

// Sizes of what a request carries, in bytes.
const (
	InHeaderSize        = 40
	ForgetInSize        = 8
	ForgetOneSize       = 16
	BatchForgetInSize   = 8
	GetattrInSize       = 16
	StatxInSize         = 24
	MknodInSize         = 16
	MkdirInSize         = 8
	RenameInSize        = 8
	Rename2InSize       = 16
	LinkInSize          = 8
	SetattrInSize       = 88
	OpenInSize          = 8
	CreateInSize        = 16
	ReleaseInSize       = 24
	FlushInSize         = 24
	ReadInSize          = 40
	WriteInSize         = 40
	FsyncInSize         = 16
	SetxattrInSize      = 16
	SetxattrInShortSize = 8 // without SetxattrExt
	GetxattrInSize      = 8
	LkInSize            = 48
	AccessInSize        = 8
	InitInSize          = 16 // without InitExt; 64 with
	InitInExtSize       = 64
	InterruptInSize     = 8
	FallocateInSize     = 32
	LseekInSize         = 24
	CopyFileRangeInSize = 56
	IoctlInSize         = 32
)

// InHeader starts every request.
type InHeader struct {
	Len    uint32 // of the whole request
	Opcode Opcode
	Unique uint64
	NodeID uint64
	// UID and GID are the caller's file system ids. With AllowIDMap they are
	// NoID in requests that create nothing.
	UID, GID uint32
	PID      uint32
	// ExtLen is the length of the extensions at the request's end, in units of
	// 8 bytes.
	ExtLen uint16
}

// NoID stands for a user or group that has no number here,
// FUSE_INVALID_UIDGID.
const NoID = 1<<32 - 1

// DecodeInHeader decodes a request's header.
func DecodeInHeader(p []byte) InHeader {
	_ = p[InHeaderSize-1]
	return InHeader{
		Len: le.Uint32(p), Opcode: Opcode(le.Uint32(p[4:])), Unique: le.Uint64(p[8:]), NodeID: le.Uint64(p[16:]),
		UID: le.Uint32(p[24:]), GID: le.Uint32(p[28:]), PID: le.Uint32(p[32:]), ExtLen: le.Uint16(p[36:]),
	}
}

// InitIn is INIT's argument.
type InitIn struct {
	Major, Minor, MaxReadahead uint32
	Flags                      uint64 // both words
}

// DecodeInitIn decodes INIT's argument, of InitInSize or InitInExtSize bytes.
func DecodeInitIn(p []byte) InitIn {
	_ = p[InitInSize-1]
	in := InitIn{Major: le.Uint32(p), Minor: le.Uint32(p[4:]), MaxReadahead: le.Uint32(p[8:]), Flags: uint64(le.Uint32(p[12:]))}
	if in.Flags&InitExt != 0 && len(p) >= InitInExtSize {
		in.Flags |= uint64(le.Uint32(p[16:])) << secondWordBitBase
	}
	return in
}

// ForgetOne is one node of BATCH_FORGET.
type ForgetOne struct{ NodeID, Nlookup uint64 }

// DecodeForgetOne decodes one element of BATCH_FORGET.
func DecodeForgetOne(p []byte) ForgetOne {
	_ = p[ForgetOneSize-1]
	return ForgetOne{NodeID: le.Uint64(p), Nlookup: le.Uint64(p[8:])}
}

// DecodeUint64 decodes the arguments that are one number: FORGET's count,
// LINK's old node, RENAME's new directory, INTERRUPT's unique.
func DecodeUint64(p []byte) uint64 { return le.Uint64(p) }

// DecodeUint32 decodes the arguments that start with one number.
func DecodeUint32(p []byte) uint32 { return le.Uint32(p) }

// GetattrIn is GETATTR's argument, and the start of STATX's.
type GetattrIn struct {
	Flags uint32
	FH    uint64
}

// DecodeGetattrIn decodes GETATTR's argument.
func DecodeGetattrIn(p []byte) GetattrIn {
	_ = p[GetattrInSize-1]
	return GetattrIn{Flags: le.Uint32(p), FH: le.Uint64(p[8:])}
}

// MknodIn is MKNOD's argument before the name.
type MknodIn struct{ Mode, Rdev, Umask uint32 }

// DecodeMknodIn decodes MKNOD's argument.
func DecodeMknodIn(p []byte) MknodIn {
	_ = p[MknodInSize-1]
	return MknodIn{Mode: le.Uint32(p), Rdev: le.Uint32(p[4:]), Umask: le.Uint32(p[8:])}
}

// MkdirIn is MKDIR's argument before the name.
type MkdirIn struct{ Mode, Umask uint32 }

// DecodeMkdirIn decodes MKDIR's argument.
func DecodeMkdirIn(p []byte) MkdirIn {
	_ = p[MkdirInSize-1]
	return MkdirIn{Mode: le.Uint32(p), Umask: le.Uint32(p[4:])}
}

// Rename2In is RENAME2's argument before the names.
type Rename2In struct {
	NewDir uint64
	Flags  uint32
}

// DecodeRename2In decodes RENAME2's argument.
func DecodeRename2In(p []byte) Rename2In {
	_ = p[Rename2InSize-1]
	return Rename2In{NewDir: le.Uint64(p), Flags: le.Uint32(p[8:])}
}

// SetattrIn is SETATTR's argument. Times are seconds and nanoseconds.
type SetattrIn struct {
	Valid                           uint32
	FH, Size                        uint64
	Atime, Mtime, Ctime             uint64
	AtimeNsec, MtimeNsec, CtimeNsec uint32
	Mode, UID, GID                  uint32
}

// DecodeSetattrIn decodes SETATTR's argument.
func DecodeSetattrIn(p []byte) SetattrIn {
	_ = p[SetattrInSize-1]
	return SetattrIn{
		Valid: le.Uint32(p), FH: le.Uint64(p[8:]), Size: le.Uint64(p[16:]),
		Atime: le.Uint64(p[32:]), Mtime: le.Uint64(p[40:]), Ctime: le.Uint64(p[48:]),
		AtimeNsec: le.Uint32(p[56:]), MtimeNsec: le.Uint32(p[60:]), CtimeNsec: le.Uint32(p[64:]),
		Mode: le.Uint32(p[68:]), UID: le.Uint32(p[76:]), GID: le.Uint32(p[80:]),
	}
}

// OpenIn is the argument of OPEN and OPENDIR.
type OpenIn struct{ Flags, OpenFlags uint32 }

// DecodeOpenIn decodes the argument of OPEN and OPENDIR.
func DecodeOpenIn(p []byte) OpenIn {
	_ = p[OpenInSize-1]
	return OpenIn{Flags: le.Uint32(p), OpenFlags: le.Uint32(p[4:])}
}

// CreateIn is the argument of CREATE and TMPFILE before the name.
type CreateIn struct{ Flags, Mode, Umask, OpenFlags uint32 }

// DecodeCreateIn decodes the argument of CREATE and TMPFILE.
func DecodeCreateIn(p []byte) CreateIn {
	_ = p[CreateInSize-1]
	return CreateIn{Flags: le.Uint32(p), Mode: le.Uint32(p[4:]), Umask: le.Uint32(p[8:]), OpenFlags: le.Uint32(p[12:])}
}

// ReleaseIn is the argument of RELEASE and RELEASEDIR.
type ReleaseIn struct {
	FH                  uint64
	Flags, ReleaseFlags uint32
	LockOwner           uint64
}

// DecodeReleaseIn decodes the argument of RELEASE and RELEASEDIR.
func DecodeReleaseIn(p []byte) ReleaseIn {
	_ = p[ReleaseInSize-1]
	return ReleaseIn{FH: le.Uint64(p), Flags: le.Uint32(p[8:]), ReleaseFlags: le.Uint32(p[12:]), LockOwner: le.Uint64(p[16:])}
}

// FlushIn is FLUSH's argument.
type FlushIn struct{ FH, LockOwner uint64 }

// DecodeFlushIn decodes FLUSH's argument.
func DecodeFlushIn(p []byte) FlushIn {
	_ = p[FlushInSize-1]
	return FlushIn{FH: le.Uint64(p), LockOwner: le.Uint64(p[16:])}
}

// ReadIn is the argument of READ, READDIR and READDIRPLUS.
type ReadIn struct {
	FH, Offset      uint64
	Size, ReadFlags uint32
}

// DecodeReadIn decodes the argument of READ, READDIR and READDIRPLUS.
func DecodeReadIn(p []byte) ReadIn {
	_ = p[ReadInSize-1]
	return ReadIn{FH: le.Uint64(p), Offset: le.Uint64(p[8:]), Size: le.Uint32(p[16:]), ReadFlags: le.Uint32(p[20:])}
}

// WriteIn is WRITE's argument before the data.
type WriteIn struct {
	FH, Offset       uint64
	Size, WriteFlags uint32
	Flags            uint32 // the open file's O_ flags at this moment
}

// DecodeWriteIn decodes WRITE's argument.
func DecodeWriteIn(p []byte) WriteIn {
	_ = p[WriteInSize-1]
	return WriteIn{FH: le.Uint64(p), Offset: le.Uint64(p[8:]), Size: le.Uint32(p[16:]), WriteFlags: le.Uint32(p[20:]), Flags: le.Uint32(p[32:])}
}

// FsyncIn is the argument of FSYNC and FSYNCDIR.
type FsyncIn struct {
	FH    uint64
	Flags uint32
}

// DecodeFsyncIn decodes the argument of FSYNC and FSYNCDIR.
func DecodeFsyncIn(p []byte) FsyncIn {
	_ = p[FsyncInSize-1]
	return FsyncIn{FH: le.Uint64(p), Flags: le.Uint32(p[8:])}
}

// SetxattrIn is SETXATTR's argument before name and value.
type SetxattrIn struct{ Size, Flags, SetxattrFlags uint32 }

// DecodeSetxattrIn decodes SETXATTR's argument, in its long form if ext.
func DecodeSetxattrIn(p []byte, ext bool) SetxattrIn {
	in := SetxattrIn{Size: le.Uint32(p), Flags: le.Uint32(p[4:])}
	if ext {
		in.SetxattrFlags = le.Uint32(p[8:])
	}
	return in
}

// FileLock is a range of a file and how it is locked. End is the last byte;
// Type is F_RDLCK, F_WRLCK or F_UNLCK.
type FileLock struct {
	Start, End uint64
	Type, PID  uint32
}

// LkIn is the argument of GETLK, SETLK and SETLKW.
type LkIn struct {
	FH, Owner uint64
	Lock      FileLock
	Flags     uint32
}

// DecodeLkIn decodes the argument of GETLK, SETLK and SETLKW.
func DecodeLkIn(p []byte) LkIn {
	_ = p[LkInSize-1]
	return LkIn{
		FH: le.Uint64(p), Owner: le.Uint64(p[8:]),
		Lock:  FileLock{Start: le.Uint64(p[16:]), End: le.Uint64(p[24:]), Type: le.Uint32(p[32:]), PID: le.Uint32(p[36:])},
		Flags: le.Uint32(p[40:]),
	}
}

// FallocateIn is FALLOCATE's argument.
type FallocateIn struct {
	FH, Offset, Length uint64
	Mode               uint32
}

// DecodeFallocateIn decodes FALLOCATE's argument.
func DecodeFallocateIn(p []byte) FallocateIn {
	_ = p[FallocateInSize-1]
	return FallocateIn{FH: le.Uint64(p), Offset: le.Uint64(p[8:]), Length: le.Uint64(p[16:]), Mode: le.Uint32(p[24:])}
}

// LseekIn is LSEEK's argument.
type LseekIn struct {
	FH, Offset uint64
	Whence     uint32
}

// DecodeLseekIn decodes LSEEK's argument.
func DecodeLseekIn(p []byte) LseekIn {
	_ = p[LseekInSize-1]
	return LseekIn{FH: le.Uint64(p), Offset: le.Uint64(p[8:]), Whence: le.Uint32(p[16:])}
}

// CopyFileRangeIn is COPY_FILE_RANGE's argument.
type CopyFileRangeIn struct {
	FHIn, OffIn   uint64
	NodeIDOut     uint64
	FHOut, OffOut uint64
	Len, Flags    uint64
}

// DecodeCopyFileRangeIn decodes COPY_FILE_RANGE's argument.
func DecodeCopyFileRangeIn(p []byte) CopyFileRangeIn {
	_ = p[CopyFileRangeInSize-1]
	return CopyFileRangeIn{
		FHIn: le.Uint64(p), OffIn: le.Uint64(p[8:]), NodeIDOut: le.Uint64(p[16:]),
		FHOut: le.Uint64(p[24:]), OffOut: le.Uint64(p[32:]), Len: le.Uint64(p[40:]), Flags: le.Uint64(p[48:]),
	}
}
