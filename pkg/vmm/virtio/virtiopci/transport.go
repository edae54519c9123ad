package virtiopci

import (
	"encoding/binary"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/microvm-runtime/microvm/pkg/vmm/eventfd"
	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/pci"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
)

// Config is what a Transport needs of the machine.
type Config struct {
	Device virtio.Device
	Memory *memory.Memory
	// SendMSI delivers an interrupt message. It is called from any goroutine.
	SendMSI func(addr uint64, data uint32)
	// AssignDoorbell has any write to the guest physical address signal kick
	// instead of reaching WriteBAR; DeassignDoorbell takes that back. When
	// AssignDoorbell fails, writes go on reaching WriteBAR, which is slower.
	AssignDoorbell   func(addr uint64, kick *eventfd.EventFD) error
	DeassignDoorbell func(addr uint64, kick *eventfd.EventFD) error
	// Log takes what a guest may cause: it bounds its own rate.
	Log *slog.Logger
}

// Transport makes a virtio device a PCI function.
type Transport struct {
	Config
	function *pci.Function
	msix     *pci.MSIX
	features uint64 // offered

	// What the device's goroutines use without mu: Reset waits for them with mu
	// held.
	configVector     atomic.Uint32
	configGeneration atomic.Uint32
	isr              atomic.Uint32
	needsReset       atomic.Bool

	mu                  sync.Mutex // protects what follows and serialises the calls of Device
	status              uint8
	deviceFeatureSelect uint32
	driverFeatureSelect uint32
	driverFeatures      uint64
	queueSelect         uint16
	queues              []*queue
	barAddr             uint64 // where the BAR is mapped, 0: nowhere
	removed             bool
}

// queue is what the driver set up for a virtqueue and, once the device is
// active, the queue itself.
type queue struct {
	index                uint16
	max                  uint16
	size                 uint16
	enabled              bool
	desc, driver, device uint64
	vector               atomic.Uint32

	kick     *eventfd.EventFD // nil: not active
	queue    *virtio.Queue
	doorbell uint64 // where kick is assigned, 0: nowhere
}

// New makes the transport of a device; Function is what goes on the bus.
func New(c Config) (*Transport, error) {
	t := &Transport{
		Config:   c,
		features: c.Device.Features() | virtio.FeatureVersion1 | virtio.FeatureIndirectDesc | virtio.FeatureEventIdx,
	}
	sizes := c.Device.QueueSizes()
	if len(sizes) == 0 || len(sizes) > maxQueues {
		return nil, fmt.Errorf("virtio device of type %d has %d queues: 1 to %d are possible", c.Device.Type(), len(sizes), maxQueues)
	}
	for i, size := range sizes {
		t.queues = append(t.queues, &queue{index: uint16(i), max: size})
	}
	t.clear()

	f := pci.NewFunction(identity(c.Device.Type()), t)
	t.function = f
	if err := f.AddBAR(bar, barSize); err != nil {
		return nil, err
	}
	for _, body := range [][]byte{
		capability(capCommon, partCommon, commonSize),
		capability(capNotify, partNotify, uint32(notifyStride*len(sizes)), notifyStride, 0, 0, 0),
		capability(capISR, partISR, 1),
		capability(capDevice, partDevice, partSize),
	} {
		if _, err := f.AddCapability(pci.CapVendor, body); err != nil {
			return nil, err
		}
	}
	if err := f.AddWritableCapability(pci.CapVendor, capability(capPCI, 0, 0, 0, 0, 0, 0), windowBAR, t.windowWritten); err != nil {
		return nil, err
	}
	var err error
	t.msix, err = f.AddMSIX(len(sizes)+1, bar, tableOffset, pbaOffset, c.SendMSI)
	if err != nil {
		return nil, err
	}
	return t, nil
}

// Function is the device's PCI function.
func (t *Transport) Function() *pci.Function { return t.function }

// Reset stops the device, as the driver would. When it has returned, no
// goroutine of the device's touches guest memory.
func (t *Transport) Reset() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.reset()
}

// Remove is Reset for a device whose function was taken off the bus: what a
// driver that came too late writes has no effect.
func (t *Transport) Remove() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.removed = true
	t.reset()
}

// MapBAR is called when the driver moves the BAR: the doorbells move too.
func (t *Transport) MapBAR(_ int, addr uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.barAddr = addr
	for _, q := range t.queues {
		t.placeDoorbell(q)
	}
}

// placeDoorbell assigns the queue's doorbell where it belongs now.
func (t *Transport) placeDoorbell(q *queue) {
	var want uint64
	if t.barAddr != 0 && q.kick != nil {
		want = t.barAddr + partNotify + notifyStride*uint64(q.index)
	}
	if want == q.doorbell {
		return
	}
	if q.doorbell != 0 {
		if err := t.DeassignDoorbell(q.doorbell, q.kick); err != nil {
			t.Log.Error("doorbell stays assigned", "queue", q.index, "error", err)
		}
		q.doorbell = 0
	}
	if want != 0 {
		if err := t.AssignDoorbell(want, q.kick); err != nil {
			t.Log.Warn("doorbell has to exit", "queue", q.index, "error", err)
			return
		}
		q.doorbell = want
	}
}

// ReadBAR is an access of the driver's.
func (t *Transport) ReadBAR(_ int, offset uint64, p []byte) {
	clear(p)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.removed {
		for i := range p {
			p[i] = 0xff // as from where nothing is
		}
		return
	}
	part, offset := offset&^(partSize-1), offset&(partSize-1)
	switch part {
	case partCommon:
		var b [commonSize]byte
		t.readCommon(&b)
		if offset < commonSize {
			copy(p, b[offset:])
		}
	case partISR:
		if offset == 0 && len(p) > 0 {
			p[0] = byte(t.isr.Swap(0)) // reading it clears it
		}
	case partDevice:
		t.Device.ReadConfig(offset, p)
	}
}

// WriteBAR is an access of the driver's.
func (t *Transport) WriteBAR(_ int, offset uint64, p []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.removed {
		return
	}
	part, offset := offset&^(partSize-1), offset&(partSize-1)
	switch part {
	case partCommon:
		t.writeCommon(offset, p)
	case partDevice:
		t.Device.WriteConfig(offset, p)
	case partNotify:
		if i := offset / notifyStride; i < uint64(len(t.queues)) && t.queues[i].kick != nil {
			if err := t.queues[i].kick.Signal(); err != nil {
				t.Log.Error("doorbell lost", "queue", i, "error", err)
			}
		}
	}
}

// raise sends the vector's interrupt. Without MSI-X there is only the ISR
// status to look at, as the function has no interrupt pin.
func (t *Transport) raise(vector *atomic.Uint32, isr uint32) {
	if !t.msix.Enabled() {
		t.isr.Or(isr)
		return
	}
	if v := vector.Load(); v != noVector {
		t.msix.Trigger(int(v))
	}
}

// configChanged is Activation.ConfigChanged.
func (t *Transport) configChanged() {
	t.configGeneration.Add(1)
	t.raise(&t.configVector, isrConfig)
}

// fail is Activation.Fail, section 2.1.2.
func (t *Transport) fail(err error) {
	if t.needsReset.Swap(true) {
		return
	}
	t.Log.Error("virtio device needs a reset", "error", err)
	t.raise(&t.configVector, isrConfig)
}

// activate starts the device with the queues the driver enabled. Called with
// t.mu held.
func (t *Transport) activate() {
	queues := make([]*virtio.Queue, len(t.queues))
	for i, q := range t.queues {
		if !q.enabled {
			continue
		}
		if err := t.startQueue(q); err != nil {
			t.fail(fmt.Errorf("queue %d: %w", i, err))
			return
		}
		queues[i] = q.queue
	}
	if err := t.Device.Activate(virtio.Activation{
		Features:      t.driverFeatures,
		Memory:        t.Memory,
		Queues:        queues,
		ConfigChanged: t.configChanged,
		Fail:          t.fail,
	}); err != nil {
		t.fail(fmt.Errorf("activate: %w", err))
		return
	}
	for i, q := range t.queues {
		if q.kick == nil {
			continue
		}
		t.placeDoorbell(q)
		// The driver may have kicked before anybody listened.
		if err := q.kick.Signal(); err != nil {
			t.fail(fmt.Errorf("queue %d: first kick: %w", i, err))
		}
	}
}

func (t *Transport) startQueue(q *queue) error {
	kick, err := eventfd.New()
	if err != nil {
		return err
	}
	vq, err := virtio.NewQueue(virtio.QueueConfig{
		Memory:    t.Memory,
		Size:      q.size,
		Desc:      memory.GuestAddress(q.desc),
		Avail:     memory.GuestAddress(q.driver),
		Used:      memory.GuestAddress(q.device),
		Features:  t.driverFeatures,
		Kick:      kick,
		Interrupt: func() { t.raise(&q.vector, isrQueue) },
	})
	if err != nil {
		kick.Close()
		return err
	}
	q.kick, q.queue = kick, vq
	return nil
}

// reset takes the device back to where New left it. Called with t.mu held.
func (t *Transport) reset() {
	for _, q := range t.queues {
		if q.queue != nil {
			q.queue.Close()
		}
	}
	t.Device.Reset()
	for _, q := range t.queues {
		if q.kick == nil {
			continue
		}
		if q.doorbell != 0 {
			if err := t.DeassignDoorbell(q.doorbell, q.kick); err != nil {
				t.Log.Error("doorbell stays assigned", "queue", q.index, "error", err)
			}
		}
		q.kick.Close()
	}
	t.clear()
}

// clear sets every register to its value after a reset.
func (t *Transport) clear() {
	t.status = 0
	t.needsReset.Store(false)
	t.isr.Store(0)
	t.configVector.Store(noVector)
	t.deviceFeatureSelect, t.driverFeatureSelect, t.driverFeatures = 0, 0, 0
	t.queueSelect = 0
	for _, q := range t.queues {
		q.size, q.enabled = q.max, false
		q.desc, q.driver, q.device = 0, 0, 0
		q.vector.Store(noVector)
		q.kick, q.queue, q.doorbell = nil, nil, 0
	}
}

// Offsets in struct virtio_pci_cfg_cap, section 4.1.4.9: a window into the BAR
// for whoever cannot map it. All from the first on are the driver's to write.
const (
	windowBAR    = 4
	windowOffset = 8
	windowLength = 12
	windowData   = 16
)

// windowWritten does what the driver's write to the window asks for and fetches
// what the window shows then. That is how it can be: the driver's reads of
// configuration space do not reach us. So a register that changes by itself
// shows its new value after a write to any of the window's fields.
func (t *Transport) windowWritten(body []byte, offset, n int) {
	length := binary.LittleEndian.Uint32(body[windowLength:])
	at := binary.LittleEndian.Uint32(body[windowOffset:])
	if length != 1 && length != 2 && length != 4 || at%length != 0 {
		return
	}
	bar, data := int(body[windowBAR]), body[windowData:windowData+length]
	if offset+n > windowData {
		t.function.WriteBAR(bar, uint64(at), data)
	}
	t.function.ReadBAR(bar, uint64(at), data)
}
