package virtiotest

import (
	"log/slog"
	"math"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/microvm-runtime/microvm/pkg/internal/alloctest"
	"github.com/microvm-runtime/microvm/pkg/vmm/eventfd"
	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
)

// Victim is a device that a hostile driver attacks.
type Victim struct {
	// New makes the device, and may have it cleaned up with t. What it logs is
	// counted.
	New func(t testing.TB, log *slog.Logger) virtio.Device
	// Requests are well-formed, so that those made from them get far.
	Requests []HostileRequest
	// Works sends a request to a device that is not attacked and checks the
	// answer. It is called while the other one is under attack.
	Works func(t testing.TB, d *Driver)
	// MaxLines is how many lines the device may log from one activation to the
	// next; besides there may be one that it logs once.
	MaxLines int
}

// HostileRequest is a request for a Victim: what the device is to read, and how
// much room there is for its answer.
type HostileRequest struct {
	Queue    int
	Readable []byte
	Room     int
}

const (
	// hostileMemory is small enough for a machine of tests, and large enough for
	// descriptors that claim much.
	hostileMemory = 16 << 20
	hostileStart  = memory.GuestAddress(1 << 20)
	// hostileQueue makes indices wrap around and rings fill up soon.
	hostileQueue = 16
	// hostileSteps bounds a script.
	hostileSteps = 300
	// hostileBytes is what a device may allocate while a script runs: a chain of
	// hostileQueue descriptors claims up to 32 times as much.
	hostileBytes = 8 << 20
)

// hostile is a driver that keeps no rule. Its memory is not Go's, so that guest
// and device may race for it without the race detector's complaint, as they do
// in a virtual machine.
type hostile struct {
	t       testing.TB
	victim  *Victim
	device  virtio.Device
	mem     *Memory
	rings   []*Ring
	tables  memory.GuestAddress // an indirect table for each ring
	payload memory.GuestAddress // of payloadSize bytes
	next    uint32              // where in payload the next request goes
	script  Script

	active      bool
	activations int
	enabled     []*virtio.Queue
	kicks       []*eventfd.EventFD
	failures    atomic.Int64
}

const payloadSize = 1 << 20

func newHostile(t testing.TB, victim *Victim, device virtio.Device) *hostile {
	t.Helper()
	h := &hostile{t: t, victim: victim, device: device, mem: NewMappedMemory(t, hostileStart, hostileMemory)}
	for _, size := range device.QueueSizes() {
		h.rings = append(h.rings, NewRing(t, h.mem, min(size, hostileQueue)))
	}
	h.tables = h.mem.Alloc(t, len(h.rings)*hostileQueue*DescSize)
	h.payload = h.mem.Alloc(t, payloadSize)
	return h
}

func (h *hostile) uint16() uint16 { return uint16(h.script.Byte())<<8 | uint16(h.script.Byte()) }

// activate enables the queues and features that the script names.
func (h *hostile) activate() {
	features := h.device.Features() | RingFeatures
	choice := h.script.Byte()
	for i, f := range []uint64{virtio.FeatureIndirectDesc, virtio.FeatureEventIdx} {
		if choice>>i&1 != 0 {
			features &^= f
		}
	}
	if choice&4 != 0 {
		features &= RingFeatures | uint64(h.uint16()) // of the device's own what the script likes
	}
	disabled := byte(0)
	if choice&8 != 0 {
		disabled = h.script.Byte()
	}
	a := virtio.Activation{
		Features: features, Memory: h.mem.Guest,
		ConfigChanged: func() {},
		Fail:          func(error) { h.failures.Add(1) },
	}
	h.enabled, h.kicks = nil, nil
	for i, r := range h.rings {
		if disabled>>(i%8)&1 != 0 {
			a.Queues, h.kicks = append(a.Queues, nil), append(h.kicks, nil)
			continue
		}
		kick, err := eventfd.New()
		if err != nil {
			h.t.Fatal(err)
		}
		c := r.Config(features)
		c.Kick, c.Interrupt = kick, func() {}
		q, err := virtio.NewQueue(c)
		if err != nil {
			h.t.Fatal(err)
		}
		a.Queues, h.kicks = append(a.Queues, q), append(h.kicks, kick)
	}
	h.enabled = a.Queues
	h.active = true
	h.activations++
	// A device may need queues that are not there: the transport then leaves it
	// to the driver to reset it.
	if err := h.device.Activate(a); err == nil {
		for i := range h.rings {
			h.kick(i)
		}
	}
}

// reset is what the transport does, at any time. A device that does not come to
// its end is a bug: it would hang the vCPU that asked for it.
func (h *hostile) reset() {
	if !h.active {
		return
	}
	for _, q := range h.enabled {
		if q != nil {
			q.Close()
		}
	}
	stuck := time.AfterFunc(hangs, func() { panic("virtiotest: the device cannot be reset") })
	h.device.Reset()
	stuck.Stop()
	for _, k := range h.kicks {
		if k != nil {
			k.Close()
		}
	}
	h.active, h.enabled, h.kicks = false, nil, nil
}

func (h *hostile) kick(queue int) {
	if queue < len(h.kicks) && h.kicks[queue] != nil {
		if err := h.kicks[queue].Signal(); err != nil {
			h.t.Fatal(err)
		}
	}
}

// addr makes addresses: mostly of memory, some of the rings, some of nothing.
func (h *hostile) addr() memory.GuestAddress {
	switch b := h.script.Byte(); {
	case b < 0x80:
		return h.payload + memory.GuestAddress(b)<<12 | memory.GuestAddress(h.script.Byte())
	case b < 0xa0:
		return h.rings[int(b)%len(h.rings)].Desc + memory.GuestAddress(h.script.Byte())
	case b < 0xb0:
		return h.rings[int(b)%len(h.rings)].Used
	case b < 0xd0:
		return h.table(int(b) % len(h.rings))
	case b < 0xf0:
		return hostileStart // as much as there is
	case b == 0xff:
		return math.MaxUint64 - memory.GuestAddress(h.script.Byte())
	case b == 0xfe:
		return 0
	default:
		return hostileStart + hostileMemory - memory.GuestAddress(h.script.Byte())
	}
}

// length makes lengths: mostly short, some all of memory, some impossible.
func (h *hostile) length() uint32 {
	switch b := h.script.Byte(); {
	case b < 0x80:
		return uint32(b)
	case b < 0xc0:
		return uint32(b&0x3f)<<8 | uint32(h.script.Byte())
	case b < 0xe0:
		return hostileMemory
	case b < 0xf0:
		return DescSize * uint32(b&0xf)
	default:
		return math.MaxUint32 - uint32(b&0xf)
	}
}

func (h *hostile) table(queue int) memory.GuestAddress {
	return h.tables + memory.GuestAddress(queue*hostileQueue*DescSize)
}

// request puts a request together from a well-formed one, in pieces, changes
// some of it before it is made available, and some after.
func (h *hostile) request() {
	if len(h.victim.Requests) == 0 {
		return
	}
	request := h.victim.Requests[int(h.script.Byte())%len(h.victim.Requests)]
	r := h.rings[request.Queue]
	size := uint32(len(request.Readable) + request.Room)
	if h.next+size > payloadSize {
		h.next = 0
	}
	addr := h.payload + memory.GuestAddress(h.next)
	h.next += (size + 15) &^ 15
	bytes := h.mem.Slice(addr, len(request.Readable))
	copy(bytes, request.Readable)
	h.scribble(bytes)
	shape := h.script.Byte()
	head := uint16(shape>>4) % r.Size
	cut := min(len(bytes), int(h.script.Byte()))
	var descs []Desc
	for _, d := range []Desc{
		{Addr: addr, Len: uint32(cut)},
		{Addr: addr + memory.GuestAddress(cut), Len: uint32(len(bytes) - cut)},
		{Addr: addr + memory.GuestAddress(len(bytes)), Len: uint32(request.Room), Flags: DescWrite},
	} {
		if d.Len > 0 {
			descs = append(descs, d)
		}
	}
	if shape&1 != 0 {
		table := h.table(request.Queue)
		for i, d := range descs {
			if i+1 < len(descs) {
				d.Flags, d.Next = d.Flags|DescNext, uint16(i+1)
			}
			h.mem.SetDesc(table, uint16(i), d)
		}
		r.SetDesc(head, Desc{Addr: table, Len: uint32(DescSize * len(descs)), Flags: DescIndirect})
	} else {
		for i, d := range descs {
			if i+1 < len(descs) {
				d.Flags, d.Next = d.Flags|DescNext, (head+uint16(i)+1)%r.Size
			}
			r.SetDesc((head+uint16(i))%r.Size, d)
		}
	}
	r.Push(head)
	h.kick(request.Queue)
	if shape&2 != 0 {
		runtime.Gosched()
	}
	if shape&4 != 0 {
		h.scribble(bytes)
	}
	if shape&8 != 0 { // and the descriptors under the device's hands
		r.SetDesc(head, Desc{Addr: h.addr(), Len: h.length(), Flags: uint16(h.script.Byte()), Next: uint16(h.script.Byte())})
	}
}

func (h *hostile) scribble(b []byte) {
	for n := h.script.Byte() % 8; n > 0 && len(b) > 0; n-- {
		b[int(h.uint16())%len(b)] = h.script.Byte()
	}
}

// Steps of a script, in the low half of a byte; the high half is a queue. Any
// other is stepRequest too.
const (
	stepDesc = iota
	stepDescToo
	stepTable
	stepPush
	stepIndex
	stepKick
	stepPayload
	stepConfig
	stepReset
	stepEvent
	stepYield
	stepRequest
)

// run plays the script and resets the device.
func (h *hostile) run(script []byte) {
	h.script = script
	h.activate()
	for steps := 0; len(h.script) > 0 && steps < hostileSteps; steps++ {
		op := h.script.Byte()
		queue := int(op>>4) % len(h.rings)
		r := h.rings[queue]
		switch op & 15 {
		case stepDesc, stepDescToo:
			r.SetDesc(uint16(h.script.Byte())%r.Size, Desc{Addr: h.addr(), Len: h.length(), Flags: uint16(h.script.Byte()), Next: uint16(h.script.Byte())})
		case stepTable:
			h.mem.SetDesc(h.table(queue), uint16(h.script.Byte())%hostileQueue, Desc{Addr: h.addr(), Len: h.length(), Flags: uint16(h.script.Byte()), Next: uint16(h.script.Byte())})
		case stepPush:
			r.Push(uint16(h.script.Byte()))
			h.kick(queue)
		case stepIndex:
			r.SetAvailIdx(r.AvailIdx() + uint16(int8(h.script.Byte())))
		case stepKick:
			h.kick(queue)
		case stepPayload:
			h.scribble(h.mem.Slice(h.payload, payloadSize))
		case stepConfig: // the guest chooses the offset; the transport bounds the length
			p := make([]byte, h.script.Byte()%9)
			for i := range p {
				p[i] = h.script.Byte()
			}
			offset := uint64(h.script.Byte())
			if offset >= 0xf0 {
				offset = math.MaxUint64 - offset&15
			}
			h.device.WriteConfig(offset, p)
			h.device.ReadConfig(offset, p)
		case stepReset:
			h.reset()
			if h.script.Byte()&1 != 0 {
				r.Clear()
			}
			h.activate()
		case stepEvent:
			r.SetUsedEvent(h.uint16())
			r.SetAvailFlags(uint16(h.script.Byte()))
		case stepYield:
			r.settle()
		default:
			h.request()
		}
	}
	if len(script)%2 == 0 { // else with requests in flight
		for _, r := range h.rings {
			r.settle()
		}
	}
	h.reset()
}

// settle lets the device come to what was made available. A ring that is broken,
// or whose buffers a device keeps, has no such moment.
func (r *Ring) settle() {
	for i := 0; i < 8 && r.UsedIdx() != r.AvailIdx(); i++ {
		time.Sleep(10 * time.Microsecond)
	}
}

// TestHostile plays random scripts on a device while others change all of the
// memory that it shares with its driver, and looks at what that costs the host.
func TestHostile(t *testing.T, victim *Victim) {
	lines, activations := new(lineCounter), 0
	usage := Measure(t)
	// What is made here is gone before the end is looked at.
	t.Run("attack", func(t *testing.T) {
		device := victim.New(t, slog.New(lines))
		h := newHostile(t, victim, device)
		other := NewDriver(t, victim.New(t, slog.New(slog.DiscardHandler)), Options{Memory: NewMemory(t, 1<<20, 8<<20)})
		var stop atomic.Bool
		var vandals sync.WaitGroup
		defer vandals.Wait()
		defer stop.Store(true)
		for i := range uint64(2) {
			vandals.Go(func() { h.vandalise(rand.New(rand.NewPCG(i, 2)), &stop) }) // #nosec G404 -- the same attack each time
		}
		rnd := rand.New(rand.NewPCG(1, 2)) // #nosec G404 -- likewise
		for round := range 60 {
			check := alloctest.Limit(t, hostileBytes)
			h.run(h.randomScript(rnd))
			check()
			if round%10 == 0 {
				victim.Works(t, other)
			}
		}
		activations = h.activations
		if h.failures.Load() == 0 {
			t.Error("no ring was broken: the test shows nothing")
		}
	})
	usage.Settle()
	if n, most := int(lines.n.Load()), 1+victim.MaxLines*activations; n > most {
		t.Errorf("the device logged %d lines in %d activations, at most %d are fine", n, activations, most)
	}
}

// randomScript is a script that begins with well-formed requests, every other
// time.
func (h *hostile) randomScript(rnd *rand.Rand) []byte {
	script := []byte{0}
	if rnd.IntN(2) == 0 {
		for i, r := range h.victim.Requests {
			script = append(script, stepRequest, byte(i), 0, byte(i)<<4, 255, byte(r.Queue)<<4+stepYield)
		}
	}
	for range 20 + rnd.IntN(1000) {
		script = append(script, byte(rnd.IntN(256)))
	}
	return script
}

// vandalise changes what the device may be reading: descriptors, tables, rings
// and requests.
func (h *hostile) vandalise(rnd *rand.Rand, stop *atomic.Bool) {
	payload := h.mem.Slice(h.payload, payloadSize)
	for !stop.Load() {
		queue := rnd.IntN(len(h.rings))
		r := h.rings[queue]
		d := r.GetDesc(uint16(rnd.IntN(int(r.Size))))
		switch rnd.IntN(4) {
		case 0:
			d.Len = uint32(rnd.IntN(1 << rnd.IntN(32)))
		case 1:
			d.Flags ^= uint16(1 << rnd.IntN(3))
		case 2:
			d.Next = uint16(rnd.IntN(int(r.Size) + 1))
		case 3:
			d.Addr ^= memory.GuestAddress(1) << rnd.IntN(40)
		}
		r.SetDesc(uint16(rnd.IntN(int(r.Size))), d)
		h.mem.SetDesc(h.table(queue), uint16(rnd.IntN(hostileQueue)), d)
		r.SetAvail(uint16(rnd.IntN(int(r.Size))), uint16(rnd.IntN(int(r.Size))))
		for range 16 {
			payload[rnd.IntN(min(len(payload), 1<<12))] = byte(rnd.IntN(256))
		}
		runtime.Gosched()
	}
}

// FuzzHostile lets the fuzzer write the script. Whatever it is: the device does
// not panic, can be reset, and allocates nothing in proportion to a length that
// it was told.
func FuzzHostile(f *testing.F, victim *Victim) {
	// A request of each kind: whole; through an indirect table, and changed while
	// it is served; after a reset.
	for i, request := range victim.Requests {
		f.Add([]byte{0, stepRequest, byte(i), 0, 0, 255, byte(request.Queue)<<4 + stepYield, stepYield})
		f.Add([]byte{0, stepRequest, byte(i), 2, 0, 0, 1, 0, 8, 0xff, 0x1f, 16, 1, 0, 3, 9, stepReset, 1, 0, stepRequest, byte(i), 0, 1, 200})
	}
	queues := len(victim.New(f, slog.New(slog.DiscardHandler)).QueueSizes())
	for q := range byte(min(queues, 16)) {
		q <<= 4
		const all, much = 0xd0, 0xc0 // an address and a length: the whole of memory
		// A loop; much room, and an index that is too far; much to read; a head
		// that the device has already.
		f.Add([]byte{0, q + stepDesc, 0, 0, 0, 4, DescNext, 0, q + stepPush, 0, q + stepYield, 0})
		f.Add([]byte{2, q + stepDesc, 1, all, much, DescWrite, 0, q + stepPush, 1, q + stepYield, q + stepIndex, 0x7f, q + stepYield})
		f.Add([]byte{0, q + stepDesc, 0, all, much, DescNext, 1, q + stepDesc, 1, all, much, 0, 1, q + stepPush, 0, q + stepYield})
		f.Add([]byte{1, q + stepDesc, 0, 0, 0, 8, 0, 0, q + stepPush, 0, q + stepPush, 0, q + stepPush, 0})
	}
	f.Fuzz(func(t *testing.T, script []byte) {
		h := newHostile(t, victim, victim.New(t, slog.New(slog.DiscardHandler)))
		defer alloctest.Limit(t, hostileBytes)()
		h.run(script)
	})
}
