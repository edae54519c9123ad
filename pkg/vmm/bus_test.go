package vmm

import (
	"bytes"
	"encoding/binary"
	"io"
	"log/slog"
	"sync"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/kvm"
	"github.com/microvm-runtime/microvm/pkg/vmm/eventfd"
	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/pci"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/rng"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiopci"
)

// zeroes is entropy that costs nothing.
type zeroes struct{}

func (zeroes) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// newBusMachine makes as much of a machine as guests' accesses reach: a bus
// with an entropy device and pvpanic, and the ports. There is no KVM.
func newBusMachine(t testing.TB, ecam []byte) *Machine {
	t.Helper()
	m := &Machine{
		log:    slog.New(slog.NewTextHandler(io.Discard, nil)),
		memory: &memory.Memory{},
		uart:   &uart{out: io.Discard},
		ended:  make(chan struct{}),
		acks:   make(chan struct{}, 1),
	}
	m.resumed = sync.NewCond(&m.mu)
	var err error
	if m.pci, err = pci.NewBus(pci.Window{Start: pciWindowAddr, Size: pciWindowSize}, ecam); err != nil {
		t.Fatal(err)
	}
	if err := m.memory.Add(memory.Region{Bytes: make([]byte, 0x10000)}); err != nil {
		t.Fatal(err)
	}
	transport, err := virtiopci.New(virtiopci.Config{
		Device: rng.New(zeroes{}), Memory: m.memory, Log: m.log,
		SendMSI:          func(uint64, uint32) {},
		AssignDoorbell:   func(uint64, *eventfd.EventFD) error { return nil },
		DeassignDoorbell: func(uint64, *eventfd.EventFD) error { return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(transport.Reset)
	panicking, err := newPVPanic(func() { m.finish(Exit{Reason: ExitPanic}) })
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []*pci.Function{transport.Function(), panicking} {
		if _, err := m.pci.Add(f); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

func TestNothingThere(t *testing.T) {
	m := newBusMachine(t, make([]byte, pci.ECAMSize))
	for _, port := range []uint16{0, 0x60, 0x64, 0x70, 0x80, 0xcf8, 0x3f7, 0x400, 0x5ff, 0x603, 0xffff} {
		for _, n := range []int{1, 2, 4} {
			p := make([]byte, n)
			if m.readPort(port, p); !bytes.Equal(p, bytes.Repeat([]byte{0xff}, n)) {
				t.Errorf("port %#x reads %x", port, p)
			}
			m.writePort(port, p)
		}
	}
	// A device of one byte is not there for wider accesses.
	for _, port := range []uint16{uartPort, sleepControlPort, sleepStatusPort, resetPort} {
		p := []byte{resetValue | 5<<2 | 1<<5, 0}
		m.writePort(port, p)
		if m.readPort(port, p); !bytes.Equal(p, []byte{0xff, 0xff}) {
			t.Errorf("port %#x reads %x", port, p)
		}
	}
	for _, addr := range []uint64{pciWindowAddr, ecamAddr - 8, ecamAddr + pci.ECAMSize, 0x20000000, 1 << 40, 1<<64 - 8} {
		for n := 1; n <= 8; n++ {
			p := make([]byte, n)
			m.accessMemory(kvm.MMIO{Write: true, Addr: addr, Data: p})
			if m.accessMemory(kvm.MMIO{Addr: addr, Data: p}); !bytes.Equal(p, bytes.Repeat([]byte{0xff}, n)) {
				t.Errorf("address %#x reads %x", addr, p)
			}
		}
	}
	select {
	case <-m.ended:
		t.Errorf("the machine ended: %+v", m.exit)
	default:
	}
}

// Registers of a virtio device and of MSI-X in its BAR, virtio 1.2 sections
// 4.1.4.3 and 4.1.5, as packages virtiopci and pci lay them out.
const (
	regFeatureSelect, regFeature, regConfigVector           = 0x08, 0x0c, 0x10
	regStatus, regQueueSelect, regQueueSize, regQueueVector = 0x14, 0x16, 0x18, 0x1a
	regQueueEnable, regQueueDesc                            = 0x1c, 0x20
	regNotify, regTable, regPending                         = 0x3000, 0x4000, 0x5000
)

// FuzzGuestAccess lets a guest access ports and addresses at will: the serial port,
// the power registers, configuration space, and the BARs of a virtio device. The
// machine ends when it is told to, for the reason that it is given, and not else.
func FuzzGuestAccess(f *testing.F) {
	access := func(kind byte, where uint32, value uint64) []byte {
		b := binary.LittleEndian.AppendUint32([]byte{kind}, where)
		return binary.LittleEndian.AppendUint64(b, value)
	}
	// kind: write, size and what is accessed.
	const (
		write                     = 1
		size1, size2, size4       = 0 << 2, 1 << 2, 2 << 2
		size8                     = 3 << 2
		port, config, bar, beyond = 0 << 4, 1 << 4, 2 << 4, 3 << 4
	)
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	decode := access(write|size2|config, 4, 2) // memory decoding on, of the first function
	start := join(decode,
		access(write|size1|bar, regStatus, 1), access(write|size1|bar, regStatus, 3),
		access(write|size4|bar, regFeatureSelect, 1), access(write|size4|bar, regFeature, 1),
		access(write|size1|bar, regStatus, 11), access(write|size2|bar, regQueueSelect, 0), access(write|size2|bar, regQueueSize, 16),
		access(write|size8|bar, regQueueDesc, 0x1000), access(write|size8|bar, regQueueDesc+8, 0x2000), access(write|size8|bar, regQueueDesc+16, 0x3000),
		access(write|size2|bar, regQueueVector, 1), access(write|size2|bar, regQueueEnable, 1), access(write|size1|bar, regStatus, 15))
	reset := access(write|size1|bar, regStatus, 0)
	ecam := make([]byte, pci.ECAMSize) // too big to be made each time; NewBus fills what counts
	newBusMachine(f, ecam)
	msix := uint32(ecam[0x34]) // of the first function's capabilities
	for ecam[msix] != 0x11 {   // PCI_CAP_ID_MSIX
		msix = uint32(ecam[msix+1])
	}
	f.Add(access(write|size1|port, sleepControlPort, 5<<2|1<<5))
	f.Add(access(write|size1|port, sleepControlPort, 3<<2|1<<5)) // another state than S5
	f.Add(access(write|size4|port, sleepControlPort, 5<<2|1<<5)) // more than the register
	f.Add(access(write|size1|port, resetPort, resetValue))
	f.Add(access(size1|port, sleepStatusPort, 0))
	f.Add(access(write|size1|port, uartPort, 'x'))
	f.Add(join(start, access(write|size2|bar, regNotify, 0), reset, start, access(size8|bar, regQueueDesc, 0)))
	f.Add(join(decode, access(write|size2|bar, regNotify, 0), access(write|size2|bar, regNotify+4, 1))) // of queues that are not ready
	f.Add(join(start, access(write|size2|config, msix+2, 0x8000), access(write|size8|bar, regTable, 0xfee00000), access(write|size8|bar, regTable+8, 0x40),
		access(write|size8|bar, regTable+16*3, 1), access(write|size8|bar, regPending, 1), access(write|size2|bar, regConfigVector, 77), access(size8|bar, regPending, 0)))
	f.Add(join(start, access(write|size4|config, 0x10, 0xd0000000), access(write|size4|config, 0x10, 0xffffffff), reset)) // the BAR moves
	f.Add(join(access(write|size2|config, 4|1<<15, 2), access(write|size4|config, 0x10|1<<15, pciWindowAddr+0x8000), access(write|size1|bar, 0x8000, 1)))
	f.Add(access(write|size8|beyond, 0xfee00, 1))
	f.Fuzz(func(t *testing.T, script []byte) {
		m := newBusMachine(t, ecam)
		may := map[ExitReason]bool{}
		for steps := 0; len(script) >= 13 && steps < 300; script, steps = script[13:], steps+1 {
			where, data := binary.LittleEndian.Uint32(script[1:]), bytes.Clone(script[5:13])
			n := []int{1, 2, 4, 8}[script[0]>>2&3]
			isWrite := script[0]&write != 0
			switch script[0] & 0x30 {
			case port:
				if data = data[:min(n, 4)]; isWrite {
					m.writePort(uint16(where), data)
					may[ExitPowerOff] = may[ExitPowerOff] || uint16(where) == sleepControlPort && n == 1 && data[0]&0x3c == 5<<2|1<<5
					may[ExitReset] = may[ExitReset] || uint16(where) == resetPort && n == 1 && data[0] == resetValue
				} else {
					m.readPort(uint16(where), data)
				}
				continue
			case config:
				m.accessMemory(kvm.MMIO{Write: isWrite, Addr: ecamAddr + uint64(where%pci.ECAMSize), Data: data[:n]})
			case bar:
				m.accessMemory(kvm.MMIO{Write: isWrite, Addr: pciWindowAddr + uint64(where%0x10000), Data: data[:n]})
			case beyond:
				m.accessMemory(kvm.MMIO{Write: isWrite, Addr: uint64(where) << 8, Data: data[:n]})
			}
			// The register may be anywhere, also behind the window in the virtio
			// device's configuration space.
			may[ExitPanic] = may[ExitPanic] || isWrite
		}
		select {
		case <-m.ended:
			if !may[m.exit.Reason] {
				t.Fatalf("the machine ended: %+v", m.exit)
			}
		default:
			if may[ExitPowerOff] || may[ExitReset] {
				t.Fatal("the machine did not end")
			}
		}
	})
}
