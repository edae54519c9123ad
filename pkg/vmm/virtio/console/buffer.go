package console

import (
	"context"
	"fmt"
	"io"
	"sync"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
)

const (
	// bufferSize is what the device holds for a slow reader: a whole kernel log
	// of a boot and then some.
	bufferSize = 128 << 10
	// writeSize is how much goes to the reader at once. What is being written
	// cannot be dropped any more.
	writeSize = 16 << 10
)

// buffer is a ring of output between the device, which never waits, and the
// goroutine that writes it out.
type buffer struct {
	mu      sync.Mutex
	changed sync.Cond // any of what follows
	ring    [bufferSize]byte
	start   int    // of the oldest byte
	length  int    // bytes held
	lost    uint64 // bytes dropped since the last one handed out
	writing bool   // bytes were handed out and are being written
	closed  bool
	err     error // why output was not written, for good
}

func newBuffer() *buffer {
	b := new(buffer)
	b.changed.L = &b.mu
	return b
}

// append takes the chain's readable bytes. Of more than fit it takes the last,
// and the oldest bytes held make room.
func (b *buffer) append(c *virtio.Chain) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed || b.err != nil {
		return
	}
	total := c.ReadableLen()
	skip := uint64(0)
	if total > bufferSize {
		skip = total - bufferSize
	}
	n := int(total - skip)
	if drop := b.length + n - bufferSize; drop > 0 {
		b.start = (b.start + drop) % bufferSize
		b.length -= drop
		b.lost += uint64(drop)
	}
	b.lost += skip
	if b.length == 0 {
		b.start = 0 // keeps to the pages that were touched before
	}
	at := (b.start + b.length) % bufferSize
	first := min(n, bufferSize-at)
	c.CopyIn(b.ring[at:at+first], skip)
	c.CopyIn(b.ring[:n-first], skip+uint64(first))
	b.length += n
	b.changed.Broadcast()
}

// take waits for output and moves some of it to p, which has room for the line
// about lost output and more. It returns 0 when there will be no more.
func (b *buffer) take(p []byte) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.writing = false
	b.changed.Broadcast()
	for b.length == 0 && !b.closed {
		b.changed.Wait()
	}
	if b.length == 0 || b.closed {
		return 0
	}
	n := 0
	if b.lost > 0 {
		n = copy(p, fmt.Sprintf("\r\n[%d bytes of console output lost]\r\n", b.lost))
		b.lost = 0
	}
	end := min(b.start+b.length, bufferSize)
	moved := copy(p[n:], b.ring[b.start:end])
	b.start = (b.start + moved) % bufferSize
	b.length -= moved
	b.writing = true
	return n + moved
}

// drain writes the output to w until close.
func (b *buffer) drain(w io.Writer) {
	p := make([]byte, writeSize)
	for {
		n := b.take(p)
		if n == 0 {
			return
		}
		if _, err := w.Write(p[:n]); err != nil {
			b.fail(fmt.Errorf("writing console output: %w", err))
			return
		}
	}
}

func (b *buffer) fail(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.err = err
	b.writing = false
	b.changed.Broadcast()
}

func (b *buffer) close(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.changed.Broadcast()
	})
	defer stop()
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.pending() && ctx.Err() == nil {
		b.changed.Wait()
	}
	if b.pending() {
		b.err = fmt.Errorf("console output is not written: %w", ctx.Err())
	}
	b.closed = true
	b.changed.Broadcast()
	return b.err
}

// pending says whether there is output that may still be written. mu is held.
func (b *buffer) pending() bool {
	return !b.closed && b.err == nil && (b.length > 0 || b.writing)
}
