// Package balloon is the virtio memory balloon device, virtio 1.2 section 5.5.
// It is there for free page reporting: the guest tells which pages it has freed,
// and their memory goes back to the host. Memory is never asked for through the
// balloon itself, whose queues are there because every driver wants them; a
// sandbox grows and shrinks by virtio-mem.
package balloon

import (
	"encoding/binary"
	"log/slog"
	"sync"

	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
)

// Feature bits, section 5.5.3. Neither MUST_TELL_HOST nor PAGE_POISON is there:
// a page that comes back reads as zero, and the guest may use it at once.
const (
	featureDeflateOnOOM = 1 << 2
	featureReporting    = 1 << 5
)

// Queues. The specification numbers reportingq 4, after two queues whose
// features are not offered here; Linux and QEMU count only the queues that
// exist (Linux, drivers/virtio/virtio_pci_common.c, vp_find_vqs_msix), and so
// does a later version of the specification.
const (
	inflateQueue = iota
	deflateQueue
	reportingQueue
	numQueues
)

// queueSize: Linux reports up to 32 ranges in a chain (PAGE_REPORTING_CAPACITY)
// and uses no smaller queue.
const queueSize = 128

// The configuration, section 5.5.4: le32 num_pages, actual, and two fields of
// features that are not offered. Only actual is the driver's to write.
const (
	configSize   = 16
	configActual = 4
)

const (
	pageShift = 12
	// maxPFNs is how many page numbers of a chain are looked at. Linux sends 256
	// (VIRTIO_BALLOON_ARRAY_PFNS_MAX); a chain can have a billion.
	maxPFNs = 4096
)

// Device is a balloon.
type Device struct {
	log     *slog.Logger
	serving sync.WaitGroup
	failed  sync.Once // to give memory back

	mu     sync.Mutex // protects config
	config [configSize]byte
}

// New makes a balloon that asks for nothing. That memory cannot be given back is
// written to log, once.
func New(log *slog.Logger) *Device { return &Device{log: log} }

// Type implements virtio.Device.
func (*Device) Type() uint16 { return virtio.TypeBalloon }

// Features implements virtio.Device.
func (*Device) Features() uint64 { return featureDeflateOnOOM | featureReporting }

// QueueSizes implements virtio.Device.
func (*Device) QueueSizes() []uint16 {
	sizes := make([]uint16, numQueues)
	for i := range sizes {
		sizes[i] = queueSize
	}
	return sizes
}

// ReadConfig implements virtio.Device.
func (d *Device) ReadConfig(offset uint64, p []byte) {
	clear(p)
	if offset < configSize {
		d.mu.Lock()
		defer d.mu.Unlock()
		copy(p, d.config[offset:])
	}
}

// WriteConfig implements virtio.Device: actual is the driver's word for the
// balloon's size, and nobody's business.
func (d *Device) WriteConfig(offset uint64, p []byte) {
	if offset >= configActual && offset < configActual+4 {
		d.mu.Lock()
		defer d.mu.Unlock()
		copy(d.config[offset:configActual+4], p)
	}
}

// Activate implements virtio.Device.
func (d *Device) Activate(a virtio.Activation) error {
	for i, handle := range [numQueues]func(*virtio.Chain){
		inflateQueue:   func(c *virtio.Chain) { d.inflate(a.Memory, c) },
		deflateQueue:   func(*virtio.Chain) {}, // the pages come back as they are touched
		reportingQueue: d.report,
	} {
		q := a.Queues[i]
		if q == nil || i == reportingQueue && a.Features&featureReporting == 0 {
			continue
		}
		d.serving.Go(func() {
			virtio.Serve(q, a.Fail, func(c *virtio.Chain) (uint32, bool) {
				handle(c)
				return 0, true
			})
		})
	}
	return nil
}

// inflate takes the pages that the chain names, le32 numbers of pages of 4 KiB
// (section 5.5.6). A number outside guest memory is passed over.
func (d *Device) inflate(m *memory.Memory, c *virtio.Chain) {
	var numbers [4 * 256]byte
	for off := uint64(0); off < 4*maxPFNs; off += uint64(len(numbers)) {
		n := c.CopyIn(numbers[:], off) / 4
		for pfn := range n {
			addr := memory.GuestAddress(binary.LittleEndian.Uint32(numbers[4*pfn:])) << pageShift
			if page, err := m.Slice(addr, 1<<pageShift); err == nil {
				d.discard(page)
			}
		}
		if 4*n < len(numbers) {
			return
		}
	}
}

// report takes the pages of the chain's buffers (section 5.5.6.7). They are free
// and the driver keeps them so until the chain is completed. Whatever else
// it hands in, or has another device write to meanwhile, is the guest's own
// memory and loss.
func (d *Device) report(c *virtio.Chain) {
	for _, b := range c.Writable {
		d.discard(b)
	}
}

func (d *Device) discard(b []byte) {
	if err := memory.Discard(b); err != nil {
		d.failed.Do(func() { d.log.Warn("memory that the guest has freed stays with it", "error", err) })
	}
}

// Reset implements virtio.Device. The balloon is empty then (section 5.5.5).
func (d *Device) Reset() {
	d.serving.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.config[:])
}
