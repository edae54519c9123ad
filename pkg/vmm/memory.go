package vmm

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/kvm"
	"github.com/microvm-runtime/microvm/pkg/vmm/boot"
	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/pci"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/pmem"
)

// Guest memory is a multiple of this, in bytes; less than the minimum holds no
// Linux.
const (
	memoryUnit = 1 << 20
	minMemory  = 32 << 20
)

// addMemory makes the guest's RAM: up to 3 GiB below the PCI window and the
// rest from 4 GiB on.
func (m *Machine) addMemory(size uint64) error {
	if size < minMemory || size%memoryUnit != 0 {
		return fmt.Errorf("guest memory of %d bytes: it must be a multiple of %d MiB and at least %d MiB", size, memoryUnit>>20, minMemory>>20)
	}
	ram, err := reserve(size)
	if err != nil {
		return fmt.Errorf("guest memory: %w", err)
	}
	m.mappings = append(m.mappings, ram)
	m.ram = size
	if err := ram.anonymous(0, size, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		return fmt.Errorf("guest memory: %w", err)
	}
	b := ram.bytes()
	if err := adviseGuestMemory(b); err != nil {
		return fmt.Errorf("guest memory: %w", err)
	}
	low := min(size, uint64(lowMemoryEnd))
	if err := m.addRegion(memory.Region{Bytes: b[:low:low]}, ram.address()); err != nil {
		return err
	}
	m.highEnd = highMemoryAddr
	if size > low {
		m.highEnd += memory.GuestAddress(size - low)
		return m.addRegion(memory.Region{Start: highMemoryAddr, Bytes: b[low:size:size]}, ram.address()+low)
	}
	return nil
}

// adviseGuestMemory tells the kernel how a mapping is going to be used.
func adviseGuestMemory(b []byte) error {
	// A core dump of ours is not to hold the guest's secrets, nor gigabytes.
	if err := unix.Madvise(b, unix.MADV_DONTDUMP); err != nil {
		return fmt.Errorf("MADV_DONTDUMP: %w", err)
	}
	// Huge pages halve the time to load the kernel and spare the guest most of
	// its faults. They cost some 10 MiB of a small idle guest. EINVAL: the host's
	// kernel has none.
	if err := unix.Madvise(b, unix.MADV_HUGEPAGE); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("MADV_HUGEPAGE: %w", err)
	}
	return nil
}

// addRegion makes memory part of the guest.
func (m *Machine) addRegion(r memory.Region, hostAddr uint64) error {
	if end := uint64(r.End()); m.physBits < 64 && end > 1<<m.physBits {
		return fmt.Errorf("guest memory up to %#x: the processor's physical addresses have %d bits", end, m.physBits)
	}
	var flags uint32
	if r.ReadOnly {
		flags = kvm.MemReadonly
	}
	if err := m.addSlot(r.Start, r.Bytes, hostAddr, flags); err != nil {
		return err
	}
	return m.memory.Add(r)
}

// addSlot has the guest see b, which is at hostAddr in our address space.
func (m *Machine) addSlot(start memory.GuestAddress, b []byte, hostAddr uint64, flags uint32) error {
	slot := kvm.UserMemoryRegion{
		Slot:          m.nextSlot,
		Flags:         flags,
		GuestPhysAddr: uint64(start),
		MemorySize:    uint64(len(b)),
		UserspaceAddr: hostAddr,
	}
	m.nextSlot++
	return m.vm.SetUserMemoryRegion(slot)
}

// PmemConfig is a file that the guest has as a persistent memory device.
type PmemConfig struct {
	// File is mapped shared, as long as it is when the machine is made. It must
	// not shrink while the machine exists. The machine does not close it; if it is
	// ReadOnly, it is needed open by New only.
	File *os.File
	// ReadOnly maps it without the right to write; what the guest writes is
	// ignored.
	ReadOnly bool
}

// addPmem maps the file above all memory there is and returns its device. Its
// size is rounded up to 2 MiB; the guest reads zeroes after the file's end.
func (m *Machine) addPmem(c PmemConfig) (*pmem.Device, error) {
	info, err := c.File.Stat()
	if err != nil {
		return nil, fmt.Errorf("persistent memory: %w", err)
	}
	fileSize := uint64(info.Size())
	if !info.Mode().IsRegular() || fileSize == 0 || fileSize > 1<<46 {
		return nil, fmt.Errorf("persistent memory %s: not a regular file with contents", info.Name())
	}
	size := roundUp(fileSize, pmemSizeUnit)
	host, err := reserve(size)
	if err != nil {
		return nil, fmt.Errorf("persistent memory %s: %w", info.Name(), err)
	}
	m.mappings = append(m.mappings, host)
	prot := unix.PROT_READ
	if !c.ReadOnly {
		prot |= unix.PROT_WRITE
	}
	// The tail first, over everything: the file's pages then replace it.
	if err := host.anonymous(0, size, prot); err != nil {
		return nil, fmt.Errorf("persistent memory %s: %w", info.Name(), err)
	}
	if err := host.file(c.File, 0, fileSize, prot); err != nil {
		return nil, fmt.Errorf("persistent memory %s: %w", info.Name(), err)
	}
	start := memory.GuestAddress(roundUp(uint64(m.highEnd), pmemAlign))
	if err := m.addRegion(memory.Region{Start: start, Bytes: host.bytes(), ReadOnly: c.ReadOnly}, host.address()); err != nil {
		return nil, fmt.Errorf("persistent memory %s: %w", info.Name(), err)
	}
	m.highEnd = start + memory.GuestAddress(size)
	if c.ReadOnly {
		return pmem.New(start, size, nil), nil
	}
	return pmem.New(start, size, c.File.Sync), nil
}

// roundUp rounds v up to a multiple of unit, a power of two.
func roundUp(v, unit uint64) uint64 { return (v + unit - 1) &^ (unit - 1) }

// e820 is the memory map for the kernel: RAM around the PC's reserved areas,
// and the ECAM, which Linux uses only where a map reserves it.
func e820(memorySize uint64) []boot.E820Entry {
	low := min(memorySize, uint64(lowMemoryEnd))
	entries := []boot.E820Entry{
		{Start: 0, Size: uint64(conventionalEnd), Type: boot.E820RAM},
		{Start: acpiAddr, Size: uint64(acpiEnd - acpiAddr), Type: boot.E820ACPI},
		{Start: kernelLowest, Size: low - uint64(kernelLowest), Type: boot.E820RAM},
		{Start: ecamAddr, Size: pci.ECAMSize, Type: boot.E820Reserved},
	}
	if memorySize > low {
		entries = append(entries, boot.E820Entry{Start: highMemoryAddr, Size: memorySize - low, Type: boot.E820RAM})
	}
	return entries
}
