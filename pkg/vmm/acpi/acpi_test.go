package acpi

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"
)

var testConfig = Config{
	Base: 0xe0000, CPUs: 4, LocalAPIC: 0xfee00000,
	ECAM: 0xe0000000, ECAMSize: 0x100000, MMIO: 0xd0000000, MMIOSize: 0x10000000,
	SleepControlPort: 0x600, SleepStatusPort: 0x601, ResetPort: 0x602, ResetValue: 1,
}

// tables follows the pointers from the RSDP as a guest does and returns the
// tables by signature, lengths and checksums verified.
func tables(t *testing.T, c Config) map[string][]byte {
	t.Helper()
	blob, err := Build(c)
	if err != nil {
		t.Fatal(err)
	}
	at := func(addr uint64) []byte {
		if addr < c.Base || addr >= c.Base+uint64(len(blob)) {
			t.Fatalf("pointer %#x is outside the tables", addr)
		}
		b := blob[addr-c.Base:]
		n := binary.LittleEndian.Uint32(b[4:])
		if int(n) > len(b) || sum(b[:n]) != 0 {
			t.Fatalf("table %q at %#x: length %d, checksum wrong or too long", b[:4], addr, n)
		}
		return b[:n]
	}
	if string(blob[:8]) != "RSD PTR " || sum(blob[:20]) != 0 || sum(blob[:36]) != 0 {
		t.Fatalf("bad RSDP: %x", blob[:36])
	}
	found := map[string][]byte{}
	xsdt := at(binary.LittleEndian.Uint64(blob[24:]))
	for entries := xsdt[36:]; len(entries) > 0; entries = entries[8:] {
		table := at(binary.LittleEndian.Uint64(entries))
		found[string(table[:4])] = table
	}
	found["DSDT"] = at(binary.LittleEndian.Uint64(found["FACP"][140:]))
	return found
}

func TestTables(t *testing.T) {
	all := tables(t, testConfig)
	// ACPI_TABLES keeps the tables for iasl -d.
	if dir := os.Getenv("ACPI_TABLES"); dir != "" {
		for signature, table := range all {
			if err := os.WriteFile(filepath.Join(dir, signature+".aml"), table, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}

	fadt := all["FACP"]
	if len(fadt) != 276 {
		t.Errorf("FADT is %d bytes", len(fadt))
	}
	for offset, port := range map[int]uint16{116: 0x602, 244: 0x600, 256: 0x601} {
		if want := append([]byte{1, 8, 0, 1}, byte(port), byte(port>>8), 0, 0, 0, 0, 0, 0); !bytes.Equal(fadt[offset:offset+12], want) {
			t.Errorf("FADT register at %d: %x", offset, fadt[offset:offset+12])
		}
	}
	if flags := binary.LittleEndian.Uint32(fadt[112:]); flags&(1<<20) == 0 || flags&(1<<10) == 0 {
		t.Errorf("FADT flags %#x", flags)
	}

	madt := all["APIC"][44:]
	if len(madt) != 8*testConfig.CPUs {
		t.Fatalf("MADT has %d bytes of entries", len(madt))
	}
	for i := range testConfig.CPUs {
		if want := []byte{0, 8, byte(i), byte(i), 1, 0, 0, 0}; !bytes.Equal(madt[8*i:8*i+8], want) {
			t.Errorf("MADT entry %d: %x", i, madt[8*i:8*i+8])
		}
	}

	if got := binary.LittleEndian.Uint64(all["MCFG"][44:]); got != uint64(testConfig.ECAM) {
		t.Errorf("MCFG base %#x", got)
	}
}

func TestTablesFitEveryCPUCount(t *testing.T) {
	for _, cpus := range []int{1, 32, 255} {
		c := testConfig
		c.CPUs = cpus
		if n := (len(tables(t, c)["APIC"]) - 44) / 8; n != cpus {
			t.Errorf("%d processors in the MADT, want %d", n, cpus)
		}
	}
	for _, cpus := range []int{-1, 0, 256} {
		c := testConfig
		c.CPUs = cpus
		if _, err := Build(c); err == nil {
			t.Errorf("%d processors accepted", cpus)
		}
	}
}

func TestAML(t *testing.T) {
	for _, tc := range []struct {
		what      string
		got, want []byte
	}{
		{"eisaID", eisaID("PNP0A08"), []byte{0x0c, 0x41, 0xd0, 0x0a, 0x08}},
		{"zero", integer(0), []byte{0}},
		{"one", integer(1), []byte{1}},
		{"byte", integer(0xff), []byte{0x0a, 0xff}},
		{"word", integer(0x100), []byte{0x0b, 0, 1}},
		{"dword", integer(0x10000), []byte{0x0c, 0, 0, 1, 0}},
		{"qword", integer(1 << 32), []byte{0x0e, 0, 0, 0, 0, 1, 0, 0, 0}},
		{"name", name("_S5"), []byte("_S5_")},
		{"root name", name(`\_SB`), []byte(`\_SB_`)},
		{"package", pkg(integer(5), integer(0)), []byte{0x12, 5, 2, 0x0a, 5, 0}},
		{"length of 63", withLength(make([]byte, 62))[:1], []byte{63}},
		{"length of 65", withLength(make([]byte, 63))[:2], []byte{0x41, 0x04}},
		{"length of 4095", withLength(make([]byte, 4093))[:2], []byte{0x4f, 0xff}},
		{"length of 4097", withLength(make([]byte, 4094))[:3], []byte{0x81, 0x00, 0x01}},
	} {
		if !bytes.Equal(tc.got, tc.want) {
			t.Errorf("%s: %x, want %x", tc.what, tc.got, tc.want)
		}
	}
}
