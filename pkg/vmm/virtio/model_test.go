package virtio_test

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"strconv"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

// model is a split virtqueue as the specification describes it, written for
// shortness and for one thread. The fuzz target compares Queue with it.
type model struct {
	r        *virtiotest.Ring
	indirect bool
	eventIdx bool

	nextAvail, seen uint16
	used, flushed   uint16
	withDevice      map[uint16]bool
	broken          bool
}

type buffer struct {
	addr     uint64
	len      uint32
	writable bool
}

func (m *model) bytes(addr, n uint64) ([]byte, bool) {
	start := uint64(m.r.Mem.Start)
	end := start + uint64(len(m.r.Mem.Bytes))
	if addr < start || addr > end || n > end-addr {
		return nil, false
	}
	return m.r.Mem.Bytes[addr-start:][:n], true
}

func (m *model) u16(addr memory.GuestAddress) uint16 {
	b, _ := m.bytes(uint64(addr), 2)
	return binary.LittleEndian.Uint16(b)
}

// next returns the chain that Queue.Next has to return, if any.
func (m *model) next() (head uint16, chain []buffer, ok bool) {
	if m.broken {
		return 0, nil, false
	}
	if m.seen == m.nextAvail {
		m.seen = m.u16(m.r.Avail + 2)
		if m.seen == m.nextAvail {
			return 0, nil, false
		}
		m.broken = m.seen-m.nextAvail > m.r.Size
	}
	head = m.u16(m.r.Avail + 4 + 2*memory.GuestAddress(m.nextAvail%m.r.Size))
	m.broken = m.broken || head >= m.r.Size || m.withDevice[head]
	if !m.broken {
		chain, ok = m.walk(uint64(m.r.Desc), uint64(m.r.Size), uint64(head), nil, true)
		m.broken = !ok
	}
	if m.broken {
		return 0, nil, false
	}
	m.withDevice[head] = true
	m.nextAvail++
	nonEmpty := chain[:0]
	for _, b := range chain {
		if b.len > 0 {
			nonEmpty = append(nonEmpty, b)
		}
	}
	return head, nonEmpty, true
}

// walk follows the descriptors of a table of n from i on, and adds to chain.
func (m *model) walk(table, n, i uint64, chain []buffer, top bool) ([]buffer, bool) {
	for {
		if i >= n {
			return nil, false
		}
		d, _ := m.bytes(table+16*i, 16)
		addr, size := binary.LittleEndian.Uint64(d), binary.LittleEndian.Uint32(d[8:])
		flags, next := binary.LittleEndian.Uint16(d[12:]), binary.LittleEndian.Uint16(d[14:])
		if flags&virtiotest.DescIndirect != 0 {
			count := uint64(size / 16)
			_, ok := m.bytes(addr, uint64(size))
			if !top || !m.indirect || flags&virtiotest.DescNext != 0 || size%16 != 0 || count == 0 || count > uint64(m.r.Size) || !ok {
				return nil, false
			}
			return m.walk(addr, count, 0, chain, false)
		}
		b := buffer{addr, size, flags&virtiotest.DescWrite != 0}
		_, ok := m.bytes(addr, uint64(size))
		wrongOrder := len(chain) > 0 && chain[len(chain)-1].writable && !b.writable
		if len(chain) == int(m.r.Size) || size > 0 && !ok || wrongOrder {
			return nil, false
		}
		chain = append(chain, b)
		if flags&virtiotest.DescNext == 0 {
			return chain, true
		}
		i = uint64(next)
	}
}

// flush says whether Queue.Flush has to interrupt.
func (m *model) flush() bool {
	var want bool
	if !m.eventIdx {
		want = m.flushed != m.used && m.u16(m.r.Avail)&1 == 0
	}
	event := m.u16(m.r.Avail + 4 + 2*memory.GuestAddress(m.r.Size))
	for ; m.flushed != m.used; m.flushed++ {
		want = want || m.eventIdx && m.flushed == event
	}
	return want
}

// FuzzQueue lets the fuzzer write the program.
func FuzzQueue(f *testing.F) {
	f.Add([]byte{3, 0, 0, 0, 1, 9, 0, 0, 2, 0, 5, 6, 0, 7})
	f.Add([]byte{3, 0, 0, 0, 1, 9, 3, 1, 0, 1, 2, 9, 2, 0, 2, 0, 5, 5, 6, 0, 7, 5})
	f.Add([]byte{3, 0, 0, 0, 8, 0x83, 4, 0, 1, 1, 2, 9, 1, 1, 1, 1, 3, 9, 2, 0, 2, 0, 5, 6, 0, 7})
	f.Add([]byte{0, 0, 2, 0, 2, 1, 2, 2, 5, 5, 5, 6, 1, 6, 0, 7, 3, 9, 0, 5})
	f.Add([]byte{7, 0, 0, 0, 1, 9, 0, 0, 2, 0, 5, 6, 0, 7, 9, 5})
	f.Fuzz(runProgram)
}

// TestQueueMatchesModel runs programs that are random, but always the same.
func TestQueueMatchesModel(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range 5000 {
		program := make([]byte, rnd.IntN(300))
		for i := range program {
			if program[i] = byte(rnd.IntN(256)); rnd.IntN(2) == 0 {
				program[i] &= 7 // more rings that hold for a while
			}
		}
		t.Run(strconv.Itoa(i), func(t *testing.T) { runProgram(t, program) })
	}
}

// runProgram runs a program of driver's and device's steps on a queue. Whatever
// the driver does: no panic, an end, no slice outside guest memory, never more
// chains than descriptors. And as long as the queue's parts do not overlap, the
// queue does what the model does.
func runProgram(t *testing.T, program []byte) {
	const size = 8
	take := func() byte {
		if len(program) == 0 {
			return 0
		}
		b := program[0]
		program = program[1:]
		return b
	}
	setup := take()
	var features uint64
	if setup&1 != 0 {
		features |= virtio.FeatureIndirectDesc
	}
	if setup&2 != 0 {
		features |= virtio.FeatureEventIdx
	}
	overlap := setup&4 != 0
	mem := virtiotest.NewMemory(t, memStart, 8192)
	r := newRawQueue(t, mem, size, features)
	if overlap {
		place := func(align byte) memory.GuestAddress {
			return memStart + memory.GuestAddress(take())&^memory.GuestAddress(align-1)
		}
		r.Desc, r.Avail, r.Used = place(16), place(2), place(4)
		r.enable(t, features)
	}
	m := model{r: r.Ring, indirect: setup&1 != 0, eventIdx: setup&2 != 0, withDevice: map[uint16]bool{}}

	// Addresses and lengths from a byte: mostly sensible, some hostile.
	tables := []memory.GuestAddress{memStart + 4096, memStart + 4096 + 9*16, memStart + 4097, r.Desc}
	addr := func(b byte) memory.GuestAddress {
		switch {
		case b&0x80 != 0:
			return tables[b%4]
		case b == 0x7f:
			return math.MaxUint64 - 7
		case b == 0x7e:
			return memStart + 8192
		case b == 0x7d:
			return memStart + 8191
		case b == 0x7c:
			return 0
		}
		return memStart + 4096 + 32*memory.GuestAddress(b)
	}
	length := func(b byte) uint32 {
		switch {
		case b&0x80 != 0:
			return 16 * uint32(b&0xf)
		case b == 0x7f:
			return math.MaxUint32
		case b == 0x7e:
			return 1 << 31
		}
		return uint32(b)
	}
	type held struct {
		c    *virtio.Chain
		head uint16
	}
	var chains []held
	for steps := 0; len(program) > 0 && steps < 1000; steps++ {
		switch op := take(); op % 11 {
		case 0: // a descriptor of the queue
			i := uint16(take()) % size
			r.SetDesc(i, desc(addr(take()), length(take()), uint16(take()), uint16(take())))
		case 1: // a descriptor of an indirect table
			i := uint16(take()) % 16
			table := tables[take()%2]
			mem.SetDesc(table, i, desc(addr(take()), length(take()), uint16(take()), uint16(take())))
		case 2:
			r.Push(uint16(take()))
		case 3:
			r.SetUsedEvent(r.UsedIdx() + uint16(take()) - 2)
		case 4:
			r.SetAvailIdx(r.AvailIdx() + uint16(take()) - 2)
		case 5:
			head, want, ok := m.next()
			c, err := r.q.Next()
			if c == nil {
				if !overlap && (ok || (err != nil) != m.broken) {
					t.Fatalf("Next: %v; the model has chain %v, broken %v", err, want, m.broken)
				}
				if err == nil && !overlap && (m.eventIdx && r.AvailEvent() != m.nextAvail || !m.eventIdx && r.UsedFlags() != 0) {
					t.Fatalf("the ring is empty and no kick is wanted: avail_event %d, flags %d, next %d", r.AvailEvent(), r.UsedFlags(), m.nextAvail)
				}
				break
			}
			for _, b := range append(c.Readable, c.Writable...) {
				if len(b) == 0 || !inside(mem.Bytes, b) {
					t.Fatalf("a buffer of %d bytes is not in guest memory", len(b))
				}
			}
			chains = append(chains, held{c, head})
			if len(chains) > size {
				t.Fatalf("%d chains of %d descriptors", len(chains), size)
			}
			if overlap {
				break
			}
			if !ok {
				t.Fatalf("Next returned a chain, the model has none (broken: %v)", m.broken)
			}
			i := 0
			for _, part := range []struct {
				buffers  [][]byte
				writable bool
			}{{c.Readable, false}, {c.Writable, true}} {
				for _, b := range part.buffers {
					if i == len(want) || want[i].writable != part.writable || int(want[i].len) != len(b) {
						t.Fatalf("buffer %d is %d bytes, writable: %v; the model has %v", i, len(b), part.writable, want)
					}
					if at, _ := m.bytes(want[i].addr, 1); &at[0] != &b[0] {
						t.Fatalf("buffer %d is not at %#x", i, want[i].addr)
					}
					i++
				}
			}
			if i != len(want) {
				t.Fatalf("%d buffers, the model has %v", i, want)
			}
		case 6:
			i := int(take())
			if len(chains) == 0 {
				break
			}
			i %= len(chains)
			r.q.Complete(chains[i].c, uint32(i))
			head := chains[i].head
			chains = append(chains[:i], chains[i+1:]...)
			if overlap {
				break
			}
			delete(m.withDevice, head)
			gotHead, written := r.UsedElem(m.used)
			m.used++
			if r.UsedIdx() != m.used || gotHead != uint32(head) || written != uint32(i) {
				t.Fatalf("used index %d, head %d, written %d; want %d, %d, %d", r.UsedIdx(), gotHead, written, m.used, head, i)
			}
		case 7:
			want := m.flush()
			r.interrupts = 0
			r.q.Flush()
			if got := r.interrupts == 1; !overlap && got != want {
				t.Fatalf("interrupted: %v, the model: %v", got, want)
			}
		case 8:
			r.SetAvailFlags(uint16(take()))
		case 9: // anything anywhere in the first page, where the queue is
			at := int(take())<<4 | int(take())&15
			if overlap {
				mem.Bytes[at] = take()
			}
		case 10:
			if take() == 0xff { // the last step that does anything
				r.q.Close()
				if c, err := r.q.Next(); c != nil || !m.broken && !overlap && err != nil {
					t.Fatalf("Next after Close: %v, %v", c, err)
				}
				for _, h := range chains {
					r.q.Complete(h.c, 0)
				}
				return
			}
		}
	}
}
