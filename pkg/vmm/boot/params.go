package boot

import (
	"encoding/binary"
	"fmt"

	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
)

// MaxCommandLine is the longest kernel command line in bytes, without its NUL:
// COMMAND_LINE_SIZE of arch/x86/include/asm/setup.h is 2048.
const MaxCommandLine = 2047

// ParamsSize is the size of struct boot_params, the "zero page", in bytes.
const ParamsSize = 4096

// E820Type is the type of an E820Entry.
type E820Type uint32

// Types of memory, arch/x86/include/uapi/asm/bootparam.h.
const (
	E820RAM      E820Type = 1
	E820Reserved E820Type = 2
	E820ACPI     E820Type = 3
)

// E820Entry is one range of the memory map.
type E820Entry struct {
	Start memory.GuestAddress
	Size  uint64 // bytes
	Type  E820Type
}

// maxE820Entries is the length of boot_params.e820_table.
const maxE820Entries = 128

// Params is what the kernel is told at its start. CommandLine is the address of
// a NUL-terminated string of CommandLineSize bytes, NUL not counted.
type Params struct {
	CommandLine     memory.GuestAddress
	CommandLineSize int
	Initrd          memory.GuestAddress
	InitrdSize      uint64
	RSDP            memory.GuestAddress
	E820            []E820Entry
}

// Offsets in struct boot_params: Documentation/arch/x86/zero-page.rst and, from
// 0x1f1 on, the setup header of boot.rst.
const (
	offRSDP             = 0x070
	offExtRamdiskImage  = 0x0c0
	offExtRamdiskSize   = 0x0c4
	offE820Entries      = 0x1e8
	offBootFlag         = 0x1fe
	offHeader           = 0x202
	offVersion          = 0x206
	offTypeOfLoader     = 0x210
	offRamdiskImage     = 0x218
	offRamdiskSize      = 0x21c
	offCmdLinePtr       = 0x228
	offKernelAlignment  = 0x230
	offCmdlineSize      = 0x238
	offE820Table        = 0x2d0
	e820EntrySize       = 20
	bootFlag            = 0xaa55
	headerMagic         = 0x53726448 // "HdrS"
	protocolVersion     = 0x020f
	loaderUndefined     = 0xff
	kernelAlignment     = 0x1000000
	maxCommandLineStart = 1 << 32
)

// WriteParams writes the zero page.
func WriteParams(page []byte, p Params) error {
	if len(page) < ParamsSize {
		return fmt.Errorf("boot_params need %d bytes, not %d", ParamsSize, len(page))
	}
	if len(p.E820) > maxE820Entries {
		return fmt.Errorf("%d memory map entries, at most %d", len(p.E820), maxE820Entries)
	}
	if p.CommandLine >= maxCommandLineStart {
		return fmt.Errorf("command line at %#x is not below 4 GiB", uint64(p.CommandLine))
	}
	le := binary.LittleEndian
	clear(page[:ParamsSize])
	le.PutUint64(page[offRSDP:], uint64(p.RSDP))
	le.PutUint16(page[offBootFlag:], bootFlag)
	le.PutUint32(page[offHeader:], headerMagic)
	le.PutUint16(page[offVersion:], protocolVersion)
	page[offTypeOfLoader] = loaderUndefined
	le.PutUint32(page[offKernelAlignment:], kernelAlignment)
	le.PutUint32(page[offCmdLinePtr:], uint32(p.CommandLine))
	le.PutUint32(page[offCmdlineSize:], uint32(p.CommandLineSize))
	le.PutUint32(page[offRamdiskImage:], uint32(p.Initrd))
	le.PutUint32(page[offExtRamdiskImage:], uint32(p.Initrd>>32))
	le.PutUint32(page[offRamdiskSize:], uint32(p.InitrdSize))
	le.PutUint32(page[offExtRamdiskSize:], uint32(p.InitrdSize>>32))
	page[offE820Entries] = uint8(len(p.E820))
	for i, e := range p.E820 {
		entry := page[offE820Table+e820EntrySize*i:]
		le.PutUint64(entry, uint64(e.Start))
		le.PutUint64(entry[8:], e.Size)
		le.PutUint32(entry[16:], uint32(e.Type))
	}
	return nil
}
