package boot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
)

const (
	testLowest  = 0x1000
	testMemSize = 0x10000
)

type segment struct {
	addr, offset, fileSize, memSize uint64
}

// kernelFile makes an ELF file whose segments are all "load".
func kernelFile(entry uint64, body []byte, segments ...segment) []byte {
	le := binary.LittleEndian
	b := make([]byte, elfHeaderSize)
	copy(b, []byte{0x7f, 'E', 'L', 'F', 2, 1, 1})
	le.PutUint16(b[16:], elfTypeExec)
	le.PutUint16(b[18:], elfMachineX86_64)
	le.PutUint64(b[24:], entry)
	le.PutUint64(b[32:], elfHeaderSize)
	le.PutUint16(b[54:], elfProgramHeaderSize)
	le.PutUint16(b[56:], uint16(len(segments)))
	for _, s := range segments {
		p := make([]byte, elfProgramHeaderSize)
		le.PutUint32(p, elfLoad)
		le.PutUint64(p[8:], s.offset)
		le.PutUint64(p[24:], s.addr)
		le.PutUint64(p[32:], s.fileSize)
		le.PutUint64(p[40:], s.memSize)
		b = append(b, p...)
	}
	return append(b, body...)
}

func newMemory(t testing.TB) (*memory.Memory, []byte) {
	t.Helper()
	b := make([]byte, testMemSize)
	var m memory.Memory
	if err := m.Add(memory.Region{Bytes: b}); err != nil {
		t.Fatal(err)
	}
	return &m, b
}

func TestLoadKernel(t *testing.T) {
	mem, b := newMemory(t)
	body := elfHeaderSize + 2*elfProgramHeaderSize
	file := kernelFile(0x2004, []byte("textdata"),
		segment{addr: 0x2000, offset: uint64(body), fileSize: 4, memSize: 0x100},
		segment{addr: 0x4000, offset: uint64(body + 4), fileSize: 4, memSize: 0x2000})
	kernel, err := LoadKernel(bytes.NewReader(file), mem, testLowest)
	if err != nil {
		t.Fatal(err)
	}
	if kernel.Entry != 0x2004 || kernel.End != 0x6000 {
		t.Errorf("kernel: %+v", kernel)
	}
	if string(b[0x2000:0x2004]) != "text" || string(b[0x4000:0x4004]) != "data" || b[0x4004] != 0 {
		t.Error("segments are not where they belong")
	}
}

func TestLoadKernelRefuses(t *testing.T) {
	good := segment{addr: 0x2000, offset: 0, fileSize: 4, memSize: 4}
	patch := func(offset int, value ...byte) []byte {
		b := kernelFile(0x2000, nil, good)
		copy(b[offset:], value)
		return b
	}
	for name, tc := range map[string]struct {
		file []byte
		want error
	}{
		"empty":                    {nil, io.ErrUnexpectedEOF},
		"header cut short":         {kernelFile(0, nil, good)[:40], io.ErrUnexpectedEOF},
		"a bzImage":                {bytes.Repeat([]byte("MZ"), 100), ErrNotKernel},
		"32-bit":                   {patch(4, 1), ErrNotKernel},
		"big-endian":               {patch(5, 2), ErrNotKernel},
		"shared object":            {patch(16, 3), ErrNotKernel},
		"another machine":          {patch(18, 183), ErrNotKernel},
		"odd program header size":  {patch(54, 57), ErrNotKernel},
		"no segments":              {kernelFile(0x2000, nil), ErrNotKernel},
		"65535 program headers":    {patch(56, 0xff, 0xff), ErrNotKernel},
		"table past the end":       {patch(32, 0, 0, 1), io.ErrUnexpectedEOF},
		"table offset is negative": {patch(32, 0, 0, 0, 0, 0, 0, 0, 0x80), io.ErrUnexpectedEOF},
		"entry outside":            {kernelFile(0x3000, nil, good), ErrNotKernel},
		"more file than memory":    {kernelFile(0x2000, nil, segment{addr: 0x2000, fileSize: 8, memSize: 4}), ErrNotKernel},
		"over the boot data":       {kernelFile(0, nil, segment{addr: 0, fileSize: 4, memSize: 0x2000}), ErrNotKernel},
		"past guest memory":        {kernelFile(0x2000, nil, segment{addr: 0x2000, memSize: testMemSize}), memory.ErrOutOfRange},
		"address wraps":            {kernelFile(0x2000, nil, segment{addr: 1<<64 - 4, memSize: 8}), memory.ErrOutOfRange},
		"size wraps":               {kernelFile(0x2000, nil, segment{addr: 0x2000, memSize: 1<<64 - 1}), memory.ErrOutOfRange},
		"segment past the file":    {kernelFile(0x2000, nil, segment{addr: 0x2000, offset: 1 << 20, fileSize: 4, memSize: 4}), io.ErrUnexpectedEOF},
		"segment offset negative":  {kernelFile(0x2000, nil, segment{addr: 0x2000, offset: 1 << 63, fileSize: 4, memSize: 4}), io.ErrUnexpectedEOF},
	} {
		t.Run(name, func(t *testing.T) {
			mem, b := newMemory(t)
			_, err := LoadKernel(bytes.NewReader(tc.file), mem, testLowest)
			if !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			}
			if !bytes.Equal(b[:testLowest], make([]byte, testLowest)) {
				t.Error("wrote below the lowest address")
			}
		})
	}
}

func FuzzLoadKernel(f *testing.F) {
	f.Add(kernelFile(0x2000, []byte("text"), segment{addr: 0x2000, offset: 120, fileSize: 4, memSize: 8}))
	f.Add(kernelFile(0x2000, nil, segment{addr: 1<<64 - 4, memSize: 8}, segment{addr: 0x2000, memSize: 1<<64 - 1}))
	f.Add([]byte("\x7fELF\x02\x01\x01"))
	f.Fuzz(func(t *testing.T, file []byte) {
		mem, b := newMemory(t)
		kernel, err := LoadKernel(bytes.NewReader(file), mem, testLowest)
		if err == nil && (kernel.Entry < testLowest || kernel.Entry >= kernel.End || kernel.End > testMemSize) {
			t.Errorf("accepted kernel %+v", kernel)
		}
		if !bytes.Equal(b[:testLowest], make([]byte, testLowest)) {
			t.Error("wrote below the lowest address")
		}
	})
}
