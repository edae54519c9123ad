// Package boottest makes kernels for tests: ELF files of a few instructions.
package boottest

import "encoding/binary"

// Sizes of Elf64_Ehdr and of Elf64_Phdr.
const (
	HeaderSize  = 64
	SegmentSize = 56
)

// Segment is a part of the file that is to be loaded.
type Segment struct {
	Addr                      uint64 // in guest memory
	Offset, FileSize, MemSize uint64
}

// File makes an ELF file of an executable for x86-64: the headers, then body.
func File(entry uint64, body []byte, segments ...Segment) []byte {
	le := binary.LittleEndian
	b := make([]byte, HeaderSize)
	copy(b, []byte{0x7f, 'E', 'L', 'F', 2, 1, 1})
	le.PutUint16(b[16:], 2)  // ET_EXEC
	le.PutUint16(b[18:], 62) // EM_X86_64
	le.PutUint64(b[24:], entry)
	le.PutUint64(b[32:], HeaderSize) // program headers follow
	le.PutUint16(b[54:], SegmentSize)
	le.PutUint16(b[56:], uint16(len(segments)))
	for _, s := range segments {
		p := make([]byte, SegmentSize)
		le.PutUint32(p, 1) // PT_LOAD
		le.PutUint64(p[8:], s.Offset)
		le.PutUint64(p[24:], s.Addr)
		le.PutUint64(p[32:], s.FileSize)
		le.PutUint64(p[40:], s.MemSize)
		b = append(b, p...)
	}
	return append(b, body...)
}

// Kernel makes one of code that is loaded and entered at addr.
func Kernel(addr uint64, code []byte) []byte {
	n := uint64(len(code))
	return File(addr, code, Segment{Addr: addr, Offset: HeaderSize + SegmentSize, FileSize: n, MemSize: n})
}
