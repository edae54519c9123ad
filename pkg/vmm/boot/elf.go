// Package boot puts a Linux kernel into guest memory and describes the state a
// processor enters it in: the 64-bit boot protocol of the kernel's
// Documentation/arch/x86/boot.rst. It reads no path and trusts no file.
package boot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
)

// ErrNotKernel says that the file is no uncompressed 64-bit x86 Linux kernel.
var ErrNotKernel = errors.New("not a 64-bit x86 ELF kernel (vmlinux)")

// ELF-64 Object File Format: sizes and the few values that matter.
const (
	elfHeaderSize        = 64
	elfProgramHeaderSize = 56
	elfTypeExec          = 2
	elfMachineX86_64     = 62
	elfLoad              = 1

	// A vmlinux has 5 program headers.
	maxProgramHeaders = 64
)

// Kernel is a kernel in guest memory.
type Kernel struct {
	// Entry is startup_64, the 64-bit entry point.
	Entry memory.GuestAddress
	// End is the first address after the kernel's memory, with its bss.
	End memory.GuestAddress
}

// LoadKernel reads the segments of a vmlinux to their physical addresses.
// Segments below lowest are refused: that is where the boot data are. What a
// segment has beyond its file contents is not written: guest memory must be
// fresh. Only guest memory is written, whatever the file says, and the time is
// bounded by its size.
func LoadKernel(file io.ReaderAt, mem *memory.Memory, lowest memory.GuestAddress) (Kernel, error) {
	var header [elfHeaderSize]byte
	if err := readFull(file, header[:], 0); err != nil {
		return Kernel{}, fmt.Errorf("ELF header: %w", err)
	}
	le := binary.LittleEndian
	switch {
	case !bytes.Equal(header[:7], []byte{0x7f, 'E', 'L', 'F', 2, 1, 1}), // 64-bit, little-endian, version 1
		le.Uint16(header[16:]) != elfTypeExec,
		le.Uint16(header[18:]) != elfMachineX86_64:
		return Kernel{}, ErrNotKernel
	}
	entry := memory.GuestAddress(le.Uint64(header[24:]))
	tableOffset := le.Uint64(header[32:])
	entrySize, entries := le.Uint16(header[54:]), le.Uint16(header[56:])
	if entrySize != elfProgramHeaderSize || entries == 0 || entries > maxProgramHeaders {
		return Kernel{}, fmt.Errorf("%w: %d program headers of %d bytes", ErrNotKernel, entries, entrySize)
	}
	table := make([]byte, int(entries)*elfProgramHeaderSize)
	if err := readFull(file, table, tableOffset); err != nil {
		return Kernel{}, fmt.Errorf("ELF program headers: %w", err)
	}

	kernel := Kernel{Entry: entry}
	entryLoaded := false
	var loaded uint64 // file bytes so far
	for ; len(table) > 0; table = table[elfProgramHeaderSize:] {
		if le.Uint32(table) != elfLoad {
			continue
		}
		offset := le.Uint64(table[8:])
		addr := memory.GuestAddress(le.Uint64(table[24:]))
		fileSize, memSize := le.Uint64(table[32:]), le.Uint64(table[40:])
		if memSize == 0 {
			continue
		}
		if fileSize > memSize {
			return Kernel{}, fmt.Errorf("%w: segment at %#x has %d bytes in the file and %d in memory", ErrNotKernel, uint64(addr), fileSize, memSize)
		}
		if addr < lowest {
			return Kernel{}, fmt.Errorf("%w: segment at %#x, below %#x", ErrNotKernel, uint64(addr), uint64(lowest))
		}
		dst, err := mem.Slice(addr, memSize)
		if err != nil {
			return Kernel{}, fmt.Errorf("kernel segment does not fit into guest memory: %w", err)
		}
		// Overlapping segments could make us read the same file bytes over and over.
		if loaded += fileSize; loaded > maxKernelSize {
			return Kernel{}, fmt.Errorf("%w: more than %d bytes of segments", ErrNotKernel, maxKernelSize)
		}
		if err := readFull(file, dst[:fileSize], offset); err != nil {
			return Kernel{}, fmt.Errorf("kernel segment at %#x: %w", uint64(addr), err)
		}
		end := addr + memory.GuestAddress(memSize)
		kernel.End = max(kernel.End, end)
		entryLoaded = entryLoaded || entry >= addr && entry < end
	}
	if !entryLoaded {
		return Kernel{}, fmt.Errorf("%w: entry point %#x is in no segment", ErrNotKernel, uint64(entry))
	}
	return kernel, nil
}

// maxKernelSize bounds what is read from a kernel file, in bytes. Our kernel
// has less than 32 MiB, a distribution's with everything built in about 100.
const maxKernelSize = 512 << 20

// readFull fills p from offset; a shorter file is an error.
func readFull(file io.ReaderAt, p []byte, offset uint64) error {
	if len(p) == 0 {
		return nil
	}
	if int64(offset) < 0 {
		return fmt.Errorf("offset %#x: %w", offset, io.ErrUnexpectedEOF)
	}
	n, err := file.ReadAt(p, int64(offset))
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		err = fmt.Errorf("the file ends at %d of %d bytes: %w", n, len(p), io.ErrUnexpectedEOF)
	}
	return err
}
