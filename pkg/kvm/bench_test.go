package kvm

import (
	"encoding/binary"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/eventfd"
)

// BenchmarkInterrupt compares the two ways to deliver an interrupt message, and
// shows what it costs to change a route, which an irqfd needs and the ioctl
// does not.
func BenchmarkInterrupt(b *testing.B) {
	g := newGuest(b, 0xe6, donePort)
	lapic, err := g.vcpu.GetLAPIC()
	if err != nil {
		b.Fatal(err)
	}
	binary.LittleEndian.PutUint32(lapic.Regs[0xf0:], 0x1ff)
	if err := g.vcpu.SetLAPIC(lapic); err != nil {
		b.Fatal(err)
	}
	b.Run("signal-msi", func(b *testing.B) {
		for b.Loop() {
			if _, err := g.vm.SignalMSI(MSI{AddressLo: 0xfee00000, Data: 0x41}); err != nil {
				b.Fatal(err)
			}
		}
	})
	routes := make([]IRQRoutingEntry, 20)
	for i := range routes {
		routes[i] = IRQRoutingEntry{GSI: uint32(i), Type: IRQRoutingMSI, AddressLo: 0xfee00000, Data: 0x42}
	}
	b.Run("set-routes", func(b *testing.B) {
		for b.Loop() {
			if err := g.vm.SetGSIRouting(routes); err != nil {
				b.Fatal(err)
			}
		}
	})
	e, err := eventfd.New()
	if err != nil {
		b.Fatal(err)
	}
	defer e.Close()
	if err := g.vm.IRQFD(IRQFD{FD: uint32(e.FD()), GSI: 5}); err != nil {
		b.Fatal(err)
	}
	b.Run("irqfd", func(b *testing.B) {
		for b.Loop() {
			if err := e.Signal(); err != nil {
				b.Fatal(err)
			}
		}
	})
}
