package vmm

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/kvm"
	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/mem"
)

// hotMemory is the region of guest memory that virtio-mem plugs blocks of. A
// block is plugged exactly when it has a KVM slot, of its own: slots can neither
// be resized nor split while the guest runs, and a slot that is larger than what
// is plugged would leave the guest memory that it has given back.
type hotMemory struct {
	m         *Machine
	start     memory.GuestAddress
	host      *mapping
	blocks    *memory.Blocks
	firstSlot uint32
	device    *mem.Device
	max       uint64 // of what can be plugged, in bytes
	// touchable are the blocks that have been plugged once: they stay accessible
	// to us. One goroutine uses it, the device's.
	touchable []bool
}

// addHotMemory makes the region for a guest that is to have up to limit bytes
// of memory, above everything else, and its device. What is not plugged costs
// address space only.
func (m *Machine) addHotMemory(system *kvm.System, limit uint64) error {
	if limit <= m.ram {
		return nil
	}
	slots, err := system.CheckExtension(kvm.CapNRMemslots)
	if err != nil {
		return err
	}
	start := memory.GuestAddress(roundUp(uint64(m.highEnd), hotMemoryAlign))
	most, block, count := hotMemoryShape(limit-m.ram, uint64(start), m.physBits, slots-otherSlots)
	if count == 0 {
		m.log.Warn("guest memory cannot grow", "address-bits", m.physBits, "slots", slots)
		return nil
	}
	h := &hotMemory{m: m, start: start, firstSlot: m.nextSlot, max: most, touchable: make([]bool, count)}
	m.nextSlot += uint32(count)
	if h.host, err = reserve(block * uint64(count)); err != nil {
		return fmt.Errorf("hot-plugged memory: %w", err)
	}
	m.mappings = append(m.mappings, h.host)
	if err := adviseGuestMemory(h.host.bytes()); err != nil {
		return fmt.Errorf("hot-plugged memory: %w", err)
	}
	if h.blocks, err = memory.NewBlocks(block, count); err != nil {
		return err
	}
	region := memory.Region{Start: h.start, Bytes: h.host.bytes(), Blocks: h.blocks}
	if err := m.memory.Add(region); err != nil {
		return err
	}
	m.highEnd = region.End()
	h.device, err = mem.New(mem.Config{Start: h.start, Blocks: h.blocks, Plug: h.plug, Unplug: h.unplug, Log: m.log})
	if err != nil {
		return err
	}
	m.hot = h
	_, err = m.addDevice(h.device)
	return err
}

// hotMemoryShape says how much of size bytes, rounded up to blocks, can be
// plugged at start, and by which blocks. It leaves half of the guest's address
// space to others.
func hotMemoryShape(size, start uint64, physBits, slots int) (most, block uint64, count int) {
	slots = min(slots, maxHotBlocks)
	end := uint64(1) << (min(physBits, 63) - 1)
	if slots < 1 || start >= end || size == 0 {
		return 0, 0, 0
	}
	size = min(size, end-start)
	for block = minHotBlock; roundUp(size, hotMemoryUnit)/block > uint64(slots); {
		block *= 2
	}
	most = roundUp(size, block)
	return most, block, int(roundUp(most, max(hotMemoryUnit, block)) / block)
}

// plug gives the guest n blocks from first on.
func (h *hotMemory) plug(first, n int) error {
	for i := first; i < first+n; i++ {
		err := h.touch(i)
		if err == nil {
			err = h.setSlot(i, h.blocks.Size())
		}
		if err != nil {
			for i--; i >= first; i-- {
				h.restore(i, 0)
			}
			return err
		}
	}
	for i := first; i < first+n; i++ {
		h.blocks.Set(i, true)
	}
	return nil
}

// unplug takes n blocks from first on. A device that has a slice to one of them
// may go on writing there: the guest cannot see it, and what memory that takes
// is taken back the next time the block is unplugged.
func (h *hotMemory) unplug(first, n int) error {
	for i := first; i < first+n; i++ {
		h.blocks.Set(i, false)
	}
	for i := first; i < first+n; i++ {
		if err := h.setSlot(i, 0); err != nil {
			for i--; i >= first; i-- {
				h.restore(i, h.blocks.Size())
			}
			for i := first; i < first+n; i++ {
				h.blocks.Set(i, true)
			}
			return err
		}
	}
	if err := memory.Discard(h.bytes(first, n)); err != nil {
		h.m.log.Error("unplugged memory stays with the guest's process", "error", err)
	}
	return nil
}

// bytes is where blocks are in our address space.
func (h *hotMemory) bytes(first, n int) []byte {
	size := int(h.blocks.Size())
	return h.host.bytes()[first*size : (first+n)*size]
}

// touch makes a block's mapping accessible. Where the host does not overcommit,
// this is where it counts the memory.
func (h *hotMemory) touch(block int) error {
	if h.touchable[block] {
		return nil
	}
	if err := unix.Mprotect(h.bytes(block, 1), unix.PROT_READ|unix.PROT_WRITE); err != nil {
		return fmt.Errorf("hot-plugged memory: %w", err)
	}
	h.touchable[block] = true
	return nil
}

// setSlot makes a block's slot, or removes it if size is zero.
func (h *hotMemory) setSlot(block int, size uint64) error {
	offset := uint64(block) * h.blocks.Size()
	return h.m.vm.SetUserMemoryRegion(kvm.UserMemoryRegion{
		Slot:          h.firstSlot + uint32(block),
		GuestPhysAddr: uint64(h.start) + offset,
		MemorySize:    size,
		UserspaceAddr: h.host.address() + offset,
	})
}

// restore undoes setSlot. If KVM can do neither, nobody knows any more what the
// guest has.
func (h *hotMemory) restore(block int, size uint64) {
	if err := h.setSlot(block, size); err != nil {
		h.m.finish(Exit{ExitError, fmt.Sprintf("hot-plugged memory: block %d: %v", block, err)})
	}
}

// ErrResize says that a machine cannot have the size that it was asked for.
var ErrResize = errors.New("the machine cannot have this size")

// ResizeMemory asks the guest to grow or shrink to size bytes, rounded up to
// blocks of Config.MaxMemoryBytes. It does not wait: MemoryBytes says what has
// come of it. A guest keeps what it booted with.
func (m *Machine) ResizeMemory(size uint64) error {
	wanted := size - min(size, m.ram)
	if m.hot == nil {
		if wanted > 0 {
			return fmt.Errorf("%d bytes of memory: it has %d and cannot grow: %w", size, m.ram, ErrResize)
		}
		return nil
	}
	// In this order, because rounding could wrap around.
	if wanted > m.hot.max {
		return fmt.Errorf("%d bytes of memory: it can have %d: %w", size, m.ram+m.hot.max, ErrResize)
	}
	return m.hot.device.Request(roundUp(wanted, m.hot.blocks.Size()))
}

// MemoryBytes is how much memory the guest has, in bytes, and up to how much it
// can grow.
func (m *Machine) MemoryBytes() (now, limit uint64) {
	if m.hot == nil {
		return m.ram, m.ram
	}
	return m.ram + m.hot.device.Plugged(), m.ram + m.hot.max
}
