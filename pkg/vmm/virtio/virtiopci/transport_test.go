package virtiopci

import (
	"bytes"
	"encoding/binary"
	"errors"
	"log/slog"
	"slices"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/eventfd"
	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/pci"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
)

// fakeDevice has two queues and eight bytes of configuration.
type fakeDevice struct {
	t          testing.TB
	config     [8]byte
	activation *virtio.Activation
	refuse     error
	resets     int
}

const (
	deviceFeature = 1 << 5
	queueMax      = 64
)

func (d *fakeDevice) Type() uint16         { return virtio.TypeFS }
func (d *fakeDevice) Features() uint64     { return deviceFeature }
func (d *fakeDevice) QueueSizes() []uint16 { return []uint16{queueMax, 128} }

func (d *fakeDevice) ReadConfig(offset uint64, p []byte) {
	clear(p)
	if offset < uint64(len(d.config)) {
		copy(p, d.config[offset:])
	}
}

func (d *fakeDevice) WriteConfig(offset uint64, p []byte) {
	if offset < uint64(len(d.config)) {
		copy(d.config[offset:], p)
	}
}

func (d *fakeDevice) Activate(a virtio.Activation) error {
	if d.activation != nil {
		d.t.Error("activated twice without a reset")
	}
	if d.refuse != nil {
		return d.refuse
	}
	d.activation = &a
	return nil
}

func (d *fakeDevice) Reset() {
	d.resets++
	if d.activation == nil {
		return
	}
	for _, q := range d.activation.Queues {
		// The transport closes the queues first: a device's goroutines end.
		if q != nil && !errors.Is(q.Wait(), virtio.ErrClosed) {
			d.t.Error("a queue is open during Reset")
		}
	}
	d.activation = nil
}

// machine is what the transport sits in, and the driver's side of it.
type machine struct {
	t         testing.TB
	device    *fakeDevice
	transport *Transport
	bus       *pci.Bus
	ecam      []byte
	function  uint64 // where ours is in ecam
	base      uint64 // of the BAR
	doorbells map[uint64]*eventfd.EventFD
	refuse    error // what AssignDoorbell answers
	messages  []uint32
	log       bytes.Buffer
}

const windowStart = 0xd0000000

func newMachine(t testing.TB) *machine {
	t.Helper()
	return newMachineIn(t, make([]byte, pci.ECAMSize))
}

func newMachineIn(t testing.TB, ecam []byte) *machine {
	t.Helper()
	m := &machine{t: t, ecam: ecam, device: &fakeDevice{t: t}, doorbells: map[uint64]*eventfd.EventFD{}}
	var mem memory.Memory
	if err := mem.Add(memory.Region{Bytes: make([]byte, 0x10000)}); err != nil {
		t.Fatal(err)
	}
	var err error
	m.transport, err = New(Config{
		Device:  m.device,
		Memory:  &mem,
		SendMSI: func(_ uint64, data uint32) { m.messages = append(m.messages, data) },
		AssignDoorbell: func(addr uint64, kick *eventfd.EventFD) error {
			if m.refuse != nil {
				return m.refuse
			}
			if m.doorbells[addr] != nil {
				t.Errorf("two doorbells at %#x", addr)
			}
			m.doorbells[addr] = kick
			return nil
		},
		DeassignDoorbell: func(addr uint64, kick *eventfd.EventFD) error {
			if m.doorbells[addr] != kick {
				t.Errorf("doorbell at %#x is another", addr)
			}
			delete(m.doorbells, addr)
			return nil
		},
		Log: slog.New(slog.NewTextHandler(&m.log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.transport.Reset)
	m.bus, err = pci.NewBus(pci.Window{Start: windowStart, Size: 0x100000}, m.ecam)
	if err != nil {
		t.Fatal(err)
	}
	addr, err := m.bus.Add(m.transport.Function())
	if err != nil {
		t.Fatal(err)
	}
	m.function, m.base = uint64(addr.Device)<<15, windowStart
	m.config(4, 2, 2) // memory decoding on
	return m
}

func (m *machine) config(offset uint64, n int, v uint32) {
	m.bus.WriteConfig(m.function+offset, binary.LittleEndian.AppendUint32(nil, v)[:n])
}

func (m *machine) config32(offset uint64) uint32 {
	return binary.LittleEndian.Uint32(m.ecam[m.function+offset:])
}

func (m *machine) write(offset uint64, n int, v uint64) {
	m.t.Helper()
	if !m.bus.WriteMMIO(m.base+offset, binary.LittleEndian.AppendUint64(nil, v)[:n]) {
		m.t.Fatalf("write at BAR offset %#x was not answered", offset)
	}
}

func (m *machine) read(offset uint64, n int) uint64 {
	m.t.Helper()
	p := make([]byte, 8)
	if !m.bus.ReadMMIO(m.base+offset, p[:n]) {
		m.t.Fatalf("read at BAR offset %#x was not answered", offset)
	}
	return binary.LittleEndian.Uint64(p)
}

func (m *machine) status() uint8 { return uint8(m.read(offStatus, 1)) }

func (m *machine) setFeatures(features uint64) {
	for half := range uint64(2) {
		m.write(offDriverFeatureSelect, 4, half)
		m.write(offDriverFeature, 4, features>>(32*half)&0xffffffff)
	}
}

// negotiate takes the device to FEATURES_OK.
func (m *machine) negotiate(features uint64) {
	m.write(offStatus, 1, 0)
	m.write(offStatus, 1, statusAcknowledge)
	m.write(offStatus, 1, statusAcknowledge|statusDriver)
	m.setFeatures(features)
	m.write(offStatus, 1, statusAcknowledge|statusDriver|statusFeaturesOK)
}

func (m *machine) setQueue(index uint64, size, desc, driver, device uint64) {
	m.write(offQueueSelect, 2, index)
	m.write(offQueueSize, 2, size)
	m.write(offQueueDesc, 4, desc)
	m.write(offQueueDesc+4, 4, desc>>32)
	m.write(offQueueDriver, 4, driver)
	m.write(offQueueDriver+4, 4, driver>>32)
	m.write(offQueueDevice, 8, device)
	m.write(offQueueVector, 2, index+1)
	m.write(offQueueEnable, 2, 1)
}

const ready = statusAcknowledge | statusDriver | statusFeaturesOK | statusDriverOK

// start takes the device to DRIVER_OK with both queues and MSI-X on.
func (m *machine) start() {
	m.negotiate(virtio.FeatureVersion1 | virtio.FeatureEventIdx)
	m.enableMSIX()
	m.write(offConfigVector, 2, 0)
	m.setQueue(0, 16, 0x1000, 0x2000, 0x3000)
	m.setQueue(1, 128, 0x4000, 0x5000, 0x6000)
	m.write(offStatus, 1, ready)
}

func (m *machine) enableMSIX() {
	m.t.Helper()
	for at := uint64(m.config32(0x34) & 0xff); at != 0; at = uint64(m.config32(at) >> 8 & 0xff) {
		if m.config32(at)&0xff == 0x11 {
			m.config(at+2, 2, 0x8000)
		}
	}
	for vector := range uint64(3) {
		m.write(tableOffset+16*vector, 8, 0xfee00000)
		m.write(tableOffset+16*vector+8, 8, 0x40+vector)
	}
}

// TestCapabilities finds the structures the way a driver does: section 4.1.4.
func TestCapabilities(t *testing.T) {
	m := newMachine(t)
	if id := m.config32(0); id != 0x1040<<16+virtio.TypeFS<<16+0x1af4 {
		t.Errorf("ids %#x", id)
	}
	found := map[uint32][3]uint32{} // type: bar, offset, length
	for at := uint64(m.config32(0x34) & 0xff); at != 0; at = uint64(m.config32(at) >> 8 & 0xff) {
		if head := m.config32(at); head&0xff == 9 {
			found[head>>24] = [3]uint32{m.config32(at+4) & 0xff, m.config32(at + 8), m.config32(at + 12)}
			if head>>24 == capNotify && m.config32(at+16) != notifyStride {
				t.Errorf("notify_off_multiplier %d", m.config32(at+16))
			}
			if size := head >> 16 & 0xff; size < 16 || at+uint64(size) > 256 {
				t.Errorf("capability type %d has length %d", head>>24, size)
			}
		}
	}
	for cfgType, want := range map[uint32][3]uint32{
		capCommon: {0, partCommon, commonSize}, capNotify: {0, partNotify, 8}, capISR: {0, partISR, 1},
		capDevice: {0, partDevice, partSize}, capPCI: {0, 0, 0},
	} {
		if found[cfgType] != want {
			t.Errorf("capability type %d: %#x, want %#x", cfgType, found[cfgType], want)
		}
	}
}

func TestInitialization(t *testing.T) {
	m := newMachine(t)
	if m.read(offNumQueues, 2) != 2 {
		t.Errorf("num_queues %d", m.read(offNumQueues, 2))
	}
	var offered uint64
	for half := range uint64(3) {
		m.write(offDeviceFeatureSelect, 4, half)
		offered |= m.read(offDeviceFeature, 4) << (32 * half)
	}
	if want := uint64(deviceFeature | virtio.FeatureVersion1 | virtio.FeatureIndirectDesc | virtio.FeatureEventIdx); offered != want {
		t.Errorf("features %#x, want %#x", offered, want)
	}
	m.start()
	if m.status() != ready || m.device.activation == nil {
		t.Fatalf("status %#x, log:\n%s", m.status(), &m.log)
	}
	a := m.device.activation
	if a.Features != virtio.FeatureVersion1|virtio.FeatureEventIdx || len(a.Queues) != 2 || a.Queues[0].Size() != 16 || a.Queues[1].Size() != 128 {
		t.Errorf("activation %+v", a)
	}
	for i, q := range a.Queues {
		if m.doorbells[windowStart+partNotify+uint64(4*i)] == nil {
			t.Errorf("queue %d has no doorbell", i)
		}
		if err := q.Wait(); err != nil { // the kick the transport gives
			t.Errorf("queue %d: %v", i, err)
		}
	}
	for offset, want := range map[uint64]uint64{offQueueDesc: 0x4000, offQueueDriver: 0x5000, offQueueDevice: 0x6000} {
		if got := m.read(offset, 8); got != want {
			t.Errorf("queue 1 register %#x is %#x", offset, got)
		}
	}
	if m.read(offQueueEnable, 2) != 1 || m.read(offQueueSize, 2) != 128 || m.read(offQueueNotifyOff, 2) != 1 || m.read(offQueueVector, 2) != 2 {
		t.Error("queue 1 does not read back")
	}

	m.write(offStatus, 1, 0)
	if m.status() != 0 || m.device.activation != nil || len(m.doorbells) != 0 {
		t.Errorf("after a reset: status %#x, %d doorbells", m.status(), len(m.doorbells))
	}
	m.write(offQueueSelect, 2, 1)
	if m.read(offQueueEnable, 2) != 0 || m.read(offQueueDesc, 8) != 0 || m.read(offQueueVector, 2) != noVector {
		t.Error("a queue survived the reset")
	}
	m.start()
	if m.device.activation == nil {
		t.Error("no second life after a reset")
	}
}

// TestRemove takes the function off the bus while the device is active.
func TestRemove(t *testing.T) {
	m := newMachine(t)
	m.start()
	resets := m.device.resets
	if err := m.bus.Remove(pci.Address{}); err != nil {
		t.Fatal(err)
	}
	if len(m.doorbells) != 0 || m.device.resets != resets {
		t.Errorf("%d doorbells, %d resets", len(m.doorbells), m.device.resets-resets)
	}
	m.transport.Remove()
	if m.device.activation != nil || m.device.resets != resets+1 {
		t.Error("the device is still active")
	}
	// Accesses of a vCPU that came late.
	p := []byte{1, 2, 3, 4}
	if m.transport.ReadBAR(bar, offStatus, p); !bytes.Equal(p, []byte{0xff, 0xff, 0xff, 0xff}) {
		t.Errorf("read %x", p)
	}
	for _, status := range []byte{0, statusAcknowledge, statusAcknowledge | statusDriver} {
		m.transport.WriteBAR(bar, offStatus, []byte{status})
	}
	m.transport.WriteBAR(bar, partNotify, []byte{0, 0})
	m.transport.WriteBAR(bar, partDevice, []byte{7})
	if m.transport.status != 0 || m.device.config[0] != 0 || m.device.resets != resets+1 {
		t.Errorf("status %#x, configuration %x", m.transport.status, m.device.config)
	}
}

func TestQueueNotEnabled(t *testing.T) {
	m := newMachine(t)
	m.negotiate(virtio.FeatureVersion1)
	m.setQueue(1, 128, 0x4000, 0x5000, 0x6000)
	m.write(offStatus, 1, ready)
	a := m.device.activation
	if a == nil || a.Queues[0] != nil || a.Queues[1] == nil || len(m.doorbells) != 1 {
		t.Fatalf("activation %+v, %d doorbells", a, len(m.doorbells))
	}
	m.write(partNotify, 2, 0) // a kick for a queue that is off
}

func TestActivateFails(t *testing.T) {
	m := newMachine(t)
	m.device.refuse = errors.New("no")
	m.start()
	if m.status() != ready|statusNeedsReset || len(m.doorbells) != 0 {
		t.Errorf("status %#x, %d doorbells", m.status(), len(m.doorbells))
	}
}

func TestInterrupts(t *testing.T) {
	m := newMachine(t)
	m.start()
	a := m.device.activation
	raise := func(i int) { m.transport.raise(&m.transport.queues[i].vector, isrQueue) }
	expect := func(what string, isr uint64, want ...uint32) {
		t.Helper()
		if got := m.read(partISR, 1); !slices.Equal(m.messages, want) || got != isr {
			t.Errorf("%s: messages %#x, ISR %d; want %#x, %d", what, m.messages, got, want, isr)
		}
		m.messages = nil
	}
	raise(0)
	raise(1)
	expect("queues", 0, 0x41, 0x42)
	before := m.read(offConfigGeneration, 1)
	a.ConfigChanged()
	expect("configuration", 0, 0x40)
	if m.read(offConfigGeneration, 1) == before {
		t.Error("the configuration generation stayed")
	}
	for _, v := range []uint64{3, 0x7ff, 0xffff} {
		m.write(offQueueSelect, 2, 1)
		m.write(offQueueVector, 2, v)
		if got := m.read(offQueueVector, 2); got != noVector {
			t.Errorf("vector %#x reads back as %#x", v, got)
		}
		raise(1)
		expect("no vector", 0)
	}
	m.write(offConfigVector, 2, 3)
	if got := m.read(offConfigVector, 2); got != noVector {
		t.Errorf("configuration vector 3 reads back as %#x", got)
	}

	a.Fail(errors.New("the driver broke ring 1"))
	a.Fail(errors.New("and again"))
	if m.status() != ready|statusNeedsReset {
		t.Errorf("status %#x", m.status())
	}
	if n := bytes.Count(m.log.Bytes(), []byte("needs a reset")); n != 1 {
		t.Errorf("failure was logged %d times", n)
	}

	m.write(offStatus, 1, 0)
	m.start()
	for at := uint64(m.config32(0x34) & 0xff); at != 0; at = uint64(m.config32(at) >> 8 & 0xff) {
		if m.config32(at)&0xff == 0x11 {
			m.config(at+2, 2, 0) // MSI-X off
		}
	}
	raise(0)
	m.device.activation.ConfigChanged()
	expect("without MSI-X", isrQueue|isrConfig)
	expect("read once", 0)
}

func TestDeviceConfig(t *testing.T) {
	m := newMachine(t)
	m.write(partDevice+2, 2, 0x1234)
	if got := m.read(partDevice, 8); got != 0x12340000 {
		t.Errorf("configuration reads %#x", got)
	}
	if got := m.read(partDevice+6, 4) | m.read(partDevice+partSize-1, 1); got != 0 {
		t.Errorf("past the configuration: %#x", got)
	}
}

func TestDoorbellsFollowTheBAR(t *testing.T) {
	m := newMachine(t)
	m.start()
	m.config(0x10, 4, windowStart+0x40000)
	m.base = windowStart + 0x40000
	for i := range uint64(2) {
		if m.doorbells[m.base+partNotify+4*i] == nil {
			t.Errorf("doorbell %d stayed behind", i)
		}
	}
	if len(m.doorbells) != 2 {
		t.Errorf("%d doorbells", len(m.doorbells))
	}
	m.config(4, 2, 0)
	if len(m.doorbells) != 0 {
		t.Errorf("%d doorbells with decoding off", len(m.doorbells))
	}
}

// TestDoorbellWithoutIOEventFD has the kicks reach the transport as writes.
func TestDoorbellWithoutIOEventFD(t *testing.T) {
	m := newMachine(t)
	m.refuse = errors.New("no room on the bus")
	m.start()
	q := m.device.activation.Queues[1]
	if err := q.Wait(); err != nil { // the transport's first kick
		t.Fatal(err)
	}
	m.write(partNotify+4, 2, 1)
	if err := q.Wait(); err != nil {
		t.Fatal(err)
	}
	m.write(partNotify+8, 2, 2) // a queue that is not there
	m.read(partNotify, 2)
}

func TestPCIWindow(t *testing.T) {
	m := newMachine(t)
	var at uint64
	for c := uint64(m.config32(0x34) & 0xff); c != 0; c = uint64(m.config32(c) >> 8 & 0xff) {
		if m.config32(c)&0xff == 9 && m.config32(c)>>24 == capPCI {
			at = c
		}
	}
	access := func(bar uint32, offset, length uint32) {
		m.config(at+windowBAR, 1, bar)
		m.config(at+windowOffset, 4, offset)
		m.config(at+windowLength, 4, length)
	}
	access(0, offNumQueues, 2)
	if got := m.config32(at+windowData) & 0xffff; got != 2 {
		t.Errorf("num_queues through the window: %d", got)
	}
	access(0, offStatus, 1)
	m.config(at+windowData, 1, statusAcknowledge)
	if m.status() != statusAcknowledge {
		t.Errorf("status %#x after a write through the window", m.status())
	}
	for _, bad := range [][3]uint32{{1, 0, 4}, {6, 0, 4}, {255, 0, 4}, {0, barSize, 4}, {0, barSize - 2, 4}, {0, 0xffffffff, 1}, {0, 1, 4}, {0, 0, 0}, {0, 0, 3}, {0, 0, 0xffffffff}} {
		access(bad[0], bad[1], bad[2])
		m.config(at+windowData, 4, 0)
		m.config32(at + windowData)
	}
	if m.status() != statusAcknowledge {
		t.Error("a bad access through the window did something")
	}
}

type manyQueues struct {
	fakeDevice
	n int
}

func (d *manyQueues) QueueSizes() []uint16 { return make([]uint16, d.n) }

func TestQueueCount(t *testing.T) {
	for n, ok := range map[int]bool{0: false, 1: true, maxQueues: true, maxQueues + 1: false} {
		if _, err := New(Config{Device: &manyQueues{n: n}}); (err == nil) != ok {
			t.Errorf("%d queues: %v", n, err)
		}
	}
}

// FuzzTransport lets a guest write and read the configuration space and the BAR
// at will; the fake device and the machine check the order of calls.
func FuzzTransport(f *testing.F) {
	start := func(tail ...byte) []byte {
		var b []byte
		add := func(offset uint16, n byte, v uint32) {
			b = append(b, 2, byte(offset>>8), byte(offset), n)
			b = binary.LittleEndian.AppendUint32(b, v)
		}
		add(offStatus, 1, 1)
		add(offStatus, 1, 3)
		add(offDriverFeatureSelect, 4, 1)
		add(offDriverFeature, 4, 1)
		add(offStatus, 1, 11)
		add(offQueueDesc, 4, 0x1000)
		add(offQueueDriver, 4, 0x2000)
		add(offQueueDevice, 4, 0x3000)
		add(offQueueEnable, 2, 1)
		add(offStatus, 1, 15)
		return append(b, tail...)
	}
	f.Add(start())
	f.Add(start(2, 0, offStatus, 1, 0, 0, 0, 0))
	f.Add(start(0, 0, 0x10, 4, 0, 0, 4, 0xd0, 2, 0, offStatus, 1, 15, 0, 0, 0))
	f.Add(start(2, partNotify>>8, 0, 2, 0, 0, 0, 0, 0, 0, 4, 2, 0, 0, 0, 0))
	// A doorbell before the queue is ready, and of a queue that there is not.
	f.Add([]byte{2, partNotify >> 8, 0, 2, 0, 0, 0, 0, 2, partNotify >> 8, 0xff, 1, 0, 0, 0, 0})
	ecam := make([]byte, pci.ECAMSize) // too big to be made each time; NewBus fills what counts
	newMachineIn(f, ecam)
	at := ecam[0x34]
	for ecam[at] != 0x11 { // PCI_CAP_ID_MSIX
		at = ecam[at+1]
	}
	// MSI-X on, masked, pending, and unmasked; a vector that there is not.
	msix := []byte{0, 0, at + 2, 2, 0, 0x80, 0, 0, 2, tableOffset >> 8, 0, 8, 0, 0, 0xe0, 0xfe, 2, tableOffset >> 8, 8, 8, 0x40, 0, 0, 0}
	f.Add(start(append(msix, 3, 0, 0, 0, 0, 0, 0, 0, 2, 0, offConfigVector, 2, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0,
		2, tableOffset>>8, 12, 4, 1, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 1, pbaOffset>>8, 0, 8, 0, 0, 0, 0,
		2, tableOffset>>8, 12, 4, 0, 0, 0, 0, 2, 0, offConfigVector, 2, 0xff, 3, 0, 0, 2, pbaOffset>>8, 0, 8, 0xff, 0, 0, 0)...))
	f.Fuzz(func(t *testing.T, script []byte) {
		m := newMachineIn(t, ecam)
		for ; len(script) >= 8; script = script[8:] {
			offset, n := uint64(script[1])<<8|uint64(script[2]), int(script[3]%9)
			value := append(bytes.Clone(script[4:8]), script[4:8]...)[:n]
			switch script[0] % 4 {
			case 0:
				m.bus.WriteConfig(m.function+offset%256, value)
			case 1:
				m.bus.ReadMMIO(windowStart+offset, value)
			case 2:
				m.bus.WriteMMIO(windowStart+offset, value)
			case 3:
				if a := m.device.activation; a != nil {
					a.ConfigChanged()
				}
			}
			active := 0
			if a := m.device.activation; a != nil {
				for _, q := range a.Queues {
					if q != nil {
						active++
					}
				}
			}
			if len(m.doorbells) > active {
				t.Fatalf("%d doorbells for %d queues", len(m.doorbells), active)
			}
			if m.log.Len() > 300*(1+m.device.resets) {
				t.Fatalf("%d bytes of log in %d resets", m.log.Len(), m.device.resets)
			}
		}
	})
}
