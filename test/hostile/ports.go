package main

import (
	"math/rand/v2"
	"runtime"

	"golang.org/x/sys/unix"
)

func out8(port uint16, value uint8)
func out32(port uint16, value uint32)
func in32(port uint16) uint32

// Ports where there is something, or was in older machines: serial, interrupt controllers, timer, keyboard, clock, PCI
// configuration, and beside the power registers of pkg/vmm/layout.go, which end the guest at once. The last one is the last that four
// bytes may be written to: the processor refuses an access beyond the end.
var knownPorts = []uint16{0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x20, 0xa0, 0x40, 0x43, 0x60, 0x64, 0x70, 0x71, 0x80, 0xcf8, 0xcfc, 0x603, 0xfffc}

// junkPorts accesses I/O ports. It takes iopl(2), which is of the thread.
func junkPorts(accesses int) error {
	runtime.LockOSThread()
	if _, _, errno := unix.Syscall(unix.SYS_IOPL, 3, 0, 0); errno != 0 {
		return errno
	}
	for range accesses {
		port := knownPorts[rand.IntN(len(knownPorts))]
		if rand.IntN(2) == 0 {
			port = uint16(rand.Uint32N(0x5f0))
		}
		switch rand.IntN(3) {
		case 0:
			out8(port, uint8(rand.Uint32()))
		case 1:
			out32(port, rand.Uint32())
		case 2:
			_ = in32(port)
		}
	}
	return nil
}
