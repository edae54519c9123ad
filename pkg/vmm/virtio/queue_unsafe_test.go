package virtio_test

import "unsafe"

// inside says that b is part of m.
func inside(m, b []byte) bool {
	if len(b) == 0 {
		return true
	}
	start, at := uintptr(unsafe.Pointer(unsafe.SliceData(m))), uintptr(unsafe.Pointer(unsafe.SliceData(b)))
	return at >= start && at-start < uintptr(len(m)) && uintptr(cap(b)) <= uintptr(len(m))-(at-start)
}
