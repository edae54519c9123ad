package kvm

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctl repeats a request that a signal interrupted. Every ioctl but KVM_RUN
// goes through it: a stray signal (the Go runtime sends itself SIGURG all the
// time) must not make KVM_CREATE_VM or KVM_CREATE_VCPU fail.
func ioctl(fd int, req uint, arg uintptr) (int, error) {
	for {
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), arg)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return -1, errno
		}
		return int(r), nil
	}
}

// ioctlPtr is ioctl with a pointer to the request's structure. The conversion
// is in the call expression as unsafe.Pointer's rule (4) demands, so that arg
// stays where it is for the length of the call.
func ioctlPtr[T any](fd int, req uint, arg *T) (int, error) {
	for {
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(unsafe.Pointer(arg)))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return -1, errno
		}
		return int(r), nil
	}
}

// The structures below end in a flexible array in C; a fixed one of the
// greatest size used is passed instead.

const maxCPUIDEntries = 256 // KVM_MAX_CPUID_ENTRIES

type cpuid2 struct {
	N       uint32
	_       uint32
	Entries [maxCPUIDEntries]CPUIDEntry
}

const maxMSREntries = 256 // KVM_MAX_MSR_ENTRIES

type msrs struct {
	N       uint32
	_       uint32
	Entries [maxMSREntries]MSREntry
}

const maxIRQRoutes = 4096 // KVM_MAX_IRQ_ROUTES

// setGSIRouting passes the entries behind a struct kvm_irq_routing header.
func setGSIRouting(fd int, entries []IRQRoutingEntry) error {
	// One element more than needed makes room for the 8-byte header.
	buf := make([]IRQRoutingEntry, len(entries)+1)
	header := (*struct{ N, Flags uint32 })(unsafe.Pointer(&buf[0]))
	header.N = uint32(len(entries))
	if len(entries) > 0 {
		first := (*IRQRoutingEntry)(unsafe.Add(unsafe.Pointer(&buf[0]), unsafe.Sizeof(*header)))
		copy(unsafe.Slice(first, len(entries)), entries)
	}
	_, err := ioctlPtr(fd, reqSetGSIRouting, &buf[0])
	return err
}
