// Package ratelimittest has a clock for tests of what is limited: its time
// passes when the test says so.
package ratelimittest

import (
	"sync"
	"time"
)

// Clock is a ratelimit.Clock. Its methods may be called from any goroutine.
type Clock struct {
	mu      sync.Mutex
	elapsed time.Duration
	timers  []timer
	changed sync.Cond // a timer came
}

type timer struct {
	at      time.Duration
	expired chan time.Time
}

// start is any time.
var start = time.Unix(1e9, 0)

// New makes a clock that stands still.
func New() *Clock {
	c := &Clock{}
	c.changed.L = &c.mu
	return c
}

// Now implements ratelimit.Clock.
func (c *Clock) Now() time.Time { return start.Add(c.Elapsed()) }

// Elapsed is the time since New.
func (c *Clock) Elapsed() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.elapsed
}

// After implements ratelimit.Clock.
func (c *Clock) After(d time.Duration) <-chan time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := timer{at: c.elapsed + d, expired: make(chan time.Time, 1)}
	c.timers = append(c.timers, t)
	c.changed.Broadcast()
	return t.expired
}

// Advance moves the time on.
func (c *Clock) Advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.advance(d)
}

func (c *Clock) advance(d time.Duration) {
	c.elapsed += d
	var later []timer
	for _, t := range c.timers {
		if t.at > c.elapsed {
			later = append(later, t)
			continue
		}
		t.expired <- start.Add(c.elapsed)
	}
	c.timers = later
}

// AwaitTimer returns when somebody waits for the time to pass.
func (c *Clock) AwaitTimer() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.timers) == 0 {
		c.changed.Wait()
	}
}

// While runs f, and meanwhile moves the time on, from timer to timer: it passes
// only when somebody waits for it. It returns how much has passed.
func (c *Clock) While(f func()) time.Duration {
	begin := c.Elapsed()
	ended := false // protected by mu
	var mover sync.WaitGroup
	mover.Go(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		for !ended {
			if len(c.timers) == 0 {
				c.changed.Wait()
				continue
			}
			next := c.timers[0].at
			for _, t := range c.timers {
				next = min(next, t.at)
			}
			c.advance(next - c.elapsed)
		}
	})
	f()
	c.mu.Lock()
	ended = true
	c.changed.Broadcast()
	c.mu.Unlock()
	mover.Wait()
	return c.Elapsed() - begin
}
