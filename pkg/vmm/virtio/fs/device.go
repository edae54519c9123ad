// Package fs is the virtio file system device, section 5.11 of VIRTIO 1.2: it
// shares a directory of the host with the guest, who mounts it by its tag. The
// file server is package passthrough; here are the device and its queues.
package fs

import (
	"encoding/binary"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"unicode/utf8"

	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/passthrough"
)

const (
	// The queues, section 5.11.2. FORGET comes on the first, so that it needs
	// not wait behind requests.
	hiprioQueue     = 0
	firstQueue      = 1
	hiprioQueueSize = 128
	// A request of 256 pages, the largest there is, takes 260 buffers. Linux
	// makes its requests smaller if the queue is.
	requestQueueSize = 1024

	// struct virtio_fs_config, section 5.11.4: char tag[36], le32
	// num_request_queues.
	tagSize    = 36
	configSize = tagSize + 4

	maxQueues = 64
	// Three volumes that hang, with 20 requests each (passthrough.Limits.PerMount),
	// leave some.
	defaultWorkers = 64
)

// Config describes a Device.
type Config struct {
	// Tag is the name the guest mounts the share by, 1 to 36 bytes.
	Tag string
	// Root is the directory to share; O_PATH suffices. It stays the caller's.
	// The share follows what is mounted below it, at any time, in the mount
	// namespace in which it was opened.
	Root *os.File
	// ReadOnly makes everything that changes the share fail with EROFS.
	ReadOnly bool
	// ProcSelfFD is a descriptor of this process's /proc/self/fd, for a process
	// that cannot open that path. It stays the caller's.
	ProcSelfFD *os.File
	// Uncached makes the guest ask for attributes and names each time. Else it
	// may see changes that others make up to passthrough.DefaultTimeout late.
	Uncached bool
	// Queues is the number of request queues, 1 if zero. Linux uses one for
	// each of its CPUs, at most.
	Queues int
	// Workers is the number of goroutines that serve each request queue, 64 if
	// zero: as many requests may be blocked in the host's file system at a time.
	Workers int
	// Limits bounds what the guest can make the server hold.
	Limits passthrough.Limits
	// Limit is passthrough.Config's.
	Limit *ratelimit.Limiter
	// Log gets a bounded number of lines about what no honest driver sends. May
	// be nil.
	Log *slog.Logger
}

// Device is a virtio file system device.
type Device struct {
	server  *passthrough.Server
	config  [configSize]byte
	queues  int
	workers int

	running sync.WaitGroup // of the queues since Activate
}

// New makes a device. Close releases it.
func New(c Config) (*Device, error) {
	if c.Queues == 0 {
		c.Queues = 1
	}
	if c.Workers == 0 {
		c.Workers = defaultWorkers
	}
	switch {
	case c.Tag == "" || len(c.Tag) > tagSize || !utf8.ValidString(c.Tag):
		return nil, fmt.Errorf("virtio-fs tag %q is not 1 to %d bytes of UTF-8", c.Tag, tagSize)
	case c.Queues < 1 || c.Queues > maxQueues:
		return nil, fmt.Errorf("virtio-fs with %d request queues", c.Queues)
	case c.Workers < 1:
		return nil, fmt.Errorf("virtio-fs with %d workers", c.Workers)
	}
	for _, b := range []byte(c.Tag) {
		if b == 0 || b == '\n' { // the first ends it, Linux refuses the other
			return nil, fmt.Errorf("virtio-fs tag %q has a control character", c.Tag)
		}
	}
	share := passthrough.Config{
		Root: c.Root, ProcSelfFD: c.ProcSelfFD, ReadOnly: c.ReadOnly,
		AttrTimeout: passthrough.DefaultTimeout, EntryTimeout: passthrough.DefaultTimeout,
		Limits: c.Limits, Limit: c.Limit, Log: c.Log,
	}
	if c.Uncached {
		share.AttrTimeout, share.EntryTimeout = 0, 0
	}
	server, err := passthrough.New(share)
	if err != nil {
		return nil, fmt.Errorf("virtio-fs %q: %w", c.Tag, err)
	}
	d := &Device{server: server, queues: c.Queues, workers: c.Workers}
	copy(d.config[:tagSize], c.Tag)
	binary.LittleEndian.PutUint32(d.config[tagSize:], uint32(c.Queues))
	return d, nil
}

// Close releases what the device holds. It must be reset, or never activated,
// and must not be used after.
func (d *Device) Close() { d.server.Close() }

// Type implements virtio.Device.
func (d *Device) Type() uint16 { return virtio.TypeFS }

// Features implements virtio.Device. Linux has no driver for the one there is,
// NOTIFICATION.
func (d *Device) Features() uint64 { return 0 }

// QueueSizes implements virtio.Device.
func (d *Device) QueueSizes() []uint16 {
	sizes := []uint16{hiprioQueue: hiprioQueueSize}
	for range d.queues {
		sizes = append(sizes, requestQueueSize)
	}
	return sizes
}

// ReadConfig implements virtio.Device.
func (d *Device) ReadConfig(offset uint64, p []byte) {
	clear(p)
	if offset < configSize {
		copy(p, d.config[offset:])
	}
}

// WriteConfig implements virtio.Device; nothing is writable.
func (d *Device) WriteConfig(uint64, []byte) {}

// Activate implements virtio.Device.
func (d *Device) Activate(a virtio.Activation) error {
	for i, q := range a.Queues {
		if q == nil {
			continue
		}
		workers := d.workers
		if i < firstQueue {
			workers = 1
		}
		arrive := func(c *virtio.Chain) { c.Ticket = d.server.Arrive(c.Readable) }
		handle := func(c *virtio.Chain) (written uint32, done bool) {
			return d.server.Handle(c.Ticket, c.Readable, c.Writable, func(written uint32) {
				q.Complete(c, written)
				q.Flush()
			})
		}
		d.running.Go(func() { virtio.ServeConcurrently(q, workers, a.Fail, arrive, handle) })
	}
	return nil
}

// Reset implements virtio.Device. It takes as long as the host's file system
// needs for the requests that are being served.
func (d *Device) Reset() {
	d.server.Cancel()
	d.running.Wait()
	d.server.Reset()
}
