package passthrough

import (
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/seccomp"
)

// Syscalls is what a server does once it is made. Everything with a name works
// below the root directory of the process: what is opened, and what is not, is
// this package's matter, and the jail's.
func Syscalls() []seccomp.Rule {
	rules := seccomp.Calls(
		unix.SYS_OPENAT2, // a name in a directory
		unix.SYS_OPENAT,  // what a descriptor is open on, through /proc/self/fd
		unix.SYS_STATX,
		unix.SYS_FSTATFS,
		unix.SYS_READLINKAT,
		unix.SYS_GETDENTS64,
		unix.SYS_LSEEK,
		unix.SYS_PREADV2,
		unix.SYS_PWRITEV2,
		unix.SYS_COPY_FILE_RANGE,
		unix.SYS_FALLOCATE,
		unix.SYS_FTRUNCATE,
		unix.SYS_FSYNC,
		unix.SYS_FDATASYNC,
		unix.SYS_SYNCFS,
		unix.SYS_MKNODAT,
		unix.SYS_MKDIRAT,
		unix.SYS_SYMLINKAT,
		unix.SYS_LINKAT,
		unix.SYS_UNLINKAT,
		unix.SYS_RENAMEAT2,
		unix.SYS_FCHOWNAT,
		unix.SYS_FCHMODAT,
		unix.SYS_UTIMENSAT,
		unix.SYS_SETXATTR,
		unix.SYS_GETXATTR,
		unix.SYS_LISTXATTR,
		unix.SYS_REMOVEXATTR,
		unix.SYS_FLOCK,
		unix.SYS_UMASK,
		unix.SYS_SETFSUID, // where a mount maps ids; no other id of a thread changes
		unix.SYS_SETFSGID,
		unix.SYS_FCHDIR,
	)
	for _, command := range []uint32{unix.F_DUPFD_CLOEXEC, unix.F_OFD_SETLK, unix.F_OFD_GETLK} {
		rules = append(rules, seccomp.Rule{Call: unix.SYS_FCNTL, Args: []seccomp.Arg{seccomp.Int(1, command)}})
	}
	// After a change of ids; never the other way.
	rules = append(rules, seccomp.Rule{Call: unix.SYS_PRCTL, Args: []seccomp.Arg{
		seccomp.Int(0, unix.PR_SET_DUMPABLE), {Index: 1, Mask: 0xffffffffffffffff, Value: 0},
	}})
	// A thread with an umask and a working directory of its own, and nothing else.
	return append(rules, seccomp.Rule{
		Call: unix.SYS_UNSHARE,
		Args: []seccomp.Arg{{Index: 0, Mask: 0xffffffffffffffff, Value: unix.CLONE_FS}},
	})
}
