package stdio

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// buffers are held only while there are bytes to carry: a shim has many
// streams, of which most are silent most of the time.
var buffers = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// flow is how far copying is.
type flow struct {
	progress *atomic.Int64 // counts the bytes that have arrived; may be shared
	waits    atomic.Bool   // for src, which has to write or to end
}

// copyTo copies until the end of src, or an error of either side, which is
// the end as well: there is nobody to report it to.
func copyTo(dst io.Writer, src syscall.Conn, f *flow) {
	raw, err := src.SyscallConn()
	if err != nil {
		return
	}
	for {
		f.waits.Store(true)
		buffer, n := receive(raw)
		f.waits.Store(false)
		if n > 0 {
			_, err = dst.Write(buffer[:n])
		}
		if buffer != nil {
			buffers.Put(buffer)
		}
		if n <= 0 || err != nil {
			return
		}
		f.progress.Add(int64(n))
	}
}

// receive waits until there is something to read, and only then takes a
// buffer.
func receive(raw syscall.RawConn) (buffer *[64 << 10]byte, n int) {
	err := raw.Read(func(fd uintptr) bool {
		buffer = buffers.Get().(*[64 << 10]byte)
		for {
			var err error
			n, err = unix.Read(int(fd), buffer[:])
			switch {
			case errors.Is(err, unix.EINTR):
				continue
			case errors.Is(err, unix.EAGAIN):
				buffers.Put(buffer)
				buffer, n = nil, 0
				return false // wait
			}
			return true
		}
	})
	if err != nil { // closed meanwhile
		return buffer, 0
	}
	return buffer, n
}
