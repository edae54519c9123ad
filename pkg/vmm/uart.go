package vmm

import (
	"io"
	"sync"
)

// uart is the debug UART: as much of a 16450 at I/O port 0x3f8 as Linux's 8250
// driver and its early console want to see. It only sends, and has no
// interrupt: the kernel writes its messages to it by polling. It is not for
// user space.
type uart struct {
	out io.Writer

	mu   sync.Mutex // protects what follows
	line []byte     // not written yet

	ier, lcr, mcr, scr uint8
	divisor            [2]uint8
}

// Registers of a 16450 by their offset (National Semiconductor PC16450
// datasheet, table 8-1), and the bits that count.
const (
	uartData     = 0 // THR, or the divisor's low byte while DLAB is set
	uartIER      = 1 // or the divisor's high byte
	uartIIR      = 2
	uartLCR      = 3
	uartMCR      = 4
	uartLSR      = 5
	uartMSR      = 6
	uartSCR      = 7
	uartNumPorts = 8

	uartDLAB        = 0x80 // of LCR
	uartLoop        = 0x10 // of MCR
	uartNoInterrupt = 0x01 // of IIR
	uartTxEmpty     = 0x60 // of LSR: holding and shift register
	uartModemReady  = 0xb0 // of MSR: DCD, DSR, CTS
)

// maxUARTLine is how many bytes are gathered before they are written even
// without a newline.
const maxUARTLine = 256

func (u *uart) read(reg uint16) uint8 {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch reg {
	case uartData:
		if u.lcr&uartDLAB != 0 {
			return u.divisor[0]
		}
	case uartIER:
		if u.lcr&uartDLAB != 0 {
			return u.divisor[1]
		}
		return u.ier
	case uartIIR:
		return uartNoInterrupt
	case uartLCR:
		return u.lcr
	case uartMCR:
		return u.mcr
	case uartLSR:
		return uartTxEmpty
	case uartMSR:
		if u.mcr&uartLoop != 0 {
			// The modem control lines come back: DTR as DSR, RTS as CTS, OUT1 as
			// RI, OUT2 as DCD.
			m := u.mcr
			return m&1<<5 | m&2<<3 | m&4<<4 | m&8<<4
		}
		return uartModemReady
	case uartSCR:
		return u.scr
	}
	return 0
}

func (u *uart) write(reg uint16, v uint8) {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch reg {
	case uartData:
		switch {
		case u.lcr&uartDLAB != 0:
			u.divisor[0] = v
		case u.mcr&uartLoop == 0:
			u.line = append(u.line, v)
			if v == '\n' || len(u.line) >= maxUARTLine {
				u.writeLine()
			}
		}
	case uartIER:
		if u.lcr&uartDLAB != 0 {
			u.divisor[1] = v
		} else {
			u.ier = v & 0x0f
		}
	case uartLCR:
		u.lcr = v
	case uartMCR:
		u.mcr = v & 0x1f
	case uartSCR:
		u.scr = v
	}
}

// flush writes what is left.
func (u *uart) flush() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.writeLine()
}

// writeLine writes what there is. Nobody can be told of an error.
func (u *uart) writeLine() {
	if len(u.line) > 0 {
		u.out.Write(u.line) //nolint:errcheck
		u.line = u.line[:0]
	}
}
