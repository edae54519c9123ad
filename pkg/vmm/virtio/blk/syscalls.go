package blk

import (
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/seccomp"
)

// Syscalls is what disks do, those that come later included.
func Syscalls() []seccomp.Rule {
	rules := seccomp.Calls(
		unix.SYS_PREADV,
		unix.SYS_PWRITEV2,
		unix.SYS_FDATASYNC,
		unix.SYS_FALLOCATE,
		unix.SYS_FSTAT,
		unix.SYS_LSEEK,
	)
	return append(rules, seccomp.Ioctls(unix.BLKSSZGET, unix.BLKPBSZGET, unix.BLKALIGNOFF, unix.BLKIOMIN, unix.BLKIOOPT, unix.BLKDISCARD)...)
}
