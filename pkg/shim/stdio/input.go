package stdio

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// input is a stdin fifo. The shim holds its writing end too, so that clients
// may come and go: end of file is when CloseStdin was called and no client
// has the fifo open for writing any more.
type input struct {
	reader *os.File
	once   sync.Once
	writer *os.File // closed by once
}

func openInput(address string) (*input, error) {
	scheme, location, err := split(address)
	if err != nil {
		return nil, err
	}
	if scheme != "" && scheme != "fifo" {
		return nil, fmt.Errorf("streams of the form %s:// are not supported", scheme)
	}
	// With a writer missing, and not to wait for one, reading has to come
	// first.
	reader, err := os.OpenFile(location.Path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	in := &input{reader: reader}
	info, err := reader.Stat()
	if err != nil {
		reader.Close()
		return nil, err
	}
	if info.Mode()&os.ModeNamedPipe != 0 {
		in.writer, err = os.OpenFile(location.Path, os.O_WRONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			reader.Close()
			return nil, err
		}
	}
	return in, nil
}

func (in *input) copy(to Conn) {
	var ignored atomic.Int64
	copyTo(to, in.reader, &ignored)
	// Half of the connection: the process may well go on writing, and this
	// may be the one end of a terminal.
	to.CloseWrite()
}

func (in *input) release() {
	in.once.Do(func() {
		if in.writer != nil {
			in.writer.Close()
		}
	})
}

func (in *input) close() {
	in.release()
	in.reader.Close()
}
