package boot

import (
	"encoding/binary"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/kvm"
)

func TestWriteParams(t *testing.T) {
	page := make([]byte, ParamsSize)
	page[0x1ef] = 0xff // the sentinel: the kernel distrusts the page unless it is zero
	p := Params{
		CommandLine: 0x20000, CommandLineSize: 11, RSDP: 0xe0000,
		Initrd: 0x1_4000_0000, InitrdSize: 0x2345,
		E820: []E820Entry{{0, 0x9fc00, E820RAM}, {0x100000, 0x7f00000, E820RAM}, {0xe0000000, 0x100000, E820Reserved}},
	}
	if err := WriteParams(page, p); err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	for _, tc := range []struct {
		what      string
		got, want uint64
	}{
		{"sentinel", uint64(page[0x1ef]), 0},
		{"boot_flag", uint64(le.Uint16(page[0x1fe:])), 0xaa55},
		{"type_of_loader", uint64(page[0x210]), 0xff},
		{"cmd_line_ptr", uint64(le.Uint32(page[0x228:])), 0x20000},
		{"cmdline_size", uint64(le.Uint32(page[0x238:])), 11},
		{"ramdisk_image", uint64(le.Uint32(page[0x218:])), 0x40000000},
		{"ext_ramdisk_image", uint64(le.Uint32(page[0x0c0:])), 1},
		{"ramdisk_size", uint64(le.Uint32(page[0x21c:])), 0x2345},
		{"acpi_rsdp_addr", le.Uint64(page[0x70:]), 0xe0000},
		{"e820_entries", uint64(page[0x1e8]), 3},
		{"third range", le.Uint64(page[0x2d0+40:]), 0xe0000000},
		{"third type", uint64(le.Uint32(page[0x2d0+56:])), 2},
	} {
		if tc.got != tc.want {
			t.Errorf("%s is %#x, want %#x", tc.what, tc.got, tc.want)
		}
	}
	if string(page[0x202:0x206]) != "HdrS" {
		t.Errorf("header magic %q", page[0x202:0x206])
	}
}

func TestWriteParamsRefuses(t *testing.T) {
	if err := WriteParams(make([]byte, 100), Params{}); err == nil {
		t.Error("a short page was accepted")
	}
	if err := WriteParams(make([]byte, ParamsSize), Params{E820: make([]E820Entry, 129)}); err == nil {
		t.Error("129 ranges were accepted")
	}
	if err := WriteParams(make([]byte, ParamsSize), Params{CommandLine: 1 << 32}); err == nil {
		t.Error("a command line above 4 GiB was accepted")
	}
}

func TestWriteGDT(t *testing.T) {
	b := make([]byte, GDTSize)
	if err := WriteGDT(b); err != nil {
		t.Fatal(err)
	}
	// From the processor manuals: flat 64-bit code, flat data, busy 64-bit TSS.
	for selector, want := range map[int]uint64{
		0x00: 0, 0x08: 0, 0x10: 0x00af9b000000ffff, 0x18: 0x00cf93000000ffff, 0x20: 0x00008b0000000067, 0x28: 0,
	} {
		if got := binary.LittleEndian.Uint64(b[selector:]); got != want {
			t.Errorf("descriptor %#x is %#016x, want %#016x", selector, got, want)
		}
	}
	if err := WriteGDT(b[:GDTSize-1]); err == nil {
		t.Error("a short buffer was accepted")
	}
}

func TestWritePageTables(t *testing.T) {
	const addr = 0x9000
	b := make([]byte, PageTablesSize)
	if err := WritePageTables(b, addr); err != nil {
		t.Fatal(err)
	}
	// walk does what the processor does.
	walk := func(v uint64) uint64 {
		table := uint64(addr)
		for shift := 39; ; shift -= 9 {
			entry := binary.LittleEndian.Uint64(b[table-addr+8*(v>>shift&511):])
			if entry&1 == 0 {
				t.Fatalf("%#x is not mapped", v)
			}
			if shift == 21 {
				return entry&^0x1fffff | v&0x1fffff
			}
			table = entry &^ 0xfff
		}
	}
	for _, v := range []uint64{0, 0x7000, 0x1000000, 1<<30 - 1} {
		if got := walk(v); got != v {
			t.Errorf("%#x is mapped to %#x", v, got)
		}
	}
	if err := WritePageTables(b, addr+1); err == nil {
		t.Error("an unaligned address was accepted")
	}
}

func TestEntryState(t *testing.T) {
	var s kvm.Sregs
	s.EFER = 1 // what is there stays
	SetLongMode(&s, 0x500, 0x9000)
	if s.CR0&(cr0PE|cr0PG) != cr0PE|cr0PG || s.CR3 != 0x9000 || s.EFER != eferLME|eferLMA|1 || s.CS.L != 1 || s.CS.DB != 0 {
		t.Errorf("not in long mode: %+v", s)
	}
	r := EntryRegs(0x1000000, 0x7000)
	if r.RIP != 0x1000000 || r.RSI != 0x7000 || r.RFLAGS != 2 {
		t.Errorf("registers: %+v", r)
	}
}
