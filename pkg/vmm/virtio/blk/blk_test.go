package blk

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
	"golang.org/x/sys/unix"
)

const testSectors = 64

// pattern is a byte for each position of a test's disk.
func pattern(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i/sectorSize + 1)
	}
	return p
}

// memoryFile is a file in memory; its file system punches holes, but knows no
// FALLOC_FL_ZERO_RANGE.
func memoryFile(t testing.TB, content []byte) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("disk", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "disk")
	t.Cleanup(func() { _ = f.Close() })
	if _, err := f.WriteAt(content, 0); err != nil {
		t.Fatal(err)
	}
	return f
}

func newDevice(t testing.TB, c Config) *Device {
	t.Helper()
	d, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func contentOf(t testing.TB, f *os.File) []byte {
	t.Helper()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, st.Size())
	if _, err := f.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestNewRefuses(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "disk")
	if err := os.WriteFile(good, make([]byte, 1024), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]int{"empty": 0, "ragged": 1000, "tiny": 511} {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	open := func(path string, flags int) *os.File {
		f, err := os.OpenFile(path, flags, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		return f
	}
	closed := open(good, os.O_RDWR)
	_ = closed.Close()
	for _, tc := range []struct {
		name   string
		config Config
		want   string
	}{
		{"no file", Config{}, "without a file"},
		{"closed file", Config{File: closed}, "fcntl"},
		{"serial too long", Config{File: open(good, os.O_RDWR), Serial: strings.Repeat("x", 21)}, "longer than 20"},
		{"empty", Config{File: open(filepath.Join(dir, "empty"), os.O_RDWR)}, "0 bytes"},
		{"not whole sectors", Config{File: open(filepath.Join(dir, "ragged"), os.O_RDWR)}, "1000 bytes"},
		{"less than a sector", Config{File: open(filepath.Join(dir, "tiny"), os.O_RDONLY), ReadOnly: true}, "511 bytes"},
		{"directory", Config{File: open(dir, os.O_RDONLY), ReadOnly: true}, "neither"},
		{"character device", Config{File: open("/dev/zero", os.O_RDWR)}, "neither"},
		{"not open for writing", Config{File: open(good, os.O_RDONLY)}, "not open"},
		{"not open for reading", Config{File: open(good, os.O_WRONLY)}, "not open"},
		{"not open for reading, read-only", Config{File: open(good, os.O_WRONLY), ReadOnly: true}, "not open"},
		{"open for appending", Config{File: open(good, os.O_RDWR|os.O_APPEND)}, "appending"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := New(tc.config); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want an error with %q", err, tc.want)
			}
		})
	}
}

func TestConfig(t *testing.T) {
	d := newDevice(t, Config{File: memoryFile(t, make([]byte, 0x12345*512))})
	whole := make([]byte, 64)
	d.WriteConfig(0, bytes.Repeat([]byte{0xff}, 64)) // has no effect
	d.ReadConfig(0, whole)
	// capacity, size_max, seg_max, geometry, blk_size, topology, writeback and
	// num_queues, discard (3), write zeroes (3), the end.
	const want = "4523010000000000" + "00000000" + "fe000000" + "00000000" + "00020000" + "0000000000000000" + "00000000" +
		"00002000" + "20000000" + "08000000" + "00000100" + "01000000" + "01000000" + "00000000"
	if got := hex.EncodeToString(whole); got != want {
		t.Errorf("config is\n%s, want\n%s", got, want)
	}
	for _, offset := range []uint64{1, 7, 59, 60, 1 << 40, math.MaxUint64} {
		p := bytes.Repeat([]byte{0xee}, 4)
		d.ReadConfig(offset, p)
		expect := make([]byte, 4)
		if offset < 64 {
			copy(expect, whole[offset:])
		}
		if !bytes.Equal(p, expect) {
			t.Errorf("at %d: %x, want %x", offset, p, expect)
		}
	}
	if got := d.Features(); got != featureSegMax|featureBlkSize|featureFlush|featureDiscard|featureWriteZeroes {
		t.Errorf("features %#x", got)
	}
	if got := newDevice(t, Config{File: memoryFile(t, make([]byte, 512)), ReadOnly: true}).Features(); got&featureReadOnly == 0 || got&(featureDiscard|featureWriteZeroes) != 0 {
		t.Errorf("features of a read-only disk %#x", got)
	}
}

func header(kind uint32, sector uint64) []byte {
	h := binary.LittleEndian.AppendUint32(nil, kind)
	h = binary.LittleEndian.AppendUint32(h, 0)
	return binary.LittleEndian.AppendUint64(h, sector)
}

func segment(sector uint64, sectors, flags uint32) []byte {
	s := binary.LittleEndian.AppendUint64(nil, sector)
	s = binary.LittleEndian.AppendUint32(s, sectors)
	return binary.LittleEndian.AppendUint32(s, flags)
}

func repeat(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }

// request is one of the table's, and what has to come of it.
type request struct {
	name     string
	readable [][]byte
	writable []int
	status   byte
	in       []byte          // data before the status
	change   func(p []byte)  // what happens to the disk
	features uint64          // not accepted
	config   func(c *Config) // of the device
}

var requests = []request{
	{name: "read", readable: [][]byte{header(typeIn, 3)}, writable: []int{512, 1}, in: repeat(4, 512)},
	{name: "read the last sector", readable: [][]byte{header(typeIn, 63)}, writable: []int{512, 1}, in: repeat(64, 512)},
	{name: "read everything", readable: [][]byte{header(typeIn, 0)}, writable: []int{testSectors * 512, 1}, in: pattern(testSectors * 512)},
	{name: "read in pieces of any size", readable: [][]byte{header(typeIn, 3)}, writable: []int{1, 500, 523, 1}, in: pattern(testSectors * 512)[3*512 : 5*512]},
	{name: "read, status with the data", readable: [][]byte{header(typeIn, 3)}, writable: []int{513}, in: repeat(4, 512)},
	{name: "read, header in pieces", readable: [][]byte{header(typeIn, 3)[:1], header(typeIn, 3)[1:7], header(typeIn, 3)[7:]}, writable: []int{512, 1}, in: repeat(4, 512)},
	{name: "read nothing", readable: [][]byte{header(typeIn, 64)}, writable: []int{1}},
	{name: "read past the end", readable: [][]byte{header(typeIn, 64)}, writable: []int{512, 1}, status: statusIOError},
	{name: "read across the end", readable: [][]byte{header(typeIn, 63)}, writable: []int{1024, 1}, status: statusIOError},
	{name: "read far past the end", readable: [][]byte{header(typeIn, 65)}, writable: []int{1}, status: statusIOError},
	{name: "read at the last sector number", readable: [][]byte{header(typeIn, math.MaxUint64)}, writable: []int{512, 1}, status: statusIOError},
	{name: "read at a sector that wraps around as bytes", readable: [][]byte{header(typeIn, 1<<55)}, writable: []int{512, 1}, status: statusIOError},
	{name: "read part of a sector", readable: [][]byte{header(typeIn, 0)}, writable: []int{511, 1}, status: statusIOError},
	{name: "read with data", readable: [][]byte{header(typeIn, 0), {1}}, writable: []int{512, 1}, status: statusIOError},
	{name: "short header", readable: [][]byte{header(typeIn, 0)[:15]}, writable: []int{512, 1}, status: statusIOError},
	{name: "no header", writable: []int{512, 1}, status: statusIOError},
	{name: "unknown type", readable: [][]byte{header(2, 0)}, writable: []int{1}, status: statusUnsupported},
	{name: "unknown type with data", readable: [][]byte{header(math.MaxUint32, 0), {1}}, writable: []int{10, 1}, status: statusUnsupported},
	{name: "lifetime", readable: [][]byte{header(10, 0)}, writable: []int{6, 1}, status: statusUnsupported},
	{name: "secure erase", readable: [][]byte{header(14, 0), segment(0, 1, 0)}, writable: []int{1}, status: statusUnsupported},

	{name: "write", readable: [][]byte{header(typeOut, 3), repeat(0xaa, 512)}, writable: []int{1},
		change: func(p []byte) { copy(p[3*512:], repeat(0xaa, 512)) }},
	{name: "write, header with the data", readable: [][]byte{append(header(typeOut, 3), repeat(0xaa, 1024)...)}, writable: []int{1},
		change: func(p []byte) { copy(p[3*512:], repeat(0xaa, 1024)) }},
	{name: "write in pieces of any size", readable: [][]byte{append(header(typeOut, 60), 0xaa), repeat(0xaa, 1000), repeat(0xaa, 1047)}, writable: []int{1},
		change: func(p []byte) { copy(p[60*512:], repeat(0xaa, 2048)) }},
	{name: "write through", readable: [][]byte{header(typeOut, 3), repeat(0xaa, 512)}, writable: []int{1}, features: featureFlush,
		change: func(p []byte) { copy(p[3*512:], repeat(0xaa, 512)) }},
	{name: "write nothing", readable: [][]byte{header(typeOut, 0)}, writable: []int{1}},
	{name: "write past the end", readable: [][]byte{header(typeOut, 64), repeat(0xaa, 512)}, writable: []int{1}, status: statusIOError},
	{name: "write across the end", readable: [][]byte{header(typeOut, 63), repeat(0xaa, 1024)}, writable: []int{1}, status: statusIOError},
	{name: "write at a sector that wraps around as bytes", readable: [][]byte{header(typeOut, 1<<55), repeat(0xaa, 512)}, writable: []int{1}, status: statusIOError},
	{name: "write part of a sector", readable: [][]byte{header(typeOut, 0), repeat(0xaa, 513)}, writable: []int{1}, status: statusIOError},
	{name: "write with room for data", readable: [][]byte{header(typeOut, 0), repeat(0xaa, 512)}, writable: []int{512, 1}, status: statusIOError},
	{name: "write to a read-only disk", readable: [][]byte{header(typeOut, 0), repeat(0xaa, 512)}, writable: []int{1}, status: statusIOError, config: readOnly},

	{name: "flush", readable: [][]byte{header(typeFlush, 0)}, writable: []int{1}},
	{name: "flush a read-only disk", readable: [][]byte{header(typeFlush, 0)}, writable: []int{1}, config: readOnly},
	{name: "flush with data", readable: [][]byte{header(typeFlush, 99), repeat(1, 7)}, writable: []int{1}},
	{name: "flush with room for data", readable: [][]byte{header(typeFlush, 0)}, writable: []int{7, 1}, status: statusIOError},

	{name: "id", readable: [][]byte{header(typeGetID, 0)}, writable: []int{20, 1}, in: append([]byte("serial-7"), make([]byte, 12)...)},
	{name: "longest id", readable: [][]byte{header(typeGetID, 0)}, writable: []int{20, 1}, in: []byte("01234567890123456789"), config: func(c *Config) { c.Serial = "01234567890123456789" }},
	{name: "id in pieces", readable: [][]byte{header(typeGetID, 0)}, writable: []int{3, 18}, in: append([]byte("serial-7"), make([]byte, 12)...)},
	{name: "id, little room", readable: [][]byte{header(typeGetID, 0)}, writable: []int{19, 1}, status: statusIOError},
	{name: "id, no room", readable: [][]byte{header(typeGetID, 0)}, writable: []int{1}, status: statusIOError},
	{name: "id with data", readable: [][]byte{header(typeGetID, 0), {1}}, writable: []int{20, 1}, status: statusIOError},

	{name: "discard", readable: [][]byte{header(typeDiscard, 0), segment(8, 8, 0)}, writable: []int{1}, change: func(p []byte) { clear(p[8*512 : 16*512]) }},
	{name: "discard several", readable: [][]byte{header(typeDiscard, 0), segment(8, 8, 0), segment(0, 1, 0), segment(63, 1, 0)}, writable: []int{1},
		change: func(p []byte) { clear(p[8*512 : 16*512]); clear(p[:512]); clear(p[63*512:]) }},
	{name: "discard, segment in pieces", readable: [][]byte{append(header(typeDiscard, 0), segment(8, 8, 0)[:5]...), segment(8, 8, 0)[5:]}, writable: []int{1}, change: func(p []byte) { clear(p[8*512 : 16*512]) }},
	{name: "discard nothing", readable: [][]byte{header(typeDiscard, 0), segment(8, 0, 0)}, writable: []int{1}},
	{name: "discard without segments", readable: [][]byte{header(typeDiscard, 0)}, writable: []int{1}, status: statusIOError},
	{name: "discard part of a segment", readable: [][]byte{header(typeDiscard, 0), segment(8, 8, 0)[:15]}, writable: []int{1}, status: statusIOError},
	{name: "discard too many", readable: [][]byte{header(typeDiscard, 0), bytes.Repeat(segment(0, 1, 0), 33)}, writable: []int{1}, status: statusIOError},
	{name: "discard most", readable: [][]byte{header(typeDiscard, 0), bytes.Repeat(segment(0, 1, 0), 32)}, writable: []int{1}, change: func(p []byte) { clear(p[:512]) }},
	{name: "discard too much", readable: [][]byte{header(typeDiscard, 0), segment(0, maxDiscardSectors+1, 0)}, writable: []int{1}, status: statusIOError},
	{name: "discard across the end", readable: [][]byte{header(typeDiscard, 0), segment(63, 2, 0)}, writable: []int{1}, status: statusIOError},
	{name: "discard, wraps around", readable: [][]byte{header(typeDiscard, 0), segment(math.MaxUint64, 2, 0)}, writable: []int{1}, status: statusIOError},
	{name: "discard, second is bad", readable: [][]byte{header(typeDiscard, 0), segment(0, 8, 0), segment(63, 2, 0)}, writable: []int{1}, status: statusIOError},
	{name: "discard with unmap", readable: [][]byte{header(typeDiscard, 0), segment(8, 8, 1)}, writable: []int{1}, status: statusUnsupported},
	{name: "discard with an unknown flag", readable: [][]byte{header(typeDiscard, 0), segment(8, 8, 0x80000000)}, writable: []int{1}, status: statusUnsupported},
	{name: "discard not negotiated", readable: [][]byte{header(typeDiscard, 0), segment(8, 8, 0)}, writable: []int{1}, status: statusUnsupported, features: featureDiscard},
	{name: "discard on a read-only disk", readable: [][]byte{header(typeDiscard, 0), segment(8, 8, 0)}, writable: []int{1}, status: statusUnsupported, config: readOnly},
	{name: "discard with room for data", readable: [][]byte{header(typeDiscard, 0), segment(8, 8, 0)}, writable: []int{5, 1}, status: statusIOError},

	{name: "write zeroes", readable: [][]byte{header(typeWriteZeroes, 0), segment(8, 9, 0)}, writable: []int{1}, change: func(p []byte) { clear(p[8*512 : 17*512]) }},
	{name: "write zeroes and unmap", readable: [][]byte{header(typeWriteZeroes, 0), segment(8, 9, 1)}, writable: []int{1}, change: func(p []byte) { clear(p[8*512 : 17*512]) }},
	{name: "write zeroes through", readable: [][]byte{header(typeWriteZeroes, 0), segment(8, 9, 0)}, writable: []int{1}, features: featureFlush, change: func(p []byte) { clear(p[8*512 : 17*512]) }},
	{name: "write zeroes everywhere", readable: [][]byte{header(typeWriteZeroes, 0), segment(0, testSectors, 0)}, writable: []int{1}, change: func(p []byte) { clear(p) }},
	{name: "write zeroes with an unknown flag", readable: [][]byte{header(typeWriteZeroes, 0), segment(8, 9, 2)}, writable: []int{1}, status: statusUnsupported},
	{name: "write zeroes too many", readable: [][]byte{header(typeWriteZeroes, 0), segment(8, 1, 0), segment(9, 1, 0)}, writable: []int{1}, status: statusIOError},
	{name: "write zeroes too much", readable: [][]byte{header(typeWriteZeroes, 0), segment(0, maxWriteZeroesSectors+1, 0)}, writable: []int{1}, status: statusIOError},
	{name: "write zeroes across the end", readable: [][]byte{header(typeWriteZeroes, 0), segment(60, 5, 0)}, writable: []int{1}, status: statusIOError},
	{name: "write zeroes not negotiated", readable: [][]byte{header(typeWriteZeroes, 0), segment(8, 9, 0)}, writable: []int{1}, status: statusUnsupported, features: featureWriteZeroes},
}

func readOnly(c *Config) { c.ReadOnly = true }

func TestRequests(t *testing.T) {
	for where, file := range map[string]func(*testing.T) *os.File{
		"memory": func(t *testing.T) *os.File { return memoryFile(t, pattern(testSectors*512)) },
		"disk": func(t *testing.T) *os.File {
			f, err := os.CreateTemp(t.TempDir(), "disk")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = f.Close() })
			if _, err := f.Write(pattern(testSectors * 512)); err != nil {
				t.Fatal(err)
			}
			return f
		},
	} {
		for _, tc := range requests {
			t.Run(where+"/"+tc.name, func(t *testing.T) {
				c := Config{File: file(t), Serial: "serial-7"}
				if tc.config != nil {
					tc.config(&c)
				}
				device := newDevice(t, c)
				d := virtiotest.NewDriver(t, device, virtiotest.Options{Features: device.Features()&^tc.features | virtiotest.RingFeatures})
				written, out := d.Send(0, tc.readable, tc.writable).Wait(t)
				all := bytes.Join(out, nil)
				in, status := all[:len(all)-1], all[len(all)-1]
				if status != tc.status {
					t.Fatalf("status %d, want %d", status, tc.status)
				}
				if want := len(tc.in) + 1; status == statusOK && int(written) != want {
					t.Errorf("used length %d, want %d", written, want)
				}
				if status != statusOK && written > 1 {
					t.Errorf("used length %d of a request that failed", written)
				}
				if tc.in != nil && !bytes.Equal(in, tc.in) {
					t.Errorf("read %x, want %x", in, tc.in)
				}
				want := pattern(testSectors * 512)
				if tc.change != nil {
					tc.change(want)
				}
				if got := contentOf(t, c.File); !bytes.Equal(got, want) {
					t.Error("the disk's content is not what it should be")
				}
			})
		}
	}
}

// A request without room for the status is given back; nothing else can be done.
func TestNoStatus(t *testing.T) {
	f := memoryFile(t, pattern(1024))
	d := virtiotest.NewDriver(t, newDevice(t, Config{File: f}), virtiotest.Options{})
	if written, _ := d.Send(0, [][]byte{header(typeOut, 0), make([]byte, 512)}, nil).Wait(t); written != 0 {
		t.Fatalf("%d bytes written to nowhere", written)
	}
	if !bytes.Equal(contentOf(t, f), pattern(1024)) {
		t.Fatal("written without a way to say so")
	}
}

// The largest request a driver may send, with status and header apart.
func TestMostSegments(t *testing.T) {
	f := memoryFile(t, pattern(segMax*512))
	d := virtiotest.NewDriver(t, newDevice(t, Config{File: f}), virtiotest.Options{})
	var lens []int
	for range segMax {
		lens = append(lens, 512)
	}
	written, out := d.Send(0, [][]byte{header(typeIn, 0)}, append(lens, 1)).Wait(t)
	if want := append(pattern(segMax*512), 0); int(written) != len(want) || !bytes.Equal(bytes.Join(out, nil), want) {
		t.Fatalf("%d bytes", written)
	}
}

func TestHostErrors(t *testing.T) {
	var log bytes.Buffer
	f := memoryFile(t, pattern(testSectors*512))
	d := virtiotest.NewDriver(t, newDevice(t, Config{File: f, Log: slog.New(slog.NewTextHandler(&log, nil))}), virtiotest.Options{})
	if err := f.Truncate(512 + 100); err != nil { // somebody else has cut the file
		t.Fatal(err)
	}
	status := func(readable [][]byte, writable ...int) byte {
		_, out := d.Send(0, readable, append(writable, 1)).Wait(t)
		return out[len(out)-1][0]
	}
	if s := status([][]byte{header(typeIn, 0)}, 512); s != statusOK {
		t.Errorf("reading what is left: status %d", s)
	}
	for range 100 {
		if s := status([][]byte{header(typeIn, 0)}, 1024); s != statusIOError {
			t.Fatalf("reading what is gone: status %d", s)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for name, request := range map[string][][]byte{
		"write": {header(typeOut, 0), make([]byte, 512)}, "flush": {header(typeFlush, 0)},
		"discard": {header(typeDiscard, 0), segment(0, 1, 0)}, "write zeroes": {header(typeWriteZeroes, 0), segment(0, 1, 0)},
	} {
		if s := status(request); s != statusIOError {
			t.Errorf("%s on a closed file: status %d", name, s)
		}
	}
	d.Reset()
	if n := strings.Count(log.String(), "\n"); n != 1 || !strings.Contains(log.String(), "unexpected EOF") {
		t.Errorf("the log has %d lines:\n%s", n, log.String())
	}
}

// Goroutines write, zero and read back areas of their own, all at once, and the
// file is what a model of it says.
func TestConcurrentRequests(t *testing.T) {
	const area, areas = 64, 8
	f := memoryFile(t, make([]byte, area*areas*512))
	model := make([]byte, area*areas*512)
	d := virtiotest.NewDriver(t, newDevice(t, Config{File: f}), virtiotest.Options{})
	var guests sync.WaitGroup
	for g := range areas {
		guests.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(g), 7))
			mine := model[g*area*512:][:area*512]
			for range 300 {
				at := rnd.IntN(area)
				n := 1 + rnd.IntN(min(area-at, 16))
				sector := uint64(g*area + at)
				part := mine[at*512:][:n*512]
				switch rnd.IntN(4) {
				case 0, 1:
					for i := range part {
						part[i] = byte(rnd.Uint32())
					}
					cut := rnd.IntN(len(part))
					_, out := d.Send(0, [][]byte{header(typeOut, sector), part[:cut], part[cut:]}, []int{1}).Wait(t)
					if out[0][0] != statusOK {
						t.Errorf("write: status %d", out[0][0])
					}
				case 2:
					clear(part)
					_, out := d.Send(0, [][]byte{header(typeWriteZeroes, 0), segment(sector, uint32(n), uint32(rnd.IntN(2)))}, []int{1}).Wait(t)
					if out[0][0] != statusOK {
						t.Errorf("write zeroes: status %d", out[0][0])
					}
				case 3:
					_, out := d.Send(0, [][]byte{header(typeIn, sector)}, []int{len(part), 1}).Wait(t)
					if out[1][0] != statusOK || !bytes.Equal(out[0], part) {
						t.Errorf("read: status %d, or wrong data", out[1][0])
					}
				}
			}
		})
	}
	guests.Wait()
	if !bytes.Equal(contentOf(t, f), model) {
		t.Fatal("the file's content is wrong")
	}
}

func TestResetInFlight(t *testing.T) {
	f := memoryFile(t, make([]byte, 1<<20))
	d := virtiotest.NewDriver(t, newDevice(t, Config{File: f}), virtiotest.Options{})
	for range 20 {
		for i := range 20 {
			d.Send(0, [][]byte{header(typeIn, uint64(i))}, []int{16 << 10, 1})
			d.Send(0, [][]byte{header(typeOut, uint64(i)), make([]byte, 16<<10)}, []int{1})
		}
		d.Reset()
		d.Activate()
	}
}

func TestBadRing(t *testing.T) {
	d := virtiotest.NewDriver(t, newDevice(t, Config{File: memoryFile(t, make([]byte, 512))}), virtiotest.Options{MayFail: true})
	d.Rings[0].SetDesc(0, virtiotest.Desc{Addr: 1 << 20, Len: 16, Flags: virtiotest.DescNext})
	d.Rings[0].Push(0)
	d.Kick(0)
	if err := d.Failed(); !strings.Contains(err.Error(), "longer than the queue") {
		t.Fatal(err)
	}
}

func TestQueueNotEnabled(t *testing.T) {
	virtiotest.NewDriver(t, newDevice(t, Config{File: memoryFile(t, make([]byte, 512))}), virtiotest.Options{Disabled: []int{0}})
}
