package blk

import (
	"bytes"
	"runtime"
	"testing"
	"time"

	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit"
	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit/ratelimittest"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

func newLimiter(t *testing.T, l ratelimit.Limits) (*ratelimit.Limiter, *ratelimittest.Clock) {
	t.Helper()
	clock := ratelimittest.New()
	limiter, err := ratelimit.New(l, clock)
	if err != nil {
		t.Fatal(err)
	}
	return limiter, clock
}

func newLimitedDriver(t *testing.T, limit *ratelimit.Limiter) *virtiotest.Driver {
	t.Helper()
	device := newDevice(t, Config{File: memoryFile(t, pattern(testSectors*sectorSize)), Limit: limit})
	return virtiotest.NewDriver(t, device, virtiotest.Options{})
}

// TestLimit has requests of each kind served in the time that their operations
// and bytes take.
func TestLimit(t *testing.T) {
	const all = testSectors * sectorSize // 32 KiB
	bytesOnly := ratelimit.Limits{Bytes: ratelimit.Rate{PerSecond: all, Burst: 2 * all}}
	operations := ratelimit.Limits{Operations: ratelimit.Rate{PerSecond: 10, Burst: 5}}
	for _, tc := range []struct {
		name     string
		limits   ratelimit.Limits
		readable [][]byte
		writable []int
		count    int
		want     time.Duration
	}{
		{"reads, by bytes", bytesOnly, [][]byte{header(typeIn, 0)}, []int{all, 1}, 10, 8 * time.Second},
		{"reads, by operations", operations, [][]byte{header(typeIn, 0)}, []int{all, 1}, 25, 2 * time.Second},
		{"writes, by bytes", bytesOnly, [][]byte{header(typeOut, 0), repeat(1, all)}, []int{1}, 10, 8 * time.Second},
		{"writes, by operations", operations, [][]byte{header(typeOut, 0), repeat(1, 512)}, []int{1}, 25, 2 * time.Second},
		{"flushes, by bytes", bytesOnly, [][]byte{header(typeFlush, 0)}, []int{1}, 50, 0},
		{"flushes, by operations", operations, [][]byte{header(typeFlush, 0)}, []int{1}, 25, 2 * time.Second},
		{"discards, by bytes", bytesOnly, [][]byte{header(typeDiscard, 0), segment(0, testSectors, 0)}, []int{1}, 50, 0},
		{"discards, by segments", operations, [][]byte{header(typeDiscard, 0), bytes.Repeat(segment(0, 1, 0), 5)}, []int{1}, 5, 2 * time.Second},
		{"zeroes that are written", bytesOnly, [][]byte{header(typeWriteZeroes, 0), segment(0, testSectors, 0)}, []int{1}, 10, 8 * time.Second},
		{"zeroes that are holes", bytesOnly, [][]byte{header(typeWriteZeroes, 0), segment(0, testSectors, flagUnmap)}, []int{1}, 50, 0},
		{"zeroes, by operations", operations, [][]byte{header(typeWriteZeroes, 0), segment(0, testSectors, 0)}, []int{1}, 25, 2 * time.Second},
		{"what does not get to the disk", operations, [][]byte{header(typeGetID, 0)}, []int{serialSize, 1}, 50, 0},
		{"what is refused", operations, [][]byte{header(typeIn, testSectors)}, []int{512, 1}, 50, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			limit, clock := newLimiter(t, tc.limits)
			d := newLimitedDriver(t, limit)
			ratelimittest.Took(t, "it", clock.While(func() {
				var requests []*virtiotest.Request
				for range tc.count {
					requests = append(requests, d.Send(0, tc.readable, tc.writable))
				}
				for _, r := range requests {
					r.Wait(t)
				}
			}), tc.want, 0)
		})
	}
}

// TestLimitShared has two disks that get together what the limit allows.
func TestLimitShared(t *testing.T) {
	limit, clock := newLimiter(t, ratelimit.Limits{Bytes: ratelimit.Rate{PerSecond: 1 << 20, Burst: 1 << 20}})
	disks := []*virtiotest.Driver{newLimitedDriver(t, limit), newLimitedDriver(t, limit)}
	ratelimittest.Took(t, "it", clock.While(func() {
		var requests []*virtiotest.Request
		for range 48 {
			for _, d := range disks {
				requests = append(requests, d.Send(0, [][]byte{header(typeIn, 0)}, []int{testSectors * sectorSize, 1}))
			}
		}
		for _, r := range requests {
			r.Wait(t)
		}
	}), 2*time.Second, 0) // 96 * 32 KiB
}

// TestLimitReset resets a disk whose requests wait for time that does not pass,
// and uses it again.
func TestLimitReset(t *testing.T) {
	const burst = 3
	limit, clock := newLimiter(t, ratelimit.Limits{Operations: ratelimit.Rate{PerSecond: 10, Burst: burst}})
	d := newLimitedDriver(t, limit)
	read := func() *virtiotest.Request { return d.Send(0, [][]byte{header(typeIn, 0)}, []int{512, 1}) }
	var requests []*virtiotest.Request
	for range 20 {
		requests = append(requests, read())
	}
	clock.AwaitTimer() // the burst is used up
	for d.Rings[0].UsedIdx() < burst {
		runtime.Gosched()
	}
	if served := d.Rings[0].UsedIdx(); served != burst {
		t.Errorf("%d requests were served in no time, want %d", served, burst)
	}
	d.Reset()
	for _, r := range requests {
		r.Join() // served or not, but ended
	}
	d.Activate()
	ratelimittest.Took(t, "it", clock.While(func() { read().Wait(t) }), 100*time.Millisecond, 0)
}
