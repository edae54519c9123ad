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
	ecam      []byte
	functions [maxDevices]atomic.Pointer[Function]

	mu       sync.Mutex // serialises Add, mapAt, unmap and Free
	assigned []mapping  // where the BARs were put at first
	mappings atomic.Pointer[[]mapping]
}

// mapping is a BAR and where it is.
type mapping struct {
	start, size uint64
	function    *Function
	bar         int
}

// functionSize is a function's part of the ECAM, deviceSize that of a device
// with its eight functions.
const (
	functionSize = 4096
	deviceSize   = 8 * functionSize
)

// NewBus makes an empty bus whose BARs are in window. ecam, of ECAMSize bytes
// that are zero, is what the guest reads as the configuration space: reading it
// has no side effects, so a guest does hundreds of reads at memory speed that
// would otherwise be exits each. The guest must not be able to write it: its
// writes go to WriteConfig.
func NewBus(window Window, ecam []byte) (*Bus, error) {
	if len(ecam) != ECAMSize {
		return nil, fmt.Errorf("configuration space of %d bytes, not %d", len(ecam), ECAMSize)
	}
	b := &Bus{window: window, ecam: ecam}
	b.mappings.Store(new([]mapping))
	// Nobody looks at the functions 1 to 7 of a device that does not say it has
	// several: their pages stay untouched, and the vendor id of zero that they
	// show is no vendor's either.
	for device := range maxDevices {
		showAbsent(b.page(device))
	}
	return b, nil
}

// showAbsent makes a function's configuration space that of none: all ones.
func showAbsent(page []byte) {
	for i := range page {
		page[i] = 0xff
	}
}

// page is the ECAM of a device's function 0.
func (b *Bus) page(device int) []byte {
	return b.ecam[device*deviceSize : device*deviceSize+functionSize]
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
	assigned := b.assigned
	for i, bar := range f.bars {
		if bar.size == 0 {
			continue
		}
		start, ok := b.place(uint64(bar.size), assigned)
		if !ok {
			return Address{}, fmt.Errorf("no room for a BAR of %#x bytes", bar.size)
		}
		assigned = append(assigned, mapping{start: start, size: uint64(bar.size), function: f, bar: i})
		binary.LittleEndian.PutUint32(f.config[offBARs+4*i:], uint32(start))
	}
	b.assigned = assigned
	f.bus = b
	// The guest may be looking. When it sees the id, which comes last, the function
	// is whole and its writes count. What it writes before that waits for the lock,
	// which nobody has yet: elsewhere it is taken before b.mu.
	f.mu.Lock()
	defer f.mu.Unlock()
	b.functions[device].Store(f)
	page, config := b.page(device), f.config
	f.page, f.config = page, page[:configSize]
	const afterID = offDeviceID + 2
	clear(page[afterID:]) // zeroes past the 256 bytes say "no extended capabilities"
	copy(page[afterID:], config[afterID:])
	copy(page, config[:afterID])
	return Address{Device: uint8(device)}, nil
}

// place finds the lowest range of the window for a BAR that is neither assigned
// nor in use by one that the guest has moved. Called with b.mu held.
func (b *Bus) place(size uint64, assigned []mapping) (start uint64, ok bool) {
	taken := slices.Concat(assigned, *b.mappings.Load())
	start = (uint64(b.window.Start) + size - 1) &^ (size - 1)
	for start+size <= uint64(b.window.Start)+uint64(b.window.Size) {
		i := slices.IndexFunc(taken, func(m mapping) bool { return start < m.start+m.size && m.start < start+size })
		if i < 0 {
			return start, true
		}
		start = (taken[i].start + taken[i].size + size - 1) &^ (size - 1)
	}
	return 0, false
}

// Remove takes a function off the bus for good. When it returns the guest finds
// nothing in its place, and its BARs are decoded nowhere: the handler's MapBAR
// was told. Accesses of vCPUs that were under way may still reach the handler.
// The place stays the function's until Free.
func (b *Bus) Remove(a Address) error {
	if a.Device >= maxDevices {
		return fmt.Errorf("PCI bus has no device number %d", a.Device)
	}
	f := b.functions[a.Device].Load()
	if f == nil || !f.remove() {
		return fmt.Errorf("there is no PCI function at %s", a)
	}
	return nil
}

// Free gives the place of a function that was removed to the next one: the device
// number and the BARs' ranges.
func (b *Bus) Free(a Address) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.functions[a.Device].Swap(nil)
	b.assigned = slices.DeleteFunc(b.assigned, func(m mapping) bool { return m.function == f })
}

// WriteConfig is the guest's write of p to the ECAM at offset.
func (b *Bus) WriteConfig(offset uint64, p []byte) {
	if offset >= ECAMSize || offset%deviceSize >= functionSize {
		return
	}
	if f := b.functions[offset/deviceSize].Load(); f != nil {
		f.writeConfig(int(offset%deviceSize), p)
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
