package jail

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// execveat executes a file in a directory, if it can be executed.
func execveat(dir int, name string) error {
	path, err := unix.BytePtrFromString(name)
	if err != nil {
		return err
	}
	_, _, errno := unix.RawSyscall6(unix.SYS_EXECVEAT, uintptr(dir), uintptr(unsafe.Pointer(path)), 0, 0, 0, 0)
	return errno
}
