package kvm

import "encoding/binary"

// Offsets in struct kvm_run.
const (
	runImmediateExit = 1
	runExitReason    = 8
	runUnion         = 32 // the member that belongs to the exit reason
	runMMIOData      = runUnion + 8
	runMMIOLen       = runUnion + 16
	runMMIOIsWrite   = runUnion + 20
)

// ExitReason is why the last Run returned without error: one of the Exit
// constants.
func (v *VCPU) ExitReason() uint32 { return binary.LittleEndian.Uint32(v.run[runExitReason:]) }

// IO is the access to a port behind ExitIO.
type IO struct {
	Write bool
	Size  int // bytes of one access: 1, 2 or 4
	Port  uint16
	// Data is where the bytes are (Write) or are to be put, for all the
	// accesses of a string instruction: a multiple of Size. It is valid until
	// the next Run, which is what completes the access.
	Data []byte
}

// IO describes the access after ExitIO.
func (v *VCPU) IO() IO {
	u := v.run[runUnion:]
	size := int(u[1])
	count := int(binary.LittleEndian.Uint32(u[4:]))
	offset := binary.LittleEndian.Uint64(u[8:])
	return IO{
		Write: u[0] == 1, // KVM_EXIT_IO_OUT
		Size:  size,
		Port:  binary.LittleEndian.Uint16(u[2:]),
		Data:  v.run[offset : offset+uint64(size*count)],
	}
}

// MMIO is the access to memory without a slot behind ExitMMIO.
type MMIO struct {
	Write bool
	Addr  uint64
	// Data is where the bytes are (Write) or are to be put: 1 to 8 of them. It
	// is valid until the next Run, which is what completes the access.
	Data []byte
}

// MMIO describes the access after ExitMMIO.
func (v *VCPU) MMIO() MMIO {
	n := min(binary.LittleEndian.Uint32(v.run[runMMIOLen:]), 8)
	return MMIO{
		Write: v.run[runMMIOIsWrite] != 0,
		Addr:  binary.LittleEndian.Uint64(v.run[runUnion:]),
		Data:  v.run[runMMIOData : runMMIOData+n],
	}
}

// InternalError is what KVM says with ExitInternalError: the KVM_INTERNAL_ERROR
// suberror and the data that belong to it.
func (v *VCPU) InternalError() (suberror uint32, data []uint64) {
	u := v.run[runUnion:]
	n := min(binary.LittleEndian.Uint32(u[4:]), 16)
	for i := range n {
		data = append(data, binary.LittleEndian.Uint64(u[8+8*i:]))
	}
	return binary.LittleEndian.Uint32(u), data
}

// FailEntryReason is the hardware's reason code after ExitFailEntry.
func (v *VCPU) FailEntryReason() uint64 { return binary.LittleEndian.Uint64(v.run[runUnion:]) }
