package mem

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"strings"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

const (
	testStart = memory.GuestAddress(1 << 32)
	testBlock = 2 << 20
	testCount = 100
)

// machine is the memory behind a device.
type machine struct {
	t      testing.TB
	blocks *memory.Blocks
	fail   error // of every further Plug and Unplug
}

func (m *machine) set(first, n int, plugged bool) error {
	if m.fail != nil {
		return m.fail
	}
	if n < 1 || first < 0 || first+n > testCount || plugged && m.blocks.Plugged(first, n) != 0 || !plugged && m.blocks.Plugged(first, n) != n {
		m.t.Errorf("plugged %v: blocks %d to %d", plugged, first, first+n)
	}
	for i := range n {
		m.blocks.Set(first+i, plugged)
	}
	return nil
}

func newDevice(t testing.TB) (*Device, *machine) {
	t.Helper()
	blocks, err := memory.NewBlocks(testBlock, testCount)
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t, blocks: blocks}
	d, err := New(Config{
		Start: testStart, Blocks: blocks,
		Plug:   func(first, n int) error { return m.set(first, n, true) },
		Unplug: func(first, n int) error { return m.set(first, n, false) },
		Log:    slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	return d, m
}

func request(kind uint16, addr uint64, count uint16) []byte {
	b := make([]byte, requestSize)
	binary.LittleEndian.PutUint16(b, kind)
	binary.LittleEndian.PutUint64(b[8:], addr)
	binary.LittleEndian.PutUint16(b[16:], count)
	return b
}

// at is the address of a block.
func at(block int) uint64 { return uint64(testStart) + uint64(block)*testBlock }

type answer struct{ status, state uint16 }

func ask(t testing.TB, d *virtiotest.Driver, req []byte) answer {
	t.Helper()
	written, out := d.Send(0, [][]byte{req}, []int{responseSize}).Wait(t)
	if written != responseSize {
		t.Fatalf("answer of %d bytes", written)
	}
	return answer{binary.LittleEndian.Uint16(out[0]), binary.LittleEndian.Uint16(out[0][8:])}
}

func configField(d *Device, offset uint64) uint64 {
	var b [8]byte
	d.ReadConfig(offset, b[:])
	return binary.LittleEndian.Uint64(b[:])
}

func TestRequests(t *testing.T) {
	d, m := newDevice(t)
	driver := virtiotest.NewDriver(t, d, virtiotest.Options{})
	if err := d.Request(20 * testBlock); err != nil {
		t.Fatal(err)
	}
	plugged := 0
	for _, step := range []struct {
		name  string
		kind  uint16
		addr  uint64
		count uint16
		want  answer
		delta int // of the plugged blocks
	}{
		{"state of nothing", requestState, at(0), 100, answer{responseACK, stateUnplugged}, 0},
		{"plug", requestPlug, at(4), 4, answer{responseACK, 0}, 4},
		{"plug the last", requestPlug, at(99), 1, answer{responseACK, 0}, 1},
		{"state plugged", requestState, at(4), 4, answer{responseACK, statePlugged}, 0},
		{"state mixed before", requestState, at(3), 4, answer{responseACK, stateMixed}, 0},
		{"state mixed after", requestState, at(7), 2, answer{responseACK, stateMixed}, 0},
		{"state unplugged", requestState, at(8), 91, answer{responseACK, stateUnplugged}, 0},
		{"plug what is plugged", requestPlug, at(4), 4, answer{responseError, 0}, 0},
		{"plug what is in part", requestPlug, at(2), 3, answer{responseError, 0}, 0},
		{"plug more than requested", requestPlug, at(10), 16, answer{responseNACK, 0}, 0},
		{"plug up to what is requested", requestPlug, at(10), 15, answer{responseACK, 0}, 15},
		{"and one more", requestPlug, at(0), 1, answer{responseNACK, 0}, 0},
		{"unplug from the middle", requestUnplug, at(5), 1, answer{responseACK, 0}, -1},
		{"unplug again", requestUnplug, at(5), 1, answer{responseError, 0}, 0},
		{"unplug what is plugged in part", requestUnplug, at(4), 3, answer{responseError, 0}, 0},
		{"plug it again", requestPlug, at(5), 1, answer{responseACK, 0}, 1},
		{"no block", requestPlug, at(0), 0, answer{responseError, 0}, 0},
		{"no block to unplug", requestUnplug, at(4), 0, answer{responseError, 0}, 0},
		{"state of no block", requestState, at(4), 0, answer{responseError, 0}, 0},
		{"below the region", requestUnplug, uint64(testStart) - testBlock, 1, answer{responseError, 0}, 0},
		{"into the region", requestState, uint64(testStart) - testBlock, 2, answer{responseError, 0}, 0},
		{"out of the region", requestState, at(99), 2, answer{responseError, 0}, 0},
		{"behind the region", requestPlug, at(100), 1, answer{responseError, 0}, 0},
		{"all blocks there can be", requestState, at(0), 65535, answer{responseError, 0}, 0},
		{"at the end of all addresses", requestState, 1<<64 - testBlock, 2, answer{responseError, 0}, 0},
		{"address zero", requestState, 0, 1, answer{responseError, 0}, 0},
		{"not aligned", requestUnplug, at(4) + 4096, 1, answer{responseError, 0}, 0},
		{"unknown", 4, at(4), 1, answer{responseError, 0}, 0},
		{"unknown and large", 65535, at(4), 1, answer{responseError, 0}, 0},
		{"unplug all", requestUnplugAll, 1, 2, answer{responseACK, 0}, -20},
		{"unplug all of nothing", requestUnplugAll, 0, 0, answer{responseACK, 0}, 0},
	} {
		if got := ask(t, driver, request(step.kind, step.addr, step.count)); got != step.want {
			t.Errorf("%s: answer %+v, want %+v", step.name, got, step.want)
		}
		plugged += step.delta
		if n := m.blocks.Plugged(0, testCount); n != plugged || d.Plugged() != uint64(plugged)*testBlock || configField(d, configPlugged) != d.Plugged() {
			t.Errorf("%s: %d blocks plugged, want %d; the device says %d bytes", step.name, n, plugged, d.Plugged())
		}
	}
}

func TestBadChains(t *testing.T) {
	d, _ := newDevice(t)
	driver := virtiotest.NewDriver(t, d, virtiotest.Options{})
	if err := d.Request(testBlock); err != nil {
		t.Fatal(err)
	}
	plug := request(requestPlug, at(0), 1)
	for _, tc := range []struct {
		name     string
		readable [][]byte
		writable []int
		want     []byte // of the answer
	}{
		{"short request", [][]byte{plug[:requestSize-1]}, []int{responseSize}, []byte{responseError, 0}},
		{"no request", nil, []int{responseSize}, []byte{responseError, 0}},
		{"short answer", [][]byte{request(requestPlug, at(0), 2)}, []int{1}, []byte{responseNACK}},
		{"in pieces", [][]byte{plug[:3], plug[3:17], plug[17:]}, []int{1, 9}, []byte{responseACK}},
		{"no answer", [][]byte{request(requestUnplug, at(0), 1)}, nil, nil},
		{"with a tail", [][]byte{append(request(requestState, at(0), 1), 1, 2)}, []int{100}, []byte{responseACK, 0, 0, 0, 0, 0, 0, 0, stateUnplugged, 0, 0}},
	} {
		written, out := driver.Send(0, tc.readable, tc.writable).Wait(t)
		room := 0
		for _, n := range tc.writable {
			room += n
		}
		if int(written) != min(room, responseSize) {
			t.Errorf("%s: %d bytes written", tc.name, written)
		}
		if got := bytes.Join(out, nil); !bytes.HasPrefix(got, tc.want) {
			t.Errorf("%s: answer %x, want %x", tc.name, got, tc.want)
		}
	}
}

func TestRequestedSize(t *testing.T) {
	d, _ := newDevice(t)
	if err := d.Request(testBlock); err != nil { // before there is a driver
		t.Fatal(err)
	}
	driver := virtiotest.NewDriver(t, d, virtiotest.Options{})
	if n := driver.ConfigChanges(); n != 0 {
		t.Errorf("%d configuration changes", n)
	}
	for _, size := range []uint64{testBlock, 3 * testBlock, 3 * testBlock, 0, testCount * testBlock} {
		if err := d.Request(size); err != nil {
			t.Error(err)
		}
		if got := configField(d, configRequested); got != size {
			t.Errorf("requested size %d, want %d", got, size)
		}
	}
	if n := driver.ConfigChanges(); n != 3 {
		t.Errorf("%d configuration changes, want 3", n)
	}
	for _, size := range []uint64{1, testBlock - 1, testCount*testBlock + 1, (testCount + 1) * testBlock, 1<<64 - 1, 1<<64 - testBlock} {
		if err := d.Request(size); !errors.Is(err, ErrSize) {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	driver.Reset()
	if err := d.Request(0); err != nil {
		t.Error(err)
	}
	if n := driver.ConfigChanges(); n != 3 {
		t.Errorf("%d configuration changes after the reset", n)
	}
}

// TestShrink: what is plugged may be more than is requested, and only less helps.
func TestShrink(t *testing.T) {
	d, _ := newDevice(t)
	driver := virtiotest.NewDriver(t, d, virtiotest.Options{})
	d.Request(10 * testBlock)
	ask(t, driver, request(requestPlug, at(0), 10))
	d.Request(5 * testBlock)
	if got := ask(t, driver, request(requestPlug, at(20), 1)); got.status != responseNACK {
		t.Errorf("plug: %+v", got)
	}
	if got := ask(t, driver, request(requestUnplug, at(3), 6)); got.status != responseACK || d.Plugged() != 4*testBlock {
		t.Errorf("unplug: %+v, %d bytes", got, d.Plugged())
	}
	if got := ask(t, driver, request(requestPlug, at(20), 1)); got.status != responseACK {
		t.Errorf("plug: %+v", got)
	}
}

func TestMachineFails(t *testing.T) {
	d, m := newDevice(t)
	driver := virtiotest.NewDriver(t, d, virtiotest.Options{})
	d.Request(10 * testBlock)
	ask(t, driver, request(requestPlug, at(0), 2))
	m.fail = errors.New("no slot")
	for _, req := range [][]byte{request(requestPlug, at(4), 1), request(requestUnplug, at(0), 1), request(requestUnplugAll, 0, 0)} {
		if got := ask(t, driver, req); got.status != responseBusy {
			t.Errorf("answer %+v", got)
		}
	}
	if d.Plugged() != 2*testBlock || m.blocks.Plugged(0, 2) != 2 {
		t.Errorf("%d bytes plugged", d.Plugged())
	}
}

func TestConfigSpace(t *testing.T) {
	d, _ := newDevice(t)
	d.Request(4 * testBlock)
	for offset, want := range map[uint64]uint64{
		configBlockSize: testBlock, configAddr: uint64(testStart), configRegionSize: testCount * testBlock,
		configUsableSize: testCount * testBlock, configPlugged: 0, configRequested: 4 * testBlock,
		8: 0, configSize: 0, 1 << 40: 0, 1<<64 - 1: 0,
	} {
		d.WriteConfig(offset, []byte{1, 2, 3, 4, 5, 6, 7, 8})
		if got := configField(d, offset); got != want {
			t.Errorf("at %d: %#x, want %#x", offset, got, want)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	odd, err := memory.NewBlocks(3<<20, 4)
	if err != nil {
		t.Fatal(err)
	}
	even, err := memory.NewBlocks(2<<20, 4)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]Config{"odd blocks": {Blocks: odd}, "odd start": {Start: 1 << 20, Blocks: even}} {
		if _, err := New(c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestDriverWithoutTheFeature would touch what is not there.
func TestDriverWithoutTheFeature(t *testing.T) {
	d, _ := newDevice(t)
	if err := d.Activate(virtio.Activation{Features: virtiotest.RingFeatures, Queues: []*virtio.Queue{nil}}); err == nil || !strings.Contains(err.Error(), "unplugged") {
		t.Errorf("Activate: %v", err)
	}
}

// TestReset keeps what is plugged, and the next driver finds it.
func TestReset(t *testing.T) {
	d, m := newDevice(t)
	driver := virtiotest.NewDriver(t, d, virtiotest.Options{})
	d.Request(50 * testBlock)
	for i := range 20 {
		for j := range 8 {
			driver.Send(0, [][]byte{request(requestPlug, at(2*i+j%2), 1)}, []int{responseSize})
		}
		driver.Reset()
		if n := m.blocks.Plugged(0, testCount); d.Plugged() != uint64(n)*testBlock {
			t.Fatalf("%d blocks, %d bytes", n, d.Plugged())
		}
		driver.Activate()
	}
	if got := ask(t, driver, request(requestUnplugAll, 0, 0)); got.status != responseACK || d.Plugged() != 0 {
		t.Errorf("unplug all: %+v, %d bytes are left", got, d.Plugged())
	}
}

func TestQueueNotEnabled(t *testing.T) {
	d, _ := newDevice(t)
	virtiotest.NewDriver(t, d, virtiotest.Options{Disabled: []int{0}})
}

// FuzzRequests makes requests of the fuzzer's bytes, five bytes each, and keeps
// books of its own.
func FuzzRequests(f *testing.F) {
	f.Add([]byte{0, 0, 4, 0, 0, 1, 0, 2, 0, 0, 2, 0, 0, 0, 0}, uint8(10))
	f.Add([]byte{0, 99, 1, 0, 0, 3, 98, 2, 0, 0, 0, 100, 1, 0, 0, 0, 0, 0, 1, 0}, uint8(100))
	f.Add([]byte{0, 1, 1, 0, 1, 9, 1, 1, 1, 0}, uint8(1))
	f.Fuzz(func(t *testing.T, script []byte, requested uint8) {
		d, m := newDevice(t)
		d.Request(uint64(min(int(requested), testCount)) * testBlock)
		model := [testCount]bool{}
		for ; len(script) >= 5; script = script[5:] {
			kind, block, count, off := uint16(script[0]), int(script[1]), uint16(script[2])|uint16(script[3])<<8, uint64(script[4])
			var req [requestSize]byte
			copy(req[:], request(kind, at(block)+off, count))
			status, _ := d.handle(req)
			if status == responseACK {
				for i := range testCount {
					in := i >= block && i < block+int(count)
					switch {
					case kind == requestPlug && in:
						if model[i] {
							t.Fatalf("block %d was plugged twice", i)
						}
						model[i] = true
					case kind == requestUnplug && in:
						if !model[i] {
							t.Fatalf("block %d was not plugged", i)
						}
						model[i] = false
					case kind == requestUnplugAll:
						model[i] = false
					}
				}
			}
			n := 0
			for i, plugged := range model {
				if plugged != (m.blocks.Plugged(i, 1) == 1) {
					t.Fatalf("block %d: plugged %v", i, !plugged)
				}
				if plugged {
					n++
				}
			}
			if d.Plugged() != uint64(n)*testBlock || n > int(requested) {
				t.Fatalf("%d blocks of %d requested, the device says %d bytes", n, requested, d.Plugged())
			}
		}
	})
}

func BenchmarkRequest(b *testing.B) {
	d, _ := newDevice(b)
	driver := virtiotest.NewDriver(b, d, virtiotest.Options{})
	r := driver.Prepare(0, [][]byte{request(requestState, at(0), testCount)}, []int{responseSize})
	b.ReportAllocs()
	for b.Loop() {
		r.Submit()
		r.Join()
	}
}
