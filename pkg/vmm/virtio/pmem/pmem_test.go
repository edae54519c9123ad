package pmem

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

func TestConfig(t *testing.T) {
	d := New(0x1122334455667788, 0x200000, nil)
	const whole = "8877665544332211" + "0000200000000000"
	d.WriteConfig(0, make([]byte, 16)) // has no effect
	for _, tc := range []struct {
		offset uint64
		n      int
		want   string
	}{
		{0, 16, whole}, {0, 8, whole[:16]}, {8, 8, whole[16:]}, {4, 4, whole[8:16]}, {15, 1, "00"}, {10, 1, "20"},
		{14, 4, "00000000"}, {16, 4, "00000000"}, {1 << 63, 2, "0000"}, {^uint64(0), 2, "0000"}, {8, 12, whole[16:] + "00000000"}, {3, 0, ""},
	} {
		p := bytes.Repeat([]byte{0xee}, tc.n)
		d.ReadConfig(tc.offset, p)
		if got := hex.EncodeToString(p); got != tc.want {
			t.Errorf("%d bytes at %d: %s, want %s", tc.n, tc.offset, got, tc.want)
		}
	}
}

func le32(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }

func TestRequests(t *testing.T) {
	failed := errors.New("disk on fire")
	for _, tc := range []struct {
		name     string
		flush    error
		readable [][]byte
		writable []int
		flushes  int
		want     []byte
	}{
		{"flush", nil, [][]byte{le32(0)}, []int{4}, 1, le32(0)},
		{"flush in pieces", nil, [][]byte{{0}, {0, 0, 0}}, []int{1, 3}, 1, le32(0)},
		{"flush fails", failed, [][]byte{le32(0)}, []int{4}, 1, le32(1)},
		{"unknown request", nil, [][]byte{le32(1)}, []int{4}, 0, le32(1)},
		{"unknown request, large", nil, [][]byte{le32(1 << 31)}, []int{4}, 0, le32(1)},
		{"short request", nil, [][]byte{{0, 0, 0}}, []int{4}, 0, le32(1)},
		{"no request", nil, nil, []int{4}, 0, le32(1)},
		{"no room for the answer", nil, [][]byte{le32(0)}, nil, 1, nil},
		{"little room for the answer", failed, [][]byte{le32(0)}, []int{2}, 1, []byte{1, 0}},
		{"too much of both", nil, [][]byte{le32(0), le32(7)}, []int{4, 9}, 1, le32(0)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var flushes atomic.Int32
			d := virtiotest.NewDriver(t, New(0, 0, func() error { flushes.Add(1); return tc.flush }), virtiotest.Options{})
			written, out := d.Send(0, tc.readable, tc.writable).Wait(t)
			if got := bytes.Join(out, nil)[:written]; !bytes.Equal(got, tc.want) {
				t.Errorf("answer %x, want %x", got, tc.want)
			}
			if n := int(flushes.Load()); n != tc.flushes {
				t.Errorf("%d flushes, want %d", n, tc.flushes)
			}
		})
	}
}

func TestReadOnly(t *testing.T) {
	d := virtiotest.NewDriver(t, New(0, 4096, nil), virtiotest.Options{})
	written, out := d.Send(0, [][]byte{le32(0)}, []int{4}).Wait(t)
	if written != 4 || !bytes.Equal(out[0], le32(0)) {
		t.Fatalf("%d bytes, %x", written, out)
	}
}

func TestBadRing(t *testing.T) {
	d := virtiotest.NewDriver(t, New(0, 0, nil), virtiotest.Options{MayFail: true})
	d.Rings[0].Push(64)
	d.Kick(0)
	if err := d.Failed(); !strings.Contains(err.Error(), "head 64 of 64") {
		t.Fatal(err)
	}
}

// Reset returns when the flush under way has ended, not before.
func TestResetDuringFlush(t *testing.T) {
	begun, finish := make(chan struct{}, 2), make(chan struct{})
	var ended atomic.Int32
	d := virtiotest.NewDriver(t, New(0, 0, func() error {
		begun <- struct{}{}
		<-finish
		ended.Add(1)
		return nil
	}), virtiotest.Options{})
	d.Send(0, [][]byte{le32(0)}, []int{4})
	d.Send(0, [][]byte{le32(0)}, []int{4})
	<-begun
	reset := make(chan struct{})
	go func() {
		defer close(reset)
		d.Reset()
		if n := int(ended.Load()); n != 1+len(begun) {
			t.Errorf("Reset returned after %d flushes of %d", n, 1+len(begun))
		}
	}()
	close(finish)
	<-reset
}

func FuzzRequest(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0}, uint8(2), uint8(4), uint8(0), false)
	f.Add([]byte{1, 0, 0, 0, 0}, uint8(9), uint8(3), uint8(1), true)
	f.Fuzz(func(t *testing.T, request []byte, split, room1, room2 uint8, fails bool) {
		flushes := 0
		d := virtiotest.NewDriver(t, New(0, 0, func() error {
			flushes++
			if fails {
				return errors.New("no")
			}
			return nil
		}), virtiotest.Options{})
		request = request[:min(len(request), 4096)]
		at := min(int(split), len(request))
		written, out := d.Send(0, [][]byte{request[:at], request[at:]}, []int{int(room1), int(room2)}).Wait(t)
		valid := len(request) >= 4 && binary.LittleEndian.Uint32(request) == 0
		if valid != (flushes == 1) {
			t.Fatalf("%d flushes for %x", flushes, request)
		}
		want := le32(1)
		if valid && !fails {
			want = le32(0)
		}
		want = want[:min(4, int(room1)+int(room2))]
		if got := bytes.Join(out, nil)[:written]; !bytes.Equal(got, want) {
			t.Fatalf("answer %x, want %x", got, want)
		}
	})
}
