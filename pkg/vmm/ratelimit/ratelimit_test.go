package ratelimit

import (
	"math"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit/ratelimittest"
)

func newLimiter(t testing.TB, l Limits) (*Limiter, *ratelimittest.Clock) {
	t.Helper()
	clock := ratelimittest.New()
	limiter, err := New(l, clock)
	if err != nil {
		t.Fatal(err)
	}
	return limiter, clock
}

// took fails the test unless the time is what was wanted.
func took(t testing.TB, what string, got, want time.Duration) {
	t.Helper()
	ratelimittest.Took(t, what, got, want, 0)
}

func TestCheck(t *testing.T) {
	for _, test := range []struct {
		rate Rate
		want string // in the error; empty for none
	}{
		{Rate{}, ""},
		{Rate{1, 1}, ""},
		{Rate{1, 3600}, ""},
		{Rate{1, 3601}, "burst of 3601"},
		{Rate{1, 0}, "burst of 0"},
		{Rate{0, 1}, "rate of 0"},
		{Rate{1000, 10}, ""},
		{Rate{1000, 9}, "burst of 9 is not between 10 and 3600000"},
		{Rate{MaxPerSecond, MaxPerSecond}, ""},
		{Rate{MaxPerSecond, 3600 * MaxPerSecond}, ""},
		{Rate{MaxPerSecond + 1, MaxPerSecond}, "rate of 1099511627777"},
		{Rate{math.MaxUint64, math.MaxUint64}, "rate of"},
		{Rate{1000, math.MaxUint64}, "burst of"},
	} {
		for name, limits := range map[string]Limits{"operations": {Operations: test.rate}, "bytes": {Bytes: test.rate}} {
			_, err := New(limits, SystemClock)
			switch {
			case test.want == "" && err != nil:
				t.Errorf("%+v: %v", test.rate, err)
			case test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), name)):
				t.Errorf("%+v: error %v, want one with %q and %s", test.rate, err, test.want, name)
			}
		}
	}
}

func TestOff(t *testing.T) {
	limiter, err := New(Limits{}, SystemClock)
	if limiter != nil || err != nil {
		t.Fatalf("%v, %v", limiter, err)
	}
	gate := limiter.NewGate()
	gate.Close()
	if !gate.Take(math.MaxUint64, math.MaxUint64) || !gate.Await() || !gate.Ready() {
		t.Error("what is off holds something up")
	}
	gate.Charge(1, 1)
	gate.GiveBack(1)
	gate.Open()
}

func TestTake(t *testing.T) {
	type request struct{ operations, bytes uint64 }
	for _, test := range []struct {
		name     string
		limits   Limits
		requests []request
		want     time.Duration
	}{
		{"a burst at once", Limits{Bytes: Rate{1000, 5000}}, []request{{1, 4000}, {1, 1000}}, 0},
		{"then the rate", Limits{Bytes: Rate{1000, 5000}}, []request{{1, 5000}, {1, 2500}}, 2500 * time.Millisecond},
		{"more than a burst", Limits{Bytes: Rate{1000, 10}}, []request{{1, 60010}}, time.Minute},
		{"operations", Limits{Operations: Rate{10, 1}}, []request{{1, 1 << 40}, {1, 0}, {1, 1 << 40}}, 200 * time.Millisecond},
		{"more operations than a burst", Limits{Operations: Rate{10, 1}}, []request{{11, 0}}, time.Second},
		{"both, and operations are scarce", Limits{Operations: Rate{10, 1}, Bytes: Rate{1000, 1000}}, []request{{1, 10}, {1, 10}}, 100 * time.Millisecond},
		{"both, and bytes are scarce", Limits{Operations: Rate{10, 1}, Bytes: Rate{1000, 1000}}, []request{{1, 1000}, {1, 1000}}, time.Second},
		{"nothing", Limits{Operations: Rate{10, 1}, Bytes: Rate{1000, 1000}}, []request{{0, 0}, {1, 0}, {0, 0}}, 0},
		{"no whole nanoseconds", Limits{Operations: Rate{3, 1}}, []request{{1, 0}, {1, 0}, {1, 0}, {1, 0}}, time.Second},
		{"the highest rate", Limits{Bytes: Rate{MaxPerSecond, 3600 * MaxPerSecond}}, []request{{1, 3600 * MaxPerSecond}, {1, MaxPerSecond}}, time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			limiter, clock := newLimiter(t, test.limits)
			gate := limiter.NewGate()
			took(t, "it", clock.While(func() {
				for _, r := range test.requests {
					if !gate.Take(r.operations, r.bytes) {
						t.Error("the gate is closed")
					}
				}
			}), test.want)
		})
	}
}

// What is not used is kept, up to a burst.
func TestRefill(t *testing.T) {
	limiter, clock := newLimiter(t, Limits{Bytes: Rate{1000, 500}})
	gate := limiter.NewGate()
	take := func(n uint64) time.Duration { return clock.While(func() { gate.Take(1, n) }) }
	took(t, "the first burst", take(500), 0)
	clock.Advance(200 * time.Millisecond)
	took(t, "what came since", take(200), 0)
	took(t, "more", take(100), 100*time.Millisecond)
	clock.Advance(time.Hour)
	took(t, "a burst and a half", take(750), 250*time.Millisecond)
}

func TestGiveBack(t *testing.T) {
	limiter, clock := newLimiter(t, Limits{Bytes: Rate{1000, 500}})
	gate := limiter.NewGate()
	took(t, "a burst and more", clock.While(func() {
		gate.Take(1, 500)
		gate.GiveBack(500)
		gate.Take(1, 500)
		gate.GiveBack(100)
		gate.Take(1, 200)
	}), 100*time.Millisecond)
	gate.GiveBack(1 << 32) // no more than the bucket holds
	took(t, "once more", clock.While(func() { gate.Take(1, 600) }), 100*time.Millisecond)
}

// A device that counts afterwards gets one operation into debt, and everybody
// waits until that is paid.
func TestCharge(t *testing.T) {
	limiter, clock := newLimiter(t, Limits{Bytes: Rate{1000, 500}, Operations: Rate{10, 2}})
	receiver, other := limiter.NewGate(), limiter.NewGate()
	if !receiver.Ready() || !receiver.Await() {
		t.Fatal("the first one waits")
	}
	receiver.Charge(1, 3500) // 3000 more than there are
	if receiver.Ready() || other.Ready() {
		t.Error("something is owed, and somebody may go on")
	}
	took(t, "to pay the debt", clock.While(func() { receiver.Await() }), 3*time.Second)
	if !receiver.Ready() || !other.Ready() {
		t.Error("nothing is owed, and somebody has to wait")
	}
	for n := 0; receiver.Ready(); n++ { // neither Ready nor Await has taken anything
		if n == 2 {
			t.Fatal("more operations than a burst")
		}
		receiver.Charge(1, 0)
	}
}

// All who share a limiter together get no more than it lets through, and each of
// them its part.
func TestShared(t *testing.T) {
	limiter, clock := newLimiter(t, Limits{Bytes: Rate{1 << 20, 1 << 20}})
	const gates, each, size = 5, 40, 64 << 10
	total := clock.While(func() {
		var users sync.WaitGroup
		for range gates {
			gate := limiter.NewGate()
			users.Go(func() {
				for range each {
					gate.Take(1, size)
				}
			})
		}
		users.Wait()
	})
	took(t, "everything", total, time.Second*(gates*each*size-1<<20)/(1<<20))
}

// A large request does not keep others out until all of it is there, and small
// ones do not keep the large one out.
func TestOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // for its Wait
		limiter, clock := newLimiter(t, Limits{Bytes: Rate{1000, 1000}})
		large, small := limiter.NewGate(), limiter.NewGate()
		large.Take(1, 1000)
		ended := make(chan string, 4)
		take := func(name string, g *Gate, n uint64) {
			g.Take(1, n)
			ended <- name
		}
		go take("large", large, 5000)
		synctest.Wait() // it waits for its first part
		for range 3 {
			go take("small", small, 100)
		}
		synctest.Wait() // they wait for their turn
		took(t, "everything", clock.While(func() {
			for i, want := range []string{"small", "small", "small", "large"} {
				if got := <-ended; got != want {
					t.Errorf("number %d is the %s one, want the %s one", i, got, want)
				}
			}
		}), 5300*time.Millisecond)
	})
}

func TestClose(t *testing.T) {
	limiter, clock := newLimiter(t, Limits{Bytes: Rate{1, 1}, Operations: Rate{1, 1}})
	first, second, other := limiter.NewGate(), limiter.NewGate(), limiter.NewGate()
	first.Take(1, 1)
	results := make(chan bool)
	go func() { results <- first.Take(1, 1) }()
	clock.AwaitTimer()
	go func() { results <- second.Take(1, 1) }()
	go func() { results <- second.Await() }()
	second.Close()
	second.Close()
	for range 2 {
		if <-results {
			t.Error("a closed gate let something through")
		}
	}
	if second.Take(1, 0) || second.Await() {
		t.Error("a closed gate let something through later")
	}
	first.Close() // it has the turn
	if <-results {
		t.Error("a closed gate let something through")
	}
	// Who has given up has taken nothing, and is in nobody's way.
	took(t, "the next one", clock.While(func() {
		if !other.Take(1, 1) {
			t.Error("an open gate is closed")
		}
	}), time.Second)
	second.Open()
	second.Open()
	took(t, "the one after that", clock.While(func() {
		if !second.Take(1, 1) {
			t.Error("a gate that was opened again is closed")
		}
	}), time.Second)
}

// At a high rate the waits are long enough for many operations.
func TestFewTimers(t *testing.T) {
	limiter, clock := newLimiter(t, Limits{Operations: Rate{1e6, 1e6}})
	gate := limiter.NewGate()
	counting := &countingClock{Clock: clock}
	limiter.clock = counting
	gate.Take(1e6, 0)
	took(t, "it", clock.While(func() {
		for range 100000 {
			gate.Take(1, 0)
		}
	}), 100*time.Millisecond)
	if counting.timers > 101 {
		t.Errorf("%d timers for 100 ms", counting.timers)
	}
}

type countingClock struct {
	Clock
	timers int
}

func (c *countingClock) After(d time.Duration) <-chan time.Time {
	c.timers++
	return c.Clock.After(d)
}

// FuzzLimiter: whatever is taken from a valid limiter, no more gets through than
// the rate and the burst, and no time is wasted.
func FuzzLimiter(f *testing.F) {
	f.Add(uint64(1000), uint64(500), []byte{1, 200, 255, 3})
	f.Add(uint64(1), uint64(1), []byte{1, 1, 1})
	f.Add(uint64(MaxPerSecond), uint64(MaxPerSecond), []byte{255})
	f.Add(uint64(3), uint64(7), []byte{9, 1})
	f.Fuzz(func(t *testing.T, perSecond, burst uint64, sizes []byte) {
		clock := ratelimittest.New()
		limiter, err := New(Limits{Bytes: Rate{perSecond, burst}}, clock)
		if err != nil || limiter == nil || len(sizes) > 64 {
			return
		}
		gate := limiter.NewGate()
		total := uint64(0)
		elapsed := clock.While(func() {
			for _, s := range sizes {
				n := min(uint64(s)*(burst/64+1), 4*burst)
				gate.Take(1, n)
				total += n
			}
		})
		seconds := max(float64(total)-float64(burst), 0) / float64(perSecond)
		if got := elapsed.Seconds(); got < seconds*(1-1e-9)-1e-9 || got > seconds*(1+1e-9)+2*shortest.Seconds() {
			t.Fatalf("%d bytes with %d per second and a burst of %d took %v", total, perSecond, burst, elapsed)
		}
	})
}
