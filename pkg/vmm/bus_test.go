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

// FuzzGuestAccess lets a guest access ports and addresses at will.
func FuzzGuestAccess(f *testing.F) {
	access := func(kind byte, where uint32, value uint64) []byte {
		b := binary.LittleEndian.AppendUint32([]byte{kind}, where)
		return binary.LittleEndian.AppendUint64(b, value)
	}
	f.Add(access(1, sleepControlPort, 5<<2|1<<5))
	f.Add(access(1, uartPort, 'x'))
	f.Add(append(access(0x19, 4, 2), access(0x21, 0x14, 15)...)) // ECAM: decoding on; BAR: device status
	ecam := make([]byte, pci.ECAMSize)                           // too big to be made each time; NewBus fills what counts
	f.Fuzz(func(t *testing.T, script []byte) {
		m := newBusMachine(t, ecam)
		for ; len(script) >= 13; script = script[13:] {
			where, data := binary.LittleEndian.Uint32(script[1:]), bytes.Clone(script[5:13])
			n := []int{1, 2, 4, 8}[script[0]>>2&3]
			write := script[0]&1 != 0
			switch script[0] >> 4 % 4 {
			case 0:
				if data = data[:min(n, 4)]; write {
					m.writePort(uint16(where), data)
				} else {
					m.readPort(uint16(where), data)
				}
			case 1:
				m.accessMemory(kvm.MMIO{Write: write, Addr: ecamAddr + uint64(where%pci.ECAMSize), Data: data[:n]})
			case 2:
				m.accessMemory(kvm.MMIO{Write: write, Addr: pciWindowAddr + uint64(where%0x10000), Data: data[:n]})
			case 3:
				m.accessMemory(kvm.MMIO{Write: write, Addr: uint64(where) << 8, Data: data[:n]})
			}
		}
	})
}
