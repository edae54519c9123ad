package net

import (
	"encoding/binary"
	"errors"
	"slices"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"golang.org/x/sys/unix"
)

const (
	// maxSegments is how many pieces readv(2) may have: UIO_MAXIOV, less the one
	// that finds out that a frame was cut.
	maxSegments = 1024 - 1
	// After so many frames or bytes the guest is told.
	rxBatch      = 16
	rxBatchBytes = 64 << 10
)

// receiver serves the receive queue of a pair: frames for the guest.
type receiver struct {
	device        *Device
	pair          *pair
	queue         *virtio.Queue
	fail          func(error)
	configChanged func()
	merge         bool // MRG_RXBUF
	csum          bool // GUEST_CSUM
	// longest is how much room a frame may need, with its header.
	longest int

	// held are the chains taken from the queue for the frames to come, iov their
	// buffers, and room the size of these.
	held    []*virtio.Chain
	iov     []unix.Iovec
	room    int
	written []uint32 // scratch

	// cutVector is a byte of ours after the buffers: a frame that reaches it is
	// longer.
	cutVector unix.Iovec

	receive   func(uintptr) bool // receiveSome, made once
	err       error              // why receiveSome cannot go on
	throttled bool               // receiveSome has found that the limit is reached
}

func newReceiver(d *Device, p *pair, q *virtio.Queue, a virtio.Activation) *receiver {
	r := &receiver{
		device: d, pair: p, queue: q, fail: a.Fail, configChanged: a.ConfigChanged,
		merge:   a.Features&featureMrgRxbuf != 0,
		csum:    a.Features&featureGuestCsum != 0,
		longest: headerSize + ethernetHeader + max(d.mtu, defaultMTU),
		iov:     make([]unix.Iovec, 0, maxSegments+1),

		cutVector: unix.Iovec{Base: new(byte), Len: 1},
	}
	if a.Features&guestGSO != 0 {
		r.longest = maxFrame
	}
	r.receive = r.receiveSome
	return r
}

// serve is the goroutine. It waits for buffers of the guest's or, when there are
// enough, for frames, or until the limit allows another one: never for two of
// them.
func (r *receiver) serve() {
	for {
		enough, err := r.gather()
		if err == nil && !enough {
			r.queue.Flush()
			err = r.queue.Wait()
		}
		if err != nil {
			if !errors.Is(err, virtio.ErrClosed) {
				r.fail(err)
			}
			return
		}
		if !enough {
			continue
		}
		if err := r.pair.waiter.Read(r.receive); err != nil {
			return // a Reset has interrupted it
		}
		if r.throttled {
			// Not in receiveSome, which holds the pair. Frames wait in the tap's
			// queue, like those that the guest has no buffers for.
			r.throttled = false
			if !r.device.rxGate.Await() {
				return // likewise
			}
		}
		if r.err != nil {
			// EBADFD when the link was deleted: nothing will ever come.
			r.device.lost(r.err, r.configChanged)
			return
		}
	}
}

// gather takes buffers from the queue until the longest frame has room. It says
// false when the driver has to give more for that; a kick is coming then. A
// frame is never read before: the tap's own queue holds it back, and who sends
// it notices.
func (r *receiver) gather() (enough bool, err error) {
	for !r.enough() {
		c, err := r.queue.Next()
		if c == nil || err != nil {
			return false, err
		}
		// A chain has as many buffers as the queue descriptors at the most, so
		// that iov has room for one more chain until enough says stop.
		if len(c.Readable) > 0 || c.WritableLen() < headerSize {
			r.device.badBuffers.Do(func() { r.device.log.Warn("the driver of a network device gives useless receive buffers") })
			r.queue.Complete(c, 0)
			continue
		}
		r.held = append(r.held, c)
		r.room += int(c.WritableLen())
		r.iov = appendBuffers(r.iov, c.Writable)
	}
	return true, nil
}

// enough says whether a frame can be read. Without MRG_RXBUF it gets one chain,
// and it is the driver's duty that the longest one fits (section 5.1.6.3.1).
func (r *receiver) enough() bool {
	if !r.merge {
		return len(r.held) > 0
	}
	return r.room >= r.longest || len(r.iov) > maxSegments-queueSize
}

// receiveSome reads frames while there are some and buffers for them. It says
// false to wait for the tap.
func (r *receiver) receiveSome(uintptr) bool {
	r.pair.mu.Lock()
	defer r.pair.mu.Unlock()
	// The guest is told before anybody waits, and not of every small frame.
	defer r.queue.Flush()
	for frames, bytes := 0, 0; frames < rxBatch && bytes < rxBatchBytes; frames++ {
		if r.throttled = !r.device.rxGate.Ready(); r.throttled {
			return true
		}
		switch n, err := readv(r.pair.fd, append(r.iov, r.cutVector)); err {
		case 0:
			r.received(n)
			bytes += n
			// Its length is known only now. What is dropped was work as well.
			r.device.rxGate.Charge(1, uint64(max(n-headerSize, 0)))
		case unix.EAGAIN:
			return false
		case unix.EINTR:
			continue
		case unix.EFAULT, unix.EINVAL:
			// The kernel has dropped the frame: it is too long, or the virtio header
			// has no words for it.
			r.pair.rx.dropped.Add(1)
			r.device.rxGate.Charge(1, 0)
		default:
			r.err = err
			return true
		}
		if enough, err := r.gather(); err != nil || !enough {
			break // serve comes to the same and deals with it
		}
	}
	return true
}

// received gives the guest a frame of n bytes that is in the first buffers.
func (r *receiver) received(n int) {
	if n > r.room || n < headerSize {
		r.pair.rx.dropped.Add(1)
		return
	}
	r.written = r.written[:0]
	segments := 0
	for left := n; left > 0; {
		c := r.held[len(r.written)]
		part := min(left, int(c.WritableLen()))
		r.written = append(r.written, uint32(part))
		segments += len(c.Writable)
		r.room -= int(c.WritableLen())
		left -= part
	}
	used := len(r.written)
	var field [2]byte
	if !r.csum {
		// The kernel says of some frames that their checksum is right, which this
		// driver must not hear (section 5.1.6.4.1).
		r.held[0].CopyOut(field[:1], offFlags)
	}
	binary.LittleEndian.PutUint16(field[:], uint16(used))
	r.held[0].CopyOut(field[:], offNumBuffers)
	r.queue.CompleteAll(r.held[:used], r.written)
	r.held = slices.Delete(r.held, 0, used)
	r.iov = slices.Delete(r.iov, 0, segments)
	r.pair.rx.passed(n - headerSize)
}

// appendBuffers appends the buffers, none of which is empty.
func appendBuffers(iov []unix.Iovec, buffers [][]byte) []unix.Iovec {
	for _, b := range buffers {
		v := unix.Iovec{Base: &b[0]}
		v.SetLen(len(b))
		iov = append(iov, v)
	}
	return iov
}
