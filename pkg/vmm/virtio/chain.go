package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/buffers"
)

// A descriptor, section 2.7.5: le64 addr, le32 len, le16 flags, le16 next.
const (
	descSize     = 16
	descNext     = 1 << 0
	descWrite    = 1 << 1
	descIndirect = 1 << 2
)

// maxChainBytes is what a driver may put into one chain, section 2.7.5.2.
const maxChainBytes = 1 << 32

// descriptor is a copy of one.
type descriptor struct {
	addr  memory.GuestAddress
	len   uint32
	flags uint16
	next  uint16
}

func decodeDescriptor(w0, w1 uint64) descriptor {
	return descriptor{addr: memory.GuestAddress(w0), len: uint32(w1), flags: uint16(w1 >> 32), next: uint16(w1 >> 48)}
}

// Chain is a request: the buffers the driver chained together. Its memory is
// the guest's, who may change it at any time: copy what is to be checked.
// A Chain belongs to the device from Next to Complete, and is reused after.
type Chain struct {
	// Readable are the buffers with data for the device, in order, and
	// Writable those for its answer. None is empty. The device may reslice
	// both.
	Readable, Writable [][]byte
	// Ticket is the device's own.
	Ticket uint64

	queue                    *Queue
	head                     uint16
	busy                     bool     // with the device; protected by queue.mu
	buffers                  [][]byte // backs Readable and Writable
	readableLen, writableLen uint64
}

// ReadableLen is the number of bytes in all readable buffers, at most 2^32.
func (c *Chain) ReadableLen() uint64 { return c.readableLen }

// WritableLen is the number of bytes in all writable buffers, at most 2^32.
func (c *Chain) WritableLen() uint64 { return c.writableLen }

// CopyIn fills p from the readable bytes starting at off, and returns how many
// there were.
func (c *Chain) CopyIn(p []byte, off uint64) int { return buffers.CopyFrom(c.Readable, p, off) }

// CopyOut writes p to the writable bytes starting at off, and returns how many
// found room.
func (c *Chain) CopyOut(p []byte, off uint64) int { return buffers.CopyTo(c.Writable, p, off) }

// parse walks the descriptors from c.head. It loads each once and checks the
// copy. The number of buffers is at most the size of the queue (section
// 2.7.5.3.1 forbids longer chains), which also ends loops.
func (c *Chain) parse() error {
	q := c.queue
	c.buffers, c.readableLen, c.writableLen = c.buffers[:0], 0, 0
	readable, writable := 0, false // buffers readable so far; a writable one was seen
	table := descTable{words: q.desc}
	inIndirect := false
	index, seen := c.head, 0
	for {
		if int(index) >= table.len() {
			return fmt.Errorf("next is %d, the table has %d descriptors", index, table.len())
		}
		d := table.load(index)
		if d.flags&descIndirect != 0 {
			if inIndirect {
				return errors.New("indirect table inside an indirect table")
			}
			var err error
			if table, err = q.indirectTable(d); err != nil {
				return err
			}
			inIndirect, index = true, 0
			continue
		}
		if seen++; seen > int(q.size) {
			return fmt.Errorf("longer than the queue's %d descriptors", q.size)
		}
		slice := q.mem.ReadSlice // a guest may send from its read-only pmem
		if d.flags&descWrite != 0 {
			slice = q.mem.Slice
		}
		b, err := slice(d.addr, uint64(d.len))
		if err != nil {
			return fmt.Errorf("buffer: %w", err)
		}
		if len(b) > 0 {
			c.buffers = append(c.buffers, b)
		}
		switch {
		case d.flags&descWrite != 0:
			writable = true
			c.writableLen += uint64(len(b))
		case writable: // section 2.7.4.2
			return errors.New("readable buffer after a writable one")
		default:
			readable = len(c.buffers)
			c.readableLen += uint64(len(b))
		}
		if c.readableLen+c.writableLen > maxChainBytes {
			return errors.New("more than 4 GiB")
		}
		if d.flags&descNext == 0 {
			break
		}
		index = d.next
	}
	c.Readable = c.buffers[:readable:readable]
	c.Writable = c.buffers[readable:]
	return nil
}

// indirectTable checks the descriptor of an indirect table and returns the
// table, section 2.7.5.3. Its WRITE flag means nothing.
func (q *Queue) indirectTable(d descriptor) (descTable, error) {
	switch {
	case !q.indirect:
		return descTable{}, errors.New("indirect descriptor, but the feature was not negotiated")
	case d.flags&descNext != 0:
		return descTable{}, errors.New("indirect descriptor with a next one")
	case d.len == 0 || d.len%descSize != 0:
		return descTable{}, fmt.Errorf("indirect table of %d bytes", d.len)
	case d.len/descSize > uint32(q.size):
		return descTable{}, fmt.Errorf("indirect table of %d descriptors, the queue has %d", d.len/descSize, q.size)
	}
	b, err := q.mem.Slice(d.addr, uint64(d.len))
	if err != nil {
		return descTable{}, fmt.Errorf("indirect table: %w", err)
	}
	if words, err := words64(b); err == nil {
		return descTable{words: words}, nil
	}
	return descTable{bytes: b}, nil
}

// descTable is a descriptor table in guest memory: as words, or, because the
// specification asks for no alignment of an indirect table, as bytes.
type descTable struct {
	words []uint64
	bytes []byte
}

func (t descTable) len() int { return len(t.words)/2 + len(t.bytes)/descSize }

func (t descTable) load(i uint16) descriptor {
	if t.words != nil {
		return decodeDescriptor(atomic.LoadUint64(&t.words[2*uint32(i)]), atomic.LoadUint64(&t.words[2*uint32(i)+1]))
	}
	var copied [descSize]byte
	copy(copied[:], t.bytes[uint32(i)*descSize:])
	return decodeDescriptor(binary.LittleEndian.Uint64(copied[:8]), binary.LittleEndian.Uint64(copied[8:]))
}
