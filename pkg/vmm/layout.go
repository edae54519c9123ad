package vmm

import "github.com/microvm-runtime/microvm/pkg/vmm/memory"

// Guest physical addresses. Everything that has an address of its own is here.
//
//	0x0000_0500  GDT of the boot processor
//	0x0000_7000  boot_params, the "zero page"
//	0x0000_9000  page tables of the boot processor
//	0x0002_0000  kernel command line
//	0x0009_fc00  end of conventional memory: PCs have ROMs, video memory and the
//	             like from here to 1 MiB, and Linux reserves it whatever the map says
//	0x000e_0000  ACPI tables, where Linux also looks for them by itself
//	0x0010_0000  the rest of low memory; the kernel says where in it it wants to be
//	0xc000_0000  end of low memory at the latest: PCI BARs
//	0xe000_0000  PCI configuration space (ECAM)
//	0xfee0_0000  local APICs
//	0xfeff_c000  what KVM keeps for itself
//	0x1_0000_0000  high memory, then persistent memory, then memory that is plugged
const (
	gdtAddr         memory.GuestAddress = 0x500
	bootParamsAddr  memory.GuestAddress = 0x7000
	pageTablesAddr  memory.GuestAddress = 0x9000
	commandLineAddr memory.GuestAddress = 0x20000
	conventionalEnd memory.GuestAddress = 0x9fc00
	acpiAddr        memory.GuestAddress = 0xe0000
	acpiEnd         memory.GuestAddress = 0x100000
	kernelLowest    memory.GuestAddress = 0x100000

	lowMemoryEnd memory.GuestAddress = 0xc0000000

	pciWindowAddr = 0xc0000000
	pciWindowSize = 0x20000000
	ecamAddr      = 0xe0000000

	localAPICAddr = 0xfee00000
	// A page for the identity map and three for a TSS, on Intel processors
	// without unrestricted guests: any place without memory will do.
	kvmIdentityMapAddr = 0xfeffc000
	kvmTSSAddr         = 0xfeffd000

	highMemoryAddr memory.GuestAddress = 1 << 32
)

// pmemAlign is the alignment of a persistent memory range. Linux hot-plugs the
// range in sub-sections of 2 MiB (include/linux/mmzone.h, SUBSECTION_SHIFT), but
// one that starts a section of 128 MiB (SECTION_SIZE_BITS) shares its section
// with no other memory, which keeps pfn_to_online_page() on its short path.
const (
	pmemAlign    = 128 << 20
	pmemSizeUnit = 2 << 20
)

// Memory that is plugged while the guest runs.
const (
	// hotMemoryAlign is the largest block by which Linux may add memory
	// (MAX_BLOCK_SIZE in arch/x86/mm/init_64.c), hotMemoryUnit the smallest, a
	// section: Linux leaves unused what is left of one at either end.
	hotMemoryAlign = 2 << 30
	hotMemoryUnit  = 128 << 20
	// A block is at least a huge page of both sides', and so large that there
	// are no more than maxHotBlocks: each that is plugged is a KVM slot, of
	// about 1.2 KiB, and takes some 0.1 ms to come or go.
	minHotBlock  = 2 << 20
	maxHotBlocks = 8192
	// otherSlots is how many KVM slots are left for everything else.
	otherSlots = 128
)

// I/O ports.
const (
	// The first PC serial port, eight registers.
	uartPort = 0x3f8
	// The power registers that the FADT names.
	sleepControlPort = 0x600
	sleepStatusPort  = 0x601
	resetPort        = 0x602
	resetValue       = 1
)
