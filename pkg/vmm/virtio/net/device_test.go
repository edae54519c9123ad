package net

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

var testMAC = [6]byte{2, 0, 0, 0, 0, 1}

func newDevice(t testing.TB, l *link, c Config) *Device {
	t.Helper()
	c.Taps, c.MAC = l.taps, testMAC
	d, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// guest is the driver, with receive buffers posted.
type guest struct {
	*virtiotest.Driver
	t      testing.TB
	device *Device
	size   int                   // of a receive buffer
	posted []*virtiotest.Request // of the first queue pair, in order
}

func newGuest(t testing.TB, device *Device, o virtiotest.Options, buffers, size int) *guest {
	t.Helper()
	if o.Memory == nil {
		o.Memory = virtiotest.NewMemory(t, 1<<20, 32<<20)
	}
	g := &guest{Driver: virtiotest.NewDriver(t, device, o), t: t, device: device, size: size}
	for range buffers {
		g.post()
	}
	return g
}

func (g *guest) post() {
	g.t.Helper()
	g.posted = append(g.posted, g.Send(0, nil, []int{g.size}))
}

// receive returns the next frame with its header, and how many buffers it took.
// It posts as many again.
func (g *guest) receive() (frame []byte, buffers int) {
	g.t.Helper()
	for buffers = 1; len(g.posted) > 0; {
		r := g.posted[0]
		g.posted = g.posted[1:]
		written, out := r.Wait(g.t)
		first := frame == nil
		frame = append(frame, out[0][:written]...)
		if first {
			buffers = int(binary.LittleEndian.Uint16(frame[offNumBuffers:]))
			for range buffers {
				g.post()
			}
		}
		if buffers--; buffers == 0 {
			return frame, int(binary.LittleEndian.Uint16(frame[offNumBuffers:]))
		}
	}
	g.t.Fatal("no receive buffer is posted")
	return nil, 0
}

// transmit sends a frame after its header, in pieces of the lengths and a rest.
func (g *guest) transmit(packet []byte, lengths ...int) {
	g.t.Helper()
	var pieces [][]byte
	for _, n := range lengths {
		pieces = append(pieces, packet[:n])
		packet = packet[n:]
	}
	g.Send(1, append(pieces, packet), nil).Wait(g.t)
}

func plain(frame []byte) []byte { return append(make([]byte, headerSize), frame...) }

func TestConfig(t *testing.T) {
	d := newDevice(t, newLink(t, 3), Config{MTU: 1450})
	config := make([]byte, 16)
	d.WriteConfig(0, bytes.Repeat([]byte{0xff}, 16)) // has no effect
	d.ReadConfig(0, config)
	if want := []byte{2, 0, 0, 0, 0, 1, 1, 0, 3, 0, 0xaa, 5, 0, 0, 0, 0}; !bytes.Equal(config, want) {
		t.Errorf("configuration %x, want %x", config, want)
	}
	for _, offset := range []uint64{12, 13, 1 << 40, 1<<64 - 1} {
		p := []byte{1, 2, 3}
		if d.ReadConfig(offset, p); !bytes.Equal(p, make([]byte, 3)) {
			t.Errorf("offset %#x reads %x", offset, p)
		}
	}
	if got := fmt.Sprint(d.QueueSizes()); got != "[256 256 256 256 256 256 64]" || d.Type() != virtio.TypeNet {
		t.Errorf("queue sizes %s", got)
	}
	// UDP segmentation is the kernel's to have: TUN_F_USO4 came with 6.2.
	const want = featureCsum | featureGuestCsum | featureMTU | featureMAC | featureGuestTSO4 | featureGuestTSO6 | featureGuestECN |
		featureHostTSO4 | featureHostTSO6 | featureHostECN | featureMrgRxbuf | featureStatus | featureCtrlVQ | featureMQ
	if got := d.Features() &^ (featureGuestUSO4 | featureGuestUSO6 | featureHostUSO); got != want {
		t.Errorf("features %#x, want %#x", got, want)
	}
	if got := newDevice(t, newLink(t, 1), Config{}).Features(); got&(featureMTU|featureMQ) != 0 || got&featureMAC == 0 {
		t.Errorf("features of one queue pair without an MTU: %#x", got)
	}
}

func TestNewRefuses(t *testing.T) {
	good := newLink(t, 1)
	tap := func(flags uint16) []*os.File {
		l := newLink(t, 0)
		var f *os.File
		done := make(chan error)
		l.do <- func() {
			var err error
			f, err = openTap(linkName, flags, false)
			done <- err
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return []*os.File{f}
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	closed, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	null.Close()
	for _, tc := range []struct {
		name   string
		config Config
		want   string
	}{
		{"no taps", Config{}, "0 queue pairs"},
		{"too many taps", Config{Taps: make([]*os.File, 33)}, "33 queue pairs"},
		{"MTU too small", Config{Taps: good.taps, MTU: 67}, "67 bytes"},
		{"MTU too large", Config{Taps: good.taps, MTU: 65522}, "65522 bytes"},
		{"no address", Config{Taps: good.taps, MAC: [6]byte{}}, "no host's"},
		{"group address", Config{Taps: good.taps, MAC: [6]byte{1}}, "no host's"},
		{"not a tap", Config{Taps: []*os.File{closed}, MAC: testMAC}, "TUNGETIFF"},
		{"closed", Config{Taps: []*os.File{null}, MAC: testMAC}, "closed"},
		{"IP packets", Config{Taps: tap(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR), MAC: testMAC}, "flags"},
		{"no virtio header", Config{Taps: tap(unix.IFF_TAP | unix.IFF_NO_PI), MAC: testMAC}, "flags"},
		{"not multi-queue", Config{Taps: []*os.File{good.taps[0], good.taps[0]}, MAC: testMAC}, "flags"},
	} {
		if _, err := New(tc.config); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want an error with %q", tc.name, err, tc.want)
		}
	}
	closed.Close()
}

func TestTransmit(t *testing.T) {
	l := newLink(t, 1)
	g := newGuest(t, newDevice(t, l, Config{}), virtiotest.Options{}, 0, 0)
	var bytesSent uint64
	for i, tc := range []struct {
		length int
		pieces []int
	}{
		{14, nil}, {60, []int{12}}, {61, []int{5, 7}}, {1514, []int{12, 14, 1000}}, {1514, []int{1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
		{300, []int{100, 0, 100}}, {65000, []int{12, 30000, 30000}},
	} {
		if tc.length > 1514 {
			l.in(func(device netlink.Link) error { return netlink.LinkSetMTU(device, 65000) })
		}
		frame := ethernet(i, tc.length)
		g.transmit(plain(frame), tc.pieces...)
		if got := l.receive()[hostHeader:]; !bytes.Equal(got, frame) {
			t.Errorf("frame of %d bytes: the host received %d", tc.length, len(got))
		}
		bytesSent += uint64(tc.length)
	}
	if s := g.device.Stats(); s.TX != (Counters{Packets: 7, Bytes: bytesSent}) || s.RX != (Counters{}) {
		t.Errorf("stats %+v", s)
	}
}

// A segmented frame goes through as one, for the host to cut where it has to.
func TestTransmitSegmented(t *testing.T) {
	l := newLink(t, 1)
	g := newGuest(t, newDevice(t, l, Config{}), virtiotest.Options{}, 0, 0)
	packet := tcp(1, 60000, 1448, headerSize)
	g.transmit(packet, headerSize, 4096, 30000)
	got := l.receive()
	if !bytes.Equal(got[:hostHeader], packet[:hostHeader]) || !bytes.Equal(got[hostHeader:], packet[headerSize:]) {
		t.Errorf("the host received %d bytes with header %x", len(got)-hostHeader, got[:hostHeader])
	}
}

func TestTransmitBad(t *testing.T) {
	l := newLink(t, 1)
	g := newGuest(t, newDevice(t, l, Config{}), virtiotest.Options{}, 0, 0)
	header := func(b ...byte) []byte {
		return append(append(b, make([]byte, headerSize-len(b))...), ethernet(0, 100)...)
	}
	for i, tc := range []struct {
		name   string
		packet []byte
	}{
		{"one byte", []byte{0}},
		{"header only", make([]byte, headerSize)},
		{"less than an Ethernet header", make([]byte, headerSize+ethernetHeader-1)},
		{"too long", make([]byte, maxFrame+1)},
		{"much too long", make([]byte, 1<<20)},
		{"headers longer than the frame", header(0, 0, 0xff, 0xff)},
		{"checksum past the end", header(1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff)},
		{"unknown segmentation", header(0, 0x7f, 14, 0, 100, 0)},
		{"segments of nothing", header(1, 1, 14, 0, 0, 0, 34, 0, 16, 0)},
	} {
		g.transmit(tc.packet)
		if s := g.device.Stats().TX; s.Packets != uint64(i) || s.Dropped != uint64(i+1) {
			t.Fatalf("%s: %+v", tc.name, s)
		}
		g.transmit(plain(ethernet(i, 100))) // the next one passes
		if got := l.receive()[hostHeader:]; !bytes.Equal(got, ethernet(i, 100)) {
			t.Fatalf("%s: then the host received %x", tc.name, got)
		}
	}
	// A chain the device could write to is none of a driver's; it is not written.
	g.Send(1, [][]byte{plain(ethernet(9, 100))}, []int{64}).Wait(t)
	l.receive()
}

// TestOffloads: whichever of the offloads that there are a driver accepts, the tap takes
// what becomes of them.
func TestOffloads(t *testing.T) {
	d := newDevice(t, newLink(t, 1), Config{})
	offloads := []uint64{featureGuestCsum, featureGuestTSO4, featureGuestTSO6, featureGuestECN, featureGuestUSO4, featureGuestUSO6}
	for choice := range 1 << len(offloads) {
		features := uint64(virtio.FeatureVersion1)
		for i, f := range offloads {
			if choice>>i&1 != 0 {
				features |= f & d.Features()
			}
		}
		if err := d.Activate(virtio.Activation{Features: features, Queues: make([]*virtio.Queue, 3)}); err != nil {
			t.Errorf("features %#x: %v", features, err)
		}
		d.Reset()
	}
}

func TestLinkDown(t *testing.T) {
	l := newLink(t, 1)
	g := newGuest(t, newDevice(t, l, Config{}), virtiotest.Options{}, 0, 0)
	l.in(netlink.LinkSetDown)
	for range 3 {
		g.transmit(plain(ethernet(0, 100)))
	}
	if s := g.device.Stats().TX; s != (Counters{Dropped: 3}) {
		t.Errorf("while down: %+v", s)
	}
	l.in(netlink.LinkSetUp)
	g.transmit(plain(ethernet(1, 100)))
	if s := g.device.Stats().TX; s.Packets != 1 {
		t.Errorf("up again: %+v", s)
	}
}

// TestLinkGone deletes the link under a device that works: it says so, waits for
// nothing in vain, and can be reset and used without.
func TestLinkGone(t *testing.T) {
	l := newLink(t, 2)
	var log bytes.Buffer
	device := newDevice(t, l, Config{Log: slog.New(slog.NewTextHandler(&log, nil))})
	g := newGuest(t, device, virtiotest.Options{}, 64, 1536)
	l.send(append(make([]byte, hostHeader), ethernet(1, 100)...))
	g.receive()
	l.in(netlink.LinkDel)
	eventually(t, "a configuration change", func() bool { return g.ConfigChanges() == 1 })
	status := make([]byte, 2)
	if device.ReadConfig(6, status); status[0] != 0 {
		t.Errorf("status %x", status)
	}
	g.transmit(plain(ethernet(1, 100)))
	if s := device.Stats().TX; s.Dropped != 1 {
		t.Errorf("stats %+v", s)
	}
	g.Reset()
	g.Activate()
	g.transmit(plain(ethernet(1, 100)))
	g.Reset()
	if n := strings.Count(log.String(), "\n"); n != 1 || !strings.Contains(log.String(), "lost its tap") {
		t.Errorf("log:\n%s", &log)
	}
}
