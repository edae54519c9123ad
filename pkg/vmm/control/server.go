package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
)

// Server is the VMM's end of the control socket. Its methods may be called
// concurrently, but for Boot and Serve, which read from it: first Boot, then
// Serve. What it sends, a shim that has stopped may leave unread for some time;
// then that is an error, and lost.
type Server struct {
	conn *conn
}

// NewServer takes over the descriptor that the shim left open for the VMM.
func NewServer(socket *os.File) (*Server, error) {
	c, err := newConn(socket)
	if err != nil {
		return nil, err
	}
	return &Server{conn: c}, nil
}

// BootRequest is the first message on the socket.
type BootRequest struct {
	Config Config
	// Files are the descriptors by role. The receiver owns them.
	Files map[string]*os.File

	id uint64
}

// Boot waits for the boot request. ReplyBoot answers it.
func (s *Server) Boot() (*BootRequest, error) {
	buf, oob := scratch()
	m, files, err := s.conn.receive(buf, oob)
	if err != nil {
		return nil, fmt.Errorf("boot request: %w", err)
	}
	request, err := parseBoot(m, files)
	if err != nil {
		closeAll(files)
		return nil, fmt.Errorf("boot request: %w", err)
	}
	return request, nil
}

func parseBoot(m message, files []*os.File) (*BootRequest, error) {
	if m.Method != methodBoot {
		return nil, fmt.Errorf("the first message is %q", m.Method)
	}
	var body bootBody
	if err := json.Unmarshal(m.Body, &body); err != nil {
		return nil, err
	}
	if len(body.Files) != len(files) {
		return nil, fmt.Errorf("%d files named, %d received", len(body.Files), len(files))
	}
	r := &BootRequest{Config: body.Config, Files: make(map[string]*os.File, len(files)), id: m.ID}
	for i, role := range body.Files {
		if r.Files[role] != nil {
			return nil, fmt.Errorf("file %q is there twice", role)
		}
		r.Files[role] = files[i]
	}
	for _, role := range []string{FileKVM, FileKernel, FileImage, FileConsole} {
		if r.Files[role] == nil {
			return nil, fmt.Errorf("file %q is missing", role)
		}
	}
	return r, nil
}

// ReplyBoot answers the boot request: nil when the vCPUs run.
func (s *Server) ReplyBoot(r *BootRequest, err error) error {
	return s.reply(r.id, nil, err)
}

// Handler is what the machine does for a request after boot. The functions may
// be called concurrently, but for Resize: of two sizes the later one counts.
type Handler struct {
	// Dial connects to a guest port and returns the end of the connection to
	// give away.
	Dial   func(ctx context.Context, port uint32) (*os.File, error)
	Pause  func() error
	Resume func() error
	Stats  func() (Stats, error)
	// Stop ends the machine. It does not wait.
	Stop func()
	// AttachNIC and AttachDisk put a device on the PCI bus and return its
	// address. The files are the machine's from the call on, whatever comes of
	// it.
	AttachNIC  func(nic NIC, taps []*os.File) (address string, err error)
	AttachDisk func(disk Disk, file *os.File) (address string, err error)
	// Detach takes one off again and closes its files.
	Detach func(address string) error
	// Resize asks for a size and returns the one there is.
	Resize func(Size) (Size, error)
}

// Serve answers requests until the shim's end is closed (nil) or the socket
// fails. When it returns, the contexts of requests under way are cancelled.
func (s *Server) Serve(h Handler) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	resized := make(chan struct{}) // closed when the last resize is done
	close(resized)
	buf, oob := scratch()
	for {
		m, files, err := s.conn.receive(buf, oob)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if m.Method != methodAttach {
			closeAll(files) // no other request after boot carries any
		}
		if m.Method != methodResize {
			go s.handle(ctx, h, m, files)
			continue
		}
		// The shim may have given up the one before, and want back what it asked
		// for. Of two goroutines either may come first.
		before, done := resized, make(chan struct{})
		resized = done
		go func() {
			defer close(done)
			<-before
			s.handle(ctx, h, m, files)
		}()
	}
}

func (s *Server) handle(ctx context.Context, h Handler, m message, files []*os.File) {
	var err error
	switch m.Method {
	case methodDial:
		var body portBody
		if err = json.Unmarshal(m.Body, &body); err != nil {
			break
		}
		var file *os.File
		if file, err = h.Dial(ctx, body.Port); err == nil {
			s.reply(m.ID, nil, nil, file)
			file.Close()
			return
		}
	case methodPause:
		err = h.Pause()
	case methodResume:
		err = h.Resume()
	case methodResize:
		var size Size
		if err = json.Unmarshal(m.Body, &size); err != nil {
			break
		}
		if size, err = h.Resize(size); err == nil {
			s.reply(m.ID, size, nil)
			return
		}
	case methodStats:
		var stats Stats
		if stats, err = h.Stats(); err == nil {
			s.reply(m.ID, stats, nil)
			return
		}
	case methodStop:
		h.Stop()
	case methodAttach:
		var at addressBody
		if at.Address, err = attach(h, m, files); err == nil {
			s.reply(m.ID, at, nil)
			return
		}
	case methodDetach:
		var at addressBody
		if err = json.Unmarshal(m.Body, &at); err == nil {
			err = h.Detach(at.Address)
		}
	default:
		err = fmt.Errorf("unknown method %q", m.Method)
	}
	s.reply(m.ID, nil, err)
}

// attach has the handler attach the device that the request describes.
func attach(h Handler, m message, files []*os.File) (address string, err error) {
	if m.noRoom {
		return "", errNoRoom("VMM")
	}
	var body attachBody
	if err := json.Unmarshal(m.Body, &body); err != nil {
		closeAll(files)
		return "", err
	}
	switch {
	case (body.NIC == nil) == (body.Disk == nil):
		err = errors.New("exactly one device can be attached")
	case body.NIC != nil:
		if err = body.NIC.checkTaps(files); err == nil {
			return h.AttachNIC(*body.NIC, files)
		}
	case len(files) != 1:
		err = fmt.Errorf("a disk comes with one file, not %d", len(files))
	default:
		return h.AttachDisk(*body.Disk, files[0])
	}
	closeAll(files)
	return "", err
}

// reply's error means that the shim is gone, which Serve sees too, or does not read.
func (s *Server) reply(id uint64, body any, err error, files ...*os.File) error {
	m := message{ID: id}
	if err != nil {
		m.Error = err.Error()
	}
	return s.conn.send(context.Background(), m, body, files...)
}

// Phase tells the shim that a step of the start was reached.
func (s *Server) Phase(name string) error {
	return s.conn.send(context.Background(), message{Method: notePhase}, Phase{Name: name, Monotonic: monotonic()})
}

// Accepted hands the shim a connection that the guest opened to a host port.
// The file stays the caller's.
func (s *Server) Accepted(port uint32, file *os.File) error {
	return s.conn.send(context.Background(), message{Method: noteAccepted}, portBody{Port: port}, file)
}

// Exited tells the shim how the machine ended. It is the last message.
func (s *Server) Exited(e Exit) error {
	const longest = 4096 // of a detail, which may be the guest's
	if len(e.Detail) > longest {
		e.Detail = e.Detail[:longest]
	}
	return s.conn.send(context.Background(), message{Method: noteExit}, e)
}
