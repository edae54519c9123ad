package net

import (
	"encoding/binary"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
)

// The control queue, section 5.1.6.5: u8 class, u8 command, the command's data,
// and u8 ack of the device's.
const (
	classMQ    = 4
	mqPairsSet = 0 // le16 virtqueue_pairs, section 5.1.6.5.6

	ackOK    = 0
	ackError = 1
)

// controller serves the control queue.
type controller struct {
	device     *Device
	activation virtio.Activation
}

func (c *controller) handle(chain *virtio.Chain) (written uint32, done bool) {
	if len(chain.Writable) == 0 {
		return 0, true // nowhere to put an ack
	}
	var command [4]byte
	ack := [1]byte{ackError}
	if n := chain.CopyIn(command[:], 0); n == len(command) && command[0] == classMQ && command[1] == mqPairsSet {
		if c.setPairs(int(binary.LittleEndian.Uint16(command[2:]))) {
			ack[0] = ackOK
		}
	}
	return uint32(chain.CopyOut(ack[:], 0)), true
}

// setPairs has the guest use the first n queue pairs.
func (c *controller) setPairs(n int) bool {
	if c.activation.Features&featureMQ == 0 || n < 1 || n > len(c.device.pairs) || !c.device.changes.Ready() {
		return false
	}
	for _, q := range c.activation.Queues[:2*n] {
		if q == nil {
			return false
		}
	}
	if err := c.device.usePairs(n); err != nil {
		c.device.tapGone.Do(func() { c.device.log.Error("a network device cannot use its tap's queues", "error", err) })
		return false
	}
	return true
}
