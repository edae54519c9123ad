package memory

import (
	"errors"
	"math"
	"testing"
)

func TestSlice(t *testing.T) {
	var m Memory
	low, high := make([]byte, 0x1000), make([]byte, 0x2000)
	for _, r := range []Region{{Start: 0x10000, Bytes: high}, {Start: 0, Bytes: low}, {Start: 0x20000, Bytes: make([]byte, 16), ReadOnly: true}} {
		if err := m.Add(r); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name   string
		addr   GuestAddress
		length uint64
		ok     bool
	}{
		{"whole region", 0, 0x1000, true},
		{"inside", 0x10010, 0x100, true},
		{"last byte", 0x11fff, 1, true},
		{"empty anywhere", 0xdead0000, 0, true},
		{"one past the end", 0xfff, 2, false},
		{"first byte after", 0x1000, 1, false},
		{"in the hole", 0x8000, 8, false},
		{"length wraps", 0x10000, math.MaxUint64, false},
		{"address at the top", math.MaxUint64, 1, false},
		{"read-only", 0x20000, 8, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b, err := m.Slice(tc.addr, tc.length)
			if tc.ok && (err != nil || uint64(len(b)) != tc.length) {
				t.Fatalf("got %d bytes, %v", len(b), err)
			}
			if !tc.ok && !errors.Is(err, ErrOutOfRange) {
				t.Fatalf("got %d bytes, %v; want ErrOutOfRange", len(b), err)
			}
		})
	}
	if b, err := m.ReadSlice(0x20000, 16); err != nil || len(b) != 16 {
		t.Errorf("ReadSlice of a read-only region: %d bytes, %v", len(b), err)
	}
	if _, err := m.ReadSlice(0x20000, 17); !errors.Is(err, ErrOutOfRange) {
		t.Errorf("ReadSlice past the end of a read-only region: %v", err)
	}
}

func TestAddRefuses(t *testing.T) {
	var m Memory
	if err := m.Add(Region{Start: 0x1000, Bytes: make([]byte, 0x1000)}); err != nil {
		t.Fatal(err)
	}
	for name, r := range map[string]Region{
		"empty":          {Start: 0x9000},
		"wraps":          {Start: math.MaxUint64 - 1, Bytes: make([]byte, 16)},
		"same start":     {Start: 0x1000, Bytes: make([]byte, 1)},
		"tail overlaps":  {Start: 0x0fff, Bytes: make([]byte, 2)},
		"covers another": {Start: 0, Bytes: make([]byte, 0x4000)},
	} {
		if err := m.Add(r); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzSlice(f *testing.F) {
	f.Add(uint64(0), uint64(1))
	f.Add(uint64(math.MaxUint64), uint64(math.MaxUint64))
	var m Memory
	if err := m.Add(Region{Start: 0x1000, Bytes: make([]byte, 0x1000)}); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, addr, length uint64) {
		b, err := m.Slice(GuestAddress(addr), length)
		if err == nil && uint64(len(b)) != length {
			t.Fatalf("asked for %d bytes, got %d", length, len(b))
		}
	})
}
