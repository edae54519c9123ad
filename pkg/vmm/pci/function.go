package pci

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"sync"
)

// Offsets in the type 0 configuration space header: PCI Local Bus Specification
// 3.0, section 6.1.
const (
	offVendorID        = 0x00
	offDeviceID        = 0x02
	offCommand         = 0x04
	offStatus          = 0x06
	offRevision        = 0x08
	offClass           = 0x09
	offBARs            = 0x10
	offSubsystemVendor = 0x2c
	offSubsystem       = 0x2e
	offCapabilities    = 0x34
	headerSize         = 0x40

	// configSize is what a function without PCI Express or PCI-X capability has.
	configSize = 256
	numBARs    = 6

	commandMemory     = 1 << 1
	commandBusMaster  = 1 << 2
	commandINTxOff    = 1 << 10
	statusCapListByte = 1 << 4 // of the status register's low byte
)

// Capability ids: PCI Code and ID Assignment Specification.
const (
	CapVendor = 0x09
	capMSIX   = 0x11
)

// Identity is what a function's header says it is.
type Identity struct {
	Vendor, Device             uint16
	SubsystemVendor, Subsystem uint16
	Class                      uint32 // base class, sub-class, interface: 24 bits
	Revision                   uint8
}

// Handler is the device behind a function. The calls come from vCPU threads,
// concurrently; offsets and lengths are the guest's, but inside the BAR.
type Handler interface {
	ReadBAR(bar int, offset uint64, p []byte)
	WriteBAR(bar int, offset uint64, p []byte)
	// MapBAR says that the BAR is now at addr in guest physical memory, or
	// nowhere (addr 0): the guest moves it and turns its decoding on and off.
	MapBAR(bar int, addr uint64)
}

// CapabilityWritten is told that the guest wrote [offset, offset+n) of a
// capability, counted from its start. body is the whole capability; what is
// stored there the guest reads. It is called with the function locked: it must
// not add or write capabilities.
type CapabilityWritten func(body []byte, offset, n int)

// Function is a PCI function: a type 0 configuration space, memory BARs,
// capabilities and MSI-X. It is put together with the Add methods and then
// handed to a Bus.
type Function struct {
	handler Handler
	msix    *MSIX
	bus     *Bus // set by Bus.Add

	mu sync.Mutex // protects what follows once the function is on a bus
	// config is the configuration space. On a bus it is the guest's own view,
	// see NewBus: the guest reads it at any time, and never writes it.
	config    []byte
	page      []byte // what config is the start of, on a bus
	removed   bool
	writable  [configSize]byte // the bits the guest may change
	bars      [numBARs]bar
	lastCap   int // offset of the last capability's header, 0 when there is none
	nextFree  int // where the next capability goes
	msixCap   int // offset of the MSI-X capability
	written   CapabilityWritten
	hookStart int // the capability that written is for
	hookEnd   int
}

type bar struct {
	size   uint32 // 0: not there
	mapped uint64 // where the bus has it now, 0: nowhere
}

// NewFunction makes a function without BARs and capabilities.
func NewFunction(id Identity, handler Handler) *Function {
	f := &Function{handler: handler, config: make([]byte, configSize), nextFree: headerSize}
	le := binary.LittleEndian
	le.PutUint16(f.config[offVendorID:], id.Vendor)
	le.PutUint16(f.config[offDeviceID:], id.Device)
	f.config[offRevision] = id.Revision
	f.config[offClass] = byte(id.Class)
	f.config[offClass+1] = byte(id.Class >> 8)
	f.config[offClass+2] = byte(id.Class >> 16)
	le.PutUint16(f.config[offSubsystemVendor:], id.SubsystemVendor)
	le.PutUint16(f.config[offSubsystem:], id.Subsystem)
	le.PutUint16(f.writable[offCommand:], commandMemory|commandBusMaster|commandINTxOff)
	return f
}

// AddBAR gives the function a 32-bit, non-prefetchable memory BAR. size is in
// bytes, a power of two and at least 16.
func (f *Function) AddBAR(index int, size uint32) error {
	if index < 0 || index >= numBARs || f.bars[index].size != 0 || size < 16 || bits.OnesCount32(size) != 1 {
		return fmt.Errorf("BAR %d of %#x bytes", index, size)
	}
	f.bars[index].size = size
	binary.LittleEndian.PutUint32(f.writable[offBARs+4*index:], ^(size - 1))
	return nil
}

// AddCapability appends a capability. body is what follows the two bytes of id
// and link. It returns the capability's offset.
func (f *Function) AddCapability(id uint8, body []byte) (int, error) {
	offset := f.nextFree
	if offset+2+len(body) > configSize {
		return 0, fmt.Errorf("no room for capability %#x of %d bytes", id, 2+len(body))
	}
	if f.lastCap == 0 {
		f.config[offCapabilities] = byte(offset)
		f.config[offStatus] |= statusCapListByte
	} else {
		f.config[f.lastCap+1] = byte(offset)
	}
	f.config[offset] = id
	copy(f.config[offset+2:], body)
	f.lastCap = offset
	f.nextFree = (offset + 2 + len(body) + 3) &^ 3 // capabilities are aligned to 4 bytes
	return offset, nil
}

// AddWritableCapability appends a capability whose bytes from firstWritable on
// (counted from the capability's start) the guest may write, and has written
// called after it did. A function has at most one.
func (f *Function) AddWritableCapability(id uint8, body []byte, firstWritable int, written CapabilityWritten) error {
	if f.written != nil {
		return fmt.Errorf("capability %#x: the function has a writable one", id)
	}
	offset, err := f.AddCapability(id, body)
	if err != nil {
		return err
	}
	f.written, f.hookStart, f.hookEnd = written, offset, offset+2+len(body)
	for i := offset + firstWritable; i < f.hookEnd; i++ {
		f.writable[i] = 0xff
	}
	return nil
}

// AddMSIX gives the function MSI-X with its table and pending bits in a BAR,
// which must have been added. send delivers a message; it is called from any
// goroutine.
func (f *Function) AddMSIX(vectors, bar int, table, pending uint32, send func(addr uint64, data uint32)) (*MSIX, error) {
	if vectors < 1 || vectors > maxVectors || f.msix != nil {
		return nil, fmt.Errorf("MSI-X with %d vectors", vectors)
	}
	if bar < 0 || bar >= numBARs || table%8 != 0 || pending%8 != 0 ||
		uint64(table)+uint64(vectors)*entrySize > uint64(f.bars[bar].size) ||
		uint64(pending)+pendingSize(vectors) > uint64(f.bars[bar].size) {
		return nil, fmt.Errorf("MSI-X table at %#x, pending bits at %#x of BAR %d", table, pending, bar)
	}
	body := binary.LittleEndian.AppendUint16(nil, uint16(vectors-1))
	body = binary.LittleEndian.AppendUint32(body, table|uint32(bar))
	body = binary.LittleEndian.AppendUint32(body, pending|uint32(bar))
	offset, err := f.AddCapability(capMSIX, body)
	if err != nil {
		return nil, err
	}
	f.msixCap = offset
	binary.LittleEndian.PutUint16(f.writable[offset+2:], controlEnable|controlMask)
	f.msix = newMSIX(vectors, bar, table, pending, send)
	return f.msix, nil
}

// validAccess says whether an access is one a PCI bus can make: 1, 2 or 4
// bytes, aligned.
func validAccess(offset, n int) bool {
	return (n == 1 || n == 2 || n == 4) && offset%n == 0
}

// writeConfig stores p as far as the guest may, and does what follows from it.
func (f *Function) writeConfig(offset int, p []byte) {
	if !validAccess(offset, len(p)) || offset >= configSize {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.removed {
		return
	}
	for i, v := range p {
		mask := f.writable[offset+i]
		f.config[offset+i] = f.config[offset+i]&^mask | v&mask
	}
	end := offset + len(p)
	if offset < offStatus && end > offCommand || offset < offBARs+4*numBARs && end > offBARs {
		f.mapBARs()
	}
	if f.msix != nil && offset < f.msixCap+4 && end > f.msixCap+2 {
		f.msix.setControl(binary.LittleEndian.Uint16(f.config[f.msixCap+2:]))
	}
	if offset < f.hookEnd && end > f.hookStart {
		f.written(f.config[f.hookStart:f.hookEnd], offset-f.hookStart, len(p))
	}
}

// remove is the function's part of Bus.Remove. It says false when that was done
// before.
func (f *Function) remove() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.removed {
		return false
	}
	f.removed = true
	f.config[offCommand] &^= commandMemory
	f.mapBARs()
	if f.msix != nil {
		f.msix.setControl(0) // no message any more
	}
	f.config = nil // the next function's
	showAbsent(f.page)
	return true
}

// mapBARs brings the bus and the handler in line with the command register and
// the BARs. Called with f.mu held.
func (f *Function) mapBARs() {
	decoding := f.config[offCommand]&commandMemory != 0
	for i := range f.bars {
		b := &f.bars[i]
		if b.size == 0 {
			continue
		}
		var want uint64
		if decoding {
			want = uint64(binary.LittleEndian.Uint32(f.config[offBARs+4*i:]))
		}
		if want == b.mapped {
			continue
		}
		if b.mapped != 0 {
			f.handler.MapBAR(i, 0)
			f.bus.unmap(f, i)
			b.mapped = 0
		}
		if want != 0 && f.bus.mapAt(f, i, want, b.size) {
			b.mapped = want
			f.handler.MapBAR(i, want)
		}
	}
}

// readBAR and writeBAR route an access inside a BAR: to MSI-X or the handler.
func (f *Function) readBAR(bar int, offset uint64, p []byte) {
	if f.msix == nil || !f.msix.read(bar, offset, p) {
		f.handler.ReadBAR(bar, offset, p)
	}
}

func (f *Function) writeBAR(bar int, offset uint64, p []byte) {
	if f.msix == nil || !f.msix.write(bar, offset, p) {
		f.handler.WriteBAR(bar, offset, p)
	}
}

// ReadBAR fills p from a BAR as an access by address would, wherever the BAR is
// mapped; it is for capabilities that are windows into a BAR. What is not wholly
// inside the BAR reads as zero.
func (f *Function) ReadBAR(bar int, offset uint64, p []byte) {
	clear(p)
	if f.inBAR(bar, offset, len(p)) {
		f.readBAR(bar, offset, p)
	}
}

// WriteBAR is the counterpart of ReadBAR; what is not wholly inside the BAR is
// ignored.
func (f *Function) WriteBAR(bar int, offset uint64, p []byte) {
	if f.inBAR(bar, offset, len(p)) {
		f.writeBAR(bar, offset, p)
	}
}

func (f *Function) inBAR(bar int, offset uint64, n int) bool {
	if bar < 0 || bar >= numBARs {
		return false
	}
	size := uint64(f.bars[bar].size)
	return uint64(n) <= size && offset <= size-uint64(n)
}
