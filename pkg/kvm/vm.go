package kvm

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// VM is a virtual machine's descriptor. Its methods may be called concurrently,
// except Close.
type VM struct {
	fd       int
	mmapSize int // size of a vCPU's struct kvm_run mapping
}

// Close closes the descriptor. The kernel keeps the machine until its vCPUs'
// descriptors are closed too.
func (vm *VM) Close() error { return unix.Close(vm.fd) }

// CreateVCPU is KVM_CREATE_VCPU; id becomes the APIC id. The caller owns the
// VCPU and closes it; before it runs it calls MapRun. KVM makes no second one of an
// id, also when the first is closed.
func (vm *VM) CreateVCPU(id int) (*VCPU, error) {
	fd, err := ioctl(vm.fd, reqCreateVCPU, uintptr(id))
	if err != nil {
		return nil, fmt.Errorf("KVM_CREATE_VCPU %d: %w", id, err)
	}
	return &VCPU{fd: fd, mmapSize: vm.mmapSize}, nil
}

// SetUserMemoryRegion is KVM_SET_USER_MEMORY_REGION. The memory at
// r.UserspaceAddr must stay mapped until the slot is taken away or the machine
// is gone.
func (vm *VM) SetUserMemoryRegion(r UserMemoryRegion) error {
	if _, err := ioctlPtr(vm.fd, reqSetUserMemoryRegion, &r); err != nil {
		return fmt.Errorf("KVM_SET_USER_MEMORY_REGION slot %d at %#x, %#x bytes: %w", r.Slot, r.GuestPhysAddr, r.MemorySize, err)
	}
	return nil
}

// SetTSSAddr is KVM_SET_TSS_ADDR: three pages of guest physical space, below
// 4 GiB, that Intel processors without unrestricted guest mode need.
func (vm *VM) SetTSSAddr(addr uint32) error {
	if _, err := ioctl(vm.fd, reqSetTSSAddr, uintptr(addr)); err != nil {
		return fmt.Errorf("KVM_SET_TSS_ADDR: %w", err)
	}
	return nil
}

// SetIdentityMapAddr is KVM_SET_IDENTITY_MAP_ADDR: one page with the same
// purpose. It must precede the first vCPU.
func (vm *VM) SetIdentityMapAddr(addr uint64) error {
	if _, err := ioctlPtr(vm.fd, reqSetIdentityMapAddr, &addr); err != nil {
		return fmt.Errorf("KVM_SET_IDENTITY_MAP_ADDR: %w", err)
	}
	return nil
}

// EnableCap is KVM_ENABLE_CAP on the machine.
func (vm *VM) EnableCap(capability uint32, args ...uint64) error {
	arg := enableCap{Cap: capability}
	copy(arg.Args[:], args)
	if _, err := ioctlPtr(vm.fd, reqEnableCap, &arg); err != nil {
		return fmt.Errorf("KVM_ENABLE_CAP %d: %w", capability, err)
	}
	return nil
}

// SetGSIRouting is KVM_SET_GSI_ROUTING: entries replace all routes there were.
func (vm *VM) SetGSIRouting(entries []IRQRoutingEntry) error {
	if len(entries) > maxIRQRoutes {
		return fmt.Errorf("KVM_SET_GSI_ROUTING: %d routes, at most %d", len(entries), maxIRQRoutes)
	}
	if err := setGSIRouting(vm.fd, entries); err != nil {
		return fmt.Errorf("KVM_SET_GSI_ROUTING: %w", err)
	}
	return nil
}

// IRQFD is KVM_IRQFD. The kernel keeps its own reference to the eventfd.
func (vm *VM) IRQFD(arg IRQFD) error {
	if _, err := ioctlPtr(vm.fd, reqIRQFD, &arg); err != nil {
		return fmt.Errorf("KVM_IRQFD gsi %d: %w", arg.GSI, err)
	}
	return nil
}

// IOEventFD is KVM_IOEVENTFD. The kernel keeps its own reference to the
// eventfd.
func (vm *VM) IOEventFD(arg IOEventFD) error {
	if _, err := ioctlPtr(vm.fd, reqIOEventFD, &arg); err != nil {
		return fmt.Errorf("KVM_IOEVENTFD %#x: %w", arg.Addr, err)
	}
	return nil
}

// SignalMSI is KVM_SIGNAL_MSI. It reports whether the message reached a local
// APIC that did not block it.
func (vm *VM) SignalMSI(arg MSI) (delivered bool, err error) {
	n, err := ioctlPtr(vm.fd, reqSignalMSI, &arg)
	if err != nil {
		return false, fmt.Errorf("KVM_SIGNAL_MSI: %w", err)
	}
	return n > 0, nil
}

// GetStatsFD is KVM_GET_STATS_FD on the machine. The caller closes the result.
func (vm *VM) GetStatsFD() (*Stats, error) { return getStatsFD(vm.fd) }
