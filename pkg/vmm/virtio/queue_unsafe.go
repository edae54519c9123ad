package virtio

import (
	"errors"
	"unsafe"
)

// Rings and descriptor tables are read and written as aligned words with
// sync/atomic: Go has no 16-bit atomics, and the other side is a vCPU that
// runs at the same time. Virtio is little-endian (section 1.4), and so is
// every machine this runs on: a word's low half is the field at the lower
// address.

var errMisaligned = errors.New("mapping of guest memory is not aligned")

// words32 gives b as 32-bit words. b aliases guest memory; its length is a
// multiple of 4.
func words32(b []byte) ([]uint32, error) {
	p := unsafe.Pointer(unsafe.SliceData(b))
	if uintptr(p)%4 != 0 {
		return nil, errMisaligned
	}
	return unsafe.Slice((*uint32)(p), len(b)/4), nil
}

// words64 gives b as 64-bit words. b aliases guest memory; its length is a
// multiple of 8.
func words64(b []byte) ([]uint64, error) {
	p := unsafe.Pointer(unsafe.SliceData(b))
	if uintptr(p)%8 != 0 {
		return nil, errMisaligned
	}
	return unsafe.Slice((*uint64)(p), len(b)/8), nil
}
