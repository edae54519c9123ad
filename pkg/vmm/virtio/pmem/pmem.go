// Package pmem is the virtio persistent memory device, virtio 1.2 section 5.19.
// The memory itself is a KVM slot that the machine maps; the device tells the
// driver where it is, and makes writes to it durable on request.
package pmem

import (
	"encoding/binary"
	"sync"

	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
)

// The only request and the two answers, section 5.19.6. All are le32.
const (
	requestFlush = 0

	responseOK  = 0
	responseEIO = 1
)

// Device announces one range of persistent memory.
type Device struct {
	config  [16]byte // le64 start, le64 size
	flush   func() error
	serving sync.WaitGroup
}

// New makes a device for the size bytes that the machine put at start. A
// driver's flush request calls flush, which returns when everything written to
// the range is on stable storage (msync); calls do not overlap. When the guest
// cannot write to the range, flush is nil and a flush has nothing to do.
func New(start memory.GuestAddress, size uint64, flush func() error) *Device {
	if flush == nil {
		flush = func() error { return nil }
	}
	d := &Device{flush: flush}
	binary.LittleEndian.PutUint64(d.config[:8], uint64(start))
	binary.LittleEndian.PutUint64(d.config[8:], size)
	return d
}

// Type implements virtio.Device.
func (*Device) Type() uint16 { return virtio.TypePmem }

// Features implements virtio.Device. SHMEM_REGION is not offered: the range is
// in the configuration.
func (*Device) Features() uint64 { return 0 }

// QueueSizes implements virtio.Device.
func (*Device) QueueSizes() []uint16 { return []uint16{64} }

// ReadConfig implements virtio.Device.
func (d *Device) ReadConfig(offset uint64, p []byte) {
	clear(p)
	if offset < uint64(len(d.config)) {
		copy(p, d.config[offset:])
	}
}

// WriteConfig implements virtio.Device: nothing is writable.
func (*Device) WriteConfig(uint64, []byte) {}

// Activate implements virtio.Device.
func (d *Device) Activate(a virtio.Activation) error {
	if q := a.Queues[0]; q != nil {
		d.serving.Go(func() { virtio.Serve(q, a.Fail, d.handle) })
	}
	return nil
}

func (d *Device) handle(c *virtio.Chain) (uint32, bool) {
	var request, response [4]byte
	status := uint32(responseEIO)
	if c.CopyIn(request[:], 0) == len(request) && binary.LittleEndian.Uint32(request[:]) == requestFlush && d.flush() == nil {
		status = responseOK
	}
	binary.LittleEndian.PutUint32(response[:], status)
	return uint32(c.CopyOut(response[:], 0)), true
}

// Reset implements virtio.Device. It waits for a flush that is under way.
func (d *Device) Reset() { d.serving.Wait() }
