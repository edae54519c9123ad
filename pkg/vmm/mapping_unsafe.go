package vmm

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mapping is a range of our address space, outside Go's heap, that becomes
// guest memory. It starts at a multiple of 2 MiB, so that guest and host
// addresses are congruent and KVM can map huge pages.
type mapping struct {
	whole  unsafe.Pointer // what was reserved, alignment included
	size   uint64         // of the reservation
	start  unsafe.Pointer
	usable uint64
}

const hugePage = 2 << 20

// reserve takes size bytes of address space that cannot be accessed yet.
func reserve(size uint64) (*mapping, error) {
	whole, err := unix.MmapPtr(-1, 0, nil, uintptr(size+hugePage), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("reserve %d bytes of address space: %w", size, err)
	}
	skip := -uintptr(whole) & (hugePage - 1)
	return &mapping{whole: whole, size: size + hugePage, start: unsafe.Add(whole, skip), usable: size}, nil
}

// anonymous backs [offset, offset+size) with memory that is zero and takes up
// nothing until it is touched.
func (m *mapping) anonymous(offset, size uint64, prot int) error {
	return m.place(-1, offset, size, prot, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
}

// file backs [offset, offset+size) with the start of a file, shared.
func (m *mapping) file(file *os.File, offset, size uint64, prot int) error {
	return m.place(int(file.Fd()), offset, size, prot, unix.MAP_SHARED)
}

func (m *mapping) place(fd int, offset, size uint64, prot, flags int) error {
	if offset > m.usable || size > m.usable-offset {
		return fmt.Errorf("map [%#x, +%#x) of %#x bytes", offset, size, m.usable)
	}
	if _, err := unix.MmapPtr(fd, 0, unsafe.Add(m.start, offset), uintptr(size), prot, flags|unix.MAP_FIXED); err != nil {
		return fmt.Errorf("map %d bytes: %w", size, err)
	}
	return nil
}

// bytes is the whole of the mapping.
func (m *mapping) bytes() []byte { return unsafe.Slice((*byte)(m.start), m.usable) }

// address is where the mapping is, for KVM.
func (m *mapping) address() uint64 { return uint64(uintptr(m.start)) }

// unmap gives everything back. Nothing may use the bytes any more.
func (m *mapping) unmap() error { return unix.MunmapPtr(m.whole, uintptr(m.size)) }
