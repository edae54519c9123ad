package virtio

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"github.com/microvm-runtime/microvm/pkg/vmm/eventfd"
	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
)

// MaxQueueSize is the largest size a split virtqueue can have, section 2.7.
const MaxQueueSize = 1 << 15

// Flags of the two rings, sections 2.7.6 and 2.7.8. They count only when
// EVENT_IDX was not negotiated.
const (
	availNoInterrupt = 1 << 0
	usedNoNotify     = 1 << 0
)

// ErrClosed is what Wait returns once the queue is closed.
var ErrClosed = errors.New("virtqueue is closed")

// QueueConfig is what the transport knows when the driver enables a queue.
type QueueConfig struct {
	Memory *memory.Memory
	// Size is the number of descriptors, a power of two. The transport has
	// checked that it is not above the device's maximum.
	Size uint16
	// Desc, Avail and Used are where the driver put the descriptor table and
	// the rings. They come from the guest and are checked by NewQueue.
	Desc, Avail, Used memory.GuestAddress
	// Features are the accepted feature bits; IndirectDesc and EventIdx count.
	Features uint64
	// Kick is signalled when the driver notifies the queue. It stays the
	// transport's, who closes it after Device.Reset, and signals it once after
	// activation, because kicks before that found nobody.
	Kick *eventfd.EventFD
	// Interrupt raises the queue's interrupt. It is called from any goroutine
	// until Device.Reset has returned.
	Interrupt func()
}

// Queue is the device's side of a split virtqueue, section 2.7. Everything in
// the rings is the guest's and may change at any time: an index or descriptor
// is loaded once, and the copy is checked and used.
//
// Next is for one goroutine at a time. All other methods may be called from
// any goroutine.
type Queue struct {
	mem       *memory.Memory
	size      uint16
	indirect  bool
	eventIdx  bool
	kick      *eventfd.EventFD
	interrupt func()

	desc []uint64 // descriptor table, two words each
	// avail and used are the rings. avail starts at the aligned word that
	// holds its first field: availOff is 0 or 2.
	avail    []uint32
	availOff uint32
	used     []uint32

	// Next's own.
	nextAvail uint16 // next entry of the available ring to take
	availIdx  uint16 // the driver's index as last read
	armed     bool   // the driver was asked to kick at nextAvail
	err       error  // why the ring is broken, for good

	closed atomic.Bool // written with mu held

	mu        sync.Mutex // protects what follows and the used ring
	usedIdx   uint16
	usedFlags uint16
	signalled uint16 // usedIdx when Flush last decided
	busy      []bool // by head: the chain is with the device
	free      []*Chain
}

// NewQueue checks what the driver set up, sections 2.7 and 2.7.4: the size, the
// alignments, and that each part lies inside one region of guest memory. The
// parts may overlap each other or anything else: that confuses the guest alone.
func NewQueue(c QueueConfig) (*Queue, error) {
	if c.Size == 0 || c.Size > MaxQueueSize || c.Size&(c.Size-1) != 0 {
		return nil, fmt.Errorf("virtqueue size %d is not a power of two up to %d", c.Size, MaxQueueSize)
	}
	size := uint64(c.Size)
	q := &Queue{
		mem:       c.Memory,
		size:      c.Size,
		indirect:  c.Features&FeatureIndirectDesc != 0,
		eventIdx:  c.Features&FeatureEventIdx != 0,
		kick:      c.Kick,
		interrupt: c.Interrupt,
		availOff:  uint32(c.Avail & 2),
		busy:      make([]bool, size),
	}
	part := func(name string, addr memory.GuestAddress, align, length uint64) ([]byte, error) {
		if uint64(addr)%align != 0 {
			return nil, fmt.Errorf("virtqueue %s at %#x is not aligned to %d", name, uint64(addr), align)
		}
		// Whole 32-bit words, see words32. Regions are made of pages, so the
		// rounding leaves none.
		start := addr &^ 3
		b, err := c.Memory.Slice(start, (uint64(addr-start)+length+3)&^3)
		if err != nil {
			return nil, fmt.Errorf("virtqueue %s: %w", name, err)
		}
		return b, nil
	}
	desc, err := part("descriptor table", c.Desc, 16, descSize*size)
	if err != nil {
		return nil, err
	}
	avail, err := part("available ring", c.Avail, 2, 6+2*size)
	if err != nil {
		return nil, err
	}
	used, err := part("used ring", c.Used, 4, 6+8*size)
	if err != nil {
		return nil, err
	}
	var errs [3]error
	q.desc, errs[0] = words64(desc)
	q.avail, errs[1] = words32(avail)
	q.used, errs[2] = words32(used)
	if err := errors.Join(errs[:]...); err != nil {
		return nil, fmt.Errorf("virtqueue: %w", err)
	}
	return q, nil
}

// Size returns the number of descriptors.
func (q *Queue) Size() int { return int(q.size) }

// loadAvail reads the 16-bit field at byte offset off of the available ring.
func (q *Queue) loadAvail(off uint32) uint16 {
	off += q.availOff
	return uint16(atomic.LoadUint32(&q.avail[off/4]) >> (off % 4 * 8))
}

// storeUsed publishes the used ring's flags and index, which share a word. It
// is a release store and, on every architecture Go orders atomics as
// sequentially consistent, a full barrier. mu is held.
func (q *Queue) storeUsed() {
	atomic.StoreUint32(&q.used[0], uint32(q.usedFlags)|uint32(q.usedIdx)<<16)
}

// Wait blocks until the driver kicks the queue. It returns ErrClosed after
// Close. A kick is certain only for chains made available after Next has
// returned nil: drain the queue before every Wait.
func (q *Queue) Wait() error {
	if q.closed.Load() {
		return ErrClosed
	}
	err := q.kick.Wait()
	if q.closed.Load() || errors.Is(err, os.ErrClosed) {
		return ErrClosed
	}
	if err != nil {
		return fmt.Errorf("waiting for a kick: %w", err)
	}
	return nil
}

// Next takes the next available chain. It returns nil when there is none, and
// has then asked the driver for a kick. The chain is the caller's until it is
// given to Complete; chains may be completed in any order.
//
// An error means that the driver broke the ring, for good: every later call
// returns the same. After Close, Next returns nil.
func (q *Queue) Next() (*Chain, error) {
	if q.err != nil {
		return nil, q.err
	}
	c, err := q.next()
	if err != nil {
		q.err = fmt.Errorf("virtqueue is broken: %w", err)
		return nil, q.err
	}
	return c, nil
}

func (q *Queue) next() (*Chain, error) {
	if q.closed.Load() {
		return nil, nil
	}
	if q.nextAvail == q.availIdx {
		q.availIdx = q.loadAvail(2)
		if q.nextAvail == q.availIdx {
			q.arm()
			// The driver may have added a chain before it saw that we want a
			// kick: look again (section 2.7.7.1 has it from the driver's side).
			q.availIdx = q.loadAvail(2)
			if q.nextAvail == q.availIdx {
				return nil, nil
			}
		}
		if n := q.availIdx - q.nextAvail; n > q.size {
			return nil, fmt.Errorf("available index %d is %d ahead, the queue has %d descriptors", q.availIdx, n, q.size)
		}
	}
	head := q.loadAvail(4 + 2*uint32(q.nextAvail&(q.size-1)))
	if head >= q.size {
		return nil, fmt.Errorf("head %d of %d descriptors", head, q.size)
	}
	c, err := q.take(head)
	if err != nil {
		return nil, err
	}
	if err := c.parse(); err != nil {
		return nil, fmt.Errorf("chain at descriptor %d: %w", head, err)
	}
	q.nextAvail++
	return c, nil
}

// take finds a Chain for head and marks both as being with the device. No
// driver may offer a descriptor that it has not got back: the check bounds the
// number of chains by the size of the queue.
func (q *Queue) take(head uint16) (*Chain, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.busy[head] {
		return nil, fmt.Errorf("head %d was made available again while the device has it", head)
	}
	q.busy[head] = true
	if q.armed {
		q.armed = false
		if !q.eventIdx && !q.closed.Load() {
			// With EVENT_IDX the stale avail_event keeps kicks away.
			q.usedFlags = usedNoNotify
			q.storeUsed()
		}
	}
	var c *Chain
	if n := len(q.free); n > 0 {
		c, q.free = q.free[n-1], q.free[:n-1]
	} else {
		c = &Chain{queue: q}
	}
	c.head, c.busy = head, true
	return c, nil
}

// arm asks the driver to kick when it makes the entry at nextAvail available,
// and orders that before the loads that follow.
func (q *Queue) arm() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.armed || q.closed.Load() {
		return
	}
	q.armed = true
	if q.eventIdx {
		// avail_event is the low half of the last word; what follows in
		// memory is not ours, so the other half must stay. A driver that sees
		// the zero in between is one whose index we are about to see.
		word := &q.used[1+2*uint32(q.size)]
		atomic.AndUint32(word, 0xffff0000)
		atomic.OrUint32(word, uint32(q.nextAvail))
		return
	}
	q.usedFlags = 0
	q.storeUsed()
}

// Complete gives the chain back to the driver, with the number of bytes
// written to the front of c.Writable. The caller must not use c, or the memory
// it points to, afterwards. The driver learns of it at the next Flush. After
// Close the chain is dropped: the driver gets its memory back by the reset.
func (q *Queue) Complete(c *Chain, written uint32) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.giveBack(c, written)
	q.publish()
}

// CompleteAll is Complete for chains that make sense to the driver only
// together, as the merged buffers of section 5.1.6.4 do: it sees all of them
// used, in this order, or none. written has an entry for each chain.
func (q *Queue) CompleteAll(chains []*Chain, written []uint32) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for i, c := range chains {
		q.giveBack(c, written[i])
	}
	q.publish()
}

// giveBack puts the chain into the used ring, which publish shows the driver.
// mu is held.
func (q *Queue) giveBack(c *Chain, written uint32) {
	if c.queue != q || !c.busy {
		panic("virtio: chain completed twice, or on another queue") // a device's bug, no guest's doing
	}
	c.busy = false
	q.busy[c.head] = false
	q.free = append(q.free, c)
	if q.closed.Load() {
		return
	}
	elem := 1 + 2*uint32(q.usedIdx&(q.size-1))
	q.used[elem] = uint32(c.head)
	q.used[elem+1] = written
	q.usedIdx++
}

func (q *Queue) publish() {
	if !q.closed.Load() {
		q.storeUsed()
	}
}

// Flush interrupts the driver if it asked to hear of what was completed since
// the last Flush.
func (q *Queue) Flush() {
	if q.wantsInterrupt() {
		q.interrupt()
	}
}

func (q *Queue) wantsInterrupt() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	old := q.signalled
	if q.usedIdx == old || q.closed.Load() {
		return false
	}
	q.signalled = q.usedIdx
	// storeUsed has ordered the index before these loads, section 2.7.7.2.
	if q.eventIdx {
		event := q.loadAvail(4 + 2*uint32(q.size))
		return q.usedIdx-event-1 < q.usedIdx-old
	}
	return q.loadAvail(0)&availNoInterrupt == 0
}

// Close makes Wait return ErrClosed and Next return nil. No method writes to
// the rings any more. The device's goroutines may hold chains until
// Device.Reset has stopped them. Close may be called again.
func (q *Queue) Close() {
	q.mu.Lock()
	q.closed.Store(true)
	q.mu.Unlock()
	// It fails only when the transport has closed the eventfd, which has woken
	// Wait already.
	_ = q.kick.Signal()
}
