// Package vsock is the virtio socket device, section 5.10 of VIRTIO 1.2, in
// user space: a guest's stream sockets of the AF_VSOCK family are connected to
// Unix sockets of the VMM. Its peer is Linux's net/vmw_vsock.
//
// Each connection is one end of a socketpair. Two goroutines move the data:
// one serves the tx queue and writes what the guest sends to the sockets; the
// other, the pump, reads the sockets into the buffers of the rx queue and sends
// the control packets. The kernel copies in both directions; only what a slow
// reader on the host leaves in its socket is copied by us, into a backlog that
// the credit given to the guest bounds.
package vsock

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"golang.org/x/sys/unix"
)

// The virtqueues, section 5.10.2. Linux fills the whole rx queue with buffers
// of a page, so that its size costs guest memory. It puts 8 buffers on the
// event queue.
const (
	rxQueue = iota
	txQueue
	eventQueue
	numQueues

	dataQueueSize  = 128
	eventQueueSize = 8
)

const (
	defaultGuestCID       = 3
	defaultMaxConnections = 1024

	// dialTimeout is how long the guest may take to answer a Dial. Its kernel
	// answers on its own, without the program that listens.
	dialTimeout = 30 * time.Second

	// shutdownTimeout is how long the guest may take to confirm that a
	// connection which the host closed is gone: Linux's VSOCK_CLOSE_TIMEOUT.
	shutdownTimeout = 8 * time.Second
)

// Errors of Dial, beside those of its context. A refused connection is
// unix.ECONNREFUSED, and one that a reset of the device ended unix.ECONNRESET.
var (
	// ErrNotReady says that the guest has no driver for the device (yet).
	ErrNotReady = errors.New("the guest has not activated its vsock device")
	// ErrTooManyConnections says that Config.MaxConnections exist.
	ErrTooManyConnections = errors.New("too many vsock connections")
	// ErrNoAnswer says that the guest did not answer in time.
	ErrNoAnswer = errors.New("the guest did not answer")
)

// Config describes a Device.
type Config struct {
	// GuestCID is the guest's context id, 3 if zero. It is local to this
	// device: two virtual machines may have the same.
	GuestCID uint64
	// MaxConnections is the largest number of connections at a time, in both
	// directions together; 1024 if zero. Each may hold up to 256 KiB of memory
	// while its reader on the host is slow, and two buffers of the kernel's.
	MaxConnections int
	// Accept is asked, in a goroutine of its own, when the guest connects to a
	// port of the host. It returns a connected AF_UNIX stream socket, which is
	// the device's from then on, or an error: the guest's connect(2) fails with
	// ECONNRESET. The number of concurrent calls is bounded by MaxConnections.
	// Nil refuses every port.
	Accept func(port uint32) (*os.File, error)
	// Log gets a bounded number of lines about packets that no honest driver
	// sends, and about refused connections. May be nil.
	Log *slog.Logger
}

// Device is a virtio socket device. Dial may be called from any goroutine, the
// methods of virtio.Device as that interface says.
type Device struct {
	config                       Config
	dialTimeout, shutdownTimeout time.Duration // lowered by tests
	complaints                   atomic.Uint64 // that were to be logged

	mu  sync.Mutex
	mux *mux // nil while the driver has not activated the device
}

// New makes a device.
func New(c Config) *Device {
	if c.GuestCID == 0 {
		c.GuestCID = defaultGuestCID
	}
	if c.MaxConnections == 0 {
		c.MaxConnections = defaultMaxConnections
	}
	if c.Accept == nil {
		c.Accept = func(uint32) (*os.File, error) { return nil, errors.New("no port is open") }
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Device{config: c, dialTimeout: dialTimeout, shutdownTimeout: shutdownTimeout}
}

// Dial connects to a port of the guest. It returns one end of a connected pair
// of AF_UNIX stream sockets, which is the caller's; the file is in blocking
// mode. Half-closing it with shutdown(2) half-closes the guest's socket.
func (d *Device) Dial(ctx context.Context, port uint32) (*os.File, error) {
	f, err := d.dial(ctx, port)
	if err != nil {
		return nil, fmt.Errorf("connecting to vsock port %d of the guest: %w", port, err)
	}
	return f, nil
}

func (d *Device) dial(ctx context.Context, port uint32) (*os.File, error) {
	d.mu.Lock()
	m := d.mux
	d.mu.Unlock()
	if m == nil {
		return nil, ErrNotReady
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	peer := os.NewFile(uintptr(pair[1]), "vsock")
	if err := m.dial(ctx, port, pair[0], d.dialTimeout); err != nil {
		peer.Close()
		return nil, err
	}
	return peer, nil
}

// Type is part of virtio.Device.
func (d *Device) Type() uint16 { return virtio.TypeVsock }

// Features is part of virtio.Device. VIRTIO_VSOCK_F_SEQPACKET is not offered.
// Without it, and without VIRTIO_VSOCK_F_STREAM, streams are what there is
// (section 5.10.3).
func (d *Device) Features() uint64 { return 0 }

// QueueSizes is part of virtio.Device.
func (d *Device) QueueSizes() []uint16 {
	return []uint16{rxQueue: dataQueueSize, txQueue: dataQueueSize, eventQueue: eventQueueSize}
}

// ReadConfig is part of virtio.Device. The configuration is le64 guest_cid,
// section 5.10.4.
func (d *Device) ReadConfig(offset uint64, p []byte) {
	clear(p)
	var config [8]byte
	binary.LittleEndian.PutUint64(config[:], d.config.GuestCID)
	if offset < uint64(len(config)) {
		copy(p, config[offset:])
	}
}

// WriteConfig is part of virtio.Device. Nothing is writable.
func (d *Device) WriteConfig(uint64, []byte) {}

// Activate is part of virtio.Device. The event queue is left alone: its one
// event, VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, is for machines that were moved.
func (d *Device) Activate(a virtio.Activation) error {
	if len(a.Queues) != numQueues || a.Queues[rxQueue] == nil || a.Queues[txQueue] == nil {
		return errors.New("vsock: the driver enabled no rx or no tx queue")
	}
	m, err := startMux(d, a)
	if err != nil {
		return fmt.Errorf("vsock: %w", err)
	}
	d.mu.Lock()
	d.mux = m
	d.mu.Unlock()
	return nil
}

// Reset is part of virtio.Device. It closes every connection.
func (d *Device) Reset() {
	d.mu.Lock()
	m := d.mux
	d.mux = nil
	d.mu.Unlock()
	if m != nil {
		m.stop()
	}
}
