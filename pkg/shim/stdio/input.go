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
	path string

	mu       sync.Mutex
	released bool // no more input from clients that come
	closed   bool
	reader   *os.File // nil before open
	writer   *os.File // nil before open and after release
}

func newInput(address string) (*input, error) {
	scheme, location, err := split(address)
	if err != nil {
		return nil, err
	}
	if scheme != "" && scheme != "fifo" {
		return nil, fmt.Errorf("streams of the form %s:// are not supported", scheme)
	}
	if _, err := os.Stat(location.Path); err != nil {
		return nil, err
	}
	return &input{path: location.Path}, nil
}

// open opens the fifo. It is called at most once.
func (in *input) open() (err error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed {
		return os.ErrClosed
	}
	// With a writer missing, and not to wait for one, reading has to come
	// first.
	reader, err := os.OpenFile(in.path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	info, err := reader.Stat()
	if err == nil && info.Mode()&os.ModeNamedPipe != 0 && !in.released {
		in.writer, err = os.OpenFile(in.path, os.O_WRONLY|unix.O_NONBLOCK, 0)
	}
	if err != nil {
		reader.Close()
		return err
	}
	in.reader = reader
	return nil
}

func (in *input) copy(to Conn) {
	copyTo(to, in.reader, &flow{progress: new(atomic.Int64)})
	// Half of the connection: the process may well go on writing, and this
	// may be the one end of a terminal.
	to.CloseWrite()
}

func (in *input) release() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.released = true
	if in.writer != nil {
		in.writer.Close()
		in.writer = nil
	}
}

func (in *input) close() {
	in.release()
	in.mu.Lock()
	defer in.mu.Unlock()
	in.closed = true
	if in.reader != nil {
		in.reader.Close()
	}
}
