package net

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/microvm-runtime/microvm/pkg/vmm/eventfd"
	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit"
	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit/ratelimittest"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

// rawQueue is the device's side of a ring that nobody drives.
func rawQueue(t testing.TB, ring *virtiotest.Ring) *virtio.Queue {
	t.Helper()
	kick, err := eventfd.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kick.Close() })
	c := ring.Config(virtiotest.RingFeatures)
	c.Kick, c.Interrupt = kick, func() {}
	q, err := virtio.NewQueue(c)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

func TestControlQueue(t *testing.T) {
	l := newLink(t, 2)
	device := newDevice(t, l, Config{})
	const control = 4
	set := func(pairs ...byte) [][]byte { return [][]byte{append([]byte{classMQ, mqPairsSet}, pairs...)} }
	for _, tc := range []struct {
		name     string
		disabled []int
		request  [][]byte
		want     byte
	}{
		{"one", nil, set(1, 0), ackOK},
		{"two", nil, set(2, 0), ackOK},
		{"in pieces", nil, [][]byte{{classMQ}, {mqPairsSet, 2}, {0}}, ackOK},
		{"none", nil, set(0, 0), ackError},
		{"three", nil, set(3, 0), ackError},
		{"very many", nil, set(0, 0x80), ackError},
		{"half a number", nil, set(1), ackError},
		{"no number", nil, set(), ackError},
		{"one byte", nil, [][]byte{{classMQ}}, ackError},
		{"another class", nil, [][]byte{{0, 0, 1, 0}}, ackError},
		{"another command", nil, [][]byte{{classMQ, 1, 1, 0}}, ackError},
		{"no receive queue", []int{2}, set(2, 0), ackError},
		{"no transmit queue", []int{3}, set(2, 0), ackError},
		{"first pair only", []int{2, 3}, set(1, 0), ackOK},
	} {
		g := newGuest(t, device, virtiotest.Options{Disabled: tc.disabled}, 0, 0)
		if written, out := g.Send(control, tc.request, []int{1}).Wait(t); written != 1 || out[0][0] != tc.want {
			t.Errorf("%s: ack %d of %d bytes", tc.name, out[0][0], written)
		}
		if written, _ := g.Send(control, tc.request, nil).Wait(t); written != 0 {
			t.Errorf("%s without an ack: %d bytes written", tc.name, written)
		}
		g.Reset()
	}

	t.Run("without MQ", func(t *testing.T) {
		// The third queue is the control queue, and there is one pair.
		features := device.Features()&^featureMQ | virtiotest.RingFeatures
		g := newGuest(t, device, virtiotest.Options{Features: features, Disabled: []int{3, 4}}, 0, 0)
		if _, out := g.Send(2, set(1, 0), []int{1}).Wait(t); out[0][0] != ackError {
			t.Errorf("ack %d", out[0][0])
		}
	})
}

// TestTapChanges: a guest that resets the device has the tap changed no more often
// than one that does not. What it does for the first time after a while is done.
func TestTapChanges(t *testing.T) {
	const control, burst = 4, 10
	clock := ratelimittest.New()
	limits := ratelimit.Limits{Operations: ratelimit.Rate{PerSecond: 1, Burst: burst}}
	limited := func() *Device {
		d := newDevice(t, newLink(t, 2), Config{})
		d.changes = newLimiter(t, limits, clock).NewGate()
		return d
	}
	t.Run("pairs", func(t *testing.T) {
		g := newGuest(t, limited(), virtiotest.Options{}, 0, 0) // offloads, and one pair
		set := func(n byte) byte {
			_, out := g.Send(control, [][]byte{{classMQ, mqPairsSet, n, 0}}, []int{1}).Wait(t)
			return out[0][0]
		}
		for i := range burst - 2 {
			if ack := set(byte(2 - i%2)); ack != ackOK {
				t.Fatalf("change %d: ack %d", i, ack)
			}
		}
		for range 3 {
			if ack := set(2); ack != ackError {
				t.Errorf("change too much: ack %d", ack)
			}
			g.Reset()
			g.Activate()
		}
		clock.Advance(time.Second)
		if ack := set(2); ack != ackOK {
			t.Errorf("after a second: ack %d", ack)
		}
		g.Reset()
		g.Activate() // as it is, which is two pairs
		if p := g.device.pairs[1]; !p.attached {
			t.Error("the second pair was detached")
		}
	})
	t.Run("offloads", func(t *testing.T) {
		d := limited()
		activate := func(features uint64) error {
			defer d.Reset()
			return d.Activate(virtio.Activation{Features: features, Queues: make([]*virtio.Queue, 5)})
		}
		all, none := d.Features(), d.Features()&^featureGuestCsum
		for i := range (burst - 1) / 2 { // and one pair
			if err := errors.Join(activate(all), activate(none)); err != nil {
				t.Fatalf("round %d: %v", i, err)
			}
		}
		if err := activate(all); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if err := activate(none); err == nil {
				t.Error("a change too much")
			}
			if err := activate(all); err != nil { // which are none
				t.Error(err)
			}
		}
		clock.Advance(time.Second)
		if err := activate(none); err != nil {
			t.Errorf("after a second: %v", err)
		}
	})
	t.Run("of 32 pairs", func(t *testing.T) {
		d := newDevice(t, newLink(t, MaxQueuePairs), Config{})
		d.changes = newLimiter(t, tapChanges, clock).NewGate()
		g := newGuest(t, d, virtiotest.Options{Memory: virtiotest.NewMemory(t, 1<<20, 32<<20)}, 0, 0)
		for i := range 10 { // a driver that is bound again and again
			_, out := g.Send(2*MaxQueuePairs, [][]byte{{classMQ, mqPairsSet, MaxQueuePairs, 0}}, []int{1}).Wait(t)
			if out[0][0] != ackOK {
				t.Fatalf("round %d: ack %d", i, out[0][0])
			}
			g.Reset()
			g.Activate()
			if d.pairs[1].attached {
				t.Fatalf("round %d: more than one pair after a reset", i)
			}
		}
	})
}

// TestQueuePairs has the tap spread flows over the queue pairs, and not.
func TestQueuePairs(t *testing.T) {
	const pairs, control, flows = 4, 8, 64
	l := newLink(t, pairs)
	g := newGuest(t, newDevice(t, l, Config{}), virtiotest.Options{}, 0, 0)
	var got [pairs]atomic.Int64
	var readers sync.WaitGroup
	for pair := range pairs {
		var posted []*virtiotest.Request
		for range queueSize - 1 { // frames and the room for the longest one
			posted = append(posted, g.Send(2*pair, nil, []int{2000}))
		}
		readers.Go(func() {
			for _, r := range posted {
				if _, ok := r.Join(); !ok {
					return
				}
				got[pair].Add(1)
			}
		})
	}
	total := func() int64 { return got[0].Load() + got[1].Load() + got[2].Load() + got[3].Load() }
	for round, tc := range []struct {
		set    byte
		spread bool
	}{{0, false}, {4, true}, {1, false}, {2, true}, {1, false}} {
		if tc.set > 0 {
			if _, out := g.Send(control, [][]byte{{classMQ, mqPairsSet, tc.set, 0}}, []int{1}).Wait(t); out[0][0] != ackOK {
				t.Fatalf("ack %d", out[0][0])
			}
		}
		var before [pairs]int64
		for i := range before {
			before[i] = got[i].Load()
		}
		start := total()
		for flow := range flows / 2 {
			l.send(tcp(flow, 100, 1448, hostHeader))
		}
		eventually(t, "all frames", func() bool { return total() == start+flows/2 })
		used := 0
		for i := range before {
			if n := got[i].Load() - before[i]; n > 0 {
				used++
				if i >= max(int(tc.set), 1) {
					t.Errorf("round %d: pair %d, which is not in use, received %d frames", round, i, n)
				}
			}
		}
		if (used > 1) != tc.spread {
			t.Errorf("round %d: %d pairs received", round, used)
		}
	}
	for pair := range pairs {
		g.Send(2*pair+1, [][]byte{plain(ethernet(1, 100))}, nil).Wait(t)
	}
	// The kernel sends what a driver should not have put there.
	if s := g.device.Stats(); s.TX.Packets != pairs || s.RX.Packets != 5*flows/2 {
		t.Errorf("stats %+v", s)
	}
	g.Reset()
	readers.Wait()
}

// TestResetUnderTraffic resets the device while frames flow in both directions.
// Memory is overwritten after a reset, which the race detector holds against a
// goroutine that still uses it.
func TestResetUnderTraffic(t *testing.T) {
	l := newLink(t, 2)
	g := newGuest(t, newDevice(t, l, Config{}), virtiotest.Options{}, 0, 0)
	stop := l.flood(0, func(i int) []byte { return tcp(i%16, 60+i%40000, 1448, hostHeader) })
	for round := range 60 {
		var guest sync.WaitGroup
		if round%3 != 0 {
			g.Send(4, [][]byte{{classMQ, mqPairsSet, 2, 0}}, []int{1}).Wait(t)
		}
		for pair := range 2 {
			for range 32 {
				r := g.Prepare(2*pair, nil, []int{4096})
				guest.Go(func() {
					r.Submit()
					for _, ok := r.Join(); ok; _, ok = r.Join() {
						r.Submit()
					}
				})
			}
			r := g.Prepare(2*pair+1, [][]byte{tcp(1, 20000, 1448, headerSize)}, nil)
			guest.Go(func() {
				r.Submit()
				for _, ok := r.Join(); ok; _, ok = r.Join() {
					r.Submit()
				}
			})
		}
		start := g.device.Stats()
		eventually(t, "traffic", func() bool {
			s := g.device.Stats()
			return s.TX.Packets > start.TX.Packets+20 && s.RX.Packets > start.RX.Packets+20
		})
		g.Reset()
		guest.Wait()
		g.Activate()
	}
	stop()
}

// A driver that breaks a ring is told so, and the device can be reset.
func TestBrokenRings(t *testing.T) {
	l := newLink(t, 1)
	device := newDevice(t, l, Config{Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	for _, queue := range []int{0, 1, 2} {
		for name, breakIt := range map[string]func(*virtiotest.Ring){
			"head too large": func(r *virtiotest.Ring) { r.Push(r.Size) },
			"index too far":  func(r *virtiotest.Ring) { r.SetAvailIdx(r.AvailIdx() + r.Size + 1) },
			"outside memory": func(r *virtiotest.Ring) {
				r.SetDesc(0, virtiotest.Desc{Addr: memory.GuestAddress(1 << 40), Len: 2000, Flags: virtiotest.DescWrite})
				r.Push(0)
			},
			"loop": func(r *virtiotest.Ring) {
				r.SetDesc(0, virtiotest.Desc{Addr: r.Mem.Start, Len: 1, Flags: virtiotest.DescNext})
				r.Push(0)
			},
			"same buffer twice": func(r *virtiotest.Ring) {
				if r.Size == controlQueueSize { // which keeps no buffer
					r.Push(r.Size)
				}
				r.SetDesc(0, virtiotest.Desc{Addr: r.Mem.Start, Len: 1 << 30, Flags: virtiotest.DescWrite})
				r.Push(0)
				r.Push(0)
			},
		} {
			g := newGuest(t, device, virtiotest.Options{MayFail: true}, 0, 0)
			breakIt(g.Rings[queue])
			g.Kick(queue)
			if err := g.Failed(); err == nil {
				t.Errorf("%s in queue %d: no error", name, queue)
			}
			g.Reset()
		}
	}
	g := newGuest(t, device, virtiotest.Options{}, 64, 1536)
	g.transmit(plain(ethernet(1, 100)))
	l.send(append(make([]byte, hostHeader), ethernet(2, 100)...))
	if frame, _ := g.receive(); !bytes.Equal(frame[headerSize:], ethernet(2, 100)) {
		t.Errorf("received %d bytes", len(frame))
	}
}

// FuzzDevice lets a guest send and post what it likes, with frames for it in
// between. Whatever that is, every chain of a transmit queue comes back, each
// frame is counted, and the device can be reset and works.
func FuzzDevice(f *testing.F) {
	f.Add(uint64(noGSO), []byte{0, 60, 0, 12, 1, 60, 0, 100, 2, 60, 0, 0, 3, 1, 0, 0})
	f.Add(uint64(0), []byte{2, 0, 5, 0, 1, 0, 8, 12, 0, 26, 0, 3, 0, 11, 0, 1})
	f.Add(^uint64(0), []byte{3, 2, 0, 0, 1, 255, 255, 1, 1, 255, 255, 1, 2, 0, 200, 0, 3, 1, 0, 0})
	l := newLink(f, 2)
	device := newDevice(f, l, Config{})
	device.changes = nil // no limit: all scripts have the same device
	drain := func() {
		for b := make([]byte, 1<<17); l.tryReceive(b); {
		}
	}
	f.Fuzz(func(t *testing.T, features uint64, script []byte) {
		l.t = t
		features = features&device.Features() | virtio.FeatureVersion1 | features&virtiotest.RingFeatures
		control := 2
		if features&featureMQ != 0 {
			control = 4
		}
		memory := virtiotest.NewMemory(t, 1<<20, 8<<20)
		g := newGuest(t, device, virtiotest.Options{Features: features, Memory: memory}, 0, 0)
		before := device.Stats().TX
		sent, posted := uint64(0), 0
		for ; len(script) >= 4 && sent < 100; script = script[4:] {
			n := int(script[1]) | int(script[2])<<8
			piece := min(int(script[3]), n)
			switch script[0] % 4 {
			case 0: // transmit: the script's own bytes are the header
				packet := append(bytes.Clone(script), make([]byte, n)...)[:n]
				g.Send(1, [][]byte{packet[:piece], packet[piece:]}, nil).Wait(t)
				sent++
			case 1:
				if posted++; posted < 50 {
					g.Send(0, nil, []int{piece, n - piece})
				}
			case 2: // the host sends: its header is the script's, too
				header := append(bytes.Clone(script[4:]), make([]byte, hostHeader)...)[:hostHeader]
				l.trySend(append(header, ethernet(n, max(n%3000, 14))...))
			case 3:
				if features&featureCtrlVQ == 0 {
					continue
				}
				g.Send(control, [][]byte{append([]byte{classMQ, mqPairsSet}, script[1:1+piece%3]...)}, []int{1}).Wait(t)
			}
		}
		after := device.Stats().TX
		if after.Packets+after.Dropped-before.Packets-before.Dropped != sent {
			t.Fatalf("%d frames sent, %+v became %+v", sent, before, after)
		}
		g.Reset()
		drain()
		g = newGuest(t, device, virtiotest.Options{Memory: memory}, 0, 0)
		g.transmit(plain(ethernet(1, 100)))
		// What the script has sent may still be on its way through the host.
		for !bytes.Equal(l.receive()[hostHeader:], ethernet(1, 100)) {
		}
		g.Reset()
	})
}
