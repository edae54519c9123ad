package vsock

import (
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/seccomp"
)

// Syscalls is what the device does with its connections. The sockets are unix
// domain ones, in pairs, and streams: a pair of datagram sockets would send to any
// socket that has a name below the root directory.
func Syscalls() []seccomp.Rule {
	rules := seccomp.Calls(unix.SYS_EPOLL_WAIT, unix.SYS_READV, unix.SYS_WRITEV)
	return append(append(rules, ActivateSyscalls()...),
		seccomp.Rule{Call: unix.SYS_SOCKETPAIR, Args: []seccomp.Arg{
			seccomp.Int(0, unix.AF_UNIX), seccomp.Int(1, unix.SOCK_STREAM|unix.SOCK_CLOEXEC),
		}},
		seccomp.Rule{Call: unix.SYS_FCNTL, Args: []seccomp.Arg{seccomp.Int(1, unix.F_DUPFD_CLOEXEC)}},
	)
}

// ActivateSyscalls is what activating and resetting the device does.
func ActivateSyscalls() []seccomp.Rule {
	return seccomp.Calls(unix.SYS_EPOLL_CREATE1, unix.SYS_SHUTDOWN)
}
