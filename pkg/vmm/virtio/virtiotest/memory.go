package virtiotest

import (
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
)

const pageSize = 4096

// Memory is a guest's memory for a test: one region of Go memory, so that the
// race detector sees every access to it. Allocations are for the driver's side
// and may be made from any goroutine.
type Memory struct {
	// Guest is what a device gets.
	Guest *memory.Memory
	// Start is the guest address of Bytes[0].
	Start memory.GuestAddress
	Bytes []byte

	mu   sync.Mutex
	free []extent // sorted by offset, no two adjacent
}

type extent struct{ off, size uint64 }

// NewMemory makes guest memory of size bytes, a multiple of 4096, at start.
func NewMemory(t testing.TB, start memory.GuestAddress, size int) *Memory {
	t.Helper()
	raw := make([]byte, size+pageSize)
	if m := misalignment(raw, pageSize); m != 0 {
		raw = raw[pageSize-m:]
	}
	return newMemory(t, start, raw[:size:size])
}

// NewMappedMemory is NewMemory with pages of the kernel's, which the race
// detector does not look at, between pages that nobody may touch. It is gone
// when the test ends: whoever still uses it then crashes.
func NewMappedMemory(t testing.TB, start memory.GuestAddress, size int) *Memory {
	t.Helper()
	all, err := unix.Mmap(-1, 0, size+2*pageSize, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Munmap(all); err != nil {
			t.Error(err)
		}
	})
	inside := all[pageSize : pageSize+size : pageSize+size]
	if err := unix.Mprotect(inside, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		t.Fatal(err)
	}
	return newMemory(t, start, inside)
}

func newMemory(t testing.TB, start memory.GuestAddress, b []byte) *Memory {
	t.Helper()
	m := &Memory{Guest: new(memory.Memory), Start: start, Bytes: b, free: []extent{{0, uint64(len(b))}}}
	if err := m.Guest.Add(memory.Region{Start: start, Bytes: m.Bytes}); err != nil {
		t.Fatal(err)
	}
	return m
}

// Alloc takes size bytes of memory, aligned to 16 (to 4096 from that size on).
func (m *Memory) Alloc(t testing.TB, size int) memory.GuestAddress {
	t.Helper()
	need, align := roundUp(uint64(max(size, 1)), 16), uint64(16)
	if need >= pageSize {
		align = pageSize
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, e := range m.free {
		off := roundUp(e.off, align)
		if off+need > e.off+e.size {
			continue
		}
		var rest []extent
		if off > e.off {
			rest = append(rest, extent{e.off, off - e.off})
		}
		if end := e.off + e.size; off+need < end {
			rest = append(rest, extent{off + need, end - off - need})
		}
		m.free = slices.Replace(m.free, i, i+1, rest...)
		return m.Start + memory.GuestAddress(off)
	}
	t.Fatalf("virtiotest: no room for %d bytes in guest memory", size)
	return 0
}

// Free gives back what Alloc returned for size.
func (m *Memory) Free(addr memory.GuestAddress, size int) {
	e := extent{uint64(addr - m.Start), roundUp(uint64(max(size, 1)), 16)}
	m.mu.Lock()
	defer m.mu.Unlock()
	i, _ := slices.BinarySearchFunc(m.free, e, func(a, b extent) int {
		if a.off < b.off {
			return -1
		}
		return 1
	})
	m.free = slices.Insert(m.free, i, e)
	if i+1 < len(m.free) && m.free[i].off+m.free[i].size == m.free[i+1].off {
		m.free[i].size += m.free[i+1].size
		m.free = slices.Delete(m.free, i+1, i+2)
	}
	if i > 0 && m.free[i-1].off+m.free[i-1].size == m.free[i].off {
		m.free[i-1].size += m.free[i].size
		m.free = slices.Delete(m.free, i, i+1)
	}
}

// Slice returns the memory at addr; it panics outside.
func (m *Memory) Slice(addr memory.GuestAddress, size int) []byte {
	off := uint64(addr - m.Start)
	return m.Bytes[off : off+uint64(size) : off+uint64(size)]
}

func (m *Memory) load16(addr memory.GuestAddress) uint16 {
	off := uint64(addr - m.Start)
	return uint16(atomic.LoadUint32(word(m.Bytes, off&^3)) >> (off % 4 * 8))
}

// store16 leaves the other half of the word alone, also when the device
// writes to it at the same time.
func (m *Memory) store16(addr memory.GuestAddress, v uint16) {
	off := uint64(addr - m.Start)
	w, shift := word(m.Bytes, off&^3), off%4*8
	for {
		old := atomic.LoadUint32(w)
		if atomic.CompareAndSwapUint32(w, old, old&^(0xffff<<shift)|uint32(v)<<shift) {
			return
		}
	}
}

func roundUp(n, align uint64) uint64 { return (n + align - 1) / align * align }
