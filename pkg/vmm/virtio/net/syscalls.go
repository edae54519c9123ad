package net

import (
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/seccomp"
)

// Syscalls is what NICs do: those that come later make themselves at home with
// their taps, of which none is made here (no TUNSETIFF).
func Syscalls() []seccomp.Rule {
	rules := ActivateSyscalls()
	rules = append(rules, seccomp.Ioctls(unix.TUNGETIFF, unix.TUNSETVNETHDRSZ)...)
	rules = append(rules, seccomp.Rule{Call: unix.SYS_FCNTL, Args: []seccomp.Arg{seccomp.Int(1, unix.F_DUPFD_CLOEXEC)}})
	return append(rules, seccomp.Calls(unix.SYS_EPOLL_CREATE1, unix.SYS_READV, unix.SYS_WRITEV)...)
}

// ActivateSyscalls is what activating a NIC does.
func ActivateSyscalls() []seccomp.Rule {
	return seccomp.Ioctls(unix.TUNSETOFFLOAD, unix.TUNSETQUEUE)
}
