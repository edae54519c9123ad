package vmm

import (
	"github.com/microvm-runtime/microvm/pkg/kvm"
	"github.com/microvm-runtime/microvm/pkg/vmm/acpi"
	"github.com/microvm-runtime/microvm/pkg/vmm/pci"
)

// readPort fills p, 1 to 4 bytes, from an I/O port. Where there is nothing all
// bits are ones, as on a PC.
func (m *Machine) readPort(port uint16, p []byte) {
	for i := range p {
		p[i] = 0xff
	}
	if len(p) != 1 {
		return
	}
	switch {
	case m.uart != nil && port >= uartPort && port < uartPort+uartNumPorts:
		p[0] = m.uart.read(port - uartPort)
	case port == sleepControlPort, port == sleepStatusPort, port == resetPort:
		p[0] = 0
	}
}

// writePort is readPort's counterpart.
func (m *Machine) writePort(port uint16, p []byte) {
	if len(p) != 1 {
		return
	}
	switch {
	case m.uart != nil && port >= uartPort && port < uartPort+uartNumPorts:
		m.uart.write(port-uartPort, p[0])
	case port == sleepControlPort:
		if p[0]&acpi.SleepEnable != 0 && p[0]&acpi.SleepTypeMask == acpi.SleepTypeS5<<acpi.SleepTypeShift {
			m.finish(Exit{Reason: ExitPowerOff})
		}
	case port == resetPort:
		if p[0] == resetValue {
			m.finish(Exit{Reason: ExitReset})
		}
	}
}

// accessMemory does an access to guest physical memory that has no slot, and
// says what to count it as.
func (m *Machine) accessMemory(a kvm.MMIO) int {
	if !a.Write {
		if !m.pci.ReadMMIO(a.Addr, a.Data) {
			for i := range a.Data {
				a.Data[i] = 0xff
			}
		}
		return countMMIORead
	}
	if a.Addr >= ecamAddr && a.Addr < ecamAddr+pci.ECAMSize {
		m.pci.WriteConfig(a.Addr-ecamAddr, a.Data)
		return countConfigWrite
	}
	m.pci.WriteMMIO(a.Addr, a.Data)
	return countMMIOWrite
}
