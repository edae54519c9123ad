package net

import (
	"encoding/binary"
	"errors"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// link is a tap device in a network namespace of its own, and the host's stack
// behind it: a packet socket. It needs the right to make namespaces.
type link struct {
	t      testing.TB
	taps   []*os.File
	packet int         // AF_PACKET socket on the link, with virtio headers; -1 if there are no taps
	do     chan func() // runs in the namespace
}

const linkName = "tap0"

func newLink(t testing.TB, queues int) *link {
	t.Helper()
	l := &link{t: t, packet: -1, do: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends, and its namespace
		ready <- l.open(queues)
		for f := range l.do {
			f()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		close(l.do)
		unix.Close(l.packet)
		for _, f := range l.taps {
			f.Close()
		}
	})
	return l
}

func (l *link) open(queues int) error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	// Nobody but the test is to send anything.
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for range queues {
		tap, err := openTap(linkName, unix.IFF_TAP|unix.IFF_NO_PI|unix.IFF_VNET_HDR, queues > 1)
		if err != nil {
			return err
		}
		l.taps = append(l.taps, tap)
	}
	if queues == 0 {
		return nil
	}
	device, err := netlink.LinkByName(linkName)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(device); err != nil {
		return err
	}
	all := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))
	if l.packet, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all)); err != nil {
		return err
	}
	return errors.Join(
		unix.SetsockoptInt(l.packet, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1),
		unix.SetsockoptInt(l.packet, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		unix.SetsockoptInt(l.packet, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20),
		unix.SetsockoptTimeval(l.packet, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 60}), // lost, not late
		unix.Bind(l.packet, &unix.SockaddrLinklayer{Protocol: all, Ifindex: device.Attrs().Index}))
}

// openTap opens a queue of a tap in the caller's namespace.
func openTap(name string, flags uint16, multiQueue bool) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return nil, err
	}
	if multiQueue {
		flags |= unix.IFF_MULTI_QUEUE
	}
	ifr.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("TUNSETIFF", err)
	}
	return os.NewFile(uintptr(fd), "tap"), nil
}

// in runs f on the link, in the namespace.
func (l *link) in(f func(device netlink.Link) error) {
	l.t.Helper()
	done := make(chan error)
	l.do <- func() {
		device, err := netlink.LinkByName(linkName)
		if err == nil {
			err = f(device)
		}
		done <- err
	}
	if err := <-done; err != nil {
		l.t.Fatal(err)
	}
}

// hostHeader is the packet socket's, of ten bytes.
const hostHeader = 10

// send has the host send a frame, after its virtio header of ten bytes.
func (l *link) send(packet []byte) {
	l.t.Helper()
	for {
		switch err := unix.Sendto(l.packet, packet, 0, nil); err {
		case nil:
			return
		case unix.ENOBUFS: // the tap's queue is full
			runtime.Gosched()
		default:
			l.t.Errorf("host's send: %v", err)
			return
		}
	}
}

// trySend is send without a care for what comes of it.
func (l *link) trySend(packet []byte) { _ = unix.Sendto(l.packet, packet, 0, nil) }

// flood has the host send one frame after another, with a pause between two,
// until stop is called. frame makes the next one.
func (l *link) flood(pause time.Duration, frame func(i int) []byte) (stop func()) {
	end := make(chan struct{})
	var host sync.WaitGroup
	host.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-end:
				return
			default:
				l.trySend(frame(i))
				time.Sleep(pause)
			}
		}
	})
	return func() {
		close(end)
		host.Wait()
	}
}

// unreadable is what the packet socket has for a frame with a segmentation that
// virtio's header has no word for there, as of UDP into fragments, which a tap takes
// from whoever sends it. The frame is gone then.
const unreadable = unix.EINVAL

// tryReceive reads a frame if there is one.
func (l *link) tryReceive(b []byte) bool {
	_, _, err := unix.Recvfrom(l.packet, b, unix.MSG_DONTWAIT)
	return err == nil || err == unreadable
}

// ignoreAll has the packet socket receive nothing any more.
func (l *link) ignoreAll() error {
	const reject = unix.BPF_RET | unix.BPF_K
	return unix.SetsockoptSockFprog(l.packet, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{
		Len: 1, Filter: &unix.SockFilter{Code: reject, K: 0},
	})
}

// receive returns the next frame the host gets and can read, with its header.
func (l *link) receive() []byte {
	l.t.Helper()
	b := make([]byte, 1<<17)
	for {
		switch n, err := unix.Read(l.packet, b); err {
		case nil:
			return b[:n]
		case unreadable:
		default:
			l.t.Fatalf("host's receive: %v", err)
		}
	}
}

// ethernet makes a frame of n bytes, with contents of their own for each id. Its
// type is one for experiments.
func ethernet(id, n int) []byte {
	f := make([]byte, n)
	copy(f, []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5})
	for i := ethernetHeader; i < n; i++ {
		f[i] = byte(id + i*7)
	}
	return f
}

// tcp makes an IPv4 frame with payload bytes, and a virtio header of size bytes
// that asks to cut it into segments of mss.
func tcp(flow, payload, mss, size int) []byte {
	const ip, tcp = 20, 20
	h := make([]byte, size)
	le, be := binary.LittleEndian, binary.BigEndian
	h[0] = 1 // VIRTIO_NET_HDR_F_NEEDS_CSUM
	if payload > mss {
		h[1] = 1 // VIRTIO_NET_HDR_GSO_TCPV4
		le.PutUint16(h[2:], ethernetHeader+ip+tcp)
		le.PutUint16(h[4:], uint16(mss))
	}
	le.PutUint16(h[6:], ethernetHeader+ip) // csum_start
	le.PutUint16(h[8:], 16)                // csum_offset
	f := ethernet(flow, ethernetHeader+ip+tcp+payload)
	be.PutUint16(f[12:], unix.ETH_P_IP)
	p := f[ethernetHeader:]
	clear(p[:ip+tcp])
	p[0] = 0x45
	be.PutUint16(p[2:], uint16(len(p)))
	p[8], p[9] = 64, unix.IPPROTO_TCP
	copy(p[12:], []byte{10, 0, 0, 1, 10, 0, 0, 2})
	be.PutUint16(p[10:], ^sum(p[:ip]))
	be.PutUint16(p[ip:], uint16(1024+flow))
	be.PutUint16(p[ip+2:], 80)
	p[ip+12], p[ip+13] = tcp/4<<4, 0x10 // ACK
	// The checksum of the pseudo header, for whoever completes it.
	pseudo := append(append([]byte{}, p[12:20]...), 0, unix.IPPROTO_TCP, byte((tcp+payload)>>8), byte(tcp+payload))
	be.PutUint16(p[ip+16:], sum(pseudo))
	return append(h, f...)
}

// sum is the Internet checksum's, not complemented.
func sum(b []byte) uint16 {
	var s uint32
	for ; len(b) > 1; b = b[2:] {
		s += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}
