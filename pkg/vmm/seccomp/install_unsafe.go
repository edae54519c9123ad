package seccomp

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

func (f Filter) install(flags uintptr) error {
	if len(f) == 0 {
		return errors.New("seccomp: an empty filter")
	}
	program := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	r, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&program)))
	switch {
	case errno == unix.ENOSYS || errno == unix.EINVAL:
		return fmt.Errorf("seccomp: this kernel has no system call filters (CONFIG_SECCOMP_FILTER, Linux 4.14): %w", errno)
	case errno != 0:
		return fmt.Errorf("seccomp: %w", errno)
	case r != 0: // with SECCOMP_FILTER_FLAG_TSYNC
		return fmt.Errorf("seccomp: thread %d has a filter of its own", r)
	}
	return nil
}
