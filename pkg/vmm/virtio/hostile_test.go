package virtio_test

import (
	"math"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

// The guest rewrites descriptors, indirect tables and indices while the device
// reads them: whatever mixture the device sees, it checks and uses the same
// copy.
func TestRewrittenWhileRead(t *testing.T) {
	const size = 16
	mem := virtiotest.NewMemory(t, memStart, memSize)
	r := newRawQueue(t, mem, size, bothRing)
	table := mem.Alloc(t, size*virtiotest.DescSize)
	data := mem.Alloc(t, 0x10000) // buffers only: they are read without atomics
	addrs := []memory.GuestAddress{data, data + 0x8000, table, r.Desc, 0, math.MaxUint64 - 15, memStart + memSize - 1, memStart + memSize}
	lens := []uint32{0, 1, 16, 16 * size, 0x8000, 1 << 31, math.MaxUint32}

	var stop atomic.Bool
	var guests sync.WaitGroup
	defer guests.Wait()
	defer stop.Store(true)
	for g := range uint64(2) {
		guests.Go(func() {
			rnd := rand.New(rand.NewPCG(g, 1))
			some := func() virtiotest.Desc {
				d := desc(addrs[rnd.IntN(2)], lens[rnd.IntN(5)], uint16(rnd.IntN(8)), uint16(rnd.IntN(size+1)))
				if rnd.IntN(8) == 0 {
					d.Addr, d.Len = addrs[rnd.IntN(len(addrs))], lens[rnd.IntN(len(lens))]
				}
				if d.Flags&virtiotest.DescIndirect != 0 && rnd.IntN(4) != 0 {
					d.Addr, d.Len, d.Flags = table, 16*size, virtiotest.DescIndirect
				}
				return d
			}
			for !stop.Load() {
				r.SetDesc(uint16(rnd.IntN(size)), some())
				mem.SetDesc(table, uint16(rnd.IntN(size)), some())
				r.SetAvail(uint16(rnd.IntN(size)), uint16(rnd.IntN(size)))
				r.SetUsedEvent(uint16(rnd.IntN(1 << 16)))
				if rnd.IntN(64) == 0 {
					r.SetAvailIdx(uint16(rnd.IntN(1 << 16)))
				}
			}
		})
	}
	var good, bad int
	// On a busy machine the guests may get to their turn late.
	for i := 0; i < 30_000 || (good == 0 || bad == 0) && i < 30_000_000; i++ {
		if i%1000 == 0 {
			runtime.Gosched()
		}
		r.SetAvailIdx(r.AvailIdx() + 1)
		c, err := r.q.Next()
		if err != nil {
			bad++
			r.SetAvailIdx(0)
			r.enable(t, bothRing)
			continue
		}
		if c == nil {
			continue
		}
		good++
		var sum uint64
		for _, b := range append(c.Readable, c.Writable...) {
			if len(b) == 0 || !inside(mem.Bytes, b) {
				t.Fatalf("a buffer of %d bytes is not in guest memory", len(b))
			}
			sum += uint64(len(b))
		}
		if sum != c.ReadableLen()+c.WritableLen() {
			t.Fatalf("%d bytes in the buffers, the chain says %d and %d", sum, c.ReadableLen(), c.WritableLen())
		}
		if n := len(c.Readable) + len(c.Writable); n > size {
			t.Fatalf("%d buffers", n)
		}
		r.q.Complete(c, 0)
		r.q.Flush()
	}
	t.Logf("%d chains, %d broken rings", good, bad)
	if good == 0 || bad == 0 {
		t.Fatal("the test shows nothing")
	}
}
