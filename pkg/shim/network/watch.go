package network

import (
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// settle is how long nothing has to happen before a change counts: who sets a
// link up does so in several steps.
const settle = 50 * time.Millisecond

// watchedGroups are the multicast groups of rtnetlink(7) that tell of what
// Describe looks at. Neighbours are left out: they change all the time.
const watchedGroups = unix.RTMGRP_LINK | unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR | unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_ROUTE

// watch tells of changes in a namespace.
type watch struct {
	socket *os.File
	timer  *time.Timer
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
	w := &watch{socket: socket, timer: time.NewTimer(time.Hour)}
	w.timer.Stop()
	ended := make(chan struct{})
	w.wg.Go(func() {
		defer close(ended)
		w.receive()
	})
	w.wg.Go(func() {
		for {
			select {
			case <-w.timer.C:
				changed()
			case <-ended:
				return
			}
		}
	})
	n.mu.Lock()
	n.watch = w
	n.mu.Unlock()
	return nil
}

// receive starts the timer anew with every message. What it says is of no
// interest, nor whether some got lost.
func (w *watch) receive() {
	raw, err := w.socket.SyscallConn()
	if err != nil {
		return
	}
	var buffer [8192]byte
	for {
		received := false
		err := raw.Read(func(fd uintptr) bool {
			for {
				_, err := unix.Read(int(fd), buffer[:])
				if err == unix.EAGAIN {
					return received
				}
				received = true // or ENOBUFS: more than the socket has room for
			}
		})
		if err != nil {
			return // closed
		}
		w.timer.Reset(settle)
	}
}

func (w *watch) close() {
	w.socket.Close()
	w.wg.Wait()
	w.timer.Stop()
}
