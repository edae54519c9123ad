package kvm

import (
	"github.com/microvm-runtime/microvm/pkg/vmm/seccomp"
)

// Syscalls are the ioctls of a machine that was made: interrupts and doorbells,
// memory that comes and goes, and vCPUs that come later. No other machine can be
// made. KVM_RUN is the first, because conditions are tried in their order.
func Syscalls() []seccomp.Rule {
	return seccomp.Ioctls(
		reqRun,
		reqSignalMSI,
		reqIOEventFD,
		reqSetUserMemoryRegion,
		reqCreateVCPU,
		reqGetStatsFD,
		reqSetCPUID2,
		reqSetMSRs,
		reqGetSregs,
		reqSetSregs,
		reqGetRegs,
		reqSetRegs,
		reqGetLAPIC,
		reqSetLAPIC,
		reqGetMPState,
		reqKVMClockCtrl,
	)
}

// VCPUSyscalls are the ioctls of a vCPU's own thread: what it runs by, and what an
// access of the guest's to a device's registers brings about.
func VCPUSyscalls() []seccomp.Rule {
	return seccomp.Ioctls(
		reqRun,
		reqSignalMSI,    // a register's write raises an interrupt
		reqIOEventFD,    // the guest moves a BAR
		reqKVMClockCtrl, // after a pause
		reqGetRegs,      // where the guest was, for an error
	)
}
