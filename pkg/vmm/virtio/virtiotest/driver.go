// Package virtiotest drives virtio devices in tests: it is the guest's driver
// and the transport, in ordinary memory and without a virtual machine.
//
// A Driver keeps the rules and finds lost kicks and lost interrupts (a request
// then hangs, and the test says so). A Ring breaks whichever rule the test
// wants to see broken.
package virtiotest

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/microvm-runtime/microvm/pkg/vmm/eventfd"
	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
)

// RingFeatures are the feature bits a transport adds to the device's.
const RingFeatures = virtio.FeatureVersion1 | virtio.FeatureIndirectDesc | virtio.FeatureEventIdx

// hangs is how long a request may take before the test fails. It is no
// measurement: a request that takes this long was lost.
const hangs = time.Minute

// Options change what NewDriver does. The zero value is a driver that accepts
// every feature.
type Options struct {
	// Memory is the guest's memory; nil makes 4 MiB at 1 MiB.
	Memory *Memory
	// Features are the accepted feature bits; 0 accepts all that the device
	// offers, and RingFeatures.
	Features uint64
	// QueueSize caps the size of every queue; 0 takes the device's maxima.
	QueueSize uint16
	// Disabled are the indices of queues that the driver does not enable.
	Disabled []int
	// MayFail says that Activation.Fail is no failure of the test: it breaks a
	// ring on purpose, and looks at Failed.
	MayFail bool
}

// Driver is the driver of one device. Its methods may be called from any
// goroutine, but Reset and Activate from one at a time.
type Driver struct {
	Device   virtio.Device
	Memory   *Memory
	Features uint64
	// Rings is raw access to each queue; nil for disabled ones.
	Rings []*Ring

	t             testing.TB
	opts          Options
	queues        []*queue // nil where disabled, all nil while reset
	failed        chan error
	configChanges atomic.Int64
}

// NewDriver allocates the device's queues in guest memory and activates the
// device. The device is reset when the test ends.
func NewDriver(t testing.TB, device virtio.Device, opts Options) *Driver {
	t.Helper()
	if opts.Memory == nil {
		opts.Memory = NewMemory(t, 1<<20, 4<<20)
	}
	if opts.Features == 0 {
		opts.Features = device.Features() | RingFeatures
	}
	d := &Driver{Device: device, Memory: opts.Memory, Features: opts.Features, t: t, opts: opts, failed: make(chan error, 1)}
	for i, size := range device.QueueSizes() {
		var r *Ring
		if !d.disabled(i) {
			if opts.QueueSize != 0 {
				size = min(size, opts.QueueSize)
			}
			r = NewRing(t, d.Memory, size)
		}
		d.Rings = append(d.Rings, r)
	}
	d.Activate()
	t.Cleanup(d.Reset)
	return d
}

func (d *Driver) disabled(queue int) bool {
	for _, i := range d.opts.Disabled {
		if i == queue {
			return true
		}
	}
	return false
}

// Activate sets up the queues and activates the device, after a Reset.
func (d *Driver) Activate() {
	d.t.Helper()
	a := virtio.Activation{
		Features:      d.Features,
		Memory:        d.Memory.Guest,
		ConfigChanged: func() { d.configChanges.Add(1) },
		Fail:          d.fail,
	}
	d.queues = nil
	for _, r := range d.Rings {
		if r == nil {
			a.Queues = append(a.Queues, nil)
			d.queues = append(d.queues, nil)
			continue
		}
		r.Clear()
		q := newQueue(d.t, r, d.Features)
		q.mayFail = d.opts.MayFail
		a.Queues = append(a.Queues, q.device)
		d.queues = append(d.queues, q)
	}
	if err := d.Device.Activate(a); err != nil {
		d.t.Fatalf("Activate: %v", err)
	}
	for i := range d.Rings {
		d.Kick(i) // as the transport does, for kicks that came too early
	}
}

func (d *Driver) fail(err error) {
	if !d.opts.MayFail {
		d.t.Errorf("the device says the driver broke the ring: %v", err)
	}
	select {
	case d.failed <- err:
	default:
	}
}

// Failed returns what the device passed to Activation.Fail, waiting for it.
func (d *Driver) Failed() error {
	d.t.Helper()
	select {
	case err := <-d.failed:
		return err
	case <-time.After(hangs):
		d.t.Fatal("the device did not call Fail")
		return nil
	}
}

// ConfigChanges is how often the device announced a configuration change.
func (d *Driver) ConfigChanges() int { return int(d.configChanges.Load()) }

// Kicks is how many kicks Submit sent to the queue since Activate.
func (d *Driver) Kicks(queue int) int { return int(d.queues[queue].kicks.Load()) }

// Interrupts is how many interrupts the queue raised since Activate.
func (d *Driver) Interrupts(queue int) int { return int(d.queues[queue].interrupts.Load()) }

// Kick notifies the queue, whether or not the device asked for it.
func (d *Driver) Kick(queue int) {
	if q := d.queues[queue]; q != nil {
		if err := q.kick.Signal(); err != nil {
			d.t.Errorf("kick: %v", err)
		}
	}
}

// Reset does what the transport does when the driver resets the device: it
// closes the queues, calls Device.Reset and closes the eventfds. Requests that
// nobody has waited for are lost. Then all of guest memory is overwritten: under the race
// detector this finds a goroutine of the device's that still uses it.
func (d *Driver) Reset() {
	if d.queues == nil {
		return
	}
	for _, q := range d.queues {
		if q != nil {
			q.device.Close()
		}
	}
	d.Device.Reset()
	for _, q := range d.queues {
		if q != nil {
			q.stop()
		}
	}
	d.queues = nil
	zero := make([]byte, pageSize)
	for off := 0; off < len(d.Memory.Bytes); off += pageSize {
		copy(d.Memory.Bytes[off:], zero)
	}
}

// Send makes a request of copies of the readable buffers and of writable
// buffers with the given lengths, and submits it.
func (d *Driver) Send(queue int, readable [][]byte, writableLens []int) *Request {
	d.t.Helper()
	r := d.Prepare(queue, readable, writableLens)
	r.Submit()
	return r
}

// Prepare is Send without the Submit.
func (d *Driver) Prepare(queue int, readable [][]byte, writableLens []int) *Request {
	d.t.Helper()
	q := d.queues[queue]
	r := &Request{queue: q, t: d.t, done: make(chan bool, 1)}
	for _, b := range readable {
		addr := d.Memory.Alloc(d.t, len(b))
		copy(d.Memory.Slice(addr, len(b)), b)
		r.buffers = append(r.buffers, Desc{Addr: addr, Len: uint32(len(b))})
	}
	for _, n := range writableLens {
		r.buffers = append(r.buffers, Desc{Addr: d.Memory.Alloc(d.t, n), Len: uint32(n), Flags: DescWrite})
	}
	if len(r.buffers) == 0 || len(r.buffers) > int(q.ring.Size) {
		d.t.Fatalf("virtiotest: a request of %d buffers in a queue of %d", len(r.buffers), q.ring.Size)
	}
	if d.Features&virtio.FeatureIndirectDesc != 0 && len(r.buffers) > 1 {
		r.table = d.Memory.Alloc(d.t, DescSize*len(r.buffers))
		for i, b := range r.buffers {
			if i+1 < len(r.buffers) {
				b.Flags |= DescNext
				b.Next = uint16(i + 1)
			}
			d.Memory.SetDesc(r.table, uint16(i), b)
		}
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.live[r] = true
	return r
}

// Request is what the driver asks of the device: one chain. It is for one
// goroutine.
type Request struct {
	queue   *queue
	t       testing.TB
	buffers []Desc
	table   memory.GuestAddress // indirect table; 0 when there is none
	heads   []uint16            // descriptors of the ring while in flight
	written uint32
	done    chan bool // true: completed, false: reset
}

// Submit makes the request available and kicks the queue if the device wants
// it. While the ring has too few free descriptors it waits. A request may be
// submitted again after Join.
func (r *Request) Submit() {
	r.t.Helper()
	r.queue.submit(r)
}

// Join waits for the device and returns the number of bytes it wrote, or false
// if the device was reset first.
func (r *Request) Join() (written uint32, ok bool) {
	r.t.Helper()
	select {
	case ok := <-r.done:
		return r.written, ok
	default:
	}
	timeout := time.NewTimer(hangs)
	defer timeout.Stop()
	select {
	case ok := <-r.done:
		return r.written, ok
	case <-timeout.C:
		r.t.Fatal("virtiotest: the request was not completed, or its interrupt was lost")
		return 0, false
	}
}

// Wait waits for the device. It returns the number of bytes the device says it
// wrote, and copies of the whole writable buffers. The request is finished.
func (r *Request) Wait(t testing.TB) (written uint32, out [][]byte) {
	t.Helper()
	written, ok := r.Join()
	if !ok {
		t.Fatal("virtiotest: the device was reset")
	}
	for _, b := range r.buffers {
		if b.Flags&DescWrite != 0 {
			out = append(out, append([]byte{}, r.queue.ring.Mem.Slice(b.Addr, int(b.Len))...))
		}
	}
	r.queue.mu.Lock()
	defer r.queue.mu.Unlock()
	r.free()
	return written, out
}

// free gives back the request's memory, once. queue.mu is held.
func (r *Request) free() {
	if !r.queue.live[r] {
		return
	}
	delete(r.queue.live, r)
	m := r.queue.ring.Mem
	for _, b := range r.buffers {
		m.Free(b.Addr, int(b.Len))
	}
	if r.table != 0 {
		m.Free(r.table, DescSize*len(r.buffers))
	}
}

// queue is the driver's side of an active virtqueue.
type queue struct {
	ring       *Ring
	device     *virtio.Queue
	eventIdx   bool
	mayFail    bool
	kick       *eventfd.EventFD
	irq        chan struct{}
	kicks      atomic.Int64
	interrupts atomic.Int64
	t          testing.TB
	stopped    sync.WaitGroup

	mu       sync.Mutex
	room     sync.Cond // more free descriptors, or reset
	reset    bool
	free     []uint16          // descriptors
	inFlight []*Request        // by head
	live     map[*Request]bool // whose memory is not freed
	lastUsed uint16
}

func newQueue(t testing.TB, r *Ring, features uint64) *queue {
	t.Helper()
	kick, err := eventfd.New()
	if err != nil {
		t.Fatal(err)
	}
	q := &queue{ring: r, eventIdx: features&virtio.FeatureEventIdx != 0, kick: kick, irq: make(chan struct{}, 1), t: t, inFlight: make([]*Request, r.Size), live: map[*Request]bool{}}
	q.room.L = &q.mu
	for i := range r.Size {
		q.free = append(q.free, r.Size-1-i)
	}
	c := r.Config(features)
	c.Kick = kick
	c.Interrupt = func() {
		q.interrupts.Add(1)
		select {
		case q.irq <- struct{}{}:
		default: // as an edge that is pending already
		}
	}
	if q.device, err = virtio.NewQueue(c); err != nil {
		t.Fatal(err)
	}
	q.stopped.Add(1)
	go func() {
		defer q.stopped.Done()
		for range q.irq {
			q.reap()
		}
	}()
	return q
}

func (q *queue) submit(r *Request) {
	q.t.Helper()
	need := len(r.buffers)
	if r.table != 0 {
		need = 1
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.free) < need && !q.reset {
		q.room.Wait()
	}
	if q.reset {
		r.done <- false
		return
	}
	r.heads = append(r.heads[:0], q.free[len(q.free)-need:]...)
	q.free = q.free[:len(q.free)-need]
	if r.table != 0 {
		q.ring.SetDesc(r.heads[0], Desc{Addr: r.table, Len: uint32(DescSize * len(r.buffers)), Flags: DescIndirect})
	} else {
		for i, b := range r.buffers {
			if i+1 < len(r.buffers) {
				b.Flags |= DescNext
				b.Next = r.heads[i+1]
			}
			q.ring.SetDesc(r.heads[i], b)
		}
	}
	q.inFlight[r.heads[0]] = r
	old := q.ring.AvailIdx()
	q.ring.Push(r.heads[0])
	wanted := q.ring.UsedFlags()&1 == 0
	if q.eventIdx {
		wanted = old-q.ring.AvailEvent() < 1 // section 2.7.10: new-event-1 < new-old
	}
	if wanted {
		q.kicks.Add(1)
		if err := q.kick.Signal(); err != nil {
			q.t.Errorf("kick: %v", err)
		}
	}
}

// reap takes what the device completed, as an interrupt handler does.
func (q *queue) reap() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for !q.reset {
		for q.lastUsed != q.ring.UsedIdx() {
			head, written := q.ring.UsedElem(q.lastUsed)
			q.lastUsed++
			if head >= uint32(q.ring.Size) || q.inFlight[head] == nil {
				if q.mayFail {
					continue // the test pushed it through Rings
				}
				q.t.Errorf("virtiotest: used element names head %d, which is not in flight", head)
				continue
			}
			r := q.inFlight[head]
			q.inFlight[head] = nil
			q.free = append(q.free, r.heads...)
			r.written = written
			r.done <- true
			q.room.Broadcast()
		}
		if q.eventIdx {
			q.ring.SetUsedEvent(q.lastUsed)
		}
		if q.lastUsed == q.ring.UsedIdx() {
			return
		}
	}
}

// stop ends the driver's side after the device's has ended.
func (q *queue) stop() {
	q.mu.Lock()
	q.reset = true
	for i, r := range q.inFlight {
		if r != nil {
			r.done <- false
			q.inFlight[i] = nil
		}
	}
	for r := range q.live {
		r.free()
	}
	q.room.Broadcast()
	q.mu.Unlock()
	close(q.irq)
	q.stopped.Wait()
	if err := q.kick.Close(); err != nil {
		q.t.Errorf("close eventfd: %v", err)
	}
}
