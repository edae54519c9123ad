package virtiotest

import "unsafe"

// word gives the aligned 32-bit word of b at byte offset off.
func word(b []byte, off uint64) *uint32 {
	return (*uint32)(unsafe.Pointer(unsafe.SliceData(b[off : off+4])))
}

// quad gives the aligned 64-bit word of b at byte offset off.
func quad(b []byte, off uint64) *uint64 {
	return (*uint64)(unsafe.Pointer(unsafe.SliceData(b[off : off+8])))
}

// misalignment is how far b's first byte is past a multiple of align.
func misalignment(b []byte, align uintptr) uintptr {
	return uintptr(unsafe.Pointer(unsafe.SliceData(b))) % align
}
