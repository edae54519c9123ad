package virtiotest

import (
	"sync/atomic"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
)

// Descriptor flags, virtio 1.2 section 2.7.5.
const (
	DescNext     = 1
	DescWrite    = 2
	DescIndirect = 4
)

// DescSize is the size of a descriptor in memory.
const DescSize = 16

// Desc is a descriptor of a split virtqueue.
type Desc struct {
	Addr  memory.GuestAddress
	Len   uint32
	Flags uint16
	Next  uint16
}

// Ring is raw access to one virtqueue's descriptor table and rings, as the
// driver sees them: it checks nothing, so that a test can write what no good
// driver would. All accesses are atomic and may be made while the device runs.
type Ring struct {
	Mem               *Memory
	Size              uint16
	Desc, Avail, Used memory.GuestAddress
}

// NewRing allocates the parts of a virtqueue.
func NewRing(t testing.TB, m *Memory, size uint16) *Ring {
	t.Helper()
	n := int(size)
	return &Ring{Mem: m, Size: size, Desc: m.Alloc(t, DescSize*n), Avail: m.Alloc(t, 6+2*n), Used: m.Alloc(t, 6+8*n)}
}

// Config is the ring as the transport describes it to NewQueue, without Kick
// and Interrupt.
func (r *Ring) Config(features uint64) virtio.QueueConfig {
	return virtio.QueueConfig{Memory: r.Mem.Guest, Size: r.Size, Desc: r.Desc, Avail: r.Avail, Used: r.Used, Features: features}
}

// Clear zeroes the table and the rings, as a driver does before it enables the
// queue.
func (r *Ring) Clear() {
	n := int(r.Size)
	clear(r.Mem.Slice(r.Desc, DescSize*n))
	clear(r.Mem.Slice(r.Avail, 6+2*n))
	clear(r.Mem.Slice(r.Used, 6+8*n))
}

// SetDesc writes descriptor i of the ring's table.
func (r *Ring) SetDesc(i uint16, d Desc) { r.Mem.SetDesc(r.Desc, i, d) }

// GetDesc reads descriptor i of the ring's table.
func (r *Ring) GetDesc(i uint16) Desc { return r.Mem.GetDesc(r.Desc, i) }

// SetDesc writes descriptor i of the table at an address aligned to 8.
func (m *Memory) SetDesc(table memory.GuestAddress, i uint16, d Desc) {
	off := uint64(table-m.Start) + uint64(i)*DescSize
	atomic.StoreUint64(quad(m.Bytes, off), uint64(d.Addr))
	atomic.StoreUint64(quad(m.Bytes, off+8), uint64(d.Len)|uint64(d.Flags)<<32|uint64(d.Next)<<48)
}

// GetDesc reads descriptor i of the table at an address aligned to 8.
func (m *Memory) GetDesc(table memory.GuestAddress, i uint16) Desc {
	off := uint64(table-m.Start) + uint64(i)*DescSize
	w := atomic.LoadUint64(quad(m.Bytes, off+8))
	return Desc{memory.GuestAddress(atomic.LoadUint64(quad(m.Bytes, off))), uint32(w), uint16(w >> 32), uint16(w >> 48)}
}

// The fields of the available ring, section 2.7.6. Slots count modulo Size.

func (r *Ring) SetAvailFlags(v uint16) { r.Mem.store16(r.Avail, v) }
func (r *Ring) AvailIdx() uint16       { return r.Mem.load16(r.Avail + 2) }
func (r *Ring) SetAvailIdx(v uint16)   { r.Mem.store16(r.Avail+2, v) }
func (r *Ring) SetAvail(slot, head uint16) {
	r.Mem.store16(r.Avail+4+2*memory.GuestAddress(slot&(r.Size-1)), head)
}
func (r *Ring) SetUsedEvent(v uint16) { r.Mem.store16(r.Avail+4+2*memory.GuestAddress(r.Size), v) }

// Push makes head available: it writes the next slot, then the index.
func (r *Ring) Push(head uint16) {
	idx := r.AvailIdx()
	r.SetAvail(idx, head)
	r.SetAvailIdx(idx + 1)
}

// The fields of the used ring, section 2.7.8.

func (r *Ring) UsedFlags() uint16  { return r.Mem.load16(r.Used) }
func (r *Ring) UsedIdx() uint16    { return r.Mem.load16(r.Used + 2) }
func (r *Ring) AvailEvent() uint16 { return r.Mem.load16(r.Used + 4 + 8*memory.GuestAddress(r.Size)) }

// UsedElem reads the element of a slot: the head of the chain and the bytes
// written to it.
func (r *Ring) UsedElem(slot uint16) (head, written uint32) {
	off := uint64(r.Used-r.Mem.Start) + 4 + 8*uint64(slot&(r.Size-1))
	return atomic.LoadUint32(word(r.Mem.Bytes, off)), atomic.LoadUint32(word(r.Mem.Bytes, off+4))
}
