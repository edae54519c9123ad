package virtiopci

import (
	"testing"

	"github.com/microvm-runtime/microvm/pkg/internal/fdtest"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
)

// TestKicksOfWhatIsNotReady rings every doorbell, and those of queues that there
// are not, in every state of the device.
func TestKicksOfWhatIsNotReady(t *testing.T) {
	m := newMachine(t)
	kick := func(state string) {
		t.Helper()
		for offset := uint64(partNotify); offset < partNotify+partSize; offset += 2 {
			for _, n := range []int{1, 2, 4, 8} {
				m.write(offset, n, offset)
			}
		}
		if m.device.activation != nil || m.log.Len() > 0 || len(m.messages) > 0 {
			t.Errorf("%s: active %v, %d messages, log %s", state, m.device.activation != nil, len(m.messages), &m.log)
		}
	}
	kick("untouched")
	m.negotiate(virtio.FeatureVersion1)
	kick("negotiated")
	m.setQueue(0, 16, 0x1000, 0x2000, 0x3000)
	kick("queue enabled")
	m.write(offStatus, 1, uint64(m.status())|statusFailed)
	kick("failed")
	m.write(offStatus, 1, 0)
	m.start()
	m.write(offStatus, 1, 0)
	kick("reset")
	m.start()
	if m.device.activation == nil {
		t.Error("not active after all")
	}
}

// TestComesAndGoes activates and resets the device over and over, with queues that
// are good and queues that are nowhere: nothing is left of it but what there is
// once.
func TestComesAndGoes(t *testing.T) {
	m := newMachine(t)
	before := fdtest.Count(t)
	for i := range 300 {
		if i%3 != 0 {
			m.start()
		} else {
			m.negotiate(virtio.FeatureVersion1)
			m.setQueue(0, 16, 0x1000, 0x2000, 0x3000)
			m.setQueue(1, 128, 1<<40, 0x5000, 0x6000) // after one that is good
			m.write(offStatus, 1, ready)
			if m.device.activation != nil || m.status()&statusNeedsReset == 0 {
				t.Fatalf("status %#x with a queue outside memory", m.status())
			}
		}
		m.write(offStatus, 1, 0)
	}
	if n := fdtest.Count(t); n != before || len(m.doorbells) != 0 {
		t.Errorf("%d descriptors, there were %d; %d doorbells", n, before, len(m.doorbells))
	}
}
