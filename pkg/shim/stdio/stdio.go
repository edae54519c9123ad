// Package stdio connects the standard streams of a process in the guest, each
// one connection, with what a client of containerd has asked for: fifos, a
// file (file://) or a logging program (binary://).
package stdio

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Config is what a client asks for. Empty paths are streams that are not
// connected.
type Config struct {
	// ID and Namespace of the container, which a logging program is told.
	ID, Namespace string

	Stdin, Stdout, Stderr string
	// Terminal: what the process writes comes on stdout alone.
	Terminal bool
}

// Conn is a stream's connection to the guest.
type Conn interface {
	syscall.Conn
	Read(p []byte) (int, error)
	Write(p []byte) (int, error)
	Close() error
	CloseWrite() error
	SetWriteDeadline(time.Time) error
}

// Streams are the host's ends of a process's streams. All methods may be
// called concurrently.
type Streams struct {
	stdin          *input // nil if not connected
	stdout, stderr *os.File
	logger         *logger

	inputs   sync.WaitGroup
	outputs  sync.WaitGroup
	drained  chan struct{} // closed when the outputs have ended
	progress atomic.Int64  // bytes that have reached the client

	mu        sync.Mutex
	conns     []Conn
	flows     map[Conn]*flow // of the outputs
	stdinConn Conn           // until StartStdin
	closed    bool
}

// Open opens the host's ends. The caller must Close them. Its errors are
// errdefs.ErrInvalidArgument, as the addresses are the client's, or
// errdefs.ErrResourceExhausted.
func Open(ctx context.Context, c Config) (_ *Streams, err error) {
	s := &Streams{drained: make(chan struct{}), flows: map[Conn]*flow{}}
	defer func() {
		if err != nil {
			s.Close()
			err = fmt.Errorf("%w: %w", err, kind(err))
		}
	}()
	if c.Terminal {
		c.Stderr = ""
	}
	scheme, location, err := split(c.Stdout)
	if err != nil {
		return nil, err
	}
	switch scheme {
	case "binary", "binary-v2":
		// The program takes both streams; clients name it for each.
		var outputs [2]*os.File
		s.logger, outputs, err = startLogger(ctx, location, c)
		if err != nil {
			return nil, err
		}
		s.stdout, s.stderr = outputs[0], outputs[1]
		if c.Terminal {
			s.stderr.Close()
			s.stderr = nil
		}
	default:
		if s.stdout, err = openOutput(c.Stdout); err != nil {
			return nil, fmt.Errorf("stdout: %w", err)
		}
		if s.stderr, err = openOutput(c.Stderr); err != nil {
			return nil, fmt.Errorf("stderr: %w", err)
		}
	}
	if c.Stdin != "" {
		if s.stdin, err = newInput(c.Stdin); err != nil {
			return nil, fmt.Errorf("stdin: %w", err)
		}
	}
	return s, nil
}

// kind is what an error of Open means to the client.
func kind(err error) error {
	for _, lack := range []error{unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.EAGAIN} {
		if errors.Is(err, lack) {
			return errdefs.ErrResourceExhausted
		}
	}
	return errdefs.ErrInvalidArgument
}

// split takes a stream's address apart. Without a scheme it is a path, in
// which any character may occur.
func split(address string) (scheme string, location *url.URL, err error) {
	if !strings.Contains(address, "://") {
		return "", &url.URL{Path: address}, nil
	}
	u, err := url.Parse(address)
	if err != nil {
		return "", nil, fmt.Errorf("stream address: %w", err)
	}
	return u.Scheme, u, nil
}

// openOutput returns nil for an empty address.
func openOutput(address string) (*os.File, error) {
	if address == "" {
		return nil, nil
	}
	scheme, location, err := split(address)
	if err != nil {
		return nil, err
	}
	path := location.Path
	var flags int
	switch scheme {
	case "", "fifo":
		info, err := os.Stat(path)
		if err != nil {
			return nil, err
		}
		flags = os.O_WRONLY | os.O_APPEND
		if info.Mode()&os.ModeNamedPipe != 0 {
			// Holding the reading end too, we neither wait for a reader nor
			// get an error when it goes away: containerd may come back.
			flags = os.O_RDWR | unix.O_NONBLOCK
		}
	case "file":
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, err
		}
		flags = os.O_WRONLY | os.O_APPEND | os.O_CREATE
	default:
		return nil, fmt.Errorf("streams of the form %s:// are not supported", scheme)
	}
	return os.OpenFile(path, flags, 0o644)
}

// Wants says which streams are to be connected.
func (s *Streams) Wants() (stdin, stdout, stderr bool) {
	return s.stdin != nil, s.stdout != nil, s.stderr != nil
}

// Copy starts copying and takes over the connections, of which there is one
// for each stream that Wants names and nil for the others. It is called at
// most once.
func (s *Streams) Copy(stdin, stdout, stderr Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range []Conn{stdin, stdout, stderr} {
		if c == nil {
			continue
		}
		if s.closed {
			c.Close()
			continue
		}
		s.conns = append(s.conns, c)
	}
	if s.closed {
		return
	}
	s.stdinConn = stdin
	for _, o := range []struct {
		to   *os.File
		from Conn
	}{{s.stdout, stdout}, {s.stderr, stderr}} {
		if o.from == nil {
			continue
		}
		f := &flow{progress: &s.progress}
		s.flows[o.from] = f
		s.outputs.Go(func() {
			copyTo(o.to, o.from, f)
			// End of file for the client, whatever the other streams do.
			o.to.Close()
			o.from.Close()
		})
	}
	go func() {
		s.outputs.Wait()
		close(s.drained)
	}()
}

// StartStdin opens the client's stdin and starts copying it. It is for the start
// of the process, not sooner: a client that finds a reader, writes little and
// comes to its end before it knows of the process that it has made cannot say
// CloseStdin any more, and ctr does not.
func (s *Streams) StartStdin() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	conn := s.stdinConn
	if conn == nil || s.closed {
		return nil
	}
	s.stdinConn = nil
	if err := s.stdin.open(); err != nil {
		return fmt.Errorf("stdin: %w", err)
	}
	s.inputs.Go(func() { s.stdin.copy(conn) })
	return nil
}

// CloseStdin lets the process read end of file when what the clients have
// written until now is read.
func (s *Streams) CloseStdin() {
	if s.stdin != nil {
		s.stdin.release()
	}
}

// Drain waits until all output has reached the client. It gives up, and says
// so, when nothing has got on for the time of stall: the client has gone, or
// does not read; what there is reaches it when it does. Or the guest does not
// end an output, which it has to before it tells of the process's end: it is
// ended here, for a client that waits for that.
func (s *Streams) Drain(stall time.Duration) error {
	var endless error
	for {
		before := s.progress.Load()
		timer := time.NewTimer(stall)
		select {
		case <-s.drained:
			timer.Stop()
			return endless
		case <-timer.C:
		}
		if s.progress.Load() != before {
			continue
		}
		if !s.cut() {
			return errors.New("the client does not read the output")
		}
		endless = errors.New("the guest does not end the output")
	}
}

// cut ends the outputs of which nothing comes from the guest, if there are any.
func (s *Streams) cut() (any bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for conn, f := range s.flows {
		if f.waits.CompareAndSwap(true, false) {
			conn.Close()
			any = true
		}
	}
	return any
}

// Close ends all copying and waits for it.
func (s *Streams) Close() {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	s.closed = true
	for _, c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()

	if s.stdin != nil {
		s.stdin.close()
	}
	for _, o := range []*os.File{s.stdout, s.stderr} {
		if o != nil {
			o.Close()
		}
	}
	s.inputs.Wait()
	s.outputs.Wait()
	if s.logger != nil {
		s.logger.stop()
	}
}
