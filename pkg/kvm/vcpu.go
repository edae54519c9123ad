package kvm

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// VCPU is a virtual CPU's descriptor and its struct kvm_run mapping.
//
// KVM wants all calls for one vCPU to come from one thread: the caller runs
// them on a goroutine locked to its thread. Only SetImmediateExit and
// GetStatsFD may be called from elsewhere.
type VCPU struct {
	fd       int
	mmapSize int
	run      []byte // struct kvm_run and what follows it in the mapping; nil: not mapped
}

// MapRun maps struct kvm_run, which Run and what tells of it need. Done once, it
// does nothing.
func (v *VCPU) MapRun() (err error) {
	if v.run != nil {
		return nil
	}
	if v.run, err = unix.Mmap(v.fd, 0, v.mmapSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("mmap of a vCPU: %w", err)
	}
	return nil
}

// Close closes the descriptor and its mapping.
func (v *VCPU) Close() error {
	var err error
	if v.run != nil {
		err = unix.Munmap(v.run)
	}
	if cerr := unix.Close(v.fd); err == nil {
		err = cerr
	}
	return err
}

// Run is KVM_RUN. Any error is the bare errno: unix.EINTR when a signal came or
// immediate_exit is set. It is not repeated here because only the caller knows
// whether it was told to stop.
//
// The call must be unix.Syscall: it tells the Go scheduler that the thread may
// be away for long. With RawSyscall the thread would keep its P, and the next
// garbage collection would wait for the guest for ever.
func (v *VCPU) Run() error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(v.fd), reqRun, 0); errno != 0 {
		return errno
	}
	return nil
}

// GetRegs is KVM_GET_REGS.
func (v *VCPU) GetRegs() (Regs, error) { return get[Regs](v, reqGetRegs, "KVM_GET_REGS") }

// SetRegs is KVM_SET_REGS.
func (v *VCPU) SetRegs(r Regs) error { return set(v, reqSetRegs, "KVM_SET_REGS", &r) }

// GetSregs is KVM_GET_SREGS.
func (v *VCPU) GetSregs() (Sregs, error) { return get[Sregs](v, reqGetSregs, "KVM_GET_SREGS") }

// SetSregs is KVM_SET_SREGS.
func (v *VCPU) SetSregs(s Sregs) error { return set(v, reqSetSregs, "KVM_SET_SREGS", &s) }

// GetLAPIC is KVM_GET_LAPIC.
func (v *VCPU) GetLAPIC() (LAPICState, error) {
	return get[LAPICState](v, reqGetLAPIC, "KVM_GET_LAPIC")
}

// SetLAPIC is KVM_SET_LAPIC.
func (v *VCPU) SetLAPIC(s LAPICState) error { return set(v, reqSetLAPIC, "KVM_SET_LAPIC", &s) }

// GetMPState is KVM_GET_MP_STATE: one of the MPState constants.
func (v *VCPU) GetMPState() (uint32, error) {
	return get[uint32](v, reqGetMPState, "KVM_GET_MP_STATE")
}

// SetCPUID2 is KVM_SET_CPUID2.
func (v *VCPU) SetCPUID2(entries []CPUIDEntry) error {
	if len(entries) > maxCPUIDEntries {
		return fmt.Errorf("KVM_SET_CPUID2: %d entries, at most %d", len(entries), maxCPUIDEntries)
	}
	arg := cpuid2{N: uint32(len(entries))}
	copy(arg.Entries[:], entries)
	return set(v, reqSetCPUID2, "KVM_SET_CPUID2", &arg)
}

// GetMSRs is KVM_GET_MSRS: the values of the registers with these numbers.
func (v *VCPU) GetMSRs(indexes ...uint32) ([]MSREntry, error) {
	if len(indexes) > maxMSREntries {
		return nil, fmt.Errorf("KVM_GET_MSRS: %d entries, at most %d", len(indexes), maxMSREntries)
	}
	arg := msrs{N: uint32(len(indexes))}
	for i, index := range indexes {
		arg.Entries[i].Index = index
	}
	n, err := ioctlPtr(v.fd, reqGetMSRs, &arg)
	if err != nil {
		return nil, fmt.Errorf("KVM_GET_MSRS: %w", err)
	}
	if n < len(indexes) {
		return nil, fmt.Errorf("KVM_GET_MSRS: MSR %#x is not readable", indexes[n])
	}
	return slices.Clone(arg.Entries[:n]), nil
}

// SetMSRs is KVM_SET_MSRS. It fails when KVM refused one of the entries; those
// before it are set then.
func (v *VCPU) SetMSRs(entries []MSREntry) error {
	if len(entries) > maxMSREntries {
		return fmt.Errorf("KVM_SET_MSRS: %d entries, at most %d", len(entries), maxMSREntries)
	}
	arg := msrs{N: uint32(len(entries))}
	copy(arg.Entries[:], entries)
	n, err := ioctlPtr(v.fd, reqSetMSRs, &arg)
	if err != nil {
		return fmt.Errorf("KVM_SET_MSRS: %w", err)
	}
	if n < len(entries) {
		return fmt.Errorf("KVM_SET_MSRS: MSR %#x = %#x was refused", entries[n].Index, entries[n].Data)
	}
	return nil
}

// KVMClockCtrl is KVM_KVMCLOCK_CTRL: tells the guest that it was paused, so
// that its watchdogs do not blame it. It fails with EINVAL when the guest has
// no kvmclock.
func (v *VCPU) KVMClockCtrl() error {
	if _, err := ioctl(v.fd, reqKVMClockCtrl, 0); err != nil {
		return fmt.Errorf("KVM_KVMCLOCK_CTRL: %w", err)
	}
	return nil
}

// GetStatsFD is KVM_GET_STATS_FD on the vCPU. The caller closes the result.
func (v *VCPU) GetStatsFD() (*Stats, error) { return getStatsFD(v.fd) }

func get[T any](v *VCPU, req uint, name string) (T, error) {
	var arg T
	if _, err := ioctlPtr(v.fd, req, &arg); err != nil {
		return arg, fmt.Errorf("%s: %w", name, err)
	}
	return arg, nil
}

func set[T any](v *VCPU, req uint, name string, arg *T) error {
	if _, err := ioctlPtr(v.fd, req, arg); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}
