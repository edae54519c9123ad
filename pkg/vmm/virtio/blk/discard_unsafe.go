package blk

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// discardBlocks discards a range, in bytes, of a block device.
func discardBlocks(fd int, offset, length uint64) error {
	extent := [2]uint64{offset, length} // include/uapi/linux/fs.h: BLKDISCARD
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKDISCARD, uintptr(unsafe.Pointer(&extent)))
	runtime.KeepAlive(&extent)
	if errno != 0 {
		return errno
	}
	return nil
}
