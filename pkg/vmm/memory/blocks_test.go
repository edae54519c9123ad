package memory

import (
	"bytes"
	"errors"
	"sync"
	"testing"
)

// blocksMemory has a region of eight blocks of 0x1000 bytes at 0x10000.
func blocksMemory(t testing.TB) (*Memory, *Blocks) {
	t.Helper()
	b, err := NewBlocks(0x1000, 8)
	if err != nil {
		t.Fatal(err)
	}
	m := new(Memory)
	if err := m.Add(Region{Start: 0x10000, Bytes: make([]byte, 0x8000), Blocks: b}); err != nil {
		t.Fatal(err)
	}
	return m, b
}

func TestBlocks(t *testing.T) {
	m, b := blocksMemory(t)
	for _, i := range []int{1, 2, 3, 7} {
		b.Set(i, true)
	}
	b.Set(2, false)
	b.Set(2, true)
	for _, tc := range []struct {
		name         string
		addr, length uint64
		ok           bool
	}{
		{"one block", 0x11000, 0x1000, true},
		{"across plugged blocks", 0x11ff0, 0x1020, true},
		{"all that is plugged", 0x11000, 0x3000, true},
		{"the last block", 0x17000, 0x1000, true},
		{"before the plugged ones", 0x10fff, 2, false},
		{"after the plugged ones", 0x13fff, 2, false},
		{"unplugged", 0x14000, 1, false},
		{"plugged at both ends only", 0x13000, 0x5000, false},
		{"past the region", 0x17000, 0x1001, false},
	} {
		for _, slice := range []func(GuestAddress, uint64) ([]byte, error){m.Slice, m.ReadSlice} {
			p, err := slice(GuestAddress(tc.addr), tc.length)
			if tc.ok != (err == nil) || tc.ok && uint64(len(p)) != tc.length {
				t.Errorf("%s: %d bytes, %v", tc.name, len(p), err)
			}
			if err != nil && !errors.Is(err, ErrOutOfRange) {
				t.Errorf("%s: %v", tc.name, err)
			}
		}
	}
	if n := b.Plugged(0, 8); n != 4 {
		t.Errorf("%d blocks are plugged", n)
	}
	b.Set(2, false)
	if _, err := m.Slice(0x12000, 1); !errors.Is(err, ErrOutOfRange) {
		t.Errorf("slice of a block that went: %v", err)
	}
}

func TestBlocksRefuse(t *testing.T) {
	for _, tc := range []struct {
		size  uint64
		count int
	}{{0, 1}, {4096, 0}, {4096, -1}} {
		if _, err := NewBlocks(tc.size, tc.count); err == nil {
			t.Errorf("%d blocks of %d bytes accepted", tc.count, tc.size)
		}
	}
	b, err := NewBlocks(0x1000, 8)
	if err != nil {
		t.Fatal(err)
	}
	if err := new(Memory).Add(Region{Bytes: make([]byte, 0x9000), Blocks: b}); err == nil {
		t.Error("a region larger than its blocks was accepted")
	}
}

// TestBlocksConcurrently takes slices while blocks come and go: what Slice gives
// out can be used, whatever becomes of the block.
func TestBlocksConcurrently(t *testing.T) {
	m, b := blocksMemory(t)
	var users sync.WaitGroup
	done := make(chan struct{})
	for range 3 {
		users.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if p, err := m.Slice(0x12800, 0x1000); err == nil && len(p) != 0x1000 {
					t.Errorf("%d bytes", len(p))
				}
			}
		})
	}
	for i := range 2000 {
		b.Set(2+i%2, i/2%2 == 0)
	}
	close(done)
	users.Wait()
}

func TestDiscard(t *testing.T) {
	const page = 4096
	b := bytes.Repeat([]byte{1}, 5*page)
	start := 0
	for ; ; start++ { // of the first page in it
		if err := Discard(b[start : start+page]); err != nil {
			t.Fatal(err)
		}
		if b[start] == 0 {
			break
		}
	}
	if !bytes.Equal(b[start:start+page], make([]byte, page)) {
		t.Error("the page is not zero")
	}
	if bytes.IndexByte(b[:start], 0) >= 0 || bytes.IndexByte(b[start+page:], 0) >= 0 {
		t.Error("more than the page was discarded")
	}
	// Only whole pages: two of the three that this touches.
	if err := Discard(b[start+page-1 : start+3*page+1]); err != nil {
		t.Fatal(err)
	}
	if b[start+page] != 0 || b[start+3*page-1] != 0 || b[start+3*page] != 1 {
		t.Error("not the two whole pages were discarded")
	}
	if err := Discard(nil); err != nil {
		t.Error(err)
	}
}

func FuzzBlocks(f *testing.F) {
	f.Add(uint8(0xff), uint64(0), uint64(0x8000))
	f.Add(uint8(0x0e), uint64(0x1fff), uint64(2))
	f.Fuzz(func(t *testing.T, plugged uint8, off, length uint64) {
		m, b := blocksMemory(t)
		for i := range 8 {
			b.Set(i, plugged>>i&1 != 0)
		}
		p, err := m.Slice(0x10000+GuestAddress(off), length)
		want := off < 0x8000 && length <= 0x8000-off
		for i := off / 0x1000; want && length > 0 && i <= (off+length-1)/0x1000; i++ {
			want = plugged>>i&1 != 0
		}
		if length == 0 {
			want = true
		}
		if want != (err == nil) || want && uint64(len(p)) != length {
			t.Fatalf("%d bytes, %v", len(p), err)
		}
	})
}
