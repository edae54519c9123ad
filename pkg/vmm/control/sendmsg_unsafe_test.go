package control

import (
	"errors"
	"net"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sendEmpty sends a packet that has descriptors and not one byte. WriteMsgUnix would
// add one.
func sendEmpty(c *net.UnixConn, rights []byte) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) {
		m := unix.Msghdr{Control: &rights[0]}
		m.SetControllen(len(rights))
		if _, _, errno := unix.Syscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&m)), unix.MSG_NOSIGNAL); errno != 0 {
			err = os.NewSyscallError("sendmsg", errno)
		}
	})
	return errors.Join(cerr, err)
}
