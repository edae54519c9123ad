package kvm

import (
	"sync/atomic"
	"unsafe"
)

// SetImmediateExit makes Run return unix.EINTR before it enters the guest,
// until it is set to false. It may be called from any thread; one that wants a
// vCPU out of the guest sets it and then sends the vCPU's thread a signal.
func (v *VCPU) SetImmediateExit(on bool) {
	// immediate_exit is a byte between request_interrupt_window (unused with an
	// in-kernel local APIC, always zero) and padding: the whole word is stored,
	// as Go has no atomic store of a byte.
	var word uint32
	if on {
		word = 1 << (8 * runImmediateExit)
	}
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&v.run[0])), word)
}
