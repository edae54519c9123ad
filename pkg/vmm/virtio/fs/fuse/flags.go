package fuse

// Flags of INIT: what the kernel offers and what the server accepts. Bits 32
// and up travel in a second word, present when InitExt is set.
const (
	AsyncRead         = 1 << 0
	PosixLocks        = 1 << 1
	AtomicOTrunc      = 1 << 3
	ExportSupport     = 1 << 4
	BigWrites         = 1 << 5
	DontMask          = 1 << 6
	FlockLocks        = 1 << 10
	AutoInvalData     = 1 << 12
	DoReaddirplus     = 1 << 13
	ReaddirplusAuto   = 1 << 14
	AsyncDIO          = 1 << 15
	WritebackCache    = 1 << 16
	ParallelDirops    = 1 << 18
	PosixACL          = 1 << 20
	MaxPages          = 1 << 22
	CacheSymlinks     = 1 << 23
	Submounts         = 1 << 27
	HandleKillprivV2  = 1 << 28
	SetxattrExt       = 1 << 29
	InitExt           = 1 << 30
	SecurityCtx       = 1 << 32
	CreateSuppGroup   = 1 << 34
	NoExportSupport   = 1 << 38
	AllowIDMap        = 1 << 40
	secondWordBitBase = 32
)

// SetattrIn.Valid, FATTR_.
const (
	FattrMode        = 1 << 0
	FattrUID         = 1 << 1
	FattrGID         = 1 << 2
	FattrSize        = 1 << 3
	FattrAtime       = 1 << 4
	FattrMtime       = 1 << 5
	FattrFH          = 1 << 6
	FattrAtimeNow    = 1 << 7
	FattrMtimeNow    = 1 << 8
	FattrLockOwner   = 1 << 9
	FattrCtime       = 1 << 10
	FattrKillSuidgid = 1 << 11
)

const (
	// OpenOut.OpenFlags.
	OpenKeepCache = 1 << 1

	// OpenIn.OpenFlags and CreateIn.OpenFlags.
	OpenKillSuidgid = 1 << 0

	// ReleaseIn.ReleaseFlags.
	ReleaseFlockUnlock = 1 << 1

	// GetattrIn.Flags.
	GetattrFH = 1 << 0

	// LkIn.Flags.
	LkFlock = 1 << 0

	// WriteIn.WriteFlags. WriteCache: the kernel writes back a page that was
	// dirtied through a mapping, with any writable handle of the file.
	WriteCache       = 1 << 0
	WriteKillSuidgid = 1 << 2

	// FsyncIn.Flags.
	FsyncDatasync = 1 << 0

	// SetxattrIn.SetxattrFlags.
	SetxattrACLKillSgid = 1 << 0

	// Attr.Flags.
	AttrSubmount = 1 << 0
)
