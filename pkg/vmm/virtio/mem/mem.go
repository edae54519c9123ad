// Package mem is the virtio memory device, virtio 1.2 section 5.15: a region of
// guest memory of which the host says how much it wants to be plugged, and the
// guest which blocks.
package mem

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
)

// featureUnpluggedInaccessible: the driver must not touch what is not plugged,
// section 5.15.3. A driver that does not promise it is not served: there is
// nothing where a block is unplugged.
const featureUnpluggedInaccessible = 1 << 1

// Requests and answers, section 5.15.6. All fields are little endian.
const (
	requestPlug      = 0
	requestUnplug    = 1
	requestUnplugAll = 2
	requestState     = 3

	requestSize = 24 // le16 type at 0, le64 addr at 8, le16 nb_blocks at 16

	responseACK   = 0
	responseNACK  = 1 // not now: the requested size says otherwise
	responseBusy  = 2 // try again later
	responseError = 3

	statePlugged   = 0
	stateUnplugged = 1
	stateMixed     = 2

	responseSize = 10 // le16 type at 0, le16 state at 8
)

// The configuration, section 5.15.4. The driver writes none of it.
const (
	configBlockSize  = 0 // le64; then le16 node_id and padding
	configAddr       = 16
	configRegionSize = 24
	configUsableSize = 32
	configPlugged    = 40
	configRequested  = 48
	configSize       = 56
)

// Config describes the region, and what plugging means.
type Config struct {
	// Start is where the region is in guest memory, a multiple of the block size.
	Start memory.GuestAddress
	// Blocks are the region's. The device counts by them and leaves it to Plug
	// and Unplug to set them.
	Blocks *memory.Blocks
	// Plug gives the guest n blocks that it does not have, from first on: all of
	// them or, with an error, none. Unplug takes n that it has; on an error it has
	// taken none. Both are called by one goroutine, which is not a vCPU's.
	Plug, Unplug func(first, n int) error
	// Log takes what Plug and Unplug fail with. A guest can make them fail, so
	// it has to be limited in rate.
	Log *slog.Logger
}

// Device is a virtio memory device.
type Device struct {
	c         Config
	blockSize uint64
	size      uint64 // of the region
	serving   sync.WaitGroup

	mu        sync.Mutex
	plugged   uint64 // bytes
	requested uint64 // bytes
	// configChanged is set while the device is active.
	configChanged func()
}

// New makes a device without a plugged block. The region must be aligned.
func New(c Config) (*Device, error) {
	d := &Device{c: c, blockSize: c.Blocks.Size()}
	d.size = d.blockSize * uint64(c.Blocks.Count())
	if d.blockSize&(d.blockSize-1) != 0 || uint64(c.Start)%d.blockSize != 0 {
		return nil, fmt.Errorf("hot-plugged memory at %#x in blocks of %#x bytes: not aligned", uint64(c.Start), d.blockSize)
	}
	return d, nil
}

// ErrSize says that a size is not to be had.
var ErrSize = errors.New("not a size that hot-plugged memory can have")

// Request asks the guest to plug or unplug until size bytes are plugged: a
// multiple of the block size, at most the region's. It does not wait for it.
func (d *Device) Request(size uint64) error {
	if size > d.size || size%d.blockSize != 0 {
		return fmt.Errorf("%d bytes of at most %d, in blocks of %d: %w", size, d.size, d.blockSize, ErrSize)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if size == d.requested {
		return nil
	}
	d.requested = size
	if d.configChanged != nil {
		d.configChanged()
	}
	return nil
}

// Plugged is how much the guest has of the region, in bytes.
func (d *Device) Plugged() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.plugged
}

// Type implements virtio.Device.
func (*Device) Type() uint16 { return virtio.TypeMem }

// Features implements virtio.Device. ACPI_PXM is not offered: the machine has
// one NUMA node.
func (*Device) Features() uint64 { return featureUnpluggedInaccessible }

// QueueSizes implements virtio.Device.
func (*Device) QueueSizes() []uint16 { return []uint16{64} }

// ReadConfig implements virtio.Device. All of the region is usable: what is
// requested says enough.
func (d *Device) ReadConfig(offset uint64, p []byte) {
	clear(p)
	if offset >= configSize {
		return
	}
	var b [configSize]byte
	d.mu.Lock()
	for _, field := range []struct {
		offset int
		value  uint64
	}{
		{configBlockSize, d.blockSize},
		{configAddr, uint64(d.c.Start)},
		{configRegionSize, d.size},
		{configUsableSize, d.size},
		{configPlugged, d.plugged},
		{configRequested, d.requested},
	} {
		binary.LittleEndian.PutUint64(b[field.offset:], field.value)
	}
	d.mu.Unlock()
	copy(p, b[offset:])
}

// WriteConfig implements virtio.Device: nothing is writable.
func (*Device) WriteConfig(uint64, []byte) {}

// Activate implements virtio.Device.
func (d *Device) Activate(a virtio.Activation) error {
	if a.Features&featureUnpluggedInaccessible == 0 {
		return errors.New("the driver does not promise to leave unplugged memory alone")
	}
	d.mu.Lock()
	d.configChanged = a.ConfigChanged
	d.mu.Unlock()
	if q := a.Queues[0]; q != nil {
		d.serving.Go(func() { virtio.Serve(q, a.Fail, d.serve) })
	}
	return nil
}

// Reset implements virtio.Device. What is plugged stays so (section 5.15.5):
// a driver that finds it begins by unplugging all.
func (d *Device) Reset() {
	d.mu.Lock()
	d.configChanged = nil
	d.mu.Unlock()
	d.serving.Wait()
}

func (d *Device) serve(c *virtio.Chain) (uint32, bool) {
	var request [requestSize]byte
	var response [responseSize]byte
	status, state := uint16(responseError), uint16(0)
	if c.CopyIn(request[:], 0) == len(request) {
		status, state = d.handle(request)
	}
	binary.LittleEndian.PutUint16(response[:], status)
	binary.LittleEndian.PutUint16(response[8:], state)
	return uint32(c.CopyOut(response[:], 0)), true
}

// handle does a request, of which nobody else has a copy.
func (d *Device) handle(request [requestSize]byte) (status, state uint16) {
	kind := binary.LittleEndian.Uint16(request[:])
	if kind == requestUnplugAll {
		return d.unplugAll(), 0
	}
	first, n, ok := d.blocks(binary.LittleEndian.Uint64(request[8:]), binary.LittleEndian.Uint16(request[16:]))
	if !ok {
		return responseError, 0
	}
	plugged := d.c.Blocks.Plugged(first, n)
	switch kind {
	case requestPlug:
		if plugged > 0 {
			return responseError, 0
		}
		return d.plug(first, n), 0
	case requestUnplug:
		if plugged < n {
			return responseError, 0
		}
		return d.unplug(first, n), 0
	case requestState:
		switch plugged {
		case n:
			state = statePlugged
		case 0:
			state = stateUnplugged
		default:
			state = stateMixed
		}
		return responseACK, state
	}
	return responseError, 0
}

// blocks checks the range of a request: aligned, not empty, inside the region.
func (d *Device) blocks(addr uint64, count uint16) (first, n int, ok bool) {
	off := addr - uint64(d.c.Start)
	if addr < uint64(d.c.Start) || off >= d.size || off%d.blockSize != 0 {
		return 0, 0, false
	}
	first, n = int(off/d.blockSize), int(count)
	return first, n, n > 0 && n <= d.c.Blocks.Count()-first
}

// plug never gives the guest more than was requested. What is requested may
// shrink meanwhile; the driver then hears of it and unplugs.
func (d *Device) plug(first, n int) uint16 {
	size := uint64(n) * d.blockSize
	d.mu.Lock()
	fits := d.plugged <= d.requested && size <= d.requested-d.plugged
	d.mu.Unlock()
	if !fits {
		return responseNACK
	}
	if err := d.c.Plug(first, n); err != nil {
		d.c.Log.Warn("memory cannot be plugged", "blocks", n, "error", err)
		return responseBusy
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.plugged += size
	return responseACK
}

func (d *Device) unplug(first, n int) uint16 {
	if err := d.c.Unplug(first, n); err != nil {
		d.c.Log.Warn("memory cannot be unplugged", "blocks", n, "error", err)
		return responseBusy
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.plugged -= uint64(n) * d.blockSize
	return responseACK
}

// unplugAll takes every block, run by run.
func (d *Device) unplugAll() uint16 {
	for first := 0; first < d.c.Blocks.Count(); {
		n := 0
		for first+n < d.c.Blocks.Count() && d.c.Blocks.Plugged(first+n, 1) == 1 {
			n++
		}
		if n > 0 {
			if status := d.unplug(first, n); status != responseACK {
				return status
			}
		}
		first += n + 1
	}
	return responseACK
}
