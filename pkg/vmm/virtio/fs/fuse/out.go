package fuse

// Sizes of what a reply carries, in bytes.
const (
	OutHeaderSize   = 16
	AttrSize        = 88
	EntryOutSize    = 40 + AttrSize
	AttrOutSize     = 16 + AttrSize
	StatxOutSize    = 32 + 256
	OpenOutSize     = 16
	WriteOutSize    = 8
	StatfsOutSize   = 80
	GetxattrOutSize = 8
	LkOutSize       = 24
	LseekOutSize    = 8
	InitOutSize     = 64
	DirentSize      = 24 // before the name
)

// OutHeader starts every reply. Error is 0 or a negative errno.
type OutHeader struct {
	Len    uint32 // of the whole reply
	Error  int32
	Unique uint64
}

// Append appends the header to b.
func (h OutHeader) Append(b []byte) []byte {
	b = le.AppendUint32(b, h.Len)
	b = le.AppendUint32(b, uint32(h.Error))
	return le.AppendUint64(b, h.Unique)
}

// InitOut is INIT's reply. MaxReadahead and MaxWrite are bytes.
type InitOut struct {
	Major, Minor, MaxReadahead         uint32
	Flags                              uint64 // both words
	MaxBackground, CongestionThreshold uint16
	MaxWrite, TimeGran                 uint32
	MaxPages                           uint16
}

// Append appends the reply to b.
func (o InitOut) Append(b []byte) []byte {
	b = le.AppendUint32(b, o.Major)
	b = le.AppendUint32(b, o.Minor)
	b = le.AppendUint32(b, o.MaxReadahead)
	b = le.AppendUint32(b, uint32(o.Flags))
	b = le.AppendUint16(b, o.MaxBackground)
	b = le.AppendUint16(b, o.CongestionThreshold)
	b = le.AppendUint32(b, o.MaxWrite)
	b = le.AppendUint32(b, o.TimeGran)
	b = le.AppendUint16(b, o.MaxPages)
	b = le.AppendUint16(b, 0) // map_alignment
	b = le.AppendUint32(b, uint32(o.Flags>>secondWordBitBase))
	return append(b, make([]byte, 28)...) // max_stack_depth, unused
}

// Time is a point in time.
type Time struct {
	Sec  uint64 // two's complement before 1970
	Nsec uint32
}

// Attr describes a node. Rdev is encoded by EncodeDev.
type Attr struct {
	Ino, Size, Blocks     uint64
	Atime, Mtime, Ctime   Time
	Mode, Nlink, UID, GID uint32
	Rdev, Blksize, Flags  uint32
}

// Append appends the attributes to b.
func (a *Attr) Append(b []byte) []byte {
	b = le.AppendUint64(b, a.Ino)
	b = le.AppendUint64(b, a.Size)
	b = le.AppendUint64(b, a.Blocks)
	b = le.AppendUint64(b, a.Atime.Sec)
	b = le.AppendUint64(b, a.Mtime.Sec)
	b = le.AppendUint64(b, a.Ctime.Sec)
	for _, v := range [...]uint32{
		a.Atime.Nsec, a.Mtime.Nsec, a.Ctime.Nsec,
		a.Mode, a.Nlink, a.UID, a.GID, a.Rdev, a.Blksize, a.Flags,
	} {
		b = le.AppendUint32(b, v)
	}
	return b
}

// EntryOut tells of a name: the node behind it and how long the kernel may
// keep name and attributes.
type EntryOut struct {
	NodeID                uint64
	EntryValid, AttrValid Time
	Attr                  Attr
}

// Append appends the entry to b.
func (e *EntryOut) Append(b []byte) []byte {
	b = le.AppendUint64(b, e.NodeID)
	b = le.AppendUint64(b, 0) // generation: node ids are never used again
	b = le.AppendUint64(b, e.EntryValid.Sec)
	b = le.AppendUint64(b, e.AttrValid.Sec)
	b = le.AppendUint32(b, e.EntryValid.Nsec)
	b = le.AppendUint32(b, e.AttrValid.Nsec)
	return e.Attr.Append(b)
}

// AttrOut is the reply of GETATTR and SETATTR.
type AttrOut struct {
	Valid Time
	Attr  Attr
}

// Append appends the reply to b.
func (a *AttrOut) Append(b []byte) []byte {
	b = le.AppendUint64(b, a.Valid.Sec)
	b = le.AppendUint32(b, a.Valid.Nsec)
	b = le.AppendUint32(b, 0)
	return a.Attr.Append(b)
}

// StatxOut is STATX's reply. Its times and devices are those of statx(2).
type StatxOut struct {
	Valid                      Time
	Mask, Blksize              uint32
	Nlink, UID, GID            uint32
	Mode                       uint16
	Ino, Size, Blocks          uint64
	Atime, Btime, Ctime, Mtime Time
	RdevMajor, RdevMinor       uint32
}

// Append appends the reply to b.
func (s *StatxOut) Append(b []byte) []byte {
	b = le.AppendUint64(b, s.Valid.Sec)
	b = le.AppendUint32(b, s.Valid.Nsec)
	b = append(b, make([]byte, 20)...) // flags, spare
	b = le.AppendUint32(b, s.Mask)
	b = le.AppendUint32(b, s.Blksize)
	b = le.AppendUint64(b, 0) // attributes
	b = le.AppendUint32(b, s.Nlink)
	b = le.AppendUint32(b, s.UID)
	b = le.AppendUint32(b, s.GID)
	b = le.AppendUint16(b, s.Mode)
	b = le.AppendUint16(b, 0)
	b = le.AppendUint64(b, s.Ino)
	b = le.AppendUint64(b, s.Size)
	b = le.AppendUint64(b, s.Blocks)
	b = le.AppendUint64(b, 0) // attributes_mask
	for _, t := range [...]Time{s.Atime, s.Btime, s.Ctime, s.Mtime} {
		b = le.AppendUint64(b, t.Sec)
		b = le.AppendUint32(b, t.Nsec)
		b = le.AppendUint32(b, 0)
	}
	b = le.AppendUint32(b, s.RdevMajor)
	b = le.AppendUint32(b, s.RdevMinor)
	return append(b, make([]byte, 120)...) // the host's device, spare
}

// AppendOpenOut appends the reply of OPEN, OPENDIR and, after the entry, of
// CREATE.
func AppendOpenOut(b []byte, fh uint64, flags uint32) []byte {
	b = le.AppendUint64(b, fh)
	b = le.AppendUint32(b, flags)
	return le.AppendUint32(b, 0) // backing_id
}

// AppendUint32Out appends the replies that are one number and padding:
// WRITE's, COPY_FILE_RANGE's and the size of xattrs.
func AppendUint32Out(b []byte, v uint32) []byte {
	b = le.AppendUint32(b, v)
	return le.AppendUint32(b, 0)
}

// AppendUint64Out appends LSEEK's reply.
func AppendUint64Out(b []byte, v uint64) []byte { return le.AppendUint64(b, v) }

// StatfsOut is STATFS's reply.
type StatfsOut struct {
	Blocks, Bfree, Bavail, Files, Ffree uint64
	Bsize, Namelen, Frsize              uint32
}

// Append appends the reply to b.
func (s StatfsOut) Append(b []byte) []byte {
	for _, v := range [...]uint64{s.Blocks, s.Bfree, s.Bavail, s.Files, s.Ffree} {
		b = le.AppendUint64(b, v)
	}
	for _, v := range [...]uint32{s.Bsize, s.Namelen, s.Frsize} {
		b = le.AppendUint32(b, v)
	}
	return append(b, make([]byte, 28)...)
}

// Append appends the lock, as GETLK's reply, to b.
func (l FileLock) Append(b []byte) []byte {
	b = le.AppendUint64(b, l.Start)
	b = le.AppendUint64(b, l.End)
	b = le.AppendUint32(b, l.Type)
	return le.AppendUint32(b, l.PID)
}

// Dirent is an entry of a directory. Off is the position after it; Type is the
// DT_ constant.
type Dirent struct {
	Ino, Off uint64
	Type     uint32
	Name     []byte
}

// Size returns how many bytes Append appends.
func (d *Dirent) Size() int { return (DirentSize + len(d.Name) + 7) &^ 7 }

// Append appends the entry, padded to 8 bytes.
func (d *Dirent) Append(b []byte) []byte {
	b = le.AppendUint64(b, d.Ino)
	b = le.AppendUint64(b, d.Off)
	b = le.AppendUint32(b, uint32(len(d.Name)))
	b = le.AppendUint32(b, d.Type)
	b = append(b, d.Name...)
	var pad [8]byte
	return append(b, pad[:d.Size()-DirentSize-len(d.Name)]...)
}

// EncodeDev packs a device number as the kernel's new_encode_dev does.
func EncodeDev(major, minor uint32) uint32 {
	return minor&0xff | major<<8 | (minor&^0xff)<<12
}

// DecodeDev is new_decode_dev.
func DecodeDev(dev uint32) (major, minor uint32) {
	return dev >> 8 & 0xfff, dev&0xff | dev>>12&0xfff00
}
