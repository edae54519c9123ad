package control

import (
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/seccomp"
)

// Syscalls is what a Server does after Boot.
func Syscalls() []seccomp.Rule {
	rules := seccomp.Calls(
		unix.SYS_SENDMSG,
		unix.SYS_RECVMSG,
	)
	return append(rules,
		// See Socketpair. No other type: datagram sockets send to any name.
		seccomp.Rule{Call: unix.SYS_SOCKETPAIR, Args: []seccomp.Arg{
			seccomp.Int(0, unix.AF_UNIX), seccomp.Int(1, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK),
		}},
		// Descriptors that arrive are not for programs that are executed.
		seccomp.Rule{Call: unix.SYS_FCNTL, Args: []seccomp.Arg{seccomp.Int(1, unix.F_GETFD)}},
		seccomp.Rule{Call: unix.SYS_FCNTL, Args: []seccomp.Arg{seccomp.Int(1, unix.F_SETFD)}},
	)
}
