package vmm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/mem"
)

const (
	present, writable, large = 1, 2, 1 << 7 // in page tables
	hotAddr                  = uint64(highMemoryAddr)
)

// mapHot maps the first two blocks of hot-plugged memory to themselves.
func mapHot() []byte {
	const directory = 0x32000 // for the fifth GiB
	return bytes.Join([][]byte{
		store64(uint64(pageTablesAddr)+0x1000+4*8, directory|present|writable),
		store64(directory, hotAddr|present|writable|large),
		store64(directory+8, (hotAddr+minHotBlock)|present|writable|large),
	}, nil)
}

// count64 counts at addr for ever.
func count64(addr uint64) []byte {
	return append(binary.LittleEndian.AppendUint64([]byte{0x48, 0xbf}, addr), // mov rdi, addr
		0xff, 0x07, // inc dword [rdi]
		0xeb, 0xfc) // jmp to the inc
}

// start runs a machine until the test ends.
func start(t *testing.T, c Config) *Machine {
	t.Helper()
	m, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if exit, err := m.Run(); err != nil {
			t.Errorf("%v, %v", exit, err)
		}
	}()
	t.Cleanup(func() {
		m.Stop()
		<-ended
	})
	return m
}

// TestHotMemory has a guest count in a block that comes and goes.
func TestHotMemory(t *testing.T) {
	c := tinyConfig(t, mapHot(), count64(hotAddr))
	c.MaxMemoryBytes = minMemory + 256<<20
	m, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	h := m.hot
	if uint64(h.start) != hotAddr || h.blocks.Size() != minHotBlock || h.blocks.Count() != 128 {
		t.Fatalf("%d blocks of %d bytes at %#x", h.blocks.Count(), h.blocks.Size(), h.start)
	}
	if now, limit := m.MemoryBytes(); now != minMemory || limit != c.MaxMemoryBytes {
		t.Errorf("%d bytes of %d", now, limit)
	}
	if err := h.plug(0, 2); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		m.Run()
		close(ended)
	}()
	defer func() {
		m.Stop()
		<-ended
	}()

	b, err := m.memory.Slice(h.start, 2*minHotBlock)
	if err != nil {
		t.Fatal(err)
	}
	value := func() uint32 { return binary.LittleEndian.Uint32(b) }
	waitForCount := func(what string) {
		t.Helper()
		before := value()
		waitFor(t, what, func() bool { return value() != before })
	}
	waitForCount("the guest to count")
	for range 10 { // what goes on beside it does not disturb it
		if err := h.plug(2, 20); err != nil {
			t.Fatal(err)
		}
		if err := h.unplug(5, 3); err != nil {
			t.Fatal(err)
		}
		waitForCount("the guest to count while blocks come")
		if err := h.plug(5, 3); err != nil {
			t.Fatal(err)
		}
		if err := h.unplug(2, 20); err != nil {
			t.Fatal(err)
		}
		waitForCount("the guest to count while blocks go")
	}

	b[minHotBlock] = 7
	if err := h.unplug(0, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := m.memory.Slice(h.start, 8); !errors.Is(err, memory.ErrOutOfRange) {
		t.Errorf("slice of an unplugged block: %v", err)
	}
	waitFor(t, "the guest to miss its memory", func() bool {
		stats, err := m.VCPUStats()
		return err == nil && stats[0].Exits["mmio-write"] > 100
	})
	// The slice from before is of no harm, and the guest does not write there.
	for range 100 {
		if value() != 0 {
			t.Fatal("the guest writes to a block that it does not have")
		}
	}
	if b[minHotBlock] != 7 {
		t.Error("the block beside it has lost its contents")
	}
	b[4] = 9 // a device's late write
	if err := h.plug(0, 1); err != nil {
		t.Fatal(err)
	}
	waitForCount("the guest to count again")
}

// TestHotMemoryFails has KVM refuse a slot in the middle: nothing is left of the
// others.
func TestHotMemoryFails(t *testing.T) {
	c := tinyConfig(t, tinySpin)
	c.MaxMemoryBytes = 512 << 20
	m := start(t, c)
	h := m.hot
	// Somebody else is where block 6 goes.
	other := h.firstSlot + uint32(h.blocks.Count())
	slot := m.nextSlot
	if slot != other {
		t.Fatalf("next slot %d, want %d", slot, other)
	}
	if err := m.addSlot(h.start+6*minHotBlock, h.bytes(7, 1), h.host.address(), 0); err != nil {
		t.Fatal(err)
	}
	if err := h.plug(4, 4); err == nil {
		t.Fatal("two slots for one address")
	}
	if n := h.blocks.Plugged(0, h.blocks.Count()); n != 0 {
		t.Errorf("%d blocks are plugged", n)
	}
	for _, part := range [][2]int{{4, 2}, {7, 1}} {
		if err := h.plug(part[0], part[1]); err != nil {
			t.Error(err)
		}
	}
	// A slot that is not there cannot be removed.
	h.blocks.Set(10, true)
	if err := h.unplug(10, 1); err == nil {
		t.Error("a slot was removed that was never made")
	}
}

func TestResizeMemory(t *testing.T) {
	c := tinyConfig(t, tinySpin)
	c.MaxMemoryBytes = minMemory + 100<<20 // no whole unit of Linux's
	m := start(t, c)
	if n := m.hot.blocks.Count(); n != hotMemoryUnit/minHotBlock {
		t.Errorf("%d blocks", n)
	}
	requested := func() uint64 {
		var b [8]byte
		m.hot.device.ReadConfig(48, b[:])
		return binary.LittleEndian.Uint64(b[:])
	}
	for _, tc := range []struct{ size, want uint64 }{
		{minMemory + 10<<20, 10 << 20},
		{minMemory + 1, 2 << 20},
		{0, 0},
		{c.MaxMemoryBytes, 100 << 20},
		{minMemory - 1, 0},
	} {
		if err := m.ResizeMemory(tc.size); err != nil || requested() != tc.want {
			t.Errorf("%d bytes: %d requested, %v", tc.size, requested(), err)
		}
	}
	for _, size := range []uint64{c.MaxMemoryBytes + 1, 1 << 62, 1<<64 - 1} {
		if err := m.ResizeMemory(size); !errors.Is(err, ErrResize) {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	if m.PCIAddress(m.hot.device) == "" {
		t.Error("the device is not on the bus")
	}

	fixed := start(t, tinyConfig(t, tinySpin))
	if err := fixed.ResizeMemory(minMemory + 1); !errors.Is(err, ErrResize) {
		t.Errorf("a machine that cannot grow: %v", err)
	}
	if err := fixed.ResizeMemory(1); err != nil {
		t.Errorf("a machine that cannot shrink: %v", err)
	}
	if now, limit := fixed.MemoryBytes(); now != minMemory || limit != minMemory {
		t.Errorf("%d bytes of %d", now, limit)
	}
	var d *mem.Device
	if fixed.hot != nil || m.hot.device == d {
		t.Error("hot-plugged memory")
	}
}

func TestHotMemoryShape(t *testing.T) {
	const gib = 1 << 30
	for _, tc := range []struct {
		name            string
		size, start     uint64
		physBits, slots int
		most, block     uint64
		count           int
	}{
		{"small", 100 << 20, 4 * gib, 46, 32000, 100 << 20, 2 << 20, 64},
		{"odd", 3<<20 + 4096, 4 * gib, 46, 32000, 4 << 20, 2 << 20, 64},
		{"16 GiB", 16*gib - hotMemoryUnit, 4 * gib, 46, 32000, 16*gib - hotMemoryUnit, 2 << 20, 8128},
		{"more", 64 * gib, 4 * gib, 46, 32000, 64 * gib, 8 << 20, 8192},
		{"much more", 1024 * gib, 4 * gib, 46, 32000, 1024 * gib, 128 << 20, 8192},
		{"an old kernel", 16 * gib, 4 * gib, 46, 381, 16 * gib, 64 << 20, 256},
		{"no slots", gib, 4 * gib, 46, 0, 0, 0, 0},
		{"few address bits", 64 * gib, 4 * gib, 36, 32000, 28 * gib, 4 << 20, 7168},
		{"fewer", 64 * gib, 4 * gib, 32, 32000, 0, 0, 0},
		{"all address bits", gib, 4 * gib, 64, 32000, gib, 2 << 20, 512},
		{"less than a block", 1 << 20, 4 * gib, 46, 32000, 2 << 20, 2 << 20, 64},
		{"nothing", 0, 4 * gib, 46, 32000, 0, 0, 0},
	} {
		most, block, count := hotMemoryShape(tc.size, tc.start, tc.physBits, tc.slots)
		if most != tc.most || count != tc.count || count > 0 && block != tc.block {
			t.Errorf("%s: %d bytes, %d blocks of %d; want %d, %d of %d", tc.name, most, count, block, tc.most, tc.count, tc.block)
		}
	}
}
