package net

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// counters are Counters that are being counted.
type counters struct{ packets, bytes, dropped atomic.Uint64 }

func (c *counters) passed(bytes int) {
	c.packets.Add(1)
	c.bytes.Add(uint64(bytes))
}

func (c *counters) addTo(sum *Counters) {
	sum.Packets += c.packets.Load()
	sum.Bytes += c.bytes.Load()
	sum.Dropped += c.dropped.Load()
}

// pair is a queue of the tap, and what is counted of the queue pair on it. It
// lasts as long as the device.
type pair struct {
	fd     int // the tap queue, non-blocking
	rx, tx counters

	// readable is an epoll instance with the tap in it, to wait for frames in
	// the runtime's poller: by waiter, whose function reads the tap. The tap
	// itself is not for that poller: the os.File that it came in, if it is in
	// there, is closed when the machine has made the device, and the tap's end is
	// an event without EPOLLIN, which that poller takes for a failure of its own.
	// Nobody calls epoll_wait(2) on readable: its state is looked up when the
	// poller's is.
	readable *os.File
	waiter   syscall.RawConn

	mu       sync.Mutex // held while frames are received: they end when attach(false) returns
	attached bool
}

// newPair checks that the file is what Config.Taps says, and copies the
// descriptor.
func newPair(file *os.File, multiQueue bool) (_ *pair, err error) {
	p := &pair{fd: -1, attached: true}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, err
	}
	if cerr := raw.Control(func(fd uintptr) { p.fd, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) }); cerr != nil {
		return nil, cerr
	}
	if err != nil {
		p.fd = -1
		return nil, fmt.Errorf("fcntl: %w", err)
	}
	ifr, err := unix.NewIfreq("x")
	if err != nil {
		return nil, err
	}
	if err := unix.IoctlIfreq(p.fd, unix.TUNGETIFF, ifr); err != nil {
		return nil, fmt.Errorf("TUNGETIFF: %w", err)
	}
	// IFF_NO_PI cannot be asked for: IFF_NOFILTER has the same value here.
	want := uint16(unix.IFF_TAP | unix.IFF_VNET_HDR)
	if multiQueue {
		want |= unix.IFF_MULTI_QUEUE
	}
	if ifr.Uint16()&want != want {
		return nil, fmt.Errorf("interface %s has flags %#x, and needs %#x", ifr.Name(), ifr.Uint16(), want)
	}
	if err := unix.IoctlSetPointerInt(p.fd, unix.TUNSETVNETHDRSZ, headerSize); err != nil {
		return nil, fmt.Errorf("TUNSETVNETHDRSZ: %w", err)
	}
	if err := unix.SetNonblock(p.fd, true); err != nil {
		return nil, fmt.Errorf("non-blocking mode: %w", err)
	}
	return p, p.watch()
}

// watch makes readable.
func (p *pair) watch() error {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return fmt.Errorf("epoll_create1: %w", err)
	}
	// So that os.NewFile gives it to the runtime's poller.
	if err := unix.SetNonblock(epoll, true); err != nil {
		unix.Close(epoll)
		return fmt.Errorf("epoll descriptor: %w", err)
	}
	p.readable = os.NewFile(uintptr(epoll), "epoll")
	if err := unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, p.fd, &unix.EpollEvent{Events: unix.EPOLLIN}); err != nil {
		return fmt.Errorf("epoll_ctl: %w", err)
	}
	p.waiter, err = p.readable.SyscallConn()
	return err
}

func (p *pair) close() error {
	var errs []error
	if p.readable != nil {
		errs = append(errs, p.readable.Close())
	}
	if p.fd >= 0 {
		errs = append(errs, unix.Close(p.fd))
	}
	return errors.Join(errs...)
}

// Offloads of a tap, TUN_F_* in include/uapi/linux/if_tun.h.
const (
	tapCsum = 1 << 0
	tapTSO4 = 1 << 1
	tapTSO6 = 1 << 2
	tapECN  = 1 << 3
	tapUSO4 = 1 << 5
	tapUSO6 = 1 << 6
)

// tapOffloads is what a driver that accepted the features can take from the tap.
// Like the features, which need GUEST_CSUM (section 5.1.3.1), those of the tap
// are nothing without the checksum.
func tapOffloads(features uint64) int {
	if features&featureGuestCsum == 0 {
		return 0
	}
	offloads := tapCsum
	for _, o := range []struct {
		feature uint64
		tap     int
	}{
		{featureGuestTSO4, tapTSO4}, {featureGuestTSO6, tapTSO6}, {featureGuestUSO4, tapUSO4}, {featureGuestUSO6, tapUSO6},
	} {
		if features&o.feature != 0 {
			offloads |= o.tap
		}
	}
	// The kernel takes these two together only (drivers/net/tun.c, set_offload). Fewer
	// offloads than the driver accepted are allowed.
	if uso := tapUSO4 | tapUSO6; offloads&uso != uso {
		offloads &^= uso
	}
	if features&featureGuestECN != 0 && offloads&(tapTSO4|tapTSO6) != 0 {
		offloads |= tapECN
	}
	return offloads
}

// setOffloads sets them for the whole tap device.
func (p *pair) setOffloads(offloads int) error {
	if err := unix.IoctlSetInt(p.fd, unix.TUNSETOFFLOAD, offloads); err != nil {
		return fmt.Errorf("TUNSETOFFLOAD %#x: %w", offloads, err)
	}
	return nil
}

// attach has the tap deliver frames to this queue, or not: then the kernel drops
// those that are in it, and reading it gives EAGAIN. It says whether there was
// something to change.
func (p *pair) attach(on bool) (changed bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if on == p.attached {
		return false, nil
	}
	ifr, err := unix.NewIfreq("x") // the name counts for nothing
	if err != nil {
		return false, err
	}
	ifr.SetUint16(unix.IFF_DETACH_QUEUE)
	if on {
		ifr.SetUint16(unix.IFF_ATTACH_QUEUE)
	}
	if err := unix.IoctlIfreq(p.fd, unix.TUNSETQUEUE, ifr); err != nil {
		return true, fmt.Errorf("TUNSETQUEUE: %w", err)
	}
	p.attached = on
	return true, nil
}

// interrupt ends the wait for frames, and lets nobody wait any more; or allows
// it again.
func (p *pair) interrupt(on bool) error {
	var deadline time.Time
	if on {
		deadline = time.Unix(1, 0)
	}
	return p.readable.SetReadDeadline(deadline)
}
