package virtio_test

import (
	"fmt"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

// steady sets up chains of n buffers and returns a function that runs a batch
// of them through the queue.
func steady(t testing.TB, features uint64, buffers, batch int) func() {
	const size = 256
	mem := virtiotest.NewMemory(t, memStart, memSize)
	r := newRawQueue(t, mem, size, features)
	var heads []uint16
	add := func(set func(i uint16, d virtiotest.Desc), first uint16) {
		for i := range uint16(buffers) {
			d := desc(mem.Alloc(t, 512), 512, virtiotest.DescNext, first+i+1)
			if i > 0 {
				d.Flags |= virtiotest.DescWrite
			}
			if int(i) == buffers-1 {
				d.Flags &^= virtiotest.DescNext
			}
			set(first+i, d)
		}
	}
	for i := range uint16(batch) {
		if features&virtio.FeatureIndirectDesc != 0 {
			table := mem.Alloc(t, buffers*virtiotest.DescSize)
			add(func(i uint16, d virtiotest.Desc) { mem.SetDesc(table, i, d) }, 0)
			r.SetDesc(i, desc(table, uint32(buffers*virtiotest.DescSize), virtiotest.DescIndirect, 0))
			heads = append(heads, i)
		} else {
			add(r.SetDesc, i*uint16(buffers))
			heads = append(heads, i*uint16(buffers))
		}
	}
	chains := make([]*virtio.Chain, 0, batch)
	return func() {
		for _, h := range heads {
			r.Push(h)
		}
		r.SetUsedEvent(r.UsedIdx() + uint16(batch) - 1)
		chains = chains[:0]
		for {
			c, err := r.q.Next()
			if err != nil {
				t.Fatal(err)
			}
			if c == nil {
				break
			}
			chains = append(chains, c)
		}
		for i := range chains { // last in, first out
			r.q.Complete(chains[len(chains)-1-i], 1)
		}
		r.q.Flush()
		if len(chains) != batch {
			t.Fatalf("%d of %d chains", len(chains), batch)
		}
	}
}

var benchCases = []struct {
	features uint64
	buffers  int
	batch    int
}{
	{0, 1, 1}, {virtio.FeatureEventIdx, 1, 1}, {virtio.FeatureEventIdx, 3, 1}, {bothRing, 3, 1},
	{virtio.FeatureEventIdx, 3, 32}, {bothRing, 3, 32}, {bothRing, 18, 32},
}

// BenchmarkQueue is the cost of a chain without any wake-up: the driver's part
// (one push), Next, Complete and Flush.
func BenchmarkQueue(b *testing.B) {
	for _, bc := range benchCases {
		b.Run(fmt.Sprintf("indirect=%v/eventidx=%v/buffers=%d/batch=%d", bc.features&virtio.FeatureIndirectDesc != 0, bc.features&virtio.FeatureEventIdx != 0, bc.buffers, bc.batch), func(b *testing.B) {
			run := steady(b, bc.features, bc.buffers, bc.batch)
			run()
			b.ReportAllocs()
			b.ResetTimer()
			for done := 0; done < b.N; done += bc.batch {
				run()
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "chains/s")
		})
	}
}

// BenchmarkRoundTrip adds the kick, the wake-up of the device's goroutine and
// the interrupt, with one and with many requests in flight.
func BenchmarkRoundTrip(b *testing.B) {
	for _, inFlight := range []int{1, 16} {
		b.Run(fmt.Sprintf("inflight=%d", inFlight), func(b *testing.B) {
			d := virtiotest.NewDriver(b, &echo{size: 64}, virtiotest.Options{})
			var requests []*virtiotest.Request
			for range inFlight {
				requests = append(requests, d.Prepare(0, [][]byte{make([]byte, 64)}, []int{64}))
			}
			for _, r := range requests {
				r.Submit()
			}
			b.ReportAllocs()
			b.ResetTimer()
			for i := range b.N {
				r := requests[i%inFlight]
				r.Join()
				r.Submit()
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "chains/s")
			b.ReportMetric(float64(d.Kicks(0))/float64(b.N), "kicks/op")
			b.ReportMetric(float64(d.Interrupts(0))/float64(b.N), "irqs/op")
		})
	}
}

func TestSteadyStateAllocatesNothing(t *testing.T) {
	for _, bc := range benchCases {
		run := steady(t, bc.features, bc.buffers, bc.batch)
		if n := testing.AllocsPerRun(100, run); n != 0 {
			t.Errorf("%+v: %v allocations", bc, n)
		}
	}
}
