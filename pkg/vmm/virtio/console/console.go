// Package console is the virtio console, virtio 1.2 section 5.3: one port,
// output only.
//
// A guest writes as fast as it likes, and the reader of its console may be slow
// or stuck. Linux's hvc driver waits for the device with interrupts off and a
// spinlock held (__send_to_port in drivers/char/virtio_console.c), so back
// pressure would hang the guest's CPUs whenever nobody reads. The device
// therefore always takes the output at once, into a buffer of fixed size, and
// another goroutine writes it out. When the buffer is full, the oldest output
// is dropped, so that the last lines of a dying guest survive, and a line in
// the output says how much is missing.
package console

import (
	"context"
	"io"
	"sync"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
)

const (
	receiveQueue  = 0
	transmitQueue = 1
)

// Device is the guest's console.
type Device struct {
	out     *buffer
	serving sync.WaitGroup
}

// New makes a console whose output is written to out. The device writes from
// one goroutine of its own and expects that Write may block for ever; after the
// first error it writes no more. Close ends the goroutine.
func New(out io.Writer) *Device {
	d := &Device{out: newBuffer()}
	go d.out.drain(out)
	return d
}

// Close waits until everything the guest has written so far is written out, or
// out failed, or ctx is done; then nothing more is. It returns ctx's error or
// that of out. Call it when the guest has stopped.
func (d *Device) Close(ctx context.Context) error { return d.out.close(ctx) }

// Type implements virtio.Device.
func (*Device) Type() uint16 { return virtio.TypeConsole }

// Features implements virtio.Device: no size, no multiport, no emergency write.
func (*Device) Features() uint64 { return 0 }

// QueueSizes implements virtio.Device. Linux fills the receive queue with a
// page for each entry, which is memory lost to the guest: it is small.
func (*Device) QueueSizes() []uint16 { return []uint16{receiveQueue: 4, transmitQueue: 64} }

// ReadConfig implements virtio.Device: without features no field is valid.
func (*Device) ReadConfig(_ uint64, p []byte) { clear(p) }

// WriteConfig implements virtio.Device.
func (*Device) WriteConfig(uint64, []byte) {}

// Activate implements virtio.Device. The receive queue is left alone: there is
// no input.
func (d *Device) Activate(a virtio.Activation) error {
	if q := a.Queues[transmitQueue]; q != nil {
		d.serving.Go(func() {
			virtio.Serve(q, a.Fail, func(c *virtio.Chain) (uint32, bool) {
				d.out.append(c)
				return 0, true
			})
		})
	}
	return nil
}

// Reset implements virtio.Device. Output that the device has taken is still
// written out.
func (d *Device) Reset() { d.serving.Wait() }
