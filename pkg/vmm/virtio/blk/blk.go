// Package blk is the virtio block device, virtio 1.2 section 5.2, on a file or
// a block device of the host.
package blk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"

	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
)

// Feature bits, section 5.2.3.
const (
	featureSegMax      = 1 << 2
	featureReadOnly    = 1 << 5
	featureBlkSize     = 1 << 6
	featureFlush       = 1 << 9
	featureTopology    = 1 << 10
	featureDiscard     = 1 << 13
	featureWriteZeroes = 1 << 14
)

const (
	queueSize = 256
	// A request's header and status have descriptors of their own, and no
	// chain is longer than the queue.
	segMax = queueSize - 2
	// workers is how many requests are with the host at the same time.
	workers = 4
	// sectorSize is the unit of every sector number, whatever the block size.
	sectorSize = 512
	// serialSize is the length of the device id, section 5.2.6.
	serialSize = 20
)

// Limits of discard and write zeroes. They bound the work of one request: a
// host file system that cannot punch holes makes a write zeroes a write.
const (
	maxDiscardSectors     = 1 << 30 / sectorSize
	maxDiscardSegments    = 32
	maxWriteZeroesSectors = 32 << 20 / sectorSize
	maxWriteZeroesSegs    = 1
)

// Config describes a block device.
type Config struct {
	// File is a regular file or a block device, open for reading, and for
	// writing unless ReadOnly. It stays the caller's, who closes it after the
	// device's last Reset. Its size is read once. The content is raw: no image
	// format is ever detected.
	File     *os.File
	ReadOnly bool
	// Serial is what the guest finds in /sys/block/vdX/serial: at most 20
	// bytes.
	Serial string
	// Limit is what the disk may do, with all that share it; nil is no limit.
	Limit *ratelimit.Limiter
	// Log gets the host's errors, at most one every ten seconds; nil drops
	// them. The guest sees an I/O error either way.
	Log *slog.Logger
}

// Device is a disk of the guest's.
type Device struct {
	disk     *disk
	readOnly bool
	serial   [serialSize]byte
	config   [60]byte
	serving  sync.WaitGroup
}

// New checks the file and makes the device.
func New(c Config) (*Device, error) {
	if len(c.Serial) > serialSize {
		return nil, fmt.Errorf("block device serial %q is longer than %d bytes", c.Serial, serialSize)
	}
	if c.File == nil {
		return nil, errors.New("block device without a file")
	}
	k, err := openDisk(c.File, c.ReadOnly, c.Log)
	if err != nil {
		return nil, fmt.Errorf("block device %s: %w", c.File.Name(), err)
	}
	k.gate = c.Limit.NewGate()
	d := &Device{disk: k, readOnly: c.ReadOnly}
	copy(d.serial[:], c.Serial)

	// struct virtio_blk_config, section 5.2.4.
	le := binary.LittleEndian
	le.PutUint64(d.config[0:], k.sectors)
	le.PutUint32(d.config[12:], segMax)
	le.PutUint32(d.config[20:], k.blockSize)
	d.config[24], d.config[25] = k.topology.physicalBlockExp, k.topology.alignmentOffset
	le.PutUint16(d.config[26:], k.topology.minIOSize)
	le.PutUint32(d.config[28:], k.topology.optIOSize)
	if !c.ReadOnly {
		le.PutUint32(d.config[36:], maxDiscardSectors)
		le.PutUint32(d.config[40:], maxDiscardSegments)
		le.PutUint32(d.config[44:], k.discardUnit/sectorSize)
		le.PutUint32(d.config[48:], maxWriteZeroesSectors)
		le.PutUint32(d.config[52:], maxWriteZeroesSegs)
		d.config[56] = 1 // write_zeroes_may_unmap
	}
	return d, nil
}

// Type implements virtio.Device.
func (*Device) Type() uint16 { return virtio.TypeBlock }

// Features implements virtio.Device.
func (d *Device) Features() uint64 {
	features := uint64(featureSegMax | featureBlkSize | featureFlush)
	if d.disk.device {
		features |= featureTopology
	}
	if d.readOnly {
		return features | featureReadOnly
	}
	return features | featureDiscard | featureWriteZeroes
}

// QueueSizes implements virtio.Device.
func (*Device) QueueSizes() []uint16 { return []uint16{queueSize} }

// ReadConfig implements virtio.Device.
func (d *Device) ReadConfig(offset uint64, p []byte) {
	clear(p)
	if offset < uint64(len(d.config)) {
		copy(p, d.config[offset:])
	}
}

// WriteConfig implements virtio.Device: CONFIG_WCE is not offered, so nothing
// is writable.
func (*Device) WriteConfig(uint64, []byte) {}

// Activate implements virtio.Device.
func (d *Device) Activate(a virtio.Activation) error {
	q := a.Queues[0]
	if q == nil {
		return nil
	}
	d.disk.gate.Open()
	s := &session{disk: d.disk, readOnly: d.readOnly, serial: d.serial, features: a.Features}
	d.serving.Go(func() { virtio.ServeConcurrently(q, workers, a.Fail, nil, s.handle) })
	return nil
}

// Reset implements virtio.Device. It waits for the requests that are with the
// host; those that wait for their turn under the limit are dropped.
func (d *Device) Reset() {
	d.disk.gate.Close()
	d.serving.Wait()
}
