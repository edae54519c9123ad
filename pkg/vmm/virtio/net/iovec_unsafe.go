package net

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// readv and writev are the system calls without an allocation, which x/sys
// makes for each. iov is not empty.

func readv(fd int, iov []unix.Iovec) (int, syscall.Errno) {
	n, _, errno := unix.Syscall(unix.SYS_READV, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)))
	return int(n), errno
}

func writev(fd int, iov []unix.Iovec) syscall.Errno {
	_, _, errno := unix.Syscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)))
	return errno
}
