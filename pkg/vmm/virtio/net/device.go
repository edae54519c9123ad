// Package net is the virtio network device, virtio 1.2 section 5.1, over the
// queues of a tap device of the host.
//
// The headers that carry checksum and segmentation offloads are the same on
// both sides, and the kernel copies each frame straight between the tap and the
// guest's buffers: no byte of a frame is looked at here. What a guest writes
// into a header the kernel judges, as it does for any program with a tap.
package net

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"

	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
)

// Feature bits, section 5.1.3; those of UDP segmentation are in section 5.1.3 of
// version 1.3.
const (
	featureCsum      = 1 << 0
	featureGuestCsum = 1 << 1
	featureMTU       = 1 << 3
	featureMAC       = 1 << 5
	featureGuestTSO4 = 1 << 7
	featureGuestTSO6 = 1 << 8
	featureGuestECN  = 1 << 9
	featureHostTSO4  = 1 << 11
	featureHostTSO6  = 1 << 12
	featureHostECN   = 1 << 13
	featureMrgRxbuf  = 1 << 15
	featureStatus    = 1 << 16
	featureCtrlVQ    = 1 << 17
	featureMQ        = 1 << 22
	featureGuestUSO4 = 1 << 54
	featureGuestUSO6 = 1 << 55
	featureHostUSO   = 1 << 56

	// guestGSO are those with which the guest gets frames longer than its MTU.
	guestGSO = featureGuestTSO4 | featureGuestTSO6 | featureGuestUSO4 | featureGuestUSO6
)

const (
	queueSize        = 256
	controlQueueSize = 64

	// headerSize is that of struct virtio_net_hdr, section 5.1.6, whose last
	// field is le16 num_buffers.
	headerSize     = 12
	offFlags       = 0
	offNumBuffers  = 10
	ethernetHeader = 14
	defaultMTU     = 1500

	// maxFrame is the longest frame with its header: section 5.1.6.3.1 has 65550
	// bytes for one that is to be segmented.
	maxFrame = 65550 + headerSize

	// Of an MTU, in bytes: what IPv4 needs, and what a tap can have
	// (drivers/net/tun.c, MAX_MTU less the Ethernet header).
	minMTU = 68
	maxMTU = 65535 - ethernetHeader

	// MaxQueuePairs is the greatest number of queue pairs.
	MaxQueuePairs = 32
)

// tapChanges bounds how often a guest has a queue of its tap attached or detached, or
// the tap's offloads changed, over the life of the device: each takes a lock of the
// host's kernel that all its networks share (drivers/net/tun.c, rtnl_lock). A driver
// that is bound makes 63 changes at the most.
var tapChanges = ratelimit.Limits{Operations: ratelimit.Rate{PerSecond: 4, Burst: 1024}}

// Config describes a network device.
type Config struct {
	// Taps are the queues of one tap device, one for each queue pair: opened with
	// IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, with IFF_MULTI_QUEUE if there are
	// several. They stay the caller's, who may close them when New returns: the
	// device has copies.
	Taps []*os.File
	// MAC is the guest's address.
	MAC [6]byte
	// MTU is the one the guest is told, in bytes; zero tells it none.
	MTU int
	// RXLimit and TXLimit are what the guest may receive and send, with all NICs
	// that share them; nil is no limit.
	RXLimit, TXLimit *ratelimit.Limiter
	// Log gets a line when the host takes the tap away, and one when the driver
	// gives useless buffers, each once; nil drops them.
	Log *slog.Logger
}

// Counters are of one direction. Dropped frames are those that the tap refused,
// or that fit no buffer of the guest's.
type Counters struct {
	// Bytes are counted without the virtio header.
	Packets, Bytes, Dropped uint64
}

// Stats are a device's counters since it was made: what the guest received and
// what it sent.
type Stats struct{ RX, TX Counters }

// Device is a network device. Stats may be called from any goroutine, the
// methods of virtio.Device as that interface says.
type Device struct {
	log      *slog.Logger
	mac      [6]byte
	mtu      int
	features uint64
	pairs    []*pair
	offloads int         // as the tap has them; Activate's own
	gone     atomic.Bool // the tap is: the link is down

	rxGate, txGate *ratelimit.Gate
	changes        *ratelimit.Gate // see tapChanges; it is asked, but not waited for

	badBuffers, tapGone sync.Once // to log

	serving sync.WaitGroup
}

// New checks the taps and makes the device. All queues of a multi-queue tap must
// be attached. Close gives back what New took.
func New(c Config) (_ *Device, err error) {
	if len(c.Taps) < 1 || len(c.Taps) > MaxQueuePairs {
		return nil, fmt.Errorf("network device with %d queue pairs: 1 to %d are possible", len(c.Taps), MaxQueuePairs)
	}
	if c.MTU != 0 && (c.MTU < minMTU || c.MTU > maxMTU) {
		return nil, fmt.Errorf("network device with an MTU of %d bytes: %d to %d are possible", c.MTU, minMTU, maxMTU)
	}
	if c.MAC[0]&1 != 0 || c.MAC == [6]byte{} {
		return nil, fmt.Errorf("network device with the address %x, which is no host's", c.MAC)
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	changes, err := ratelimit.New(tapChanges, ratelimit.SystemClock)
	if err != nil {
		return nil, err
	}
	d := &Device{
		log: c.Log, mac: c.MAC, mtu: c.MTU,
		rxGate: c.RXLimit.NewGate(), txGate: c.TXLimit.NewGate(), changes: changes.NewGate(),
	}
	d.features = featureCsum | featureGuestCsum | featureMAC | featureStatus | featureMrgRxbuf | featureCtrlVQ |
		featureGuestTSO4 | featureGuestTSO6 | featureGuestECN | featureHostTSO4 | featureHostTSO6 | featureHostECN
	if c.MTU != 0 {
		d.features |= featureMTU
	}
	if len(c.Taps) > 1 {
		d.features |= featureMQ
	}
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	for i, file := range c.Taps {
		p, err := newPair(file, len(c.Taps) > 1)
		if err != nil {
			return nil, fmt.Errorf("network device, tap queue %d: %w", i, err)
		}
		d.pairs = append(d.pairs, p)
	}
	// Kernels before 6.2 refuse what they do not know.
	if d.pairs[0].setOffloads(tapOffloads(d.features|guestGSO)) == nil {
		d.features |= featureGuestUSO4 | featureGuestUSO6 | featureHostUSO
	}
	if err := d.pairs[0].setOffloads(0); err != nil {
		return nil, fmt.Errorf("network device: %w", err)
	}
	return d, nil
}

// Close closes the device's copies of the taps, after its last Reset.
func (d *Device) Close() error {
	var errs []error
	for _, p := range d.pairs {
		errs = append(errs, p.close())
	}
	return errors.Join(errs...)
}

// Stats returns the device's counters.
func (d *Device) Stats() Stats {
	var s Stats
	for _, p := range d.pairs {
		p.rx.addTo(&s.RX)
		p.tx.addTo(&s.TX)
	}
	return s
}

// Type implements virtio.Device.
func (*Device) Type() uint16 { return virtio.TypeNet }

// Features implements virtio.Device.
func (d *Device) Features() uint64 { return d.features }

// QueueSizes implements virtio.Device: receiveq1, transmitq1 and so on, then
// controlq. A driver that does not accept MQ takes the third queue for the
// control queue (section 5.1.2).
func (d *Device) QueueSizes() []uint16 {
	var sizes []uint16
	for range d.pairs {
		sizes = append(sizes, queueSize, queueSize)
	}
	return append(sizes, controlQueueSize)
}

// ReadConfig implements virtio.Device: struct virtio_net_config, section 5.1.4.
func (d *Device) ReadConfig(offset uint64, p []byte) {
	const linkUp = 1
	var config [12]byte
	le := binary.LittleEndian
	copy(config[:], d.mac[:])
	if !d.gone.Load() {
		le.PutUint16(config[6:], linkUp)
	}
	le.PutUint16(config[8:], uint16(len(d.pairs)))
	le.PutUint16(config[10:], uint16(d.mtu))
	clear(p)
	if offset < uint64(len(config)) {
		copy(p, config[offset:])
	}
}

// WriteConfig implements virtio.Device. Nothing is writable.
func (*Device) WriteConfig(uint64, []byte) {}

// Activate implements virtio.Device.
func (d *Device) Activate(a virtio.Activation) error {
	pairs, control := 1, 2
	if a.Features&featureMQ != 0 {
		pairs, control = len(d.pairs), 2*len(d.pairs)
	}
	if err := d.setUp(a.Features, d.pairs[:pairs]); err != nil {
		return fmt.Errorf("network device: %w", err)
	}
	d.rxGate.Open()
	d.txGate.Open()
	for i, p := range d.pairs[:pairs] {
		if q := a.Queues[2*i]; q != nil {
			r := newReceiver(d, p, q, a)
			d.serving.Go(r.serve)
		}
		if q := a.Queues[2*i+1]; q != nil {
			t := newTransmitter(p, q, d.txGate)
			d.serving.Go(func() { virtio.Serve(q, a.Fail, t.send) })
		}
	}
	if q := a.Queues[control]; q != nil && a.Features&featureCtrlVQ != 0 {
		c := &controller{device: d, activation: a}
		d.serving.Go(func() { virtio.Serve(q, a.Fail, c.handle) })
	}
	return nil
}

// setUp brings the tap in line with what the driver accepted.
func (d *Device) setUp(features uint64, pairs []*pair) error {
	for _, p := range pairs {
		if err := p.interrupt(false); err != nil {
			return err
		}
	}
	if d.gone.Load() {
		return nil // the receivers see it again, and the guest that the link is down
	}
	if offloads := tapOffloads(features); offloads != d.offloads {
		if !d.changes.Ready() { // frames would come of which the driver has not been told
			return errors.New("its driver has changed the tap's offloads too often")
		}
		d.changes.Charge(1, 0)
		if err := d.pairs[0].setOffloads(offloads); err != nil {
			return err
		}
		d.offloads = offloads
	}
	if !d.changes.Ready() {
		return nil // it goes on with those that it had
	}
	// One queue pair until the driver asks for more (section 5.1.6.5.6).
	return d.usePairs(1)
}

// Reset implements virtio.Device.
func (d *Device) Reset() {
	d.rxGate.Close()
	d.txGate.Close()
	for _, p := range d.pairs {
		_ = p.interrupt(true) // fails only when nobody can wait either
	}
	d.serving.Wait()
}

// usePairs has the tap deliver frames to its first n queues only.
func (d *Device) usePairs(n int) error {
	var errs []error
	for i, p := range d.pairs { // those to be attached first, lest there be none
		changed, err := p.attach(i < n)
		if changed {
			d.changes.Charge(1, 0)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// lost is told that the tap is not there any more.
func (d *Device) lost(err error, configChanged func()) {
	d.tapGone.Do(func() { d.log.Error("a network device has lost its tap", "error", err) })
	if !d.gone.Swap(true) {
		configChanged()
	}
}
