package vmm

import (
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/kvm"
	"github.com/microvm-runtime/microvm/pkg/vmm/seccomp"
)

// Syscalls is what a running machine and its simple devices call, apart from what
// Go's runtime does: packages with devices of their own add to it.
func Syscalls() []seccomp.Rule {
	rules := kvm.Syscalls()
	rules = append(rules, eventSyscalls()...)
	rules = append(rules, seccomp.Calls(
		unix.SYS_PREAD64,   // the kernel's statistics of a vCPU
		unix.SYS_FSYNC,     // pmem
		unix.SYS_GETRANDOM, // rng
	)...)
	return append(rules,
		// Hot-plugged memory becomes accessible.
		seccomp.Rule{Call: unix.SYS_MPROTECT, Args: []seccomp.Arg{seccomp.Clear(2, unix.PROT_EXEC)}},
		// The filter of a vCPU's thread: it can only take away.
		seccomp.Rule{Call: unix.SYS_SECCOMP, Args: []seccomp.Arg{seccomp.Int(0, unix.SECCOMP_SET_MODE_FILTER)}},
	)
}

// eventSyscalls is what it takes to make an eventfd, or another descriptor, that
// Go's poller waits for.
func eventSyscalls() []seccomp.Rule {
	rules := seccomp.Calls(unix.SYS_EVENTFD2, unix.SYS_EPOLL_CTL)
	return append(rules,
		seccomp.Rule{Call: unix.SYS_FCNTL, Args: []seccomp.Arg{seccomp.Int(1, unix.F_GETFL)}},
		// What is non-blocking stays so. The shim shares the flags of the sockets
		// that it is given: it would hang in a read, or in a close, of one that
		// blocks, and if it was given the other end too, the end of this process
		// would not help.
		seccomp.Rule{Call: unix.SYS_FCNTL, Args: []seccomp.Arg{
			seccomp.Int(1, unix.F_SETFL), {Index: 2, Mask: unix.O_NONBLOCK, Value: unix.O_NONBLOCK},
		}},
	)
}

// VCPUSyscalls is what a vCPU's own thread calls, apart from what Go's runtime does
// there, and from what devices do when the guest's access to a register activates
// or resets them.
func VCPUSyscalls() []seccomp.Rule {
	return append(kvm.VCPUSyscalls(), eventSyscalls()...)
}
