package boot

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/internal/alloctest"
	"github.com/microvm-runtime/microvm/pkg/vmm/boot/boottest"
	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
)

const (
	testLowest  = 0x1000
	testMemSize = 0x10000
)

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
	file := boottest.File(0x2004, []byte("textdata"),
		boottest.Segment{Addr: 0x2000, Offset: uint64(body), FileSize: 4, MemSize: 0x100},
		boottest.Segment{Addr: 0x4000, Offset: uint64(body + 4), FileSize: 4, MemSize: 0x2000})
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

// counted counts what is read of a file.
type counted struct {
	io.ReaderAt
	reads, bytes int
}

func (c *counted) ReadAt(p []byte, offset int64) (int, error) {
	c.reads++
	n, err := c.ReaderAt.ReadAt(p, offset)
	c.bytes += n
	return n, err
}

// A kernel is read straight to where it belongs, each segment by one system call.
func TestLoadKernelReadsOnce(t *testing.T) {
	mem, _ := newMemory(t)
	const headers = boottest.HeaderSize + 2*boottest.SegmentSize
	file := &counted{ReaderAt: bytes.NewReader(boottest.File(0x2000, make([]byte, 0x3000),
		boottest.Segment{Addr: 0x2000, Offset: headers, FileSize: 0x2000, MemSize: 0x2000},
		boottest.Segment{Addr: 0x5000, Offset: headers + 0x2000, FileSize: 0x1000, MemSize: 0x2000}))}
	if _, err := LoadKernel(file, mem, testLowest); err != nil {
		t.Fatal(err)
	}
	if file.reads != 4 || file.bytes != headers+0x3000 {
		t.Errorf("%d bytes in %d reads", file.bytes, file.reads)
	}
}

func TestLoadKernelRefuses(t *testing.T) {
	good := boottest.Segment{Addr: 0x2000, Offset: 0, FileSize: 4, MemSize: 4}
	patch := func(offset int, value ...byte) []byte {
		b := boottest.File(0x2000, nil, good)
		copy(b[offset:], value)
		return b
	}
	for name, tc := range map[string]struct {
		file []byte
		want error
	}{
		"empty":                    {nil, io.ErrUnexpectedEOF},
		"header cut short":         {boottest.File(0, nil, good)[:40], io.ErrUnexpectedEOF},
		"a bzImage":                {bytes.Repeat([]byte("MZ"), 100), ErrNotKernel},
		"32-bit":                   {patch(4, 1), ErrNotKernel},
		"big-endian":               {patch(5, 2), ErrNotKernel},
		"shared object":            {patch(16, 3), ErrNotKernel},
		"another machine":          {patch(18, 183), ErrNotKernel},
		"odd program header size":  {patch(54, 57), ErrNotKernel},
		"no segments":              {boottest.File(0x2000, nil), ErrNotKernel},
		"65535 program headers":    {patch(56, 0xff, 0xff), ErrNotKernel},
		"table past the end":       {patch(32, 0, 0, 1), io.ErrUnexpectedEOF},
		"table offset is negative": {patch(32, 0, 0, 0, 0, 0, 0, 0, 0x80), io.ErrUnexpectedEOF},
		"entry outside":            {boottest.File(0x3000, nil, good), ErrNotKernel},
		"more file than memory":    {boottest.File(0x2000, nil, boottest.Segment{Addr: 0x2000, FileSize: 8, MemSize: 4}), ErrNotKernel},
		"over the boot data":       {boottest.File(0, nil, boottest.Segment{Addr: 0, FileSize: 4, MemSize: 0x2000}), ErrNotKernel},
		"past guest memory":        {boottest.File(0x2000, nil, boottest.Segment{Addr: 0x2000, MemSize: testMemSize}), memory.ErrOutOfRange},
		"address wraps":            {boottest.File(0x2000, nil, boottest.Segment{Addr: 1<<64 - 4, MemSize: 8}), memory.ErrOutOfRange},
		"size wraps":               {boottest.File(0x2000, nil, boottest.Segment{Addr: 0x2000, MemSize: 1<<64 - 1}), memory.ErrOutOfRange},
		"segment past the file":    {boottest.File(0x2000, nil, boottest.Segment{Addr: 0x2000, Offset: 1 << 20, FileSize: 4, MemSize: 4}), io.ErrUnexpectedEOF},
		"segment offset negative":  {boottest.File(0x2000, nil, boottest.Segment{Addr: 0x2000, Offset: 1 << 63, FileSize: 4, MemSize: 4}), io.ErrUnexpectedEOF},
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
	f.Add(boottest.File(0x2000, []byte("text"), boottest.Segment{Addr: 0x2000, Offset: 120, FileSize: 4, MemSize: 8}))
	f.Add(boottest.File(0x2000, nil, boottest.Segment{Addr: 1<<64 - 4, MemSize: 8}, boottest.Segment{Addr: 0x2000, MemSize: 1<<64 - 1}))
	f.Add([]byte("\x7fELF\x02\x01\x01"))
	f.Fuzz(func(t *testing.T, file []byte) {
		mem, b := newMemory(t)
		defer alloctest.Limit(t, 1<<20)()
		kernel, err := LoadKernel(bytes.NewReader(file), mem, testLowest)
		if err == nil && (kernel.Entry < testLowest || kernel.Entry >= kernel.End || kernel.End > testMemSize) {
			t.Errorf("accepted kernel %+v", kernel)
		}
		if !bytes.Equal(b[:testLowest], make([]byte, testLowest)) {
			t.Error("wrote below the lowest address")
		}
	})
}
