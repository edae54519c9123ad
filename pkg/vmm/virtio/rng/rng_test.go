package rng

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

// ones reads 0x01 for ever.
type ones struct{}

func (ones) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 1
	}
	return len(p), nil
}

func TestKernel(t *testing.T) {
	// Above 256 bytes getrandom(2) may be interrupted.
	a, b := make([]byte, maxRequest), make([]byte, maxRequest)
	for _, p := range [][]byte{a, b} {
		if _, err := io.ReadFull(Kernel, p); err != nil {
			t.Fatal(err)
		}
	}
	if bytes.Equal(a, b) || bytes.Count(a, []byte{0}) > maxRequest/64 {
		t.Error("this is not random")
	}
}

func TestRequests(t *testing.T) {
	for _, tc := range []struct {
		name     string
		readable [][]byte
		writable []int
		want     int
	}{
		{"as Linux asks", nil, []int{64}, 64},
		{"one byte", nil, []int{1}, 1},
		{"several buffers", nil, []int{1, 5, 4096}, 4102},
		{"empty", nil, []int{0}, 0},
		{"nothing writable", [][]byte{{1, 2}}, nil, 0},
		{"readable ones are ignored", [][]byte{{1, 2}}, []int{8}, 8},
		{"at the cap", nil, []int{maxRequest}, maxRequest},
		{"above the cap", nil, []int{maxRequest + 1}, maxRequest},
		{"above the cap in pieces", nil, []int{maxRequest - 1, 2, 100}, maxRequest},
		{"far above the cap", nil, []int{1 << 20, 1 << 20}, maxRequest},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := virtiotest.NewDriver(t, New(iotest.HalfReader(ones{})), virtiotest.Options{})
			written, out := d.Send(0, tc.readable, tc.writable).Wait(t)
			if int(written) != tc.want {
				t.Fatalf("%d bytes, want %d", written, tc.want)
			}
			all := bytes.Join(out, nil)
			if i := bytes.IndexByte(append(all, 0), 0); i != tc.want {
				t.Fatalf("%d bytes are random, the device says %d", i, tc.want)
			}
			if bytes.IndexByte(all[tc.want:], 1) >= 0 {
				t.Fatal("more was written than the device says")
			}
		})
	}
}

func TestBytesDiffer(t *testing.T) {
	d := virtiotest.NewDriver(t, New(rand.Reader), virtiotest.Options{})
	seen := map[string]bool{}
	for range 100 {
		_, out := d.Send(0, nil, []int{16}).Wait(t)
		seen[string(out[0])] = true
	}
	if len(seen) != 100 {
		t.Fatalf("%d of 100 answers are different", len(seen))
	}
}

func TestSourceFails(t *testing.T) {
	broken := errors.New("no entropy")
	for _, n := range []int{0, 10} {
		source := io.MultiReader(io.LimitReader(ones{}, int64(n)), iotest.ErrReader(broken))
		d := virtiotest.NewDriver(t, New(source), virtiotest.Options{MayFail: true})
		if written, _ := d.Send(0, nil, []int{16}).Wait(t); int(written) != n {
			t.Fatalf("%d bytes of %d", written, n)
		}
		if err := d.Failed(); !errors.Is(err, broken) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatal(err)
		}
	}
}

func TestBadRing(t *testing.T) {
	d := virtiotest.NewDriver(t, New(ones{}), virtiotest.Options{MayFail: true})
	d.Rings[0].SetDesc(0, virtiotest.Desc{Addr: 1 << 40, Len: 1, Flags: virtiotest.DescWrite})
	d.Rings[0].Push(0)
	d.Kick(0)
	if err := d.Failed(); !strings.Contains(err.Error(), "outside guest memory") {
		t.Fatal(err)
	}
}

func TestResetInFlight(t *testing.T) {
	d := virtiotest.NewDriver(t, New(ones{}), virtiotest.Options{})
	for range 20 {
		for range 8 {
			d.Send(0, nil, []int{maxRequest})
		}
		d.Reset()
		d.Activate()
	}
	if written, _ := d.Send(0, nil, []int{7}).Wait(t); written != 7 {
		t.Fatalf("%d bytes after a reset", written)
	}
}

func TestQueueNotEnabled(t *testing.T) {
	virtiotest.NewDriver(t, New(ones{}), virtiotest.Options{Disabled: []int{0}})
}

func TestConfigIsEmpty(t *testing.T) {
	p := []byte{1, 2, 3}
	d := New(ones{})
	d.WriteConfig(0, p)
	d.ReadConfig(0, p)
	if !bytes.Equal(p, make([]byte, 3)) {
		t.Fatal(p)
	}
}

// FuzzChain hands the device whatever chain the fuzzer builds.
func FuzzChain(f *testing.F) {
	f.Add([]byte{0, 64})
	f.Add([]byte{3, 10, 0, 255, 255, 255})
	f.Fuzz(func(t *testing.T, shape []byte) {
		var readable [][]byte
		var writable []int
		total := 0
		for i, b := range shape[:min(len(shape), 8)] {
			if i < int(shape[0])%8 {
				readable = append(readable, make([]byte, b))
			} else {
				writable = append(writable, int(b)<<10)
				total += int(b) << 10
			}
		}
		if len(shape) == 0 {
			return
		}
		d := virtiotest.NewDriver(t, New(ones{}), virtiotest.Options{})
		if written, _ := d.Send(0, readable, writable).Wait(t); int(written) != min(total, maxRequest) {
			t.Fatalf("%d of %d bytes", written, total)
		}
	})
}

func BenchmarkRequest(b *testing.B) {
	for _, size := range []int{64, 4096, maxRequest} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			d := virtiotest.NewDriver(b, New(rand.Reader), virtiotest.Options{})
			r := d.Prepare(0, nil, []int{size})
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				r.Submit()
				r.Join()
			}
		})
	}
}
