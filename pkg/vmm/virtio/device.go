// Package virtio holds what every virtio device shares: the interface to its
// transport and the split virtqueue.
//
// The specification is "Virtual I/O Device (VIRTIO) Version 1.2",
// https://docs.oasis-open.org/virtio/virtio/v1.2/virtio-v1.2.html. Section
// numbers in comments are its.
package virtio

import "github.com/microvm-runtime/microvm/pkg/vmm/memory"

// Device types, section 5.
const (
	TypeNet     = 1
	TypeBlock   = 2
	TypeConsole = 3
	TypeRNG     = 4
	TypeBalloon = 5
	TypeVsock   = 19
	TypeMem     = 24
	TypeFS      = 26
	TypePmem    = 27
)

// Feature bits that belong to rings and transports, section 6.
const (
	FeatureIndirectDesc = 1 << 28
	FeatureEventIdx     = 1 << 29
	FeatureVersion1     = 1 << 32
)

// Device is a virtio device as its transport drives it. The transport calls
// the methods from vCPU threads, one at a time: never two concurrently for the
// same device.
type Device interface {
	// Type is the virtio device id, one of the Type constants.
	Type() uint16

	// Features are the device-specific feature bits offered to the driver. The
	// transport adds VERSION_1, INDIRECT_DESC and EVENT_IDX.
	Features() uint64

	// QueueSizes gives the largest size of each virtqueue, by index; each is a
	// power of two.
	QueueSizes() []uint16

	// ReadConfig fills p from the device configuration at offset. Bytes past
	// the configuration's end read as zero. The guest chooses offset.
	ReadConfig(offset uint64, p []byte)

	// WriteConfig writes p to the device configuration at offset; what is not
	// writable is ignored. The guest chooses offset and p.
	WriteConfig(offset uint64, p []byte)

	// Activate is called when the driver sets DRIVER_OK: the device starts to
	// serve its queues, in goroutines of its own. On error the transport sets
	// DEVICE_NEEDS_RESET.
	Activate(Activation) error

	// Reset stops what Activate started and returns when no goroutine touches
	// guest memory or the queues any more. The transport closes the queues
	// before (so that Queue.Wait returns ErrClosed). Reset without Activate
	// does nothing. Activate may follow.
	Reset()
}

// Activation is what a device gets from its transport when it is activated.
type Activation struct {
	// Features are the feature bits the driver accepted.
	Features uint64
	// Memory is the guest's memory.
	Memory *memory.Memory
	// Queues has an entry for each of QueueSizes; nil where the driver did not
	// enable the queue.
	Queues []*Queue
	// ConfigChanged raises the configuration change interrupt. It may be
	// called from any goroutine until Reset returns.
	ConfigChanged func()
	// Fail is called, from any goroutine, when the driver broke the rules so
	// that a queue cannot go on (a bad ring, not a bad request). The transport
	// sets DEVICE_NEEDS_RESET (section 2.1.2), tells the driver and logs err
	// once. The device stops serving that queue.
	Fail func(err error)
}
