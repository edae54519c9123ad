package agent

import (
	"errors"
	"io"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

var copyBuffers = sync.Pool{New: func() any {
	b := make([]byte, 64<<10)
	return &b
}}

// tally counts the bytes taken from a descriptor. Who holds it knows that no
// byte is between the descriptor and the count.
type tally struct {
	sync.Mutex
	n int64
}

// readReady waits until src has something, then reads it into a buffer of
// copyBuffers, which the caller puts back. A stream that is idle, as most are
// most of the time, thus holds no buffer. n is 0, and buf nil, at the end of
// src and with an error. What was read is added to taken unless that is nil.
func readReady(src syscall.Conn, taken *tally) (buf *[]byte, n int, err error) {
	raw, err := src.SyscallConn()
	if err != nil {
		return nil, 0, err
	}
	werr := raw.Read(func(fd uintptr) bool {
		buf = copyBuffers.Get().(*[]byte)
		if taken != nil {
			taken.Lock()
			defer taken.Unlock()
		}
		n, err = unix.Read(int(fd), *buf)
		for errors.Is(err, unix.EINTR) {
			n, err = unix.Read(int(fd), *buf)
		}
		if n <= 0 {
			copyBuffers.Put(buf)
			buf, n = nil, 0
		} else if taken != nil {
			taken.n += int64(n)
		}
		return !errors.Is(err, unix.EAGAIN)
	})
	if werr != nil {
		return nil, 0, werr
	}
	return buf, n, err
}

// copyStream copies src to dst until either ends; the end of src is no error.
func copyStream(dst io.Writer, src syscall.Conn) error {
	for {
		buf, n, err := readReady(src, nil)
		if n == 0 || err != nil {
			return err
		}
		_, err = dst.Write((*buf)[:n])
		copyBuffers.Put(buf)
		if err != nil {
			return err
		}
	}
}
