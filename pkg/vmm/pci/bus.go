// Package pci is the machine's PCI bus: one root bus with up to 32 devices of
// one function each, whose configuration space is memory-mapped (ECAM) and
// whose interrupts are MSI-X messages. There are no bridges, I/O ports and
// interrupt pins.
package pci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
)

// maxDevices is the number of device numbers on a bus.
const maxDevices = 32

// ECAMSize is the size of one bus's configuration space in bytes: PCI Express
// Base Specification 5.0, section 7.2.2.
const ECAMSize = 1 << 20

// Address is a function's place on the bus.
type Address struct {
	Device uint8
}

// String is the address as Linux writes it, "0000:00:03.0".
func (a Address) String() string { return fmt.Sprintf("0000:00:%02x.0", a.Device) }

// Window is the range of guest physical memory in which BARs live.
type Window struct {
	Start, Size uint32
}

// Bus is a root bus. All methods may be called concurrently.
type Bus struct {
	window    Window
	functions [maxDevices]atomic.Pointer[Function]

	mu       sync.Mutex // serialises Add, mapAt and unmap
	nextBAR  uint64     // where the next BAR is put at first
	mappings atomic.Pointer[[]mapping]
}

// mapping is a BAR that is decoded.
type mapping struct {
	start, size uint64
	function    *Function
	bar         int
}

// NewBus makes an empty bus whose BARs are in window.
func NewBus(window Window) *Bus {
	b := &Bus{window: window, nextBAR: uint64(window.Start)}
	b.mappings.Store(new([]mapping))
	return b
}

// Add puts a function on the bus, at the lowest free device number, with its
// BARs assigned but not decoded yet. It may be called while the guest runs: the
// guest sees the function when it looks at the bus again. A function belongs to
// one bus for ever.
func (b *Bus) Add(f *Function) (Address, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if f.bus != nil {
		return Address{}, errors.New("PCI function is on a bus already")
	}
	device := 0
	for b.functions[device].Load() != nil {
		if device++; device == maxDevices {
			return Address{}, fmt.Errorf("PCI bus is full: it has %d devices", maxDevices)
		}
	}
	next := b.nextBAR
	for i, bar := range f.bars {
		if bar.size == 0 {
			continue
		}
		size := uint64(bar.size)
		start := (next + size - 1) &^ (size - 1)
		if next = start + size; next > uint64(b.window.Start)+uint64(b.window.Size) {
			return Address{}, fmt.Errorf("no room for a BAR of %#x bytes", bar.size)
		}
		binary.LittleEndian.PutUint32(f.config[offBARs+4*i:], uint32(start))
	}
	b.nextBAR = next
	f.bus = b
	b.functions[device].Store(f)
	return Address{Device: uint8(device)}, nil
}

// function splits an ECAM offset: bits 12 to 14 are the function number, 15 to
// 19 the device.
func (b *Bus) function(offset uint64) (*Function, int) {
	if offset >= ECAMSize || offset>>12&7 != 0 {
		return nil, 0
	}
	return b.functions[offset>>15].Load(), int(offset & 0xfff)
}

// ReadConfig fills p from the ECAM. Where there is no function all bits are
// ones.
func (b *Bus) ReadConfig(offset uint64, p []byte) {
	f, reg := b.function(offset)
	if f == nil {
		for i := range p {
			p[i] = 0xff
		}
		return
	}
	f.readConfig(reg, p)
}

// WriteConfig writes p to the ECAM.
func (b *Bus) WriteConfig(offset uint64, p []byte) {
	if f, reg := b.function(offset); f != nil {
		f.writeConfig(reg, p)
	}
}

// ReadMMIO fills p from the BAR at a guest physical address. It says false when
// there is none, or the access reaches over its end.
func (b *Bus) ReadMMIO(addr uint64, p []byte) bool {
	m, ok := b.find(addr, len(p))
	if ok {
		m.function.readBAR(m.bar, addr-m.start, p)
	}
	return ok
}

// WriteMMIO is ReadMMIO's counterpart.
func (b *Bus) WriteMMIO(addr uint64, p []byte) bool {
	m, ok := b.find(addr, len(p))
	if ok {
		m.function.writeBAR(m.bar, addr-m.start, p)
	}
	return ok
}

func (b *Bus) find(addr uint64, n int) (mapping, bool) {
	for _, m := range *b.mappings.Load() {
		if addr >= m.start && addr-m.start < m.size {
			return m, uint64(n) <= m.size-(addr-m.start)
		}
	}
	return mapping{}, false
}

// mapAt has the bus decode a BAR at addr. It says false when that is not wholly
// inside the window, as no bridge would forward it there, or when another BAR
// is there: whoever came first keeps the range.
func (b *Bus) mapAt(f *Function, bar int, addr uint64, size uint32) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	end := addr + uint64(size)
	if addr < uint64(b.window.Start) || end > uint64(b.window.Start)+uint64(b.window.Size) {
		return false
	}
	old := *b.mappings.Load()
	for _, m := range old {
		if addr < m.start+m.size && m.start < end {
			return false
		}
	}
	next := append(slices.Clone(old), mapping{start: addr, size: uint64(size), function: f, bar: bar})
	b.mappings.Store(&next)
	return true
}

// unmap is mapAt's counterpart.
func (b *Bus) unmap(f *Function, bar int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	next := slices.DeleteFunc(slices.Clone(*b.mappings.Load()), func(m mapping) bool {
		return m.function == f && m.bar == bar
	})
	b.mappings.Store(&next)
}
