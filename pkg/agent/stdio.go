package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runc/libcontainer"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// pipeSize is the room in an output pipe. The default of 64 KiB makes a process
// with much output wait for the agent after each of the agent's reads. Memory
// is used only for what is in the pipe.
const pipeSize = 256 << 10

// stdio connects the standard streams of one process: each is a pipe, or they
// are all one pseudo terminal, on the process's side, and a connection to the
// shim on the other. A stream without connection is /dev/null for the process.
//
// The order of calls is openStdio, attach, started, drain; or abort at any
// time before started has succeeded.
type stdio struct {
	// terminal is set before attach.
	terminal bool
	stdin    streamConn
	stdout   streamConn
	stderr   streamConn

	// theirs are the process's ends of the pipes, which the agent holds only
	// until the process has them.
	theirs []*os.File
	// consoleSocket is where libcontainer sends the pseudo terminal's master.
	consoleSocket *os.File

	in      *os.File
	outputs []*output

	// peer is the process's end of the pseudo terminal, held until the process
	// has ended. Reads of the master fail while nobody has that end open, but
	// processes may close it for a while: systemd does after each message.
	peer *os.File

	// master is the pseudo terminal: also in, and the source of the one output.
	mu     sync.Mutex
	master *os.File
}

// openStdio takes the streams of a process, which the shim has opened.
func openStdio(ctx context.Context, hub *streamHub, ids *agentproto.Streams) (*stdio, error) {
	s := new(stdio)
	for _, stream := range []struct {
		name string
		id   uint64
		conn *streamConn
	}{
		{"stdin", ids.GetStdin(), &s.stdin},
		{"stdout", ids.GetStdout(), &s.stdout},
		{"stderr", ids.GetStderr(), &s.stderr},
	} {
		if stream.id == 0 {
			continue
		}
		conn, err := hub.take(ctx, stream.id)
		if err != nil {
			s.abort()
			return nil, fmt.Errorf("%s: %w", stream.name, err)
		}
		*stream.conn = conn
	}
	return s, nil
}

// attach gives the process its ends of the streams. They belong to uid and gid,
// root of the process's user namespace: who may reopen /dev/stdout there
// depends on its owner.
func (s *stdio) attach(p *libcontainer.Process, uid, gid int) error {
	if s.terminal {
		if s.stderr != nil {
			return fmt.Errorf("a process with a terminal has no stderr stream: %w", errdefs.ErrInvalidArgument)
		}
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("make the console socket: %w", err)
		}
		s.consoleSocket = os.NewFile(uintptr(fds[0]), "console")
		p.ConsoleSocket = os.NewFile(uintptr(fds[1]), "console")
		s.theirs = append(s.theirs, p.ConsoleSocket)
		return nil
	}
	if s.stdin != nil {
		r, w, err := os.Pipe()
		if err != nil {
			return fmt.Errorf("make the pipe of stdin: %w", err)
		}
		p.Stdin, s.in = r, w
		s.theirs = append(s.theirs, r)
	}
	for _, out := range []struct {
		conn streamConn
		set  func(*os.File)
	}{
		{s.stdout, func(f *os.File) { p.Stdout = f }},
		{s.stderr, func(f *os.File) { p.Stderr = f }},
	} {
		if out.conn == nil {
			continue
		}
		r, w, err := os.Pipe()
		if err != nil {
			return fmt.Errorf("make an output pipe: %w", err)
		}
		s.outputs = append(s.outputs, newOutput(out.conn, r, 0))
		s.theirs = append(s.theirs, w)
		// A pipe that cannot be that big is slower, no more.
		unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, pipeSize)
		out.set(w)
	}
	if uid == 0 && gid == 0 {
		return nil
	}
	for _, f := range s.theirs {
		if err := f.Chown(uid, gid); err != nil {
			return fmt.Errorf("give a pipe to the container's root: %w", err)
		}
	}
	return nil
}

// started begins to carry the streams of the process, which runs now or waits
// to be let run.
func (s *stdio) started() error {
	s.closeTheirs()
	if s.terminal {
		master, err := receiveConsole(s.consoleSocket)
		s.consoleSocket.Close()
		s.consoleSocket = nil
		if err != nil {
			return fmt.Errorf("receive the terminal: %w", err)
		}
		s.master, s.in = master, master
		if s.peer, err = openPeer(master); err != nil {
			return fmt.Errorf("open the other end of the terminal: %w", err)
		}
		s.outputs = []*output{newOutput(s.stdout, master, terminalBuffers)}
	}
	for _, o := range s.outputs {
		go o.run()
	}
	if s.stdin != nil {
		go s.feed()
	}
	return nil
}

// feed carries stdin. The end of the stream closes a pipe. A terminal stays as
// it is: there is nothing that could be closed without taking the output too.
func (s *stdio) feed() {
	copyStream(s.in, s.stdin)
	if !s.terminal {
		s.in.Close()
	}
	s.stdin.Close()
}

// resize sets the size of the terminal, in characters.
func (s *stdio) resize(width, height uint16) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.master == nil {
		return errors.New("the process has no terminal")
	}
	raw, err := s.master.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) {
		err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Col: width, Row: height})
	})
	return errors.Join(cerr, err)
}

// drain returns when all that the process, which has ended, had written is with
// its streams, and the streams have been ended.
func (s *stdio) drain() {
	if s.stdin != nil {
		s.stdin.Close()
	}
	if s.peer != nil {
		s.peer.Close()
	}
	var wg sync.WaitGroup
	for _, o := range s.outputs {
		wg.Go(o.drain)
	}
	wg.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.master != nil {
		s.master.Close()
		s.master = nil
	}
}

// abort closes everything: the process will never be.
func (s *stdio) abort() {
	s.closeTheirs()
	if s.consoleSocket != nil {
		s.consoleSocket.Close()
	}
	if s.in != nil {
		s.in.Close()
	}
	if s.peer != nil {
		s.peer.Close()
	}
	for _, o := range s.outputs {
		o.src.Close()
	}
	for _, conn := range []streamConn{s.stdin, s.stdout, s.stderr} {
		if conn != nil {
			go finish(conn)
		}
	}
}

func (s *stdio) closeTheirs() {
	for _, f := range s.theirs {
		f.Close()
	}
	s.theirs = nil
}

// receiveConsole receives the master of the pseudo terminal that libcontainer
// has opened in the container. It was sent before the process was reported as
// started, so nothing is waited for.
func receiveConsole(socket *os.File) (*os.File, error) {
	// Of the message, libcontainer/init_linux.go setupConsole: a name, which
	// is the container's to choose and not used here, and one descriptor.
	name := make([]byte, 4096)
	oob := make([]byte, unix.CmsgSpace(4))
	_, oobn, _, _, err := unix.Recvmsg(int(socket.Fd()), name, oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(msgs) != 1 {
		return nil, fmt.Errorf("%d control messages instead of one: %w", len(msgs), errors.Join(err))
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("%d descriptors instead of one: %w", len(fds), errors.Join(err))
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		return nil, err
	}
	return os.NewFile(uintptr(fds[0]), "terminal"), nil
}

// openPeer opens the other end of a pseudo terminal, without a name, which would
// be one of the container's.
func openPeer(master *os.File) (*os.File, error) {
	raw, err := master.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd uintptr
	var errno unix.Errno
	if err := raw.Control(func(m uintptr) {
		fd, _, errno = unix.Syscall(unix.SYS_IOCTL, m, unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	}); err != nil {
		return nil, err
	}
	if errno != 0 {
		return nil, os.NewSyscallError("TIOCGPTPEER", errno)
	}
	return os.NewFile(fd, "terminal"), nil
}

// longPast, as a deadline, ends what waits now.
var longPast = time.Unix(1, 0)
