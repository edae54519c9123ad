package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/internal/printable"
	"github.com/microvm-runtime/microvm/pkg/vmm/jail"
)

// Options describe a VMM to launch. The files stay the caller's and may be
// closed when Launch returns.
type Options struct {
	// Binary is the path of microvm-vmm.
	Binary string
	// Name is what people are to know the machine by: it is on the VMM's command
	// line, one argument each, without spaces and not longer than MaxName bytes.
	Name   []string
	KVM    *os.File
	Kernel *os.File
	Image  *os.File
	// Root is the mount that becomes the VMM's root directory, see jail.Enter.
	Root *os.File
	// Disks go with Config.Disks.
	Disks []*os.File
	// Taps go with Config.NICs: for each, one tap queue a queue pair.
	Taps [][]*os.File
	// Console gets the guest's console output.
	Console *os.File
	// Log is the VMM's standard error, and its other standard files. It is best a
	// pipe: of a file the VMM could change the mode.
	Log    *os.File
	Config Config
	// ID is the user and group id of the VMM, which must not be another process's.
	ID uint32
	// Cgroup is the directory of the cgroup, of version 2, that the VMM starts in;
	// nil for the caller's.
	Cgroup *os.File
}

// MaxName bounds a part of Options.Name: a namespace and a pod of Kubernetes (63 and
// 253 bytes) are one.
const MaxName = 320

// acceptBacklog is how many connections of the guest to one port wait for
// Accept; further ones are refused, so that a guest cannot fill the shim's
// descriptor table.
const acceptBacklog = 16

// VMM is a running microvm-vmm process. All methods may be called
// concurrently. Those with a context return when it ends, whatever the VMM does,
// which may hold a hostile guest or be stopped.
type VMM struct {
	conn    *conn
	process *os.Process
	accept  map[uint32]chan *net.UnixConn

	mu      sync.Mutex
	nextID  uint64
	pending map[uint64]chan reply // nil when the socket is gone
	phases  []Phase
	exit    *Exit // as told by the VMM

	done chan struct{} // closed when the process has been reaped
	end  Exit          // valid after done
}

type reply struct {
	message
	files []*os.File
}

// Launch starts a VMM and boots its machine: when it returns without error the
// vCPUs run. On error nothing is left running.
func Launch(ctx context.Context, o Options) (*VMM, error) {
	if len(o.Disks) != len(o.Config.Disks) {
		return nil, fmt.Errorf("%d disks configured, %d files", len(o.Config.Disks), len(o.Disks))
	}
	if len(o.Taps) != len(o.Config.NICs) {
		return nil, fmt.Errorf("%d NICs configured, taps for %d", len(o.Config.NICs), len(o.Taps))
	}
	for i, nic := range o.Config.NICs {
		if err := nic.checkTaps(o.Taps[i]); err != nil {
			return nil, fmt.Errorf("NIC %d: %w", i, err)
		}
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "control")
	c, err := newConn(os.NewFile(uintptr(fds[0]), "control"))
	if err != nil {
		theirs.Close()
		return nil, err
	}

	v := &VMM{
		conn:    c,
		accept:  make(map[uint32]chan *net.UnixConn),
		pending: make(map[uint64]chan reply),
		done:    make(chan struct{}),
	}
	for _, port := range o.Config.ListenPorts {
		v.accept[port] = make(chan *net.UnixConn, acceptBacklog)
	}
	err = v.start(o, theirs)
	theirs.Close() // else its end would never be seen
	if err != nil {
		c.unix.Close()
		return nil, err
	}

	roles := []string{FileKVM, FileKernel, FileImage, FileConsole}
	files := []*os.File{o.KVM, o.Kernel, o.Image, o.Console}
	for i, disk := range o.Disks {
		roles, files = append(roles, FileDisk(i)), append(files, disk)
	}
	for i, taps := range o.Taps {
		for pair, tap := range taps {
			roles, files = append(roles, FileTap(i, pair)), append(files, tap)
		}
	}
	if _, err := v.order(ctx, methodBoot, bootBody{Config: o.Config, Files: roles}, files...); err != nil {
		v.Kill()
		<-v.done
		return nil, fmt.Errorf("boot: %w", err)
	}
	return v, nil
}

// start runs the process. One goroutine starts and reaps it and stays on its
// thread meanwhile: a jail takes a thread to start in, and PR_SET_PDEATHSIG fires
// when the parent's thread ends, not only its process.
func (v *VMM) start(o Options, socket *os.File) error {
	cmd := exec.Command(o.Binary, arguments(o.Name)...)
	cmd.Env = environment(o.Config.VCPUs)
	cmd.ExtraFiles = []*os.File{SocketFD - 3: socket, RootFD - 3: o.Root}
	// Also as standard input, from which nothing is read: os/exec would open
	// /dev/null, whose mode the VMM could then change.
	cmd.Stdin, cmd.Stdout, cmd.Stderr = o.Log, o.Log, o.Log
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // for good
		err := jail.Start(cmd, o.ID, o.Cgroup)
		v.process = cmd.Process
		started <- err
		if err != nil {
			return
		}
		read := make(chan struct{})
		go func() {
			defer close(read)
			v.readLoop()
			// It said what it had to say, or it broke the protocol: a VMM that
			// does not listen any more must not run on.
			v.Kill()
		}()
		err = cmd.Wait()
		// Its last words count: what has been sent is still read. But the socket need
		// not end with the process, which may have given its end away, to us even.
		v.conn.unix.CloseRead()
		<-read
		v.finish(err)
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start %s: %w", o.Binary, err)
	}
	return nil
}

func arguments(name []string) []string {
	if len(name) == 0 {
		return nil
	}
	list := []string{NameArgument}
	for _, part := range name {
		list = append(list, printable.Word(part, MaxName))
	}
	return list
}

func (v *VMM) finish(waitErr error) {
	v.mu.Lock()
	told := v.exit
	v.mu.Unlock()
	var exited *exec.ExitError
	switch {
	case told != nil:
		v.end = *told
	case errors.As(waitErr, &exited):
		if status, ok := exited.Sys().(syscall.WaitStatus); ok && status.Signaled() {
			v.end = Exit{Reason: ReasonKilled, Detail: killedBy(status.Signal(), exited.Pid())}
			break
		}
		v.end = Exit{Reason: ReasonError, Detail: fmt.Sprintf("the VMM ended with %s; its log says why", exited)}
	case waitErr != nil:
		v.end = Exit{Reason: ReasonError, Detail: waitErr.Error()}
	default:
		v.end = Exit{Reason: ReasonError, Detail: "the VMM ended without saying why"}
	}
	v.conn.unix.Close()
	for _, ch := range v.accept {
		for len(ch) > 0 {
			(<-ch).Close()
		}
	}
	close(v.done)
}

// killedBy describes the signal that ended the VMM.
func killedBy(signal syscall.Signal, pid int) string {
	if signal != unix.SIGSYS {
		return signal.String()
	}
	return fmt.Sprintf("a system call that its filter does not allow; the kernel's log (dmesg, or ausearch -m SECCOMP) names it: type=1326 pid=%d", pid)
}

// readLoop sorts what the VMM sends until the socket ends. The VMM holds a
// hostile guest: whatever it sends, this neither blocks nor grows.
func (v *VMM) readLoop() {
	buf, oob := scratch()
	for {
		m, files, err := v.conn.receive(buf, oob)
		if err != nil {
			break
		}
		if !v.dispatch(m, files) {
			closeAll(files)
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, ch := range v.pending {
		close(ch)
	}
	v.pending = nil
}

// Bounds of what the VMM says of itself: a guest that has taken it over would
// otherwise fill logs, or put lines of its own into them.
const (
	maxPhases = 32
	maxWord   = 64 // bytes, of a name
	maxText   = 4096
)

// dispatch says whether the files found an owner.
func (v *VMM) dispatch(m message, files []*os.File) bool {
	if m.Method == noteAccepted {
		return len(files) == 1 && v.accepted(m, files[0])
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	switch m.Method {
	case "": // a reply
		ch, ok := v.pending[m.ID]
		if !ok {
			return false
		}
		delete(v.pending, m.ID)
		ch <- reply{message: m, files: files} // has room for one
		return true
	case notePhase:
		var p Phase
		if json.Unmarshal(m.Body, &p) == nil && len(v.phases) < maxPhases {
			p.Name = printable.String(p.Name, maxWord)
			v.phases = append(v.phases, p)
		}
	case noteExit:
		var e Exit
		if json.Unmarshal(m.Body, &e) == nil {
			v.exit = &Exit{Reason: printable.String(e.Reason, maxWord), Detail: printable.String(e.Detail, maxText)}
		}
	}
	return false
}

func (v *VMM) accepted(m message, file *os.File) bool {
	var body portBody
	if json.Unmarshal(m.Body, &body) != nil {
		return false
	}
	ch, ok := v.accept[body.Port]
	if !ok {
		return false
	}
	c, err := streamConn(file)
	if err != nil {
		return true // streamConn has closed it
	}
	select {
	case ch <- c:
	default:
		c.Close()
	}
	return true
}

// streamConn takes over file. It could be anything, the VMM's end of the control
// socket for example, which is not to be kept open here.
func streamConn(file *os.File) (*net.UnixConn, error) {
	c, err := net.FileConn(file)
	file.Close()
	if err != nil {
		return nil, fmt.Errorf("vsock connection: %w", err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok || u.LocalAddr().Network() != "unix" { // SOCK_SEQPACKET is "unixpacket"
		c.Close()
		return nil, errors.New("vsock connection is not a unix stream socket")
	}
	return u, nil
}

func (v *VMM) call(ctx context.Context, method string, body any, files ...*os.File) (reply, error) {
	ch := make(chan reply, 1)
	v.mu.Lock()
	if v.pending == nil {
		v.mu.Unlock()
		return reply{}, v.gone(ctx)
	}
	v.nextID++
	id := v.nextID
	v.pending[id] = ch
	v.mu.Unlock()

	if err := v.conn.send(ctx, message{ID: id, Method: method}, body, files...); err != nil {
		v.abandon(id, ch)
		if errors.Is(err, syscall.EPIPE) || errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.ECONNRESET) {
			// It is ending, or it has shut down the reading half alone, of which readLoop
			// sees nothing.
			v.Kill()
			return reply{}, v.gone(ctx)
		}
		return reply{}, err
	}
	select {
	case r, ok := <-ch:
		if !ok {
			return reply{}, v.gone(ctx)
		}
		if r.Error != "" {
			closeAll(r.files)
			return reply{}, errors.New(printable.String(r.Error, maxText))
		}
		if r.noRoom {
			return reply{}, errNoRoom("shim")
		}
		return r, nil
	case <-ctx.Done():
		v.abandon(id, ch)
		return reply{}, fmt.Errorf("VMM request %s: %w", method, context.Cause(ctx))
	}
}

// order is call for requests whose answers come without files: a VMM that sends
// some all the same fills nobody's descriptor table.
func (v *VMM) order(ctx context.Context, method string, body any, files ...*os.File) (json.RawMessage, error) {
	r, err := v.call(ctx, method, body, files...)
	closeAll(r.files)
	return r.Body, err
}

// abandon forgets a request whose reply may still come.
func (v *VMM) abandon(id uint64, ch chan reply) {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.pending, id)
	select {
	case r := <-ch:
		closeAll(r.files)
	default:
	}
}

// gone says why the socket ended: the process is ending or has ended.
func (v *VMM) gone(ctx context.Context) error {
	select {
	case <-v.done:
		return fmt.Errorf("the VMM has ended (%s)", v.end)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Dial connects to a vsock port of the guest.
func (v *VMM) Dial(ctx context.Context, port uint32) (*net.UnixConn, error) {
	r, err := v.call(ctx, methodDial, portBody{Port: port})
	if err != nil {
		return nil, fmt.Errorf("dial guest port %d: %w", port, err)
	}
	if len(r.files) != 1 {
		closeAll(r.files)
		return nil, fmt.Errorf("dial guest port %d: the VMM sent %d files", port, len(r.files))
	}
	return streamConn(r.files[0])
}

// Accept returns the next connection that the guest opened to a host port, one
// of Config.ListenPorts.
func (v *VMM) Accept(ctx context.Context, port uint32) (*net.UnixConn, error) {
	ch, ok := v.accept[port]
	if !ok {
		return nil, fmt.Errorf("host port %d is not listened on", port)
	}
	select {
	case c := <-ch:
		return c, nil
	case <-v.done:
		return nil, v.gone(ctx)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Pause stops the vCPUs; Resume lets them go on.
func (v *VMM) Pause(ctx context.Context) error {
	_, err := v.order(ctx, methodPause, nil)
	return err
}

// Resume undoes Pause.
func (v *VMM) Resume(ctx context.Context) error {
	_, err := v.order(ctx, methodResume, nil)
	return err
}

// AttachNIC puts a NIC on the running machine's PCI bus and returns its address,
// "0000:00:07.0". The guest finds it when it looks at the bus again, by a write
// to /sys/bus/pci/rescan. The taps, one a queue pair, stay the caller's and may
// be closed when AttachNIC returns. After an error that is the context's the NIC
// may be there nevertheless.
func (v *VMM) AttachNIC(ctx context.Context, nic NIC, taps []*os.File) (string, error) {
	if err := nic.checkTaps(taps); err != nil {
		return "", fmt.Errorf("attach NIC: %w", err)
	}
	address, err := v.attach(ctx, attachBody{NIC: &nic}, taps...)
	if err != nil {
		return "", fmt.Errorf("attach NIC %s: %w", nic.MAC, err)
	}
	return address, nil
}

// AttachDisk is AttachNIC for a disk over file, which stays the caller's.
func (v *VMM) AttachDisk(ctx context.Context, disk Disk, file *os.File) (string, error) {
	address, err := v.attach(ctx, attachBody{Disk: &disk}, file)
	if err != nil {
		return "", fmt.Errorf("attach disk: %w", err)
	}
	return address, nil
}

func (v *VMM) attach(ctx context.Context, body attachBody, files ...*os.File) (string, error) {
	answer, err := v.order(ctx, methodAttach, body, files...)
	if err != nil {
		return "", err
	}
	var at addressBody
	if err := json.Unmarshal(answer, &at); err != nil {
		return "", fmt.Errorf("the VMM's answer: %w", err)
	}
	return printable.String(at.Address, maxWord), nil
}

// Detach takes a NIC or a disk, attached or there from the start, off the bus by
// its PCI address. The guest should have let go of it before, by a write to the
// function's "remove" in sysfs: to one that has not the device is broken. When
// Detach returns without an error the VMM has closed the device's files.
func (v *VMM) Detach(ctx context.Context, address string) error {
	if _, err := v.order(ctx, methodDetach, addressBody{Address: address}); err != nil {
		return fmt.Errorf("detach %s: %w", address, err)
	}
	return nil
}

// Stats asks the VMM for its counters.
func (v *VMM) Stats(ctx context.Context) (Stats, error) {
	answer, err := v.order(ctx, methodStats, nil)
	if err != nil {
		return Stats{}, err
	}
	var s Stats
	if err := json.Unmarshal(answer, &s); err != nil {
		return Stats{}, fmt.Errorf("VMM stats: %w", err)
	}
	return s, nil
}

// Stop ends the machine from outside, as Kill does, but has the VMM say where
// the vCPUs were: Exit has it in its detail. A VMM that hangs does not answer.
func (v *VMM) Stop(ctx context.Context) error {
	_, err := v.order(ctx, methodStop, nil)
	return err
}

// Phases are the steps of the start that the VMM has told of.
func (v *VMM) Phases() []Phase {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Clone(v.phases)
}

// Pid is the VMM's process id in the caller's pid namespace.
func (v *VMM) Pid() int { return v.process.Pid }

// Kill ends the VMM with SIGKILL. It is no error when it has ended.
func (v *VMM) Kill() error {
	if err := v.process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill VMM: %w", err)
	}
	return nil
}

// Done is closed when the process has ended and was reaped.
func (v *VMM) Done() <-chan struct{} { return v.done }

// Exit says how the machine ended. It blocks until Done.
func (v *VMM) Exit() Exit {
	<-v.done
	return v.end
}
