package balloon

import (
	"bytes"
	"encoding/binary"
	"io"
	"log/slog"
	"runtime"
	"strings"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

const pageSize = 1 << pageShift

func newDevice() *Device { return New(slog.New(slog.NewTextHandler(io.Discard, nil))) }

// fill takes pages of guest memory and writes to all of them.
func fill(t testing.TB, d *virtiotest.Driver, pages int) (memory.GuestAddress, []byte) {
	t.Helper()
	addr := d.Memory.Alloc(t, pages*pageSize)
	b := d.Memory.Slice(addr, pages*pageSize)
	for i := range b {
		b[i] = 1
	}
	return addr, b
}

func pfns(numbers ...uint32) []byte {
	var b []byte
	for _, n := range numbers {
		b = binary.LittleEndian.AppendUint32(b, n)
	}
	return b
}

// zeroes says which pages of b are zero: "1" where one is, "0" where it is not.
func zeroes(b []byte) string {
	var s strings.Builder
	for ; len(b) > 0; b = b[pageSize:] {
		if bytes.Equal(b[:pageSize], make([]byte, pageSize)) {
			s.WriteByte('1')
		} else {
			s.WriteByte('0')
		}
	}
	return s.String()
}

func TestInflate(t *testing.T) {
	d := virtiotest.NewDriver(t, newDevice(), virtiotest.Options{})
	addr, b := fill(t, d, 8)
	first := uint32(addr >> pageShift)
	far := make([]uint32, maxPFNs+1) // the last is one too many
	for i := range far {
		far[i] = 1
	}
	far[len(far)-1] = first + 7
	for _, tc := range []struct {
		name     string
		readable [][]byte
		want     string
	}{
		{"nothing", [][]byte{{}}, "00000000"},
		{"half a number", [][]byte{{1, 2, 3}}, "00000000"},
		{"one page", [][]byte{pfns(first)}, "10000000"},
		{"some, with a tail", [][]byte{append(pfns(first+1, first+3), 9)}, "11010000"},
		{"a number in two buffers", [][]byte{pfns(first + 4)[:1], pfns(first + 4)[1:]}, "11011000"},
		{"outside guest memory", [][]byte{pfns(0, 1<<32-1, 1<<20, first-1<<20)}, "11011000"},
		{"among others", [][]byte{pfns(0, first+5, 0)}, "11011100"},
		{"more than are looked at", [][]byte{pfns(far...)}, "11011100"},
		{"twice", [][]byte{pfns(first+5, first+5)}, "11011100"},
	} {
		if written, _ := d.Send(inflateQueue, tc.readable, nil).Wait(t); written != 0 {
			t.Errorf("%s: %d bytes written", tc.name, written)
		}
		if got := zeroes(b); got != tc.want {
			t.Errorf("%s: discarded %s, want %s", tc.name, got, tc.want)
		}
	}
	// The guest takes pages back with and without a word.
	d.Send(deflateQueue, [][]byte{pfns(first, 1<<32-1)}, nil).Wait(t)
	b[0] = 1
	if got := zeroes(b); got != "01011100" {
		t.Errorf("after the deflation: %s", got)
	}
}

// send hands in buffers at addresses of the test's choice.
func send(d *virtiotest.Driver, queue int, buffers ...virtiotest.Desc) {
	ring := d.Rings[queue]
	for i, b := range buffers {
		if i+1 < len(buffers) {
			b.Flags |= virtiotest.DescNext
			b.Next = uint16(i + 1)
		}
		ring.SetDesc(uint16(i), b)
	}
	ring.Push(0)
	d.Kick(queue)
}

func TestReport(t *testing.T) {
	for _, tc := range []struct {
		name    string
		ranges  [][2]int // offset and length
		readNot bool
		want    string
	}{
		{"one page", [][2]int{{0, pageSize}}, false, "10000000"},
		{"as Linux does", [][2]int{{0, 2 * pageSize}, {4 * pageSize, pageSize}, {7 * pageSize, pageSize}}, false, "11001001"},
		{"whole pages only", [][2]int{{100, 2 * pageSize}, {4*pageSize + 1, pageSize}}, false, "01000000"},
		{"less than a page", [][2]int{{0, pageSize - 1}}, false, "00000000"},
		{"readable buffers are none", [][2]int{{0, pageSize}}, true, "00000000"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := virtiotest.NewDriver(t, newDevice(), virtiotest.Options{MayFail: true})
			addr, b := fill(t, d, 8)
			var buffers []virtiotest.Desc
			for _, r := range tc.ranges {
				desc := virtiotest.Desc{Addr: addr + memory.GuestAddress(r[0]), Len: uint32(r[1]), Flags: virtiotest.DescWrite}
				if tc.readNot {
					desc.Flags = 0
				}
				buffers = append(buffers, desc)
			}
			send(d, reportingQueue, buffers...)
			ring := d.Rings[reportingQueue]
			for ring.UsedIdx() == 0 {
				runtime.Gosched()
			}
			if _, written := ring.UsedElem(0); written != 0 {
				t.Errorf("%d bytes written", written)
			}
			if got := zeroes(b); got != tc.want {
				t.Errorf("discarded %s, want %s", got, tc.want)
			}
		})
	}
}

func TestBadRanges(t *testing.T) {
	for name, buffer := range map[string]virtiotest.Desc{
		"outside guest memory": {Addr: 1 << 40, Len: pageSize, Flags: virtiotest.DescWrite},
		"across its end":       {Addr: 1<<20 + 4<<20 - pageSize, Len: 2 * pageSize, Flags: virtiotest.DescWrite},
		"huge":                 {Addr: 1 << 20, Len: 1<<32 - 1, Flags: virtiotest.DescWrite},
	} {
		t.Run(name, func(t *testing.T) {
			d := virtiotest.NewDriver(t, newDevice(), virtiotest.Options{MayFail: true})
			_, b := fill(t, d, 8)
			send(d, reportingQueue, buffer)
			if err := d.Failed(); !strings.Contains(err.Error(), "outside guest memory") {
				t.Error(err)
			}
			if got := zeroes(b); got != "00000000" {
				t.Errorf("discarded %s", got)
			}
		})
	}
}

// TestReadOnlyMemory: a page of the guest image is not the balloon's.
func TestReadOnlyMemory(t *testing.T) {
	m := virtiotest.NewMemory(t, 1<<20, 4<<20)
	rom := bytes.Repeat([]byte{1}, 2*pageSize)
	if err := m.Guest.Add(memory.Region{Start: 1 << 30, Bytes: rom, ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	d := virtiotest.NewDriver(t, newDevice(), virtiotest.Options{Memory: m, MayFail: true})
	d.Send(inflateQueue, [][]byte{pfns(1<<18, 1<<18+1)}, nil).Wait(t)
	send(d, reportingQueue, virtiotest.Desc{Addr: 1 << 30, Len: pageSize, Flags: virtiotest.DescWrite})
	if err := d.Failed(); !strings.Contains(err.Error(), "outside guest memory") {
		t.Error(err)
	}
	if bytes.IndexByte(rom, 0) >= 0 {
		t.Error("read-only memory was discarded")
	}
}

func TestConfig(t *testing.T) {
	d := newDevice()
	read := func() []byte {
		p := bytes.Repeat([]byte{0xff}, 20)
		d.ReadConfig(0, p)
		return p
	}
	for _, offset := range []uint64{0, 3, 8, 12, 16, 1 << 40, 1<<64 - 1} {
		d.WriteConfig(offset, []byte{1, 2, 3, 4})
	}
	if got := read(); !bytes.Equal(got, make([]byte, 20)) {
		t.Errorf("configuration %x", got)
	}
	d.WriteConfig(6, []byte{1, 2, 3, 4})
	d.WriteConfig(4, []byte{9})
	if got := read(); !bytes.Equal(got, append(append(make([]byte, 4), 9, 0, 1, 2), make([]byte, 12)...)) {
		t.Errorf("configuration %x", got)
	}
	p := []byte{7}
	d.ReadConfig(1<<64-1, p)
	if p[0] != 0 {
		t.Errorf("%d past the end", p[0])
	}
	d.Reset()
	if got := read(); !bytes.Equal(got, make([]byte, 20)) {
		t.Errorf("configuration after a reset %x", got)
	}
}

// TestQueuesNotEnabled is a driver that did not accept the feature.
func TestQueuesNotEnabled(t *testing.T) {
	virtiotest.NewDriver(t, newDevice(), virtiotest.Options{Disabled: []int{0, 1, 2}})
	d := virtiotest.NewDriver(t, newDevice(), virtiotest.Options{Features: virtiotest.RingFeatures, Disabled: []int{2}})
	addr, b := fill(t, d, 1)
	d.Send(inflateQueue, [][]byte{pfns(uint32(addr >> pageShift))}, nil).Wait(t)
	if got := zeroes(b); got != "1" {
		t.Error("not discarded")
	}
}

func TestResetInFlight(t *testing.T) {
	d := virtiotest.NewDriver(t, newDevice(), virtiotest.Options{})
	for range 20 {
		for range 8 {
			d.Send(inflateQueue, [][]byte{pfns(make([]uint32, maxPFNs)...)}, nil)
			d.Send(reportingQueue, nil, []int{4 * pageSize, pageSize})
		}
		d.Reset()
		d.Activate()
	}
	d.Send(reportingQueue, nil, []int{pageSize}).Wait(t)
}

// FuzzInflate names whatever pages the fuzzer likes, of a memory with a hole, in
// buffers as it cuts them.
func FuzzInflate(f *testing.F) {
	f.Add(pfns(16, 17, 1<<32-1), uint16(3))
	f.Add(pfns(16, 0, 33, 31, 16), uint16(0))
	f.Add([]byte{16}, uint16(1))
	f.Fuzz(func(t *testing.T, readable []byte, cut uint16) {
		d := virtiotest.NewMemory(t, 16<<pageShift, 8*pageSize)
		other := bytes.Repeat([]byte{1}, 2*pageSize)
		if err := d.Guest.Add(memory.Region{Start: 32 << pageShift, Bytes: other, ReadOnly: true}); err != nil {
			t.Fatal(err)
		}
		for i := range d.Bytes {
			d.Bytes[i] = 1
		}
		n := min(int(cut), len(readable))
		newDevice().inflate(d.Guest, &virtio.Chain{Readable: [][]byte{readable[:n], readable[n:]}})
		want := []byte("00000000")
		for i := 0; i < min(len(readable)/4, maxPFNs); i++ {
			if pfn := binary.LittleEndian.Uint32(readable[4*i:]); pfn >= 16 && pfn < 24 {
				want[pfn-16] = '1'
			}
		}
		if got := zeroes(d.Bytes); got != string(want) {
			t.Fatalf("discarded %s, want %s", got, want)
		}
		if bytes.IndexByte(other, 0) >= 0 {
			t.Fatal("read-only memory was discarded")
		}
	})
}

func BenchmarkReport(b *testing.B) {
	m := virtiotest.NewMemory(b, 1<<20, 64<<20)
	d := virtiotest.NewDriver(b, newDevice(), virtiotest.Options{Memory: m})
	ranges := make([]int, 8)
	for i := range ranges {
		ranges[i] = 2 << 20
	}
	r := d.Prepare(reportingQueue, nil, ranges)
	b.ReportAllocs()
	for b.Loop() {
		r.Submit()
		r.Join()
	}
}
