package pci

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"runtime/debug"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	windowStart = 0xd0000000
	windowSize  = 0x100000
	barSize     = 0x4000
	tableOffset = 0x1000
	pbaOffset   = 0x2000
	vectors     = 3
)

// fakeDevice remembers what its function was asked.
type fakeDevice struct {
	t      testing.TB
	sizes  [numBARs]uint64
	mapped [numBARs]uint64
	writes []string
}

func (d *fakeDevice) check(bar int, offset uint64, n int) {
	if offset+uint64(n) > d.sizes[bar] {
		d.t.Errorf("access to [%#x, +%d) of BAR %d, which has %#x bytes", offset, n, bar, d.sizes[bar])
	}
}

func (d *fakeDevice) ReadBAR(bar int, offset uint64, p []byte) {
	d.check(bar, offset, len(p))
	for i := range p {
		p[i] = byte(offset) + byte(i)
	}
}

func (d *fakeDevice) WriteBAR(bar int, offset uint64, p []byte) {
	d.check(bar, offset, len(p))
	d.writes = append(d.writes, fmt.Sprintf("%d:%#x=%x", bar, offset, p))
}

func (d *fakeDevice) MapBAR(bar int, addr uint64) { d.mapped[bar] = addr }

type message struct {
	addr uint64
	data uint32
}

// host is a bus with one device on it, and the guest's side of it.
type host struct {
	bus  *Bus
	ecam []byte
	dev  *fakeDevice
	fn   *Function
	base uint64 // of the device's ECAM page
	sent []message
}

func newBus(t testing.TB, ecam []byte) *Bus {
	t.Helper()
	bus, err := NewBus(Window{windowStart, windowSize}, ecam)
	if err != nil {
		t.Fatal(err)
	}
	return bus
}

func newHost(t testing.TB) *host {
	t.Helper()
	return newHostIn(t, make([]byte, ECAMSize))
}

func newHostIn(t testing.TB, ecam []byte) *host {
	t.Helper()
	return newHostOn(t, newBus(t, ecam), ecam)
}

func newHostOn(t testing.TB, bus *Bus, ecam []byte) *host {
	t.Helper()
	h := &host{dev: &fakeDevice{t: t}, ecam: ecam, bus: bus}
	h.dev.sizes[0], h.dev.sizes[2] = barSize, 16
	h.fn = NewFunction(Identity{Vendor: 0x1af4, Device: 0x1042, SubsystemVendor: 0x1af4, Subsystem: 0x1100, Class: 0x018000, Revision: 1}, h.dev)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(h.fn.AddBAR(0, barSize))
	must(h.fn.AddBAR(2, 16))
	_, err := h.fn.AddCapability(CapVendor, []byte{16, 1, 2})
	must(err)
	must(h.fn.AddWritableCapability(CapVendor, make([]byte, 14), 4, h.window))
	_, err = h.fn.AddMSIX(vectors, 0, tableOffset, pbaOffset, func(addr uint64, data uint32) {
		h.sent = append(h.sent, message{addr, data})
	})
	must(err)
	addr, err := h.bus.Add(h.fn)
	must(err)
	h.base = uint64(addr.Device) << 15
	return h
}

// window makes bytes 4 to 7 of the capability an offset into BAR 0 and bytes 8
// to 11 the four bytes there.
func (h *host) window(body []byte, offset, n int) {
	at := uint64(binary.LittleEndian.Uint32(body[4:]))
	if offset == 8 && n == 4 {
		h.fn.WriteBAR(0, at, body[8:12])
	}
	h.fn.ReadBAR(0, at, body[8:12])
}

func (h *host) read32(offset uint64) uint32 {
	return binary.LittleEndian.Uint32(h.ecam[h.base+offset:])
}

func (h *host) write(offset uint64, n int, v uint32) {
	p := binary.LittleEndian.AppendUint32(nil, v)
	h.bus.WriteConfig(h.base+offset, p[:n])
}

// capability returns the offset of the nth capability with the id.
func (h *host) capability(t *testing.T, id uint8, n int) uint64 {
	t.Helper()
	for at, seen := uint64(h.read32(0x34)&0xff), 0; at != 0 && seen < 64; seen++ {
		head := h.read32(at)
		if uint8(head) == id {
			if n == 0 {
				return at
			}
			n--
		}
		at = uint64(head >> 8 & 0xff)
	}
	t.Fatalf("no capability %#x", id)
	return 0
}

func TestHeader(t *testing.T) {
	h := newHost(t)
	for offset, want := range map[uint64]uint32{
		0x00: 0x10421af4, 0x04: 0x00100000, 0x08: 0x01800001, 0x0c: 0, 0x10: windowStart, 0x14: 0,
		0x18: windowStart + barSize, 0x2c: 0x11001af4, 0x30: 0, 0x3c: 0, 0x100: 0, 0xffc: 0,
	} {
		if got := h.read32(offset); got != want {
			t.Errorf("register %#x is %#x, want %#x", offset, got, want)
		}
	}
	h.write(0x00, 4, 0xdeadbeef)
	h.write(0x08, 4, 0xdeadbeef)
	if h.read32(0) != 0x10421af4 || h.read32(8) != 0x01800001 {
		t.Error("a read-only register was written")
	}
	h.write(0x04, 2, 0xffff)
	if got := h.read32(4) & 0xffff; got != 0x406 {
		t.Errorf("command register is %#x after all ones", got)
	}
}

func TestAbsent(t *testing.T) {
	h := newHost(t)
	for _, offset := range []uint64{1 << 15, 1<<15 | 0xffc, 31 << 15} {
		h.bus.WriteConfig(offset, make([]byte, 4))
		if got := h.ecam[offset : offset+4]; !bytes.Equal(got, []byte{0xff, 0xff, 0xff, 0xff}) {
			t.Errorf("absent function at %#x reads %x", offset, got)
		}
	}
	for _, offset := range []uint64{1 << 12, 7<<12 | 4, ECAMSize, ECAMSize - 1, 1 << 40} {
		h.bus.WriteConfig(offset, []byte{1, 2, 3, 4})
	}
	if h.ecam[1<<12] != 0 || h.ecam[7<<12|4] != 0 {
		t.Error("function 1 or 7 was written")
	}
	if h.bus.ReadMMIO(windowStart, make([]byte, 4)) {
		t.Error("a BAR answers before its decoding is on")
	}
	if _, err := NewBus(Window{}, make([]byte, 4096)); err == nil {
		t.Error("a short configuration space was accepted")
	}
}

func TestOddWrites(t *testing.T) {
	h := newHost(t)
	before := bytes.Clone(h.ecam)
	for _, tc := range []struct{ offset, n int }{{5, 2}, {0x11, 4}, {0x10, 3}, {0x10, 8}, {4, 0}, {255, 4}, {254, 4}, {256, 4}, {4092, 4}} {
		h.bus.WriteConfig(h.base+uint64(tc.offset), bytes.Repeat([]byte{0xee}, tc.n))
		if !bytes.Equal(h.ecam, before) {
			t.Errorf("%d bytes at %#x were written", tc.n, tc.offset)
		}
	}
}

func TestBARSizing(t *testing.T) {
	h := newHost(t)
	h.write(0x10, 4, 0xffffffff)
	if got := h.read32(0x10); got != ^uint32(barSize-1) {
		t.Errorf("BAR 0 says %#x", got)
	}
	h.write(0x14, 4, 0xffffffff)
	if got := h.read32(0x14); got != 0 {
		t.Errorf("BAR 1, which does not exist, says %#x", got)
	}
}

func TestBARMoves(t *testing.T) {
	h := newHost(t)
	reads := func(addr uint64) bool { return h.bus.ReadMMIO(addr, make([]byte, 4)) }
	expect := func(what string, mapped uint64) {
		t.Helper()
		if h.dev.mapped[0] != mapped || mapped != 0 && !reads(mapped) {
			t.Errorf("%s: BAR 0 is at %#x, want %#x", what, h.dev.mapped[0], mapped)
		}
	}
	h.write(4, 2, commandMemory)
	expect("decoding on", windowStart)
	h.write(0x10, 4, windowStart+0x80000)
	expect("moved", windowStart+0x80000)
	if reads(windowStart) {
		t.Error("the old place still answers")
	}
	h.write(0x10, 4, 0xffffffff) // sizing with decoding on
	expect("past the window", 0)
	h.write(0x10, 4, 0)
	expect("at zero", 0)
	h.write(0x10, 4, windowStart+barSize&^(barSize-1))
	expect("over BAR 2", 0)
	h.write(0x10, 4, windowStart-barSize)
	expect("before the window", 0)
	h.write(0x12, 2, windowStart>>16)
	h.write(0x10, 1, 0xff)
	h.write(0x11, 1, 0)
	expect("written in parts", windowStart)
	h.write(4, 2, 0)
	expect("decoding off", 0)
}

func TestBARAccess(t *testing.T) {
	h := newHost(t)
	h.write(4, 2, commandMemory)
	p := make([]byte, 2)
	if !h.bus.ReadMMIO(windowStart+0x10, p) || !bytes.Equal(p, []byte{0x10, 0x11}) {
		t.Errorf("read %x", p)
	}
	if !h.bus.WriteMMIO(windowStart+barSize+8, []byte{1, 2}) || !slices.Equal(h.dev.writes, []string{"2:0x8=0102"}) {
		t.Errorf("writes: %q", h.dev.writes)
	}
	for _, addr := range []uint64{windowStart + barSize - 1, windowStart + barSize + 15, windowStart - 1, 0} {
		if h.bus.ReadMMIO(addr, make([]byte, 2)) || h.bus.WriteMMIO(addr, make([]byte, 2)) {
			t.Errorf("an access at %#x was answered", addr)
		}
	}
}

func TestWritableCapability(t *testing.T) {
	h := newHost(t)
	at := h.capability(t, CapVendor, 1)
	h.write(at+4, 4, 0x20)
	if got := h.read32(at + 8); got != 0x23222120 {
		t.Errorf("the window reads %#x", got)
	}
	h.write(at+8, 4, 0x04030201)
	if !slices.Equal(h.dev.writes, []string{"0:0x20=01020304"}) {
		t.Errorf("writes: %q", h.dev.writes)
	}
	h.write(at+4, 4, barSize-2) // over the BAR's end
	if got := h.read32(at + 8); got != 0 {
		t.Errorf("outside the BAR the window reads %#x", got)
	}
}

func TestMSIX(t *testing.T) {
	h := newHost(t)
	h.write(4, 2, commandMemory)
	cap := h.capability(t, capMSIX, 0)
	if got := h.read32(cap) >> 16; got != vectors-1 {
		t.Fatalf("message control %#x", got)
	}
	if h.read32(cap+4) != tableOffset || h.read32(cap+8) != pbaOffset {
		t.Fatal("table or pending bits are elsewhere")
	}
	const table = windowStart + tableOffset
	store := func(addr uint64, v ...byte) {
		t.Helper()
		if !h.bus.WriteMMIO(addr, v) {
			t.Fatalf("write at %#x was not answered", addr)
		}
	}
	pending := func() uint64 {
		p := make([]byte, 8)
		h.bus.ReadMMIO(windowStart+pbaOffset, p)
		return binary.LittleEndian.Uint64(p)
	}
	expect := func(what string, bits uint64, want ...message) {
		t.Helper()
		if !slices.Equal(h.sent, want) || pending() != bits {
			t.Errorf("%s: sent %+v, pending %#x; want %+v, %#x", what, h.sent, pending(), want, bits)
		}
		h.sent = nil
	}

	h.fn.msix.Trigger(1)
	expect("disabled", 0)
	h.write(cap+2, 2, controlEnable)
	h.fn.msix.Trigger(1)
	expect("masked after reset", 1<<1)
	store(table+entrySize, 0x04, 0x10, 0xe0, 0xfe, 0, 0, 0, 0)
	store(table+entrySize+8, 0x41, 0, 0, 0)
	expect("still masked", 1<<1)
	store(table+entrySize+12, 0, 0, 0, 0)
	expect("unmasked", 0, message{0xfee01004, 0x41})
	h.fn.msix.Trigger(1)
	expect("triggered", 0, message{0xfee01004, 0x41})
	h.write(cap+2, 2, controlEnable|controlMask)
	h.fn.msix.Trigger(1)
	h.fn.msix.Trigger(1)
	expect("function masked", 1<<1)
	h.write(cap+2, 2, controlEnable)
	expect("function unmasked", 0, message{0xfee01004, 0x41})
	h.fn.msix.Trigger(2)
	h.write(cap+2, 2, 0)
	expect("disabled with one pending", 0)
	h.fn.msix.Trigger(-1)
	h.fn.msix.Trigger(vectors)
	expect("no such vector", 0)

	p := make([]byte, 8)
	h.bus.ReadMMIO(table+entrySize+8, p)
	if !bytes.Equal(p, []byte{0x41, 0, 0, 0, 0, 0, 0, 0}) {
		t.Errorf("the table reads %x", p)
	}
	for _, n := range []int{1, 2} {
		store(table+entrySize, bytes.Repeat([]byte{0xff}, n)...)
	}
	store(table+entrySize+4, 1, 2, 3, 4, 5, 6, 7, 8) // unaligned
	store(windowStart+pbaOffset, 0xff, 0, 0, 0)      // read-only
	if h.bus.ReadMMIO(table+entrySize, p); binary.LittleEndian.Uint64(p) != 0xfee01004 || pending() != 0 {
		t.Errorf("after bad accesses the address is %x", p)
	}
}

func TestBusFillsUp(t *testing.T) {
	b := newBus(t, make([]byte, ECAMSize))
	for i := range maxDevices {
		addr, err := b.Add(NewFunction(Identity{}, &fakeDevice{t: t}))
		if err != nil || int(addr.Device) != i {
			t.Fatalf("device %d: %v, %v", i, addr, err)
		}
	}
	if _, err := b.Add(NewFunction(Identity{}, &fakeDevice{t: t})); err == nil {
		t.Error("a 33rd device was accepted")
	}

	b = newBus(t, make([]byte, ECAMSize))
	f := NewFunction(Identity{}, &fakeDevice{t: t})
	if err := f.AddBAR(0, 2*windowSize); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Add(f); err == nil {
		t.Error("a BAR greater than the window was accepted")
	}
	f = NewFunction(Identity{}, &fakeDevice{t: t})
	addr, err := b.Add(f)
	if err != nil || addr.String() != "0000:00:00.0" {
		t.Errorf("after a refused function: %v, %v", addr, err)
	}
	if _, err := b.Add(f); err == nil {
		t.Error("a function was put on the bus twice")
	}
}

func TestRemove(t *testing.T) {
	h := newHost(t)
	h.write(4, 2, commandMemory)
	h.write(0x10, 4, windowStart+0x40000) // the guest moves BAR 0
	h.write(h.capability(t, capMSIX, 0)+2, 2, controlEnable)
	h.bus.WriteMMIO(windowStart+0x40000+tableOffset+12, []byte{0, 0, 0, 0})
	h.fn.msix.Trigger(0)
	if len(h.sent) != 1 || h.dev.mapped[0] != windowStart+0x40000 {
		t.Fatalf("sent %+v, BAR 0 at %#x", h.sent, h.dev.mapped[0])
	}
	if err := h.bus.Remove(Address{Device: 0}); err != nil {
		t.Fatal(err)
	}
	for offset := uint64(0); offset < functionSize; offset += 4 {
		h.write(offset, 4, 0)
		if got := h.read32(offset); got != 0xffffffff {
			t.Fatalf("register %#x is %#x", offset, got)
		}
	}
	for _, addr := range []uint64{windowStart, windowStart + barSize, windowStart + 0x40000} {
		if h.bus.ReadMMIO(addr, make([]byte, 4)) || h.bus.WriteMMIO(addr, make([]byte, 4)) {
			t.Errorf("an access at %#x was answered", addr)
		}
	}
	h.fn.writeConfig(4, []byte{2, 0}) // of a vCPU that came late
	h.fn.writeBAR(0, tableOffset, []byte{1, 0, 0, 0})
	h.fn.msix.Trigger(0)
	if len(h.sent) != 1 || h.dev.mapped != [numBARs]uint64{} || len(*h.bus.mappings.Load()) != 0 || h.read32(4) != 0xffffffff {
		t.Errorf("sent %+v, BARs at %#x", h.sent, h.dev.mapped)
	}
	if _, err := h.bus.Add(h.fn); err == nil {
		t.Error("a removed function was put on the bus again")
	}
	for _, device := range []uint8{0, 1, 31, 32, 255} {
		if h.bus.Remove(Address{Device: device}) == nil {
			t.Errorf("nothing was removed from device number %d", device)
		}
	}
}

// TestReuse removes functions from a full bus in any order, and finds that the
// next ones get their places.
func TestReuse(t *testing.T) {
	b := newBus(t, make([]byte, ECAMSize))
	add := func() (Address, uint32) {
		t.Helper()
		f := NewFunction(Identity{Vendor: 1}, &fakeDevice{t: t})
		for bar, size := range map[int]uint32{0: barSize, 1: 16} {
			if err := f.AddBAR(bar, size); err != nil {
				t.Fatal(err)
			}
		}
		a, err := b.Add(f)
		if err != nil {
			t.Fatal(err)
		}
		return a, binary.LittleEndian.Uint32(b.page(int(a.Device))[offBARs:])
	}
	var bars [maxDevices]uint32
	for i := range maxDevices {
		_, bars[i] = add()
	}
	for round := range 200 {
		i := round * 7 % maxDevices
		if err := b.Remove(Address{Device: uint8(i)}); err != nil {
			t.Fatal(err)
		}
		if _, err := b.Add(NewFunction(Identity{}, &fakeDevice{t: t})); err == nil {
			t.Fatal("a place was given away before it was free")
		}
		b.Free(Address{Device: uint8(i)})
		if a, bar := add(); int(a.Device) != i || bar != bars[i] {
			t.Fatalf("round %d: %s with BAR 0 at %#x, want %d and %#x", round, a, bar, i, bars[i])
		}
	}
	if err := b.Remove(Address{Device: 9}); err != nil {
		t.Fatal(err)
	}
	b.Free(Address{Device: 9})
	// A guest puts a BAR where the next one would go.
	b.WriteConfig(8*deviceSize+offBARs, binary.LittleEndian.AppendUint32(nil, bars[9]))
	b.WriteConfig(8*deviceSize+offCommand, []byte{commandMemory, 0})
	if a, bar := add(); a.Device != 9 || bar == bars[9] {
		t.Errorf("%s with BAR 0 at %#x", a, bar)
	}
}

// TestAddShowsIDLast stops Add where a guest that looks at the bus all the time begins
// to see the function: it finds all of it, and what it writes counts.
func TestAddShowsIDLast(t *testing.T) {
	const page, id = 4096, 4
	mapping, err := unix.Mmap(-1, 0, ECAMSize+page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mapping)
	// Device 0's id is at the end of a page of the host's, and all else behind it.
	h := &host{bus: newBus(t, mapping[page-id:][:ECAMSize]), ecam: mapping[page-id:]}
	if err := unix.Mprotect(mapping[:page], unix.PROT_READ); err != nil {
		t.Fatal(err)
	}
	f := NewFunction(Identity{Vendor: 0x1af4, Device: 0x1042, Class: 0x018000}, &fakeDevice{t: t})
	if err := f.AddBAR(0, barSize); err != nil {
		t.Fatal(err)
	}
	func() {
		defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
		defer func() {
			if recover() == nil {
				t.Error("the id was not written")
			}
		}()
		h.bus.Add(f)
	}()
	if h.read32(offVendorID) != 0xffffffff || h.read32(offRevision) != 0x01800000 || h.read32(offBARs) != windowStart || h.read32(0x100) != 0 {
		t.Errorf("with the id %#x come the class %#x, the BAR %#x and the extended capability %#x",
			h.read32(offVendorID), h.read32(offRevision), h.read32(offBARs), h.read32(0x100))
	}
	h.write(offBARs, 4, 0xffffffff)
	if got := h.read32(offBARs); got != ^uint32(barSize-1) {
		t.Errorf("BAR 0 says %#x", got)
	}
}

func TestFunctionRefuses(t *testing.T) {
	f := NewFunction(Identity{}, &fakeDevice{t: t})
	for _, tc := range []struct {
		index int
		size  uint32
	}{{-1, 16}, {6, 16}, {0, 8}, {0, 24}, {0, 0}} {
		if f.AddBAR(tc.index, tc.size) == nil {
			t.Errorf("BAR %d of %d bytes was accepted", tc.index, tc.size)
		}
	}
	if err := f.AddBAR(0, 0x1000); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		vectors, bar int
		table, pba   uint32
	}{
		"no vectors":       {0, 0, 0, 0x800},
		"2049 vectors":     {2049, 0, 0, 0x800},
		"no such BAR":      {1, 6, 0, 0x800},
		"empty BAR":        {1, 1, 0, 0x800},
		"table too long":   {129, 0, 0x800, 0},
		"pending too far":  {1, 0, 0, 0x1000},
		"unaligned table":  {1, 0, 4, 0x800},
		"unaligned vector": {1, 0, 0, 0x804},
	} {
		if _, err := f.AddMSIX(tc.vectors, tc.bar, tc.table, tc.pba, nil); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := f.AddCapability(CapVendor, make([]byte, 191)); err == nil {
		t.Error("a capability too long was accepted")
	}
}

// FuzzBus lets a guest write and read configuration space and BARs at will. The
// fake device checks that no access leaves its BARs.
func FuzzBus(f *testing.F) {
	f.Add([]byte{0, 4, 2, 2, 0, 0, 0, 1, 0x10, 4, 0, 0, 0, 0xd0})
	f.Add([]byte{0, 0x10, 4, 0xff, 0xff, 0xff, 0xff, 0, 4, 2, 2, 0, 0, 0})
	f.Add([]byte{0, 4, 2, 2, 0, 0, 0, 2, 0, 0x10, 4, 1, 2, 3, 4, 3, 0, 0x20, 4})
	f.Add([]byte{0, 4, 2, 2, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 4, 2, 2, 0, 0, 0})
	ecam := make([]byte, ECAMSize) // too big to be made each time; NewBus fills what counts
	f.Fuzz(func(t *testing.T, script []byte) {
		h := newHostIn(t, ecam)
		for len(script) >= 7 {
			op, offset, n := script[0], uint64(script[1]), int(script[2]%9)
			value := append(bytes.Clone(script[3:7]), script[3:7]...)[:n]
			addr := windowStart + offset<<8 | uint64(script[3])
			switch script = script[7:]; op % 5 {
			case 4: // out and in again
				if err := h.bus.Remove(Address{}); err != nil {
					t.Fatal(err)
				}
				h.bus.Free(Address{})
				*h = *newHostOn(t, h.bus, ecam)
			case 0:
				h.bus.WriteConfig(h.base+offset, value)
			case 1:
				h.bus.ReadMMIO(addr, value)
			case 2:
				h.bus.WriteMMIO(addr, value)
			case 3:
				h.fn.msix.Trigger(int(offset))
			}
			for i, m := range *h.bus.mappings.Load() {
				if m.start < windowStart || m.start+m.size > windowStart+windowSize || h.dev.mapped[m.bar] != m.start {
					t.Fatalf("BAR %d is mapped at %#x, the device was told %#x", m.bar, m.start, h.dev.mapped[m.bar])
				}
				for _, o := range (*h.bus.mappings.Load())[:i] {
					if m.start < o.start+o.size && o.start < m.start+m.size {
						t.Fatalf("BARs at %#x and %#x overlap", m.start, o.start)
					}
				}
			}
		}
	})
}
