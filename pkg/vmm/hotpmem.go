package vmm

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/kvm"
	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/pmem"
)

// Persistent memory that comes and goes has one of a number of windows, above
// everything else.
const (
	pmemWindows = 16
	// MaxHotPmem is the size of the largest file that AttachPmem takes. The guest
	// pays 16 MiB of its memory for the page structures of that much.
	MaxHotPmem = 1 << 30
)

// pmemWindow is where a file is in the guest's memory, one after the other. What
// is there in our address space stays accessible, because a device may hold a
// slice to it.
type pmemWindow struct {
	start  memory.GuestAddress
	slot   uint32
	host   *mapping
	there  *memory.Blocks // one, of the window's size
	seen   bool           // the guest sees it: it has its slot
	device *pmem.Device   // nil: the window is free
}

// AttachPmem is Attach for a read-only persistent memory device over a regular
// file, which is mapped shared. The file must not shrink until Detach has
// returned, and is not needed open.
func (m *Machine) AttachPmem(file *os.File) (address string, err error) {
	m.plug.Lock()
	defer m.plug.Unlock()
	if m.hasEnded() {
		return "", errEnded
	}
	info, err := file.Stat()
	if err != nil {
		return "", fmt.Errorf("persistent memory: %w", err)
	}
	if !info.Mode().IsRegular() || info.Size() == 0 || info.Size() > MaxHotPmem {
		return "", fmt.Errorf("persistent memory: not a regular file of up to %d bytes", MaxHotPmem)
	}
	w, err := m.freePmemWindow()
	if err != nil {
		return "", fmt.Errorf("persistent memory: %w", err)
	}
	size := roundUp(uint64(info.Size()), pmemSizeUnit)
	w.device = pmem.New(w.start, size, nil)
	if err := m.fillPmem(w, file, uint64(info.Size()), size); err != nil {
		return "", fmt.Errorf("persistent memory: %w", errors.Join(err, m.emptyPmem(w)))
	}
	addr, err := m.addDevice(w.device)
	if err != nil {
		return "", errors.Join(err, m.emptyPmem(w))
	}
	return addr.String(), nil
}

// freePmemWindow finds a window, or makes one. Called with plug held.
func (m *Machine) freePmemWindow() (*pmemWindow, error) {
	for _, w := range m.pmem {
		if w.device == nil {
			return w, nil
		}
	}
	if len(m.pmem) == pmemWindows {
		return nil, fmt.Errorf("there are %d already", pmemWindows)
	}
	w := &pmemWindow{start: memory.GuestAddress(roundUp(uint64(m.highEnd), pmemAlign)), slot: m.nextSlot}
	if end := uint64(w.start) + MaxHotPmem; m.physBits < 64 && end > 1<<m.physBits {
		return nil, fmt.Errorf("no room up to %#x: the processor's physical addresses have %d bits", end, m.physBits)
	}
	var err error
	if w.there, err = memory.NewBlocks(MaxHotPmem, 1); err != nil {
		return nil, err
	}
	if w.host, err = reserve(MaxHotPmem); err != nil {
		return nil, err
	}
	region := memory.Region{Start: w.start, Bytes: w.host.bytes(), ReadOnly: true, Blocks: w.there}
	if err := m.memory.Add(region); err != nil {
		return nil, errors.Join(err, w.host.unmap())
	}
	m.mappings = append(m.mappings, w.host)
	m.nextSlot++
	m.highEnd = region.End()
	m.pmem = append(m.pmem, w)
	return w, nil
}

// fillPmem has the guest see a file in a window, and zeroes up to size.
func (m *Machine) fillPmem(w *pmemWindow, file *os.File, fileSize, size uint64) error {
	if err := w.host.anonymous(0, MaxHotPmem, unix.PROT_READ); err != nil {
		return err
	}
	if err := w.host.file(file, 0, fileSize, unix.PROT_READ); err != nil {
		return err
	}
	if err := m.setPmemSlot(w, size); err != nil {
		return err
	}
	w.there.Set(0, true)
	return nil
}

// emptyPmem takes a file out of its window. If KVM fails, the window is not used
// again.
func (m *Machine) emptyPmem(w *pmemWindow) error {
	w.there.Set(0, false)
	if w.seen {
		if err := m.setPmemSlot(w, 0); err != nil {
			return err
		}
	}
	if err := w.host.anonymous(0, MaxHotPmem, unix.PROT_READ); err != nil {
		return err
	}
	w.device = nil
	return nil
}

// setPmemSlot makes the window's slot, or removes it if size is zero. One that
// is there can only be removed, one that is not cannot.
func (m *Machine) setPmemSlot(w *pmemWindow, size uint64) error {
	err := m.vm.SetUserMemoryRegion(kvm.UserMemoryRegion{
		Slot: w.slot, Flags: kvm.MemReadonly,
		GuestPhysAddr: uint64(w.start), MemorySize: size, UserspaceAddr: w.host.address(),
	})
	if err == nil {
		w.seen = size > 0
	}
	return err
}
