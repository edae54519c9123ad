// Package rng is the virtio entropy device, virtio 1.2 section 5.4.
package rng

import (
	"fmt"
	"io"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
)

// maxRequest caps what one request gets. A driver asks again when it wants
// more (Linux asks for 64 bytes to a page); without the cap a hostile one keeps
// the host busy for 4 GiB with a single descriptor chain.
const maxRequest = 64 << 10

// Device is an entropy source for the guest.
type Device struct {
	source  io.Reader
	serving sync.WaitGroup
}

// New makes a device whose entropy is read from source, straight into guest
// memory and by one goroutine. Use Kernel.
func New(source io.Reader) *Device { return &Device{source: source} }

// Kernel is getrandom(2), as crypto/rand is. That package has a generator for FIPS
// 140 as well, whose 32 MiB of zeroes make the program's data so large that a host
// backs them with huge pages, the first of which is touched.
var Kernel io.Reader = kernel{}

type kernel struct{}

func (kernel) Read(p []byte) (int, error) {
	for {
		n, err := unix.Getrandom(p, 0)
		if err == nil {
			return n, nil
		}
		if err != unix.EINTR {
			return 0, fmt.Errorf("getrandom: %w", err)
		}
	}
}

// Type implements virtio.Device.
func (*Device) Type() uint16 { return virtio.TypeRNG }

// Features implements virtio.Device: there are none.
func (*Device) Features() uint64 { return 0 }

// QueueSizes implements virtio.Device.
func (*Device) QueueSizes() []uint16 { return []uint16{8} }

// ReadConfig implements virtio.Device: there is no configuration.
func (*Device) ReadConfig(_ uint64, p []byte) { clear(p) }

// WriteConfig implements virtio.Device.
func (*Device) WriteConfig(uint64, []byte) {}

// Activate implements virtio.Device.
func (d *Device) Activate(a virtio.Activation) error {
	q := a.Queues[0]
	if q == nil {
		return nil
	}
	d.serving.Go(func() {
		virtio.Serve(q, a.Fail, func(c *virtio.Chain) (uint32, bool) {
			n, err := d.fill(c)
			if err != nil {
				// No driver's fault, but it must not take what is not random
				// for random.
				a.Fail(fmt.Errorf("entropy source: %w", err))
			}
			return n, true
		})
	})
	return nil
}

// fill writes random bytes to the chain and returns how many.
func (d *Device) fill(c *virtio.Chain) (uint32, error) {
	n := 0
	for _, b := range c.Writable {
		b = b[:min(len(b), maxRequest-n)]
		got, err := io.ReadFull(d.source, b)
		n += got
		if err != nil {
			return uint32(n), err
		}
		if n == maxRequest {
			break
		}
	}
	return uint32(n), nil
}

// Reset implements virtio.Device.
func (d *Device) Reset() { d.serving.Wait() }
