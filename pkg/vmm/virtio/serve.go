package virtio

import (
	"errors"
	"sync"
)

// Serve runs the loop of a queue's goroutine until the queue is closed: for
// every chain it calls handle, completes the chain with the bytes written, and
// interrupts the driver. When handle returns done == false, it keeps the chain
// and is responsible for Complete and Flush. When the driver breaks the ring,
// Serve calls fail and returns.
func Serve(q *Queue, fail func(error), handle func(*Chain) (written uint32, done bool)) {
	serve(q, func() *Chain { return q.await(fail) }, handle)
}

// ServeConcurrently is Serve for a handle that blocks: n goroutines call it at
// the same time, for different chains. Chains are completed in the order in
// which handle returns. arrive, unless it is nil, is called before that, for one
// chain at a time in the order of the driver's. ServeConcurrently returns when all
// calls have returned.
func ServeConcurrently(q *Queue, n int, fail func(error), arrive func(*Chain), handle func(*Chain) (written uint32, done bool)) {
	// One goroutine waits for the driver and the others for its turn. Who gets
	// a chain handles it: no hand-over is in the way of a single request.
	var turn sync.Mutex
	stopped := false // protected by turn
	next := func() *Chain {
		turn.Lock()
		defer turn.Unlock()
		if stopped {
			return nil
		}
		c := q.await(fail)
		stopped = c == nil
		if c != nil && arrive != nil {
			arrive(c)
		}
		return c
	}
	var workers sync.WaitGroup
	for range n {
		workers.Go(func() { serve(q, next, handle) })
	}
	workers.Wait()
}

func serve(q *Queue, next func() *Chain, handle func(*Chain) (written uint32, done bool)) {
	for c := next(); c != nil; c = next() {
		if written, done := handle(c); done {
			q.Complete(c, written)
			q.Flush()
		}
	}
}

// await returns the next chain, or nil when the queue is closed, or broken,
// which it tells fail.
func (q *Queue) await(fail func(error)) *Chain {
	for {
		c, err := q.Next()
		if c != nil {
			return c
		}
		if err == nil {
			err = q.Wait()
		}
		if err != nil {
			if !errors.Is(err, ErrClosed) {
				fail(err)
			}
			return nil
		}
	}
}
