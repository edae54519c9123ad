package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/shim/agentclient"
)

// connections are more than the device has.
const connections = 1200

// vsockFlood opens connections to the host by the thousand: to the port that the shim listens on, and to others. Some say nothing,
// some send and never read, some end their half; they stay until the next round.
func vsockFlood([]string) (attack, error) {
	limit := unix.Rlimit{Cur: 4 * connections, Max: 4 * connections}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil, err
	}
	junk := bytes.Repeat([]byte("\xffjunk"), 13<<10)
	var open []int
	return func(int) (string, error) {
		for _, fd := range open {
			_ = unix.Close(fd)
		}
		open = open[:0]
		var sent int
		for i := range connections {
			kind := unix.SOCK_STREAM
			if i%16 == 15 {
				kind = unix.SOCK_SEQPACKET
			}
			fd, err := unix.Socket(unix.AF_VSOCK, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				continue // the guest's kernel has not that kind, or enough
			}
			open = append(open, fd)
			port := uint32(agentclient.ControlPort)
			if i%2 == 1 {
				port = [...]uint32{0, 1, agentclient.StreamPort, 1 << 30, 1<<30 + uint32(i), 1<<32 - 2, rand.Uint32()}[i/2%7]
			}
			_ = unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: port}) // goes on by itself
		}
		for i, fd := range open {
			if i%4 == 0 {
				continue // half open
			}
			if n, err := unix.Write(fd, junk); err == nil {
				sent += n
			}
			if i%4 == 1 {
				_ = unix.Shutdown(fd, unix.SHUT_WR)
			}
		}
		return fmt.Sprintf("%d connections, %d KiB", len(open), sent>>10), nil
	}, nil
}
