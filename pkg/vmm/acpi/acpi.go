// Package acpi writes the ACPI tables of the machine: hardware-reduced ACPI
// with local APICs, one PCI root bus found through ECAM, and power control
// registers. There is no I/O APIC, no SCI and no legacy device: every interrupt
// is a message.
//
// The specification is ACPI 6.5, https://uefi.org/specs/ACPI/6.5/. Section
// numbers in comments are its.
package acpi

import (
	"encoding/binary"
	"fmt"
)

// SleepTypeS5 is the SLP_TYP value that \_S5 gives for "off": the guest writes
// SleepTypeS5<<SleepTypeShift | SleepEnable to the sleep control register
// (section 4.8.3.7).
const (
	SleepTypeS5    = 5
	SleepTypeShift = 2
	SleepTypeMask  = 7 << SleepTypeShift
	SleepEnable    = 1 << 5
)

// Config is what the tables tell about the machine.
type Config struct {
	// Base is the guest physical address the tables will be at.
	Base uint64
	// CPUs is the number of processors; their APIC ids are 0 to CPUs-1, below
	// 255.
	CPUs int
	// LocalAPIC is the physical address of the local APICs.
	LocalAPIC uint32
	// ECAM is the configuration space of bus 0.
	ECAM, ECAMSize uint32
	// MMIO is the memory window of the root bus.
	MMIO, MMIOSize uint32
	// SleepControlPort, SleepStatusPort and ResetPort are I/O ports of one byte;
	// writing ResetValue to the last resets the machine.
	SleepControlPort, SleepStatusPort, ResetPort uint16
	ResetValue                                   uint8
}

// Build returns the tables, to be put at Config.Base. The RSDP is first, so the
// base is what goes to the kernel as acpi_rsdp_addr.
func Build(c Config) ([]byte, error) {
	if c.CPUs < 1 || c.CPUs > 255 {
		return nil, fmt.Errorf("ACPI tables for %d processors: local APIC entries hold 1 to 255", c.CPUs)
	}
	const rsdpSize = 36
	out := make([]byte, rsdpSize)
	// place appends a table at a 16-byte boundary and returns its address.
	place := func(table []byte) uint64 {
		for len(out)%16 != 0 {
			out = append(out, 0)
		}
		addr := c.Base + uint64(len(out))
		out = append(out, table...)
		return addr
	}
	fadt := place(c.fadt(place(c.dsdt())))
	madt := place(c.madt())
	mcfg := place(c.mcfg())
	var entries []byte
	for _, addr := range []uint64{fadt, madt, mcfg} {
		entries = binary.LittleEndian.AppendUint64(entries, addr)
	}
	xsdt := place(table("XSDT", 1, entries))
	rsdp(out[:rsdpSize], xsdt)
	return out, nil
}

// rsdp writes the Root System Description Pointer, section 5.2.5.3.
func rsdp(b []byte, xsdt uint64) {
	copy(b, "RSD PTR ")
	copy(b[9:], oemID)
	b[15] = 2 // revision
	binary.LittleEndian.PutUint32(b[20:], uint32(len(b)))
	binary.LittleEndian.PutUint64(b[24:], xsdt)
	b[8] = -sum(b[:20])
	b[32] = -sum(b)
}

const (
	oemID      = "MICROV" // 6 bytes
	oemTableID = "MICROVM "
	creatorID  = "MVMM"
)

// table puts the System Description Table Header (section 5.2.6) before body.
func table(signature string, revision uint8, body []byte) []byte {
	const headerSize = 36
	b := make([]byte, headerSize, headerSize+len(body))
	copy(b, signature)
	binary.LittleEndian.PutUint32(b[4:], uint32(headerSize+len(body)))
	b[8] = revision
	copy(b[10:], oemID)
	copy(b[16:], oemTableID)
	binary.LittleEndian.PutUint32(b[24:], 1)
	copy(b[28:], creatorID)
	binary.LittleEndian.PutUint32(b[32:], 1)
	b = append(b, body...)
	b[9] = -sum(b)
	return b
}

func sum(b []byte) (s uint8) {
	for _, v := range b {
		s += v
	}
	return s
}

// fadt is the Fixed ACPI Description Table, section 5.2.9.
func (c *Config) fadt(dsdt uint64) []byte {
	const headerSize = 36
	b := make([]byte, 276-headerSize)
	at := func(offset int) []byte { return b[offset-headerSize:] } // offsets as in the table of 5.2.9
	const (
		vgaNotPresent     = 1 << 2
		cmosRTCNotPresent = 1 << 5
	)
	binary.LittleEndian.PutUint16(at(109), vgaNotPresent|cmosRTCNotPresent)
	const (
		wbinvd         = 1 << 0
		noPowerButton  = 1 << 4 // "control method button or none"
		noSleepButton  = 1 << 5
		resetSupported = 1 << 10
		hwReduced      = 1 << 20
	)
	binary.LittleEndian.PutUint32(at(112), wbinvd|noPowerButton|noSleepButton|resetSupported|hwReduced)
	copy(at(116), ioPort(c.ResetPort))
	at(128)[0] = c.ResetValue
	at(131)[0] = 5 // minor version of the table: 6.5
	binary.LittleEndian.PutUint64(at(140), dsdt)
	copy(at(244), ioPort(c.SleepControlPort))
	copy(at(256), ioPort(c.SleepStatusPort))
	copy(at(268), "MICROVM") // hypervisor vendor identity
	return table("FACP", 6, b)
}

// ioPort is the Generic Address Structure of a one-byte port, section 5.2.3.2.
func ioPort(port uint16) []byte {
	return binary.LittleEndian.AppendUint64([]byte{1, 8, 0, 1}, uint64(port))
}

// madt is the Multiple APIC Description Table, section 5.2.12.
func (c *Config) madt() []byte {
	b := binary.LittleEndian.AppendUint32(nil, c.LocalAPIC)
	b = binary.LittleEndian.AppendUint32(b, 0) // no 8259
	for id := range c.CPUs {
		const enabled = 1
		b = append(b, 0, 8, uint8(id), uint8(id), enabled, 0, 0, 0)
	}
	return table("APIC", 5, b)
}

// mcfg tells where the ECAM is: PCI Firmware Specification 3.3, section 4.1.2.
func (c *Config) mcfg() []byte {
	b := make([]byte, 8, 24)
	b = binary.LittleEndian.AppendUint64(b, uint64(c.ECAM))
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0) // segment 0, buses 0 to 0
	return table("MCFG", 1, b)
}

// dsdt is the Differentiated System Description Table: what "off" is written
// as, and the PCI root bridge.
func (c *Config) dsdt() []byte {
	return table("DSDT", 2, join(
		nameOp(`\_S5`, pkg(integer(SleepTypeS5), integer(0))),
		scope(`\_SB`,
			device("PCI0",
				nameOp("_HID", eisaID("PNP0A08")),
				nameOp("_CID", eisaID("PNP0A03")),
				nameOp("_SEG", integer(0)),
				nameOp("_BBN", integer(0)),
				nameOp("_UID", integer(0)),
				// Devices do no DMA behind the processor's caches' back.
				nameOp("_CCA", integer(1)),
				nameOp("_CRS", resourceTemplate(
					wordBusNumber(0, 0),
					dwordMemory(c.MMIO, c.MMIOSize),
				)),
			),
			// Linux uses an ECAM only when a motherboard resource reserves it
			// (arch/x86/pci/mmconfig-shared.c, pci_mmcfg_check_reserved).
			device("ECAM",
				nameOp("_HID", eisaID("PNP0C02")),
				nameOp("_UID", integer(0)),
				nameOp("_CRS", resourceTemplate(memory32Fixed(c.ECAM, c.ECAMSize))),
			),
		),
	))
}
