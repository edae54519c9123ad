package network

import (
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// settle is how long others get to finish what they have begun: who sets a link
// up does so in several steps.
const settle = 50 * time.Millisecond

// watchedGroups are the multicast groups of rtnetlink(7) that tell of what
// Describe looks at. Neighbours are left out: they change all the time.
const watchedGroups = unix.RTMGRP_LINK | unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR | unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_ROUTE

// watch tells of changes in a namespace.
type watch struct {
	socket *os.File
	news   chan struct{} // has room for one
	wg     sync.WaitGroup
}

// Watch calls changed after links, addresses or routes of the namespace have
// changed, until Close, which waits for it. It is called by one goroutine at a
// time.
func (n *Network) Watch(changed func()) error {
	var socket *os.File
	err := n.ns.do(func() error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: watchedGroups}); err != nil {
			unix.Close(fd)
			return err
		}
		socket = os.NewFile(uintptr(fd), "netlink")
		return nil
	})
	if err != nil {
		return fmt.Errorf("watch network namespace %s: %w", n.ns.path, err)
	}
	w := &watch{socket: socket, news: make(chan struct{}, 1)}
	ended := make(chan struct{})
	w.wg.Go(func() {
		defer close(ended)
		w.receive()
	})
	w.wg.Go(func() {
		for {
			select {
			case <-w.news:
			case <-ended:
				return
			}
			select {
			case <-time.After(settle):
			case <-ended:
				return
			}
			select {
			case <-w.news: // what happens from here on is for the next time
			default:
			}
			changed()
		}
	})
	n.mu.Lock()
	n.watch = w
	n.mu.Unlock()
	return nil
}

// receive tells that messages have come. What they say is of no interest, nor
// whether some got lost.
func (w *watch) receive() {
	raw, err := w.socket.SyscallConn()
	if err != nil {
		return
	}
	for {
		var readErr error
		err := raw.Read(func(fd uintptr) bool {
			var received bool
			received, readErr = drain(int(fd))
			return received || readErr != nil
		})
		if err != nil || readErr != nil {
			return // closed
		}
		select {
		case w.news <- struct{}{}:
		default:
		}
	}
}

// drain reads what there is.
func drain(fd int) (received bool, err error) {
	var buffer [8192]byte
	for {
		switch _, err := unix.Read(fd, buffer[:]); err {
		case nil, unix.ENOBUFS: // more came than the socket has room for
			received = true
		case unix.EINTR:
		case unix.EAGAIN:
			return received, nil
		default:
			return received, err
		}
	}
}

func (w *watch) close() {
	w.socket.Close()
	w.wg.Wait()
}
