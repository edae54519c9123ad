package net

import (
	"bytes"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit"
	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit/ratelimittest"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

func newLimiter(t *testing.T, l ratelimit.Limits, clock ratelimit.Clock) *ratelimit.Limiter {
	t.Helper()
	limiter, err := ratelimit.New(l, clock)
	if err != nil {
		t.Fatal(err)
	}
	return limiter
}

// next is how long a receiver may have waited already, in these tests, until it
// could take one frame more than the test is about.
const next = 100 * time.Millisecond

func TestTransmitLimit(t *testing.T) {
	for _, tc := range []struct {
		name   string
		limits ratelimit.Limits
		packet []byte
		want   time.Duration // for 50 of them
	}{
		{"bytes", ratelimit.Limits{Bytes: ratelimit.Rate{PerSecond: 10000, Burst: 10000}}, plain(ethernet(1, 1000)), 4 * time.Second},
		{"packets", ratelimit.Limits{Operations: ratelimit.Rate{PerSecond: 10, Burst: 10}}, plain(ethernet(1, 1000)), 4 * time.Second},
		{"segmented", ratelimit.Limits{Operations: ratelimit.Rate{PerSecond: 10, Burst: 10}}, tcp(1, 60000, 1448, headerSize), 4 * time.Second},
		{"what is no frame", ratelimit.Limits{Operations: ratelimit.Rate{PerSecond: 10, Burst: 10}}, make([]byte, headerSize), 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			clock := ratelimittest.New()
			l := newLink(t, 1)
			g := newGuest(t, newDevice(t, l, Config{TXLimit: newLimiter(t, tc.limits, clock)}), virtiotest.Options{}, 0, 0)
			ratelimittest.Took(t, "it", clock.While(func() {
				for range 50 {
					g.transmit(tc.packet)
				}
			}), tc.want, 0)
		})
	}
}

// TestReceiveLimit has the host send more than the limit, which the tap keeps
// until it is time.
func TestReceiveLimit(t *testing.T) {
	for _, tc := range []struct {
		name   string
		limits ratelimit.Limits
		want   time.Duration // for 50 frames of 1000 bytes
	}{
		// What is left at the end pays for a part of the last one.
		{"bytes", ratelimit.Limits{Bytes: ratelimit.Rate{PerSecond: 10000, Burst: 10000}}, 3900 * time.Millisecond},
		{"packets", ratelimit.Limits{Operations: ratelimit.Rate{PerSecond: 10, Burst: 10}}, 4 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			clock := ratelimittest.New()
			l := newLink(t, 1)
			g := newGuest(t, newDevice(t, l, Config{RXLimit: newLimiter(t, tc.limits, clock)}), virtiotest.Options{}, 64, 2048)
			ratelimittest.Took(t, "it", clock.While(func() {
				for range 50 {
					l.send(append(make([]byte, hostHeader), ethernet(1, 1000)...))
				}
				for range 50 {
					if frame, _ := g.receive(); !bytes.Equal(frame[headerSize:], ethernet(1, 1000)) {
						t.Errorf("received %d bytes", len(frame))
					}
				}
			}), tc.want, next)
		})
	}
}

// TestReceiveLimitDropped has frames counted that fit no buffer.
func TestReceiveLimitDropped(t *testing.T) {
	clock := ratelimittest.New()
	limit := newLimiter(t, ratelimit.Limits{Operations: ratelimit.Rate{PerSecond: 10, Burst: 10}}, clock)
	l := newLink(t, 1)
	l.in(func(device netlink.Link) error { return netlink.LinkSetMTU(device, 9000) })
	g := newGuest(t, newDevice(t, l, Config{RXLimit: limit}), virtiotest.Options{Features: noGSO}, 1, 1526)
	ratelimittest.Took(t, "it", clock.While(func() {
		for range 20 {
			l.send(append(make([]byte, hostHeader), ethernet(1, 8000)...))
		}
		eventually(t, "the frames to be dropped", func() bool { return g.device.Stats().RX.Dropped == 20 })
	}), time.Second, next)
}

// TestLimitShared has two NICs that receive together what the limit allows,
// while each can send as it likes.
func TestLimitShared(t *testing.T) {
	clock := ratelimittest.New()
	limit := newLimiter(t, ratelimit.Limits{Operations: ratelimit.Rate{PerSecond: 10, Burst: 10}}, clock)
	var links []*link
	var guests []*guest
	for range 2 {
		l := newLink(t, 1)
		links, guests = append(links, l), append(guests, newGuest(t, newDevice(t, l, Config{RXLimit: limit}), virtiotest.Options{}, 64, 2048))
	}
	ratelimittest.Took(t, "it", clock.While(func() {
		for i, g := range guests {
			for range 25 {
				links[i].send(append(make([]byte, hostHeader), ethernet(1, 1000)...))
				g.transmit(plain(ethernet(1, 1000)))
			}
		}
		for _, g := range guests {
			for range 25 {
				g.receive()
			}
		}
	}), 4*time.Second, next)
}

// TestLimitReset resets a NIC both of whose directions wait for time that does
// not pass, and uses it again. The direction that is not limited goes on.
func TestLimitReset(t *testing.T) {
	one := ratelimit.Limits{Operations: ratelimit.Rate{PerSecond: 1, Burst: 1}}
	rx, tx := ratelimittest.New(), ratelimittest.New()
	l := newLink(t, 1)
	g := newGuest(t, newDevice(t, l, Config{RXLimit: newLimiter(t, one, rx), TXLimit: newLimiter(t, one, tx)}), virtiotest.Options{}, 64, 2048)
	for range 10 {
		l.send(append(make([]byte, hostHeader), ethernet(1, 1000)...))
	}
	g.receive()
	rx.AwaitTimer()
	for range 10 {
		g.Send(1, [][]byte{plain(ethernet(1, 1000))}, nil)
	}
	l.receive()
	tx.AwaitTimer()
	if s := g.device.Stats(); s.RX.Packets != 1 || s.TX.Packets != 1 {
		t.Errorf("in no time: %+v", s)
	}
	g.Reset()
	g.posted = nil
	g.Activate()
	for range 64 {
		g.post()
	}
	ratelimittest.Took(t, "it", tx.While(func() { g.transmit(plain(ethernet(1, 1000))) }), time.Second, 0)
	ratelimittest.Took(t, "it", rx.While(func() {
		for range 9 {
			g.receive()
		}
	}), 9*time.Second, time.Second)
}
