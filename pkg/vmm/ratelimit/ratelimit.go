// Package ratelimit bounds how much a machine's devices do in a second, by
// token buckets: tokens come at a steady rate, up to a burst, and what is done
// takes some. A Limiter has two buckets, one for operations and one for bytes,
// and is shared by all devices of a kind; each of them goes through a Gate of
// its own, which it can close when it is reset.
//
// A device that has to wait does so in the goroutine that serves the queue, so
// that it takes nothing more from there. No goroutine and no timer runs when
// nobody waits, and a nil Gate costs nothing.
package ratelimit

import (
	"fmt"
	"math/bits"
	"sync"
	"time"
)

// Rate is that of one bucket. The zero value is no limit.
type Rate struct {
	// PerSecond is how many tokens come in a second, Burst how many the bucket
	// holds. It is full at first.
	PerSecond uint64 `json:"per_second"`
	Burst     uint64 `json:"burst"`
}

// Limits are those of a Limiter. The zero value is none.
type Limits struct {
	Operations Rate `json:"operations,omitzero"`
	Bytes      Rate `json:"bytes,omitzero"`
}

const (
	// MaxPerSecond is the highest rate: more is the same as no limit, and a token
	// would come in no time that can be measured.
	MaxPerSecond = 1 << 40
	// A bucket fills within MinFill at the soonest: who takes more than it holds
	// waits for it more than once, but not all the time. MaxFill is the longest: a
	// burst of more than an hour's tokens makes no sense, and keeps the
	// arithmetic far from its bounds.
	MinFill = 10 * time.Millisecond
	MaxFill = time.Hour
)

// Check says what is wrong with the rate.
func (r Rate) Check() error {
	if r == (Rate{}) {
		return nil
	}
	if r.PerSecond < 1 || r.PerSecond > MaxPerSecond {
		return fmt.Errorf("a rate of %d per second is not between 1 and %d", r.PerSecond, uint64(MaxPerSecond))
	}
	least, most := max(r.PerSecond/uint64(time.Second/MinFill), 1), r.PerSecond*uint64(MaxFill/time.Second)
	if r.Burst < least || r.Burst > most {
		return fmt.Errorf("a burst of %d is not between %d and %d, what %d per second bring in %v and in %v",
			r.Burst, least, most, r.PerSecond, MinFill, MaxFill)
	}
	return nil
}

// Check says what is wrong with the limits.
func (l Limits) Check() error {
	if err := l.Operations.Check(); err != nil {
		return fmt.Errorf("operations: %w", err)
	}
	if err := l.Bytes.Check(); err != nil {
		return fmt.Errorf("bytes: %w", err)
	}
	return nil
}

// Clock is the time, which is another one in tests.
type Clock interface {
	Now() time.Time
	// After is time.After.
	After(time.Duration) <-chan time.Time
}

type systemClock struct{}

func (systemClock) Now() time.Time                         { return time.Now() }
func (systemClock) After(d time.Duration) <-chan time.Time { return time.After(d) }

// SystemClock is the real one.
var SystemClock Clock = systemClock{}

// shortest is the shortest wait. What comes meanwhile is not lost, because no
// bucket fills in that time; and small operations at a high rate need no timer
// each.
const shortest = time.Millisecond

// Limiter has the buckets. It is safe for concurrent use.
type Limiter struct {
	clock Clock
	// turn is held by the one who waits for tokens, the others wait for it: they
	// are served in the order in which they came.
	turn chan struct{}

	mu         sync.Mutex // protects the buckets
	operations bucket
	bytes      bucket
}

// New makes a limiter; nil if there is no limit.
func New(limits Limits, clock Clock) (*Limiter, error) {
	if err := limits.Check(); err != nil {
		return nil, err
	}
	if limits == (Limits{}) {
		return nil, nil
	}
	return &Limiter{
		clock:      clock,
		turn:       make(chan struct{}, 1),
		operations: newBucket(limits.Operations),
		bytes:      newBucket(limits.Bytes),
	}, nil
}

// try takes the tokens if both buckets have them and spend is true. It returns
// for how long they are not going to have them.
func (l *Limiter) try(operations, bytes uint64, spend bool) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.clock.Now()
	wait := max(l.operations.wait(now, operations), l.bytes.wait(now, bytes))
	if wait <= 0 && spend {
		l.operations.take(now, operations)
		l.bytes.take(now, bytes)
	}
	return wait
}

// await is try until it succeeds, or stop is closed. It does not ask for more
// than the buckets hold.
func (l *Limiter) await(stop <-chan struct{}, operations, bytes uint64, spend bool) bool {
	select {
	case l.turn <- struct{}{}:
		defer func() { <-l.turn }()
	case <-stop:
		return false
	}
	for {
		wait := l.try(operations, bytes, spend)
		if wait <= 0 {
			return true
		}
		select {
		case <-l.clock.After(max(wait, shortest)):
		case <-stop:
			return false
		}
	}
}

// bucket counts tokens by the time at which it will be full. One without a rate
// has any number of them.
type bucket struct {
	rate Rate
	fill time.Duration // from empty to full
	full time.Time     // when it is, unless tokens are taken; any time of the past is now
}

func newBucket(r Rate) bucket {
	b := bucket{rate: r}
	if r.PerSecond > 0 {
		b.fill = b.time(r.Burst)
	}
	return b
}

// time is how long n tokens take to come, n being a burst or up to 4 GiB.
func (b *bucket) time(n uint64) time.Duration {
	hi, lo := bits.Mul64(n, uint64(time.Second))
	lo, carry := bits.Add64(lo, b.rate.PerSecond-1, 0) // rounded up: many small ones are no more than the rate
	q, _ := bits.Div64(hi+carry, lo, b.rate.PerSecond)
	return time.Duration(q)
}

// level is how long the bucket took to come by what is in it, negative if it
// owes something.
func (b *bucket) level(now time.Time) time.Duration {
	return b.fill - max(b.full.Sub(now), 0)
}

func (b *bucket) wait(now time.Time, n uint64) time.Duration {
	if b.rate.PerSecond == 0 {
		return 0
	}
	return b.time(n) - b.level(now)
}

// take takes n tokens, whether they are there or not.
func (b *bucket) take(now time.Time, n uint64) {
	if b.rate.PerSecond == 0 {
		return
	}
	if b.full.Before(now) {
		b.full = now
	}
	b.full = b.full.Add(b.time(n))
}

// giveBack puts back n of the tokens that were taken. What the bucket does not
// hold is lost.
func (b *bucket) giveBack(n uint64) {
	if b.rate.PerSecond != 0 {
		b.full = b.full.Add(-b.time(n))
	}
}

// part is how many of n tokens can be waited for at once.
func (b *bucket) part(n uint64) uint64 {
	if b.rate.PerSecond == 0 {
		return n
	}
	return min(n, b.rate.Burst)
}
