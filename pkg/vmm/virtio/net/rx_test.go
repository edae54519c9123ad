package net

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

// eventually polls until done says so; the limit only ends a test that fails.
func eventually(t testing.TB, what string, done func() bool) {
	t.Helper()
	for range 60000 {
		if done() {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatal("waited in vain for " + what)
}

const noGSO = featureCsum | featureGuestCsum | featureMrgRxbuf | featureStatus | virtiotest.RingFeatures

func TestReceive(t *testing.T) {
	for _, tc := range []struct {
		name     string
		features uint64
		size     int // of a buffer
		lengths  []int
		buffers  []int // that each frame takes
	}{
		{"one buffer each", noGSO, 2048, []int{14, 60, 1514, 100}, []int{1, 1, 1, 1}},
		{"merged", noGSO, 100, []int{60, 88, 89, 188, 1514}, []int{1, 1, 2, 2, 16}},
		{"smallest buffers", noGSO, headerSize, []int{60, 1514}, []int{6, 128}},
		{"not merged", noGSO &^ featureMrgRxbuf, 1526, []int{14, 1514, 60}, []int{1, 1, 1}},
		{"no feature", virtiotest.RingFeatures, 1526, []int{14, 1514, 60}, []int{1, 1, 1}},
		{"no ring feature", noGSO &^ (virtio.FeatureEventIdx | virtio.FeatureIndirectDesc), 600, []int{588, 589, 1514}, []int{1, 2, 3}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newLink(t, 1)
			g := newGuest(t, newDevice(t, l, Config{}), virtiotest.Options{Features: tc.features}, queueSize, tc.size)
			for round := range 20 { // over the end of the ring
				for i, n := range tc.lengths {
					want := ethernet(round+i, n)
					l.send(append(make([]byte, hostHeader), want...))
					frame, buffers := g.receive()
					if !bytes.Equal(frame[headerSize:], want) || buffers != tc.buffers[i] {
						t.Fatalf("frame of %d bytes: received %d in %d buffers, want %d", n, len(frame)-headerSize, buffers, tc.buffers[i])
					}
					if tc.features&featureGuestCsum == 0 && frame[offFlags] != 0 {
						t.Fatalf("header %x", frame[:headerSize])
					}
				}
			}
			if s := g.device.Stats(); s.RX.Packets != uint64(20*len(tc.lengths)) || s.RX.Dropped != 0 {
				t.Errorf("stats %+v", s)
			}
		})
	}
}

// TestReceiveSegmented gets what the host wants segmented as one frame, or as
// the segments, as the driver accepted.
func TestReceiveSegmented(t *testing.T) {
	l := newLink(t, 1)
	device := newDevice(t, l, Config{})
	packet := tcp(1, 60000, 1448, hostHeader)
	t.Run("accepted", func(t *testing.T) {
		g := newGuest(t, device, virtiotest.Options{}, queueSize, 1536)
		l.send(packet)
		frame, buffers := g.receive()
		if !bytes.Equal(frame[:hostHeader], packet[:hostHeader]) || !bytes.Equal(frame[headerSize:], packet[hostHeader:]) || buffers != 40 {
			t.Errorf("%d bytes in %d buffers with header %x", len(frame), buffers, frame[:headerSize])
		}
		l.send(tcp(2, 1000, 1448, hostHeader)) // with its checksum to be done
		if frame, _ := g.receive(); frame[offFlags]&1 == 0 {
			t.Errorf("header %x", frame[:headerSize])
		}
		g.Reset()
	})
	t.Run("without merged buffers", func(t *testing.T) {
		g := newGuest(t, device, virtiotest.Options{Features: device.Features()&^featureMrgRxbuf | virtiotest.RingFeatures}, 16, maxFrame)
		l.send(packet)
		if frame, buffers := g.receive(); !bytes.Equal(frame[headerSize:], packet[hostHeader:]) || buffers != 1 {
			t.Errorf("%d bytes in %d buffers", len(frame), buffers)
		}
		g.Reset()
	})
	t.Run("not accepted", func(t *testing.T) {
		g := newGuest(t, device, virtiotest.Options{Features: featureMrgRxbuf | virtiotest.RingFeatures}, queueSize, 1536)
		l.send(packet)
		for left := 60000; left > 0; {
			frame, _ := g.receive()
			if !bytes.Equal(frame[:hostHeader], make([]byte, hostHeader)) {
				t.Fatalf("header %x", frame[:headerSize])
			}
			ip := frame[headerSize+ethernetHeader:]
			pseudo := append(append([]byte{}, ip[12:20]...), 0, unix.IPPROTO_TCP, byte((len(ip)-20)>>8), byte(len(ip)-20))
			if sum(append(pseudo, ip[20:]...)) != 0xffff {
				t.Fatal("a checksum is wrong")
			}
			left -= len(ip) - 40
		}
	})
}

// TestFrameTooLong is a host whose MTU is larger than the driver reckons with.
func TestFrameTooLong(t *testing.T) {
	l := newLink(t, 1)
	l.in(func(device netlink.Link) error { return netlink.LinkSetMTU(device, 9000) })
	for _, features := range []uint64{noGSO, noGSO &^ featureMrgRxbuf} {
		device := newDevice(t, l, Config{})
		g := newGuest(t, device, virtiotest.Options{Features: features}, 1, 1526)
		for _, n := range []int{1515, 9014} {
			l.send(append(make([]byte, hostHeader), ethernet(1, n)...))
		}
		l.send(append(make([]byte, hostHeader), ethernet(1, 1514)...))
		if frame, _ := g.receive(); !bytes.Equal(frame[headerSize:], ethernet(1, 1514)) {
			t.Errorf("received %d bytes", len(frame))
		}
		if s := device.Stats().RX; s != (Counters{Packets: 1, Bytes: 1514, Dropped: 2}) {
			t.Errorf("stats %+v", s)
		}
		g.Reset()
	}
}

// TestUnreadableFrame has the tap refuse to say what a frame's header is, as it does of
// one with a segmentation that virtio has no name for (tun_put_user in
// drivers/net/tun.c): one frame is lost, and not the link.
func TestUnreadableFrame(t *testing.T) {
	l := newLink(t, 1)
	device := newDevice(t, l, Config{})
	g := newGuest(t, device, virtiotest.Options{Features: noGSO}, 16, 1526)
	setHeader := func(size int) {
		t.Helper()
		if err := unix.IoctlSetPointerInt(device.pairs[0].fd, unix.TUNSETVNETHDRSZ, size); err != nil {
			t.Fatal(err)
		}
	}
	setHeader(1 << 20) // no such header has room in what is read
	l.send(append(make([]byte, hostHeader), ethernet(1, 100)...))
	eventually(t, "the frame to be dropped", func() bool { return device.Stats().RX.Dropped == 1 })
	setHeader(headerSize)
	l.send(append(make([]byte, hostHeader), ethernet(2, 100)...))
	if frame, _ := g.receive(); !bytes.Equal(frame[headerSize:], ethernet(2, 100)) {
		t.Errorf("received %d bytes", len(frame))
	}
}

// TestRoom looks at when the receiver thinks that it may read a frame.
func TestRoom(t *testing.T) {
	const all = noGSO | featureGuestTSO4
	d := &Device{log: slog.New(slog.DiscardHandler)}
	for _, tc := range []struct {
		name     string
		features uint64
		mtu      int
		sizes    []int
		want     bool
	}{
		{"nothing", all, 0, nil, false},
		{"one byte too little", all, 0, []int{maxFrame - 1}, false},
		{"enough in one", all, 0, []int{maxFrame}, true},
		{"enough in two", all, 0, []int{maxFrame - 12, 12}, true},
		{"no segmentation", noGSO, 0, []int{1526}, true},
		{"no segmentation, too little", noGSO, 0, []int{1525}, false},
		{"no segmentation, large MTU", noGSO, 9000, []int{9025}, false},
		{"no segmentation, large MTU, enough", noGSO, 9000, []int{9000, 26}, true},
		{"small MTU", noGSO, 1280, []int{1525}, false},
		{"not merged", all &^ featureMrgRxbuf, 0, []int{100}, true},
		{"useless ones", all, 0, []int{11, 1, 11}, false},
	} {
		m := virtiotest.NewMemory(t, 1<<20, 1<<20)
		ring := virtiotest.NewRing(t, m, queueSize)
		for i, n := range tc.sizes {
			ring.SetDesc(uint16(i), virtiotest.Desc{Addr: m.Alloc(t, n), Len: uint32(n), Flags: virtiotest.DescWrite})
			ring.Push(uint16(i))
		}
		q := rawQueue(t, ring)
		d.mtu = tc.mtu
		r := newReceiver(d, nil, q, virtio.Activation{Features: tc.features})
		if got, err := r.gather(); err != nil || got != tc.want {
			t.Errorf("%s: %v, %v", tc.name, got, err)
		}
	}
}

// TestTooManySegments gives buffers of one byte: 256 chains of 256 each.
func TestTooManySegments(t *testing.T) {
	l := newLink(t, 1)
	g := newGuest(t, newDevice(t, l, Config{}), virtiotest.Options{}, 0, 0)
	ones := make([]int, queueSize)
	for i := range ones {
		ones[i] = 1
	}
	var requests []*virtiotest.Request
	for range 16 {
		requests = append(requests, g.Send(0, nil, ones))
	}
	// 3 chains hold 768 bytes, one more than maxSegments would overflow.
	for _, n := range []int{2000, 700} {
		l.in(func(device netlink.Link) error { return netlink.LinkSetMTU(device, 3000) })
		l.send(append(make([]byte, hostHeader), ethernet(1, n)...))
	}
	var got []byte
	for _, r := range requests[:3] {
		written, out := r.Wait(t)
		got = append(got, bytes.Join(out, nil)[:written]...)
	}
	if !bytes.Equal(got[headerSize:], ethernet(1, 700)) {
		t.Errorf("received %d bytes", len(got))
	}
	if s := g.device.Stats().RX; s.Dropped != 1 || s.Packets != 1 {
		t.Errorf("stats %+v", s)
	}
}

func TestUselessBuffers(t *testing.T) {
	l := newLink(t, 1)
	var log bytes.Buffer
	device := newDevice(t, l, Config{Log: slog.New(slog.NewTextHandler(&log, nil))})
	g := newGuest(t, device, virtiotest.Options{}, 0, 0)
	for range 3 {
		for _, r := range []*virtiotest.Request{
			g.Send(0, [][]byte{make([]byte, 100)}, nil),
			g.Send(0, [][]byte{make([]byte, 100)}, []int{2000}),
			g.Send(0, nil, []int{headerSize - 1}),
			g.Send(0, nil, []int{0}),
		} {
			if written, _ := r.Wait(t); written != 0 {
				t.Errorf("%d bytes written", written)
			}
		}
	}
	g.Reset()
	if n := strings.Count(log.String(), "\n"); n != 1 {
		t.Errorf("log:\n%s", &log)
	}
}
