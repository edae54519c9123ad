package vmm

import (
	"bytes"
	"strings"
	"testing"
)

// writes counts how the output arrives.
type writes struct{ parts []string }

func (w *writes) Write(p []byte) (int, error) {
	w.parts = append(w.parts, string(p))
	return len(p), nil
}

func TestUARTOutput(t *testing.T) {
	var out writes
	u := &uart{out: &out}
	for _, c := range []byte("one\ntwo") {
		u.write(uartData, c)
	}
	if strings.Join(out.parts, "|") != "one\n" {
		t.Errorf("before the flush: %q", out.parts)
	}
	u.flush()
	u.flush()
	if strings.Join(out.parts, "|") != "one\n|two" {
		t.Errorf("after the flush: %q", out.parts)
	}
	out.parts = nil
	for range 3 * maxUARTLine {
		u.write(uartData, 'x')
	}
	if len(out.parts) != 3 || len(out.parts[0]) != maxUARTLine {
		t.Errorf("a line without end came in %d parts", len(out.parts))
	}
}

// TestUARTProbe does what Linux's 8250 driver does to find out what it has
// (drivers/tty/serial/8250/8250_port.c, autoconfig).
func TestUARTProbe(t *testing.T) {
	var out bytes.Buffer
	u := &uart{out: &out}
	expect := func(what string, got, want uint8) {
		t.Helper()
		if got != want {
			t.Errorf("%s is %#x, want %#x", what, got, want)
		}
	}
	u.write(uartIER, 0)
	expect("IER", u.read(uartIER), 0)
	u.write(uartIER, 0xff)
	expect("IER", u.read(uartIER), 0x0f)
	u.write(uartMCR, uartLoop|0x0a)
	expect("MSR in loop mode", u.read(uartMSR)&0xf0, 0x90)
	u.write(uartData, 'x') // loops back to where nobody reads
	u.write(uartMCR, 0)
	expect("MSR", u.read(uartMSR), uartModemReady)
	u.write(uartIIR, 1) // FIFO control: there is no FIFO
	expect("IIR", u.read(uartIIR)>>6, 0)
	for _, v := range []uint8{0xa5, 0x5a} {
		u.write(uartSCR, v)
		expect("SCR", u.read(uartSCR), v)
	}
	u.write(uartLCR, uartDLAB|3)
	u.write(uartData, 1)
	u.write(uartIER, 2)
	expect("divisor, low", u.read(uartData), 1)
	expect("divisor, high", u.read(uartIER), 2)
	u.write(uartLCR, 3)
	expect("LCR", u.read(uartLCR), 3)
	expect("IER after the divisor", u.read(uartIER), 0x0f)
	expect("received data", u.read(uartData), 0)
	expect("MCR", u.read(uartMCR), 0)
	expect("LSR", u.read(uartLSR), uartTxEmpty)
	if u.flush(); out.Len() != 0 {
		t.Errorf("probing sent %q", &out)
	}
}
