package memory

import (
	"errors"
	"fmt"
	"sync/atomic"
)

// Blocks are the parts of a region whose memory comes and goes while the guest
// runs. Slice gives out what is wholly plugged. The mapping behind the region
// must stay accessible where it has been plugged once, because a device may hold
// a slice to a block that goes.
//
// Set is for one goroutine at a time, everything else for any.
type Blocks struct {
	size  uint64
	count int
	bits  []atomic.Uint64 // a set bit is a plugged block
}

// NewBlocks makes count blocks of size bytes, none of them plugged.
func NewBlocks(size uint64, count int) (*Blocks, error) {
	if size == 0 || count < 1 {
		return nil, errors.New("memory region without blocks")
	}
	return &Blocks{size: size, count: count, bits: make([]atomic.Uint64, (count+63)/64)}, nil
}

// Size is that of a block, in bytes.
func (b *Blocks) Size() uint64 { return b.size }

// Count is the number of blocks.
func (b *Blocks) Count() int { return b.count }

// Set plugs or unplugs a block.
func (b *Blocks) Set(block int, plugged bool) {
	word, bit := &b.bits[block/64], uint64(1)<<(block%64)
	if plugged {
		word.Or(bit)
	} else {
		word.And(^bit)
	}
}

// Plugged counts the plugged ones of n blocks from first on.
func (b *Blocks) Plugged(first, n int) int {
	if first < 0 || n < 0 || n > b.count-first {
		panic(fmt.Sprintf("memory: blocks %d to %d of %d", first, first+n, b.count)) // a bug, no guest's doing
	}
	plugged := 0
	for i := first; i < first+n; i++ {
		plugged += int(b.bits[i/64].Load() >> (i % 64) & 1)
	}
	return plugged
}

// plugged says whether all of [off, off+length) is, which lies inside the
// region and is not empty.
func (b *Blocks) plugged(off, length uint64) bool {
	first, last := int(off/b.size), int((off+length-1)/b.size)
	n := last - first + 1
	return b.Plugged(first, n) == n
}
