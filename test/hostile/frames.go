package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"

	"golang.org/x/sys/unix"
)

// frameFlood sends frames of any length, with what a network card is told of them: hostile frames LINK.
func frameFlood(args []string) (attack, error) {
	if len(args) != 1 {
		return nil, errors.New("usage: hostile frames LINK")
	}
	link, err := net.InterfaceByName(args[0])
	if err != nil {
		return nil, err
	}
	// In network byte order: packet(7).
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
		return nil, fmt.Errorf("PACKET_VNET_HDR: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Index}); err != nil {
		return nil, err
	}
	return func(int) (string, error) {
		var sent, refused int
		for range 2000 {
			if err := unix.Sendto(fd, junkFrame(), unix.MSG_DONTWAIT, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Index, Halen: 6}); err != nil {
				refused++
				continue
			}
			sent++
		}
		return fmt.Sprintf("%d frames sent, %d refused by the guest", sent, refused), nil
	}, nil
}

// junkFrame is a virtio_net_hdr (virtio 1.2, section 5.1.6) of any values and a frame that it is about.
func junkFrame() []byte {
	sizes := []int{0, 1, 13, 14, 15, 60, 576, 1464, 1465, 9000, 65535}
	frame := make([]byte, 10+sizes[rand.IntN(len(sizes))])
	for i := 10; i < len(frame); i++ {
		frame[i] = byte(rand.Uint32())
	}
	if len(frame) > 10+40 {
		// Often IPv4 or IPv6 with TCP or UDP, to everybody.
		for i := range 6 {
			frame[10+i] = 0xff
		}
		copy(frame[10+12:], [][]byte{{8, 0, 0x45}, {0x86, 0xdd, 0x60}, {0x81, 0, 0}, {8, 6, 0}}[rand.IntN(4)])
		frame[10+14+9] = [...]byte{6, 17, 1, 255}[rand.IntN(4)]
	}
	le := binary.LittleEndian
	frame[0] = [...]byte{0, 0, 1, 1, 2, 255}[rand.IntN(6)]        // flags
	frame[1] = [...]byte{0, 0, 0, 1, 3, 4, 5, 0x81}[rand.IntN(8)] // gso_type
	for _, field := range []struct{ offset, most int }{{2, 100}, {4, 2000}, {6, 100}, {8, 20}} {
		v := uint16(rand.IntN(field.most))
		if rand.IntN(8) == 0 {
			v = uint16(rand.Uint32())
		}
		le.PutUint16(frame[field.offset:], v)
	}
	return frame
}
