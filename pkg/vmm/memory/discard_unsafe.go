package memory

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Discard gives the host back the whole pages of b, a slice of guest memory.
// Anonymous memory reads as zeroes afterwards, and the memory of a file as the
// file has it: for both, dropping our page table entries is all it takes. Who
// writes to b meanwhile, or later, gets new pages.
func Discard(b []byte) error {
	page := uintptr(os.Getpagesize())
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (page - 1)
	if uintptr(len(b)) < skip+page {
		return nil
	}
	b = b[skip:]
	if err := unix.Madvise(b[:uintptr(len(b))&^(page-1)], unix.MADV_DONTNEED); err != nil {
		return fmt.Errorf("discard %d bytes of guest memory: %w", len(b), err)
	}
	return nil
}
