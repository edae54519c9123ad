package vsock

import (
	"slices"
	"sync"
)

// chunkSize is the unit in which a backlog takes memory.
const chunkSize = 16 << 10

var chunks = sync.Pool{New: func() any { return new([chunkSize]byte) }}

// backlog is a queue of bytes that the guest sent and the host has not taken
// yet. It holds memory only while it holds bytes. Its user bounds it.
type backlog struct {
	chunks []*[chunkSize]byte
	off    int // of the first byte, in chunks[0]
	size   int
}

// write copies bufs to the end.
func (b *backlog) write(bufs [][]byte) {
	for _, p := range bufs {
		for len(p) > 0 {
			end := b.off + b.size
			if end == len(b.chunks)*chunkSize {
				b.chunks = append(b.chunks, chunks.Get().(*[chunkSize]byte))
			}
			n := copy(b.chunks[end/chunkSize][end%chunkSize:], p)
			b.size += n
			p = p[n:]
		}
	}
}

// buffers appends to dst where the bytes are, in order. They stay valid until
// discard.
func (b *backlog) buffers(dst [][]byte) [][]byte {
	off, left := b.off, b.size
	for _, c := range b.chunks {
		n := min(chunkSize-off, left)
		dst = append(dst, c[off:off+n])
		off, left = 0, left-n
	}
	return dst
}

// discard drops the first n bytes, at most size.
func (b *backlog) discard(n int) {
	b.off += n
	b.size -= n
	done := b.off / chunkSize
	if b.size == 0 {
		done, b.off = len(b.chunks), 0
	}
	for _, c := range b.chunks[:done] {
		chunks.Put(c)
	}
	b.off %= chunkSize
	b.chunks = slices.Delete(b.chunks, 0, done)
}
