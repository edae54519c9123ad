package agent

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// siginfoChild is siginfo_t as waitid(2) fills it in on 64-bit machines
// (include/uapi/asm-generic/siginfo.h, _sigchld). unix.Siginfo has the size but
// not the fields.
type siginfoChild struct {
	signo, errno, code, _ int32

	pid    int32
	uid    uint32
	status int32
	_      [100]byte
}

// One of these overflows unless the sizes are the same.
const (
	_ = unsafe.Sizeof(siginfoChild{}) - unsafe.Sizeof(unix.Siginfo{})
	_ = unsafe.Sizeof(unix.Siginfo{}) - unsafe.Sizeof(siginfoChild{})
)

// firstZombie returns a child process that has ended and has not been waited
// for, without waiting for it; 0 if there is none.
func firstZombie() (int, error) {
	var info siginfoChild
	for {
		err := unix.Waitid(unix.P_ALL, 0, (*unix.Siginfo)(unsafe.Pointer(&info)), unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ECHILD):
			return 0, nil
		default:
			return int(info.pid), err
		}
	}
}
