package main

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// takeIDs sets the ids of the calling thread alone; the functions of package
// unix set those of the process.
func takeIDs(uid, gid int, groups []int) error {
	list := make([]uint32, len(groups)+1) // never empty, for its address
	for i, g := range groups {
		list[i] = uint32(g)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(unsafe.Pointer(&list[0])), 0); errno != 0 {
		return errno
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(gid), uintptr(gid), uintptr(gid)); errno != 0 {
		return errno
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
		return errno
	}
	return nil
}
