package ratelimit

import "sync"

// Gate is one device's way to a Limiter. A nil Gate is open and limits nothing.
// Its methods may be called from any goroutine.
type Gate struct {
	limiter *Limiter

	mu     sync.Mutex
	closed bool
	stop   chan struct{} // closed by Close; protected by mu
}

// NewGate makes an open gate; nil if l is, which limits nothing.
func (l *Limiter) NewGate() *Gate {
	if l == nil {
		return nil
	}
	return &Gate{limiter: l, stop: make(chan struct{})}
}

// Close ends all waits, and those that are to come until Open: they fail. It
// does not block.
func (g *Gate) Close() {
	if g == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.closed {
		g.closed = true
		close(g.stop)
	}
}

// Open undoes Close.
func (g *Gate) Open() {
	if g == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		g.closed, g.stop = false, make(chan struct{})
	}
}

func (g *Gate) stopped() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.stop
}

// Take waits until so much may be done; false says that the gate was closed
// before. What is more than a burst is waited for in parts, between which others
// have their turn.
func (g *Gate) Take(operations, bytes uint64) bool {
	if g == nil {
		return true
	}
	stop := g.stopped()
	for {
		o, b := g.limiter.operations.part(operations), g.limiter.bytes.part(bytes)
		if !g.limiter.await(stop, o, b, true) {
			return false
		}
		operations -= o
		bytes -= b
		if operations == 0 && bytes == 0 {
			return true
		}
	}
}

// GiveBack is for bytes that Take has waited for, and that were not moved.
func (g *Gate) GiveBack(bytes uint64) {
	if g == nil {
		return
	}
	g.limiter.mu.Lock()
	defer g.limiter.mu.Unlock()
	g.limiter.bytes.giveBack(bytes)
}

// Await is for a device that learns how much there is to do only when it is
// done: it waits until something may be done, and takes nothing. False says that
// the gate was closed before.
func (g *Gate) Await() bool {
	return g == nil || g.limiter.await(g.stopped(), 1, 1, false)
}

// Ready says whether Await would return at once.
func (g *Gate) Ready() bool {
	return g == nil || g.limiter.try(1, 1, false) <= 0
}

// Charge takes the tokens of what was done after Await or Ready. If there were
// not so many, they are owed, and the next one waits until that is paid.
func (g *Gate) Charge(operations, bytes uint64) {
	if g == nil {
		return
	}
	g.limiter.mu.Lock()
	defer g.limiter.mu.Unlock()
	now := g.limiter.clock.Now()
	g.limiter.operations.take(now, operations)
	g.limiter.bytes.take(now, bytes)
}
