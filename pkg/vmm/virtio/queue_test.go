package virtio_test

import (
	"bytes"
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/eventfd"
	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

const (
	memStart = 0x100000
	memSize  = 1 << 20
	bothRing = virtio.FeatureIndirectDesc | virtio.FeatureEventIdx
)

// rawQueue is a queue and the driver's raw side of it.
type rawQueue struct {
	*virtiotest.Ring
	q          *virtio.Queue
	kick       *eventfd.EventFD
	interrupts int
}

func newRawQueue(t testing.TB, m *virtiotest.Memory, size uint16, features uint64) *rawQueue {
	t.Helper()
	r := &rawQueue{Ring: virtiotest.NewRing(t, m, size)}
	r.enable(t, features)
	return r
}

// enable makes a new queue of the ring as it is.
func (r *rawQueue) enable(t testing.TB, features uint64) {
	t.Helper()
	var err error
	if r.kick == nil {
		if r.kick, err = eventfd.New(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = r.kick.Close() })
	}
	c := r.Config(features)
	c.Kick = r.kick
	c.Interrupt = func() { r.interrupts++ }
	if r.q, err = virtio.NewQueue(c); err != nil {
		t.Fatal(err)
	}
}

func (r *rawQueue) next(t testing.TB) *virtio.Chain {
	t.Helper()
	c, err := r.q.Next()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func desc(addr memory.GuestAddress, n uint32, flags, next uint16) virtiotest.Desc {
	return virtiotest.Desc{Addr: addr, Len: n, Flags: flags, Next: next}
}

func TestNewQueueRefuses(t *testing.T) {
	m := virtiotest.NewMemory(t, memStart, memSize)
	if err := m.Guest.Add(memory.Region{Start: memStart + memSize, Bytes: make([]byte, 4096)}); err != nil {
		t.Fatal(err)
	}
	if err := m.Guest.Add(memory.Region{Start: 0x800000, Bytes: make([]byte, 4096), ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	if err := m.Guest.Add(memory.Region{Start: 0x900000, Bytes: make([]byte, 8192)[2:4098]}); err != nil {
		t.Fatal(err)
	}
	good := virtio.QueueConfig{Memory: m.Guest, Size: 256, Desc: memStart, Avail: memStart + 0x2000, Used: memStart + 0x3000}
	if _, err := virtio.NewQueue(good); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		change func(*virtio.QueueConfig)
		want   string
	}{
		{"size 0", func(c *virtio.QueueConfig) { c.Size = 0 }, "power of two"},
		{"size not a power of two", func(c *virtio.QueueConfig) { c.Size = 255 }, "power of two"},
		{"size above 32768", func(c *virtio.QueueConfig) { c.Size = 32769 }, "power of two"},
		{"desc not aligned to 16", func(c *virtio.QueueConfig) { c.Desc += 8 }, "aligned to 16"},
		{"avail not aligned to 2", func(c *virtio.QueueConfig) { c.Avail++ }, "aligned to 2"},
		{"used not aligned to 4", func(c *virtio.QueueConfig) { c.Used += 2 }, "aligned to 4"},
		{"desc before memory", func(c *virtio.QueueConfig) { c.Desc = memStart - 16 }, "descriptor table: "},
		{"desc wraps around", func(c *virtio.QueueConfig) { c.Desc = math.MaxUint64 - 15 }, "descriptor table: "},
		{"desc past the end", func(c *virtio.QueueConfig) { c.Desc = memStart + memSize + 16 }, "descriptor table: "},
		{"desc in two regions", func(c *virtio.QueueConfig) { c.Desc = memStart + memSize - 16 }, "descriptor table: "},
		{"avail in two regions", func(c *virtio.QueueConfig) { c.Avail = memStart + memSize - 2 }, "available ring: "},
		{"avail ends outside", func(c *virtio.QueueConfig) { c.Avail = memStart + memSize + 4096 - 516 }, "available ring: "},
		{"avail wraps around", func(c *virtio.QueueConfig) { c.Avail = math.MaxUint64 - 1 }, "available ring: "},
		{"used in two regions", func(c *virtio.QueueConfig) { c.Used = memStart + memSize - 4 }, "used ring: "},
		{"used ends outside", func(c *virtio.QueueConfig) { c.Used = memStart + memSize + 4096 - 2052 }, "used ring: "},
		{"used wraps around", func(c *virtio.QueueConfig) { c.Used = math.MaxUint64 - 3 }, "used ring: "},
		{"used in read-only memory", func(c *virtio.QueueConfig) { c.Used = 0x800000 }, "used ring: "},
		{"nowhere", func(c *virtio.QueueConfig) { c.Desc, c.Avail, c.Used = 0, 0, 0 }, "descriptor table: "},
		{"mapping is misaligned", func(c *virtio.QueueConfig) { c.Avail = 0x900000 }, "not aligned"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := good
			tc.change(&c)
			_, err := virtio.NewQueue(c)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want an error with %q", err, tc.want)
			}
		})
	}
}

// What a driver must not put into a ring, one test for each check.
func TestNextRefuses(t *testing.T) {
	const buf = memStart + 0x80000
	const table = memStart + 0x90000
	type D = virtiotest.Desc
	const N, W, I = virtiotest.DescNext, virtiotest.DescWrite, virtiotest.DescIndirect
	push := func(descs ...D) func(*virtiotest.Ring) {
		return func(r *virtiotest.Ring) {
			for i, d := range descs {
				r.SetDesc(uint16(i), d)
			}
			r.Push(0)
		}
	}
	indirect := func(descs ...D) func(*virtiotest.Ring) {
		return func(r *virtiotest.Ring) {
			for i, d := range descs {
				r.Mem.SetDesc(table, uint16(i), d)
			}
			push(desc(table, uint32(16*len(descs)), I, 0))(r)
		}
	}
	for _, tc := range []struct {
		name     string
		features uint64
		setup    func(r *virtiotest.Ring)
		want     string
	}{
		{"index too far ahead", bothRing, func(r *virtiotest.Ring) { r.SetAvailIdx(9) }, "9 ahead"},
		{"index went back", bothRing, func(r *virtiotest.Ring) { r.SetAvailIdx(0xffff) }, "65535 ahead"},
		{"head outside", bothRing, func(r *virtiotest.Ring) { r.Push(8) }, "head 8 of 8"},
		{"head far outside", bothRing, func(r *virtiotest.Ring) { r.Push(0xffff) }, "head 65535"},
		{"next outside", bothRing, push(desc(buf, 1, N, 8)), "next is 8"},
		{"next far outside", bothRing, push(desc(buf, 1, N, 0xffff)), "next is 65535"},
		{"loop of one", bothRing, push(desc(buf, 1, N, 0)), "longer than the queue"},
		{"loop of two", bothRing, push(desc(buf, 1, N, 1), desc(buf, 1, N, 0)), "longer than the queue"},
		{"loop of empty buffers", bothRing, push(desc(buf, 0, N, 0)), "longer than the queue"},
		{"buffer at address 0", bothRing, push(desc(0, 1, 0, 0)), "outside guest memory"},
		{"buffer starts outside", bothRing, push(desc(memStart+memSize, 1, 0, 0)), "outside guest memory"},
		{"buffer ends outside", bothRing, push(desc(memStart+memSize-1, 2, 0, 0)), "outside guest memory"},
		{"buffer wraps around", bothRing, push(desc(math.MaxUint64, 2, 0, 0)), "outside guest memory"},
		{"largest buffer", bothRing, push(desc(buf, math.MaxUint32, W, 0)), "outside guest memory"},
		{"second buffer outside", bothRing, push(desc(buf, 1, N, 1), desc(1, 1, 0, 0)), "outside guest memory"},
		{"readable after writable", bothRing, push(desc(buf, 1, N|W, 1), desc(buf, 1, 0, 0)), "after a writable"},
		{"empty readable after writable", bothRing, push(desc(buf, 1, N|W, 1), desc(buf, 0, 0, 0)), "after a writable"},
		{"readable after empty writable", bothRing, push(desc(buf, 0, N|W, 1), desc(buf, 1, 0, 0)), "after a writable"},
		{"indirect not negotiated", virtio.FeatureEventIdx, indirect(desc(buf, 1, 0, 0)), "not negotiated"},
		{"indirect and next", bothRing, push(desc(table, 16, I|N, 1)), "with a next"},
		{"indirect table empty", bothRing, push(desc(table, 0, I, 0)), "table of 0 bytes"},
		{"indirect table ragged", bothRing, push(desc(table, 17, I, 0)), "table of 17 bytes"},
		{"indirect table too long", bothRing, push(desc(table, 9*16, I, 0)), "table of 9 descriptors"},
		{"indirect table longest", bothRing, push(desc(table, 0xfffffff0, I, 0)), "table of 268435455 descriptors"},
		{"indirect table outside", bothRing, push(desc(memStart+memSize-16, 32, I, 0)), "indirect table: "},
		{"indirect table wraps around", bothRing, push(desc(math.MaxUint64-7, 16, I, 0)), "indirect table: "},
		{"indirect in indirect", bothRing, indirect(desc(table, 16, I, 0)), "inside an indirect"},
		{"indirect next outside", bothRing, indirect(desc(buf, 1, N, 1)), "next is 1, the table has 1"},
		{"indirect loop", bothRing, indirect(desc(buf, 1, N, 1), desc(buf, 1, N, 0)), "longer than the queue"},
		{"indirect buffer outside", bothRing, indirect(desc(1, 1, 0, 0)), "outside guest memory"},
		{"indirect wrong order", bothRing, indirect(desc(buf, 1, N|W, 1), desc(buf, 1, 0, 0)), "after a writable"},
		{"direct and indirect too long", bothRing, func(r *virtiotest.Ring) {
			for i := range uint16(8) {
				r.Mem.SetDesc(table, i, desc(buf, 1, N, i+1))
			}
			push(desc(buf, 1, N, 1), desc(table, 8*16, I, 0))(r)
		}, "longer than the queue"},
		{"same head twice", bothRing, func(r *virtiotest.Ring) {
			push(desc(buf, 1, 0, 0))(r)
			r.Push(0)
		}, "again"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRawQueue(t, virtiotest.NewMemory(t, memStart, memSize), 8, tc.features)
			tc.setup(r.Ring)
			var err error
			for range 3 {
				if _, err = r.q.Next(); err != nil {
					break
				}
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want an error with %q", err, tc.want)
			}
			r.SetAvailIdx(r.AvailIdx() + 1)
			if _, again := r.q.Next(); !errors.Is(again, err) {
				t.Fatalf("the ring works again after an error: %v", again)
			}
			if idx := r.UsedIdx(); idx != 0 {
				t.Fatalf("used index is %d", idx)
			}
		})
	}
}

func TestChainOver4GiB(t *testing.T) {
	// Two descriptors of 2 GiB each that are the same memory, and one more byte.
	// Nothing is touched, so nothing is allocated.
	m := virtiotest.NewMemory(t, memStart, memSize)
	const big = 1 << 40
	if err := m.Guest.Add(memory.Region{Start: big, Bytes: untouched(t, 2<<30)}); err != nil {
		t.Fatal(err)
	}
	r := newRawQueue(t, m, 8, 0)
	half := virtiotest.Desc{Addr: big, Len: 2 << 30, Flags: virtiotest.DescNext}
	half.Next = 1
	r.SetDesc(0, half)
	half.Flags = 0
	r.SetDesc(1, half)
	r.Push(0)
	c := r.next(t)
	if n := c.ReadableLen(); n != 4<<30 {
		t.Fatalf("%d bytes", n)
	}
	half.Flags, half.Next = virtiotest.DescNext, 2
	r.SetDesc(1, half)
	r.SetDesc(2, virtiotest.Desc{Addr: big, Len: 1, Flags: virtiotest.DescWrite})
	r.q.Complete(c, 0)
	r.Push(0)
	if _, err := r.q.Next(); err == nil || !strings.Contains(err.Error(), "4 GiB") {
		t.Fatal(err)
	}
}

func TestNextAndComplete(t *testing.T) {
	const buf = memStart + 0x80000
	const table = memStart + 0x90000
	type D = virtiotest.Desc
	const N, W, I = virtiotest.DescNext, virtiotest.DescWrite, virtiotest.DescIndirect
	for _, tc := range []struct {
		name               string
		direct             []D
		table              memory.GuestAddress
		indirect           []D
		readable, writable []int // lengths, at buf, buf+0x100, ...
	}{
		{name: "one readable", direct: []D{desc(buf, 5, 0, 0)}, readable: []int{5}},
		{name: "one writable", direct: []D{desc(buf, 5, W, 0)}, writable: []int{5}},
		{name: "both", direct: []D{desc(buf, 5, N, 1), desc(buf+0x100, 6, N, 2), desc(buf+0x200, 7, W|N, 3), desc(buf+0x300, 8, W, 0)}, readable: []int{5, 6}, writable: []int{7, 8}},
		{name: "empty buffers are skipped", direct: []D{desc(0xdead, 0, N, 1), desc(buf, 6, N, 2), desc(math.MaxUint64, 0, W|N, 3), desc(buf+0x100, 8, W, 0)}, readable: []int{6}, writable: []int{8}},
		{name: "only empty", direct: []D{desc(0, 0, 0, 0)}},
		{name: "as long as the queue", direct: []D{desc(buf, 1, N, 1), desc(buf+0x100, 1, N, 2), desc(buf+0x200, 1, N, 3), desc(buf+0x300, 1, N, 4), desc(buf+0x400, 1, N, 5), desc(buf+0x500, 1, N, 6), desc(buf+0x600, 1, N, 7), desc(buf+0x700, 1, 0, 0)}, readable: []int{1, 1, 1, 1, 1, 1, 1, 1}},
		{name: "indirect", direct: []D{desc(table, 32, I, 0)}, table: table, indirect: []D{desc(buf, 5, N, 1), desc(buf+0x100, 6, W, 0)}, readable: []int{5}, writable: []int{6}},
		{name: "indirect out of order", direct: []D{desc(table, 48, I, 0)}, table: table, indirect: []D{desc(buf, 5, N, 2), desc(buf+0x200, 6, W, 0), desc(buf+0x100, 4, N, 1)}, readable: []int{5, 4}, writable: []int{6}},
		{name: "indirect's write flag is ignored", direct: []D{desc(table, 16, I|W, 0)}, table: table, indirect: []D{desc(buf, 5, 0, 0)}, readable: []int{5}},
		{name: "indirect as long as the queue", direct: []D{desc(table, 128, I, 0)}, table: table, indirect: []D{desc(buf, 1, N, 1), desc(buf+0x100, 1, N, 2), desc(buf+0x200, 1, N, 3), desc(buf+0x300, 1, N, 4), desc(buf+0x400, 1, N, 5), desc(buf+0x500, 1, N, 6), desc(buf+0x600, 1, N, 7), desc(buf+0x700, 1, 0, 0)}, readable: []int{1, 1, 1, 1, 1, 1, 1, 1}},
		{name: "direct, then indirect", direct: []D{desc(buf, 5, N, 1), desc(table, 32, I, 0)}, table: table, indirect: []D{desc(buf+0x100, 6, N, 1), desc(buf+0x200, 7, W, 0)}, readable: []int{5, 6}, writable: []int{7}},
		{name: "longer table than chain", direct: []D{desc(table, 64, I, 0)}, table: table, indirect: []D{desc(buf, 5, 0, 0)}, readable: []int{5}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRawQueue(t, virtiotest.NewMemory(t, memStart, memSize), 8, bothRing)
			for i, d := range tc.direct {
				r.SetDesc(uint16(i), d)
			}
			for i, d := range tc.indirect {
				r.Mem.SetDesc(tc.table, uint16(i), d)
			}
			for round := range 3 { // Chains are reused
				r.Push(0)
				c := r.next(t)
				if c == nil {
					t.Fatal("no chain")
				}
				addr := memory.GuestAddress(buf)
				check := func(what string, got [][]byte, total uint64, want []int) {
					sum := 0
					if len(got) != len(want) {
						t.Fatalf("%d %s buffers, want %d", len(got), what, len(want))
					}
					for i, n := range want {
						b := r.Mem.Slice(addr, n)
						if len(got[i]) != n || &got[i][0] != &b[0] {
							t.Errorf("%s buffer %d is not the %d bytes at %#x", what, i, n, addr)
						}
						addr += 0x100
						sum += n
					}
					if total != uint64(sum) {
						t.Errorf("%d %s bytes, want %d", total, what, sum)
					}
				}
				check("readable", c.Readable, c.ReadableLen(), tc.readable)
				check("writable", c.Writable, c.WritableLen(), tc.writable)
				r.q.Complete(c, uint32(100+round))
				if head, written := r.UsedElem(uint16(round)); head != 0 || written != uint32(100+round) {
					t.Fatalf("used element is %d, %d", head, written)
				}
				if r.UsedIdx() != uint16(round+1) {
					t.Fatalf("used index is %d", r.UsedIdx())
				}
				if r.next(t) != nil {
					t.Fatal("a chain from nowhere")
				}
			}
		})
	}
}

// An indirect table may be anywhere: the specification asks for no alignment.
func TestIndirectTableUnaligned(t *testing.T) {
	m := virtiotest.NewMemory(t, memStart, memSize)
	r := newRawQueue(t, m, 8, bothRing)
	const buf, aligned = memStart + 0x80000, memStart + 0x90000
	m.SetDesc(aligned, 0, virtiotest.Desc{Addr: buf, Len: 5, Flags: virtiotest.DescNext, Next: 1})
	m.SetDesc(aligned, 1, virtiotest.Desc{Addr: buf + 8, Len: 6, Flags: virtiotest.DescWrite})
	copy(m.Slice(aligned+0x101, 32), m.Slice(aligned, 32))
	r.SetDesc(0, virtiotest.Desc{Addr: aligned + 0x101, Len: 32, Flags: virtiotest.DescIndirect})
	r.Push(0)
	if c := r.next(t); c.ReadableLen() != 5 || c.WritableLen() != 6 {
		t.Fatalf("%d, %d bytes", c.ReadableLen(), c.WritableLen())
	}
}

// The available ring needs an alignment of 2 only: its index is then the low
// half of a word, and its first field shares a word with something else.
func TestAvailableRingAlignedTo2(t *testing.T) {
	for _, features := range []uint64{0, bothRing} {
		m := virtiotest.NewMemory(t, memStart, memSize)
		r := &rawQueue{Ring: virtiotest.NewRing(t, m, 4)}
		r.Avail = m.Alloc(t, 64) + 2
		r.enable(t, features)
		for i := range uint16(10) {
			r.SetDesc(i%4, virtiotest.Desc{Addr: memStart, Len: uint32(i) + 1})
			r.SetUsedEvent(i)
			r.Push(i % 4)
			c := r.next(t)
			if c == nil || c.ReadableLen() != uint64(i)+1 {
				t.Fatalf("chain %d: %+v", i, c)
			}
			r.q.Complete(c, 0)
			r.q.Flush()
		}
		if r.interrupts != 10 {
			t.Fatalf("%d interrupts", r.interrupts)
		}
	}
}

// Indices are 16 bits and wrap around; chains come back in any order.
func TestIndicesWrapAround(t *testing.T) {
	r := newRawQueue(t, virtiotest.NewMemory(t, memStart, memSize), 8, bothRing)
	for i := range uint16(8) {
		r.SetDesc(i, virtiotest.Desc{Addr: memStart + memory.GuestAddress(i), Len: 1})
	}
	var used uint16
	for range 65536/8 + 100 {
		for i := range uint16(8) {
			r.Push(i)
		}
		var chains []*virtio.Chain
		for range 8 {
			chains = append(chains, r.next(t))
		}
		if c := r.next(t); c != nil {
			t.Fatal("a ninth chain")
		}
		if e := r.AvailEvent(); e != r.AvailIdx() {
			t.Fatalf("avail_event is %d, the index %d", e, r.AvailIdx())
		}
		for _, i := range []int{3, 1, 7, 0, 2, 6, 5, 4} {
			r.q.Complete(chains[i], 1)
			if head, _ := r.UsedElem(used); head != uint32(i) {
				t.Fatalf("used %d is head %d, want %d", used, head, i)
			}
			used++
		}
		if r.UsedIdx() != used {
			t.Fatalf("used index is %d, want %d", r.UsedIdx(), used)
		}
	}
}

func TestCompleteAll(t *testing.T) {
	r := newRawQueue(t, virtiotest.NewMemory(t, memStart, memSize), 4, bothRing)
	for i := range uint16(4) {
		r.SetDesc(i, virtiotest.Desc{Addr: memStart + memory.GuestAddress(i), Len: 1})
	}
	for round := range uint16(10) { // over the end of the ring
		for i := range uint16(3) {
			r.Push(i)
		}
		chains := []*virtio.Chain{r.next(t), r.next(t), r.next(t)}
		r.q.CompleteAll([]*virtio.Chain{chains[2], chains[0], chains[1]}, []uint32{7, 8, 9})
		if r.UsedIdx() != 3*(round+1) {
			t.Fatalf("used index is %d after round %d", r.UsedIdx(), round)
		}
		for i, want := range [][2]uint32{{2, 7}, {0, 8}, {1, 9}} {
			if head, written := r.UsedElem(3*round + uint16(i)); head != want[0] || written != want[1] {
				t.Fatalf("used element %d is head %d with %d bytes, want %d", i, head, written, want)
			}
		}
	}
	r.Push(3)
	c := r.next(t)
	r.q.Close()
	if r.q.CompleteAll([]*virtio.Chain{c}, []uint32{1}); r.UsedIdx() != 30 {
		t.Errorf("used index is %d after Close", r.UsedIdx())
	}
}

func TestInterruptSuppression(t *testing.T) {
	complete := func(t *testing.T, r *rawQueue, n int) {
		t.Helper()
		for range n {
			r.Push(0)
			r.q.Complete(r.next(t), 0)
		}
		r.interrupts = 0
		r.q.Flush()
	}
	t.Run("flag", func(t *testing.T) {
		r := newRawQueue(t, virtiotest.NewMemory(t, memStart, memSize), 8, 0)
		r.q.Flush()
		if r.interrupts != 0 {
			t.Fatal("an interrupt for nothing")
		}
		complete(t, r, 3)
		if r.interrupts != 1 {
			t.Fatalf("%d interrupts for three chains", r.interrupts)
		}
		r.q.Flush()
		if r.interrupts != 1 {
			t.Fatal("Flush twice interrupted twice")
		}
		r.SetAvailFlags(1)
		complete(t, r, 1)
		if r.interrupts != 0 {
			t.Fatal("interrupted in spite of NO_INTERRUPT")
		}
	})
	t.Run("event index", func(t *testing.T) {
		r := newRawQueue(t, virtiotest.NewMemory(t, memStart, memSize), 8, virtio.FeatureEventIdx)
		r.SetAvailFlags(1) // must be ignored, section 2.7.7.2
		for _, tc := range []struct {
			event uint16 // used_event, relative to the used index before
			n     int
			want  int
		}{{0, 1, 1}, {1, 1, 0}, {0, 1, 1}, {2, 2, 0}, {1, 2, 1}, {0, 8, 1}, {7, 8, 1}, {8, 8, 0}, {0xffff, 1, 0}, {0x8000, 5, 0}} {
			r.SetUsedEvent(r.UsedIdx() + tc.event)
			complete(t, r, tc.n)
			if r.interrupts != tc.want {
				t.Errorf("event +%d, %d completed: %d interrupts, want %d", tc.event, tc.n, r.interrupts, tc.want)
			}
		}
	})
}

func TestKickSuppression(t *testing.T) {
	t.Run("flag", func(t *testing.T) {
		r := newRawQueue(t, virtiotest.NewMemory(t, memStart, memSize), 8, 0)
		for round := range uint16(3) {
			if r.next(t) != nil || r.UsedFlags() != 0 {
				t.Fatalf("round %d: empty ring, flags %#x: kicks are not wanted", round, r.UsedFlags())
			}
			r.Push(0)
			c := r.next(t)
			if r.UsedFlags() != 1 || r.UsedIdx() != round {
				t.Fatalf("round %d: being drained, flags %#x, index %d", round, r.UsedFlags(), r.UsedIdx())
			}
			r.q.Complete(c, 0)
			if r.UsedFlags() != 1 || r.UsedIdx() != round+1 {
				t.Fatalf("round %d: after Complete flags %#x, index %d", round, r.UsedFlags(), r.UsedIdx())
			}
		}
	})
	t.Run("event index", func(t *testing.T) {
		r := newRawQueue(t, virtiotest.NewMemory(t, memStart, memSize), 8, virtio.FeatureEventIdx)
		// What follows the used ring is not the device's.
		after := r.Mem.Slice(r.Used+4+8*8+2, 2)
		copy(after, "ab")
		for i := range uint16(5) {
			if r.next(t) != nil || r.AvailEvent() != i {
				t.Fatalf("empty ring at %d, avail_event %d", i, r.AvailEvent())
			}
			r.Push(0)
			c := r.next(t)
			if r.AvailEvent() != i {
				t.Fatalf("avail_event moved to %d while the ring is being drained", r.AvailEvent())
			}
			r.q.Complete(c, 0)
			if r.UsedFlags() != 0 {
				t.Fatal("flags must stay 0 with EVENT_IDX, section 2.7.10.1")
			}
		}
		if !bytes.Equal(after, []byte("ab")) {
			t.Fatalf("the bytes after the used ring became %q", after)
		}
	})
}

func TestClose(t *testing.T) {
	r := newRawQueue(t, virtiotest.NewMemory(t, memStart, memSize), 8, bothRing)
	r.Push(0)
	c := r.next(t)
	r.Push(1)
	waited := make(chan error)
	go func() { waited <- r.q.Wait() }()
	r.q.Close()
	r.q.Close()
	if err := <-waited; !errors.Is(err, virtio.ErrClosed) {
		t.Fatalf("Wait: %v", err)
	}
	if err := r.q.Wait(); !errors.Is(err, virtio.ErrClosed) {
		t.Fatalf("Wait again: %v", err)
	}
	if c := r.next(t); c != nil {
		t.Fatal("Next returned a chain")
	}
	r.q.Complete(c, 1)
	r.q.Flush()
	if r.UsedIdx() != 0 || r.interrupts != 0 {
		t.Fatalf("after Close: used index %d, %d interrupts", r.UsedIdx(), r.interrupts)
	}
}

func TestCompleteTwicePanics(t *testing.T) {
	r := newRawQueue(t, virtiotest.NewMemory(t, memStart, memSize), 8, bothRing)
	r.Push(0)
	c := r.next(t)
	r.q.Complete(c, 0)
	defer func() {
		if recover() == nil {
			t.Fatal("no panic")
		}
	}()
	r.q.Complete(c, 0)
}

func TestCopy(t *testing.T) {
	c := virtio.Chain{
		Readable: [][]byte{[]byte("ab"), []byte("c"), []byte("defg")},
		Writable: [][]byte{make([]byte, 3), make([]byte, 1), make([]byte, 2)},
	}
	for _, tc := range []struct {
		off  uint64
		n    int
		want string
	}{{0, 7, "abcdefg"}, {0, 9, "abcdefg"}, {0, 2, "ab"}, {1, 3, "bcd"}, {2, 1, "c"}, {3, 4, "defg"}, {6, 5, "g"}, {7, 1, ""}, {math.MaxUint64, 1, ""}, {0, 0, ""}} {
		p := make([]byte, tc.n)
		if n := c.CopyIn(p, tc.off); string(p[:n]) != tc.want {
			t.Errorf("CopyIn(%d bytes, %d) = %q, want %q", tc.n, tc.off, p[:n], tc.want)
		}
	}
	for _, tc := range []struct {
		off  uint64
		p    string
		n    int
		want string
	}{{0, "abcdef", 6, "abcdef"}, {0, "abcdefgh", 6, "abcdef"}, {2, "ab", 2, "..ab.."}, {4, "abc", 2, "....ab"}, {6, "a", 0, "......"}, {math.MaxUint64, "a", 0, "......"}} {
		for _, b := range c.Writable {
			copy(b, "...")
		}
		n := c.CopyOut([]byte(tc.p), tc.off)
		if got := string(bytes.Join(c.Writable, nil)); n != tc.n || got != tc.want {
			t.Errorf("CopyOut(%q, %d) = %d, %q; want %d, %q", tc.p, tc.off, n, got, tc.n, tc.want)
		}
	}
}
