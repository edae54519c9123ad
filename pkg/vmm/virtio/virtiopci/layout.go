// Package virtiopci is the modern virtio-pci transport: section 4.1 of the
// specification that package virtio names. There is no legacy interface. A
// device is one PCI function with one BAR; a queue's doorbell is an ioeventfd
// and every interrupt an MSI-X message.
package virtiopci

import (
	"encoding/binary"

	"github.com/microvm-runtime/microvm/pkg/vmm/pci"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
)

// BAR 0. The parts have a page each, so that the doorbells may become exits of
// another kind than the rest, and MSI-X shares no page with anything (PCI Local
// Bus Specification 3.0, section 6.8.2).
const (
	bar     = 0
	barSize = 0x8000

	partSize     = 0x1000
	partCommon   = 0x0000
	partISR      = 0x1000
	partDevice   = 0x2000
	partNotify   = 0x3000
	tableOffset  = 0x4000
	pbaOffset    = 0x5000
	notifyStride = 4 // notify_off_multiplier: bytes between two doorbells

	// maxQueues follows from the MSI-X table's page: a vector for each queue and
	// one for configuration changes.
	maxQueues = partSize/16 - 1
)

// Capability types, section 4.1.4.
const (
	capCommon = 1
	capNotify = 2
	capISR    = 3
	capDevice = 4
	capPCI    = 5
)

// struct virtio_pci_cap, section 4.1.4, without its id and link.
func capability(cfgType uint8, offset, length uint32, more ...byte) []byte {
	b := []byte{uint8(16 + len(more)), cfgType, bar, 0, 0, 0}
	b = binary.LittleEndian.AppendUint32(b, offset)
	b = binary.LittleEndian.AppendUint32(b, length)
	return append(b, more...)
}

// Offsets in struct virtio_pci_common_cfg, section 4.1.4.3.
const (
	offDeviceFeatureSelect = 0x00
	offDeviceFeature       = 0x04
	offDriverFeatureSelect = 0x08
	offDriverFeature       = 0x0c
	offConfigVector        = 0x10
	offNumQueues           = 0x12
	offStatus              = 0x14
	offConfigGeneration    = 0x15
	offQueueSelect         = 0x16
	offQueueSize           = 0x18
	offQueueVector         = 0x1a
	offQueueEnable         = 0x1c
	offQueueNotifyOff      = 0x1e
	offQueueDesc           = 0x20
	offQueueDriver         = 0x28
	offQueueDevice         = 0x30
	commonSize             = 0x40
)

// noVector is VIRTIO_MSI_NO_VECTOR, section 4.1.4.3.
const noVector = 0xffff

// Bits of the ISR status, section 4.1.4.5.
const (
	isrQueue  = 1 << 0
	isrConfig = 1 << 1
)

// Bits of the device status, section 2.1.
const (
	statusAcknowledge = 1
	statusDriver      = 2
	statusDriverOK    = 4
	statusFeaturesOK  = 8
	statusNeedsReset  = 64
	statusFailed      = 128
)

// identity is what the function says it is: section 4.1.2.
func identity(device uint16) pci.Identity {
	const vendor = 0x1af4
	return pci.Identity{
		Vendor:          vendor,
		Device:          0x1040 + device,
		SubsystemVendor: vendor,
		Subsystem:       0x1100, // any number from 0x40 on says "not transitional"
		Class:           class(device),
		Revision:        1,
	}
}

// class is a class code that lets lspci name the device; drivers look at the
// ids alone.
func class(device uint16) uint32 {
	switch device {
	case virtio.TypeNet:
		return 0x020000 // Ethernet controller
	case virtio.TypeBlock, virtio.TypeFS, virtio.TypePmem:
		return 0x018000 // mass storage controller, other
	case virtio.TypeConsole:
		return 0x078000 // communication controller, other
	}
	return 0x088000 // base system peripheral, other
}
