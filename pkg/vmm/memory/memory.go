// Package memory is the guest's physical memory as the VMM sees it.
package memory

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
)

// GuestAddress is an address in guest physical memory.
type GuestAddress uint64

// ErrOutOfRange says that a range of guest addresses is not wholly inside one
// region of guest memory. The addresses came from the guest: it is no bug of
// the VMM's.
var ErrOutOfRange = errors.New("outside guest memory")

// Region is a range of guest physical memory and the mapping behind it.
type Region struct {
	Start GuestAddress
	// Bytes is the mapping. It is not Go heap memory; the guest changes it at
	// any time.
	Bytes []byte
	// ReadOnly says that the mapping cannot be written: a store through Bytes
	// would fault. Slice refuses such a region.
	ReadOnly bool
	// Blocks says which parts of the region there are at the moment; nil: all of
	// it is there, for good.
	Blocks *Blocks
}

// End returns the first address after the region.
func (r Region) End() GuestAddress { return r.Start + GuestAddress(len(r.Bytes)) }

// Memory is the set of a guest's regions. All methods may be called
// concurrently.
type Memory struct {
	mu      sync.Mutex               // serialises Add
	regions atomic.Pointer[[]Region] // sorted by Start, never changed in place
}

// Add makes a region part of guest memory. It fails when the region is empty,
// wraps around, or overlaps another.
func (m *Memory) Add(r Region) error {
	if len(r.Bytes) == 0 {
		return errors.New("memory region is empty")
	}
	if r.End() < r.Start {
		return fmt.Errorf("memory region at %#x wraps around", uint64(r.Start))
	}
	if b := r.Blocks; b != nil && uint64(len(r.Bytes)) != b.size*uint64(b.count) {
		return fmt.Errorf("memory region of %d bytes with %d blocks of %d", len(r.Bytes), b.count, b.size)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	old := m.Regions()
	for _, o := range old {
		if r.Start < o.End() && o.Start < r.End() {
			return fmt.Errorf("memory region at %#x overlaps the one at %#x", uint64(r.Start), uint64(o.Start))
		}
	}
	next := append(slices.Clone(old), r)
	slices.SortFunc(next, func(a, b Region) int {
		if a.Start < b.Start {
			return -1
		}
		return 1
	})
	m.regions.Store(&next)
	return nil
}

// Regions returns the regions, sorted by address. The caller must not change
// the slice.
func (m *Memory) Regions() []Region {
	if p := m.regions.Load(); p != nil {
		return *p
	}
	return nil
}

// Slice returns the bytes of [addr, addr+length). They alias guest memory: the
// guest may change them between two reads, so what is checked must have been
// copied first. The range must lie inside one writable region. A zero length
// gives an empty slice for any address (virtio 1.2, 2.7.4.2 lets a driver pass
// empty buffers).
//
// The bytes stay accessible as long as the machine exists, also those of a
// block that is unplugged later: who uses such a slice reaches nobody else's
// memory, but the guest has lost what is written there.
func (m *Memory) Slice(addr GuestAddress, length uint64) ([]byte, error) {
	return m.slice(addr, length, true)
}

// ReadSlice is Slice for bytes that are only read: the range may lie in a
// read-only region, where a store through the slice would fault.
func (m *Memory) ReadSlice(addr GuestAddress, length uint64) ([]byte, error) {
	return m.slice(addr, length, false)
}

func (m *Memory) slice(addr GuestAddress, length uint64, writable bool) ([]byte, error) {
	if length == 0 {
		return nil, nil
	}
	for _, r := range m.Regions() {
		if addr < r.Start || addr >= r.End() {
			continue
		}
		off := uint64(addr - r.Start)
		if r.ReadOnly && writable || length > uint64(len(r.Bytes))-off {
			break
		}
		if r.Blocks != nil && !r.Blocks.plugged(off, length) {
			break
		}
		return r.Bytes[off : off+length : off+length], nil
	}
	return nil, fmt.Errorf("[%#x, +%#x): %w", uint64(addr), length, ErrOutOfRange)
}
