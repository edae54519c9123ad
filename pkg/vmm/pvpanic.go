package vmm

import "github.com/microvm-runtime/microvm/pkg/vmm/pci"

// pvpanic is the function through which a guest's kernel says that it
// panicked: QEMU's docs/specs/pvpanic.rst. Only the PANICKED event is offered;
// the kernel prints its messages before it raises it.
type pvpanic struct {
	panicked func()
}

const pvpanicPanicked = 1 << 0

func newPVPanic(panicked func()) (*pci.Function, error) {
	f := pci.NewFunction(pci.Identity{
		Vendor: 0x1b36, Device: 0x0011,
		SubsystemVendor: 0x1b36, Subsystem: 0x1100,
		Class: 0x088000, Revision: 1,
	}, &pvpanic{panicked: panicked})
	// One register of a byte; a page, as that is what a guest can map.
	return f, f.AddBAR(0, 0x1000)
}

func (p *pvpanic) ReadBAR(_ int, offset uint64, b []byte) {
	clear(b)
	if offset == 0 && len(b) > 0 {
		b[0] = pvpanicPanicked
	}
}

func (p *pvpanic) WriteBAR(_ int, offset uint64, b []byte) {
	if offset == 0 && len(b) > 0 && b[0]&pvpanicPanicked != 0 {
		p.panicked()
	}
}

func (*pvpanic) MapBAR(int, uint64) {}
