package net

import (
	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"golang.org/x/sys/unix"
)

// transmitter serves the transmit queue of a pair: frames of the guest's.
type transmitter struct {
	pair *pair
	gate *ratelimit.Gate
	iov  []unix.Iovec // scratch
}

func newTransmitter(p *pair, q *virtio.Queue, gate *ratelimit.Gate) *transmitter {
	return &transmitter{pair: p, gate: gate, iov: make([]unix.Iovec, 0, q.Size())}
}

// send gives a frame to the tap. What the tap does not take is dropped: EINVAL
// for a header that makes no sense, EIO when the link is down, EBADFD when it is
// gone, EAGAIN when somebody has limited what the tap may have on its way. Under
// a limit it waits: the guest's queue then fills up, and its kernel holds back.
func (t *transmitter) send(c *virtio.Chain) (written uint32, done bool) {
	n := c.ReadableLen()
	if n < headerSize+ethernetHeader || n > maxFrame {
		t.pair.tx.dropped.Add(1)
		return 0, true
	}
	if !t.gate.Take(1, n-headerSize) {
		return 0, true // the device is being reset
	}
	t.iov = appendBuffers(t.iov[:0], c.Readable)
	for {
		switch writev(t.pair.fd, t.iov) {
		case 0:
			t.pair.tx.passed(int(n) - headerSize)
		case unix.EINTR:
			continue
		default:
			t.pair.tx.dropped.Add(1)
		}
		return 0, true
	}
}
