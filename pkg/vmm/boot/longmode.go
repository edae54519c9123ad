package boot

import (
	"encoding/binary"
	"fmt"

	"github.com/microvm-runtime/microvm/pkg/kvm"
	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
)

// Sizes of what WritePageTables and WriteGDT write, in bytes.
const (
	PageTablesSize = 3 * 4096
	GDTSize        = 6 * 8
)

// Selectors the boot protocol asks for (boot.rst, "64-bit Boot Protocol"):
// __BOOT_CS and __BOOT_DS.
const (
	selectorCS = 0x10
	selectorDS = 0x18
	selectorTR = 0x20
)

// WritePageTables writes page tables, to lie at addr, that map the first GiB of
// guest memory to itself in pages of 2 MiB: the kernel, its parameters and its
// command line must be in there. addr is a multiple of 4096.
func WritePageTables(b []byte, addr memory.GuestAddress) error {
	if len(b) < PageTablesSize || addr%4096 != 0 {
		return fmt.Errorf("page tables at %#x in %d bytes", uint64(addr), len(b))
	}
	const (
		present  = 1 << 0
		writable = 1 << 1
		accessed = 1 << 5
		dirty    = 1 << 6
		large    = 1 << 7
	)
	clear(b[:PageTablesSize])
	le := binary.LittleEndian
	le.PutUint64(b, uint64(addr+0x1000)|present|writable|accessed)
	le.PutUint64(b[0x1000:], uint64(addr+0x2000)|present|writable|accessed)
	for i := range uint64(512) {
		le.PutUint64(b[0x2000+8*i:], i<<21|present|writable|accessed|dirty|large)
	}
	return nil
}

// Segments of the boot protocol: flat, code executable and readable, data
// writable, all accessed (so that the processor need not write to the GDT).
func segments() (code, data, task kvm.Segment) {
	code = kvm.Segment{Selector: selectorCS, Limit: 0xffffffff, Type: 0xb, Present: 1, S: 1, L: 1, G: 1}
	data = kvm.Segment{Selector: selectorDS, Limit: 0xffffffff, Type: 0x3, Present: 1, S: 1, DB: 1, G: 1}
	// A busy 64-bit TSS: entering the guest fails without one (Intel SDM 3,
	// 27.3.1.2).
	task = kvm.Segment{Selector: selectorTR, Limit: 0x67, Type: 0xb, Present: 1}
	return code, data, task
}

// WriteGDT writes the descriptor table that belongs to SetLongMode.
func WriteGDT(b []byte) error {
	if len(b) < GDTSize {
		return fmt.Errorf("GDT needs %d bytes, not %d", GDTSize, len(b))
	}
	clear(b[:GDTSize])
	code, data, task := segments()
	for _, s := range []kvm.Segment{code, data, task} {
		binary.LittleEndian.PutUint64(b[s.Selector:], descriptor(s))
	}
	return nil
}

// descriptor is the segment descriptor of s: Intel SDM 3, 3.4.5. The upper half
// of the task's 16-byte descriptor stays zero, as its base does.
func descriptor(s kvm.Segment) uint64 {
	limit := uint64(s.Limit)
	if s.G == 1 {
		limit >>= 12
	}
	access := uint64(s.Type) | uint64(s.S)<<4 | uint64(s.DPL)<<5 | uint64(s.Present)<<7
	flags := uint64(s.AVL) | uint64(s.L)<<1 | uint64(s.DB)<<2 | uint64(s.G)<<3
	return limit&0xffff | s.Base&0xffffff<<16 | access<<40 | limit>>16&0xf<<48 | flags<<52 | s.Base>>24&0xff<<56
}

// Control register and EFER bits.
const (
	cr0PE   = 1 << 0
	cr0ET   = 1 << 4
	cr0NE   = 1 << 5
	cr0PG   = 1 << 31
	cr4PAE  = 1 << 5
	eferLME = 1 << 8
	eferLMA = 1 << 10
)

// SetLongMode changes s, a fresh vCPU's, to 64-bit mode with paging on.
func SetLongMode(s *kvm.Sregs, gdt, pageTables memory.GuestAddress) {
	code, data, task := segments()
	s.CS, s.TR = code, task
	s.DS, s.ES, s.FS, s.GS, s.SS = data, data, data, data, data
	s.GDT.Base, s.GDT.Limit = uint64(gdt), GDTSize-1
	s.IDT.Base, s.IDT.Limit = 0, 0
	s.CR0 = cr0PE | cr0ET | cr0NE | cr0PG
	s.CR3 = uint64(pageTables)
	s.CR4 |= cr4PAE
	s.EFER |= eferLME | eferLMA
}

// EntryRegs are the registers at the kernel's entry.
func EntryRegs(entry, params memory.GuestAddress) kvm.Regs {
	return kvm.Regs{
		RIP:    uint64(entry),
		RSI:    uint64(params),
		RFLAGS: 1 << 1, // reserved, always set; interrupts are off
	}
}
