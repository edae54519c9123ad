package vsock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// edgeTriggered is EPOLLET, which x/sys has as a negative number.
const edgeTriggered = 1 << 31

// wakeID is the id under which the poller's own eventfd is registered.
const wakeID = 0

// event says what happened to the descriptor registered as id.
type event struct {
	id    uint64
	flags uint32 // EPOLLIN and so on
}

// poller is an epoll instance that waits inside Go's own: a goroutine blocked
// in wait holds no thread. The runtime's poller alone would not do, because it
// watches every socket for writability all the time, and so would wake us at
// every read by the other side.
//
// Everything is edge-triggered. wait is for one goroutine, the rest for any.
type poller struct {
	epoll  *os.File
	raw    syscall.RawConn
	eventf int // eventfd behind wake

	buffer [64]unix.EpollEvent
	events []event
	n      int
	err    error
	poll   func(fd uintptr) bool // pollOnce, made once
}

func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll_create1: %w", err)
	}
	// Non-blocking, so that os.NewFile gives it to the runtime's poller. It
	// changes nothing else about an epoll descriptor.
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("epoll descriptor: %w", err)
	}
	p := &poller{epoll: os.NewFile(uintptr(fd), "epoll"), eventf: -1}
	p.poll = p.pollOnce
	if p.raw, err = p.epoll.SyscallConn(); err != nil {
		p.close()
		return nil, fmt.Errorf("epoll descriptor: %w", err)
	}
	if p.eventf, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		p.close()
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	if err := p.add(p.eventf, wakeID, unix.EPOLLIN); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (p *poller) close() {
	if p.eventf >= 0 {
		unix.Close(p.eventf)
	}
	p.epoll.Close()
}

// add watches fd for flags until it is closed.
func (p *poller) add(fd int, id uint64, flags uint32) error {
	return p.control(unix.EPOLL_CTL_ADD, fd, id, flags)
}

// modify changes the flags fd is watched for. What is already true is reported
// again.
func (p *poller) modify(fd int, id uint64, flags uint32) error {
	return p.control(unix.EPOLL_CTL_MOD, fd, id, flags)
}

func (p *poller) control(op, fd int, id uint64, flags uint32) error {
	// x/sys splits the 64 bits of user data into Fd and Pad.
	e := unix.EpollEvent{Events: flags | edgeTriggered, Fd: int32(id), Pad: int32(id >> 32)}
	var err error
	if cerr := p.raw.Control(func(epoll uintptr) { err = unix.EpollCtl(int(epoll), op, fd, &e) }); cerr != nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("epoll_ctl: %w", err)
	}
	return nil
}

// wake makes wait return. The eventfd is never read: each write is an edge.
func (p *poller) wake() {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	// It fails only when 2^64 wakes have piled up, and then wait returns anyway.
	_, _ = unix.Write(p.eventf, one[:])
}

// wait returns what happened since the last call, if block is set at least one
// event. The slice is good until the next call.
func (p *poller) wait(block bool) ([]event, error) {
	var err error
	if block {
		err = p.raw.Read(p.poll)
	} else {
		err = p.raw.Control(func(fd uintptr) { p.pollOnce(fd) })
	}
	if err = errors.Join(err, p.err); err != nil {
		return nil, fmt.Errorf("epoll_wait: %w", err)
	}
	p.events = p.events[:0]
	for _, e := range p.buffer[:p.n] {
		p.events = append(p.events, event{id: uint64(uint32(e.Fd)) | uint64(uint32(e.Pad))<<32, flags: e.Events})
	}
	return p.events, nil
}

// pollOnce takes the events there are; it reports false when there are none,
// which lets RawConn.Read wait.
func (p *poller) pollOnce(fd uintptr) bool {
	for {
		p.n, p.err = unix.EpollWait(int(fd), p.buffer[:], 0)
		if p.err != unix.EINTR {
			break
		}
	}
	if p.err != nil {
		p.n = 0
	}
	return p.n > 0 || p.err != nil
}
