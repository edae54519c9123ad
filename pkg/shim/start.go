package shim

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/pkg/identifiers"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/internal/printable"
	"github.com/microvm-runtime/microvm/pkg/shim/bootstrap"
	"github.com/microvm-runtime/microvm/pkg/shim/state"
	"github.com/microvm-runtime/microvm/pkg/vmm/control"
)

const (
	// maxSocketPath is that of struct sockaddr_un, without the final zero.
	// Callers add nothing to it.
	maxSocketPath = 104
	// readyTimeout bounds the start of the serving process, and the end of
	// one that is shutting down.
	readyTimeout = 10 * time.Second
)

// settings are what start tells the process that serves, on its stdin.
type settings struct {
	Dir          state.Dir         `json:"dir"`
	Socket       string            `json:"socket"`
	TTRPCAddress string            `json:"ttrpc_address"`
	Options      bootstrap.Options `json:"options"`
}

// Descriptors that the serving process inherits.
const (
	listenerFD = 3 + iota
	readyFD
	lockFD
	hostNamespaceFD
)

// start answers with the address of the sandbox's shim, which it starts if
// there is none. It writes nothing else to the caller: stdout and stderr are
// one to some.
func (p *Program) start(in bootstrap.Invocation, stdout io.Writer) error {
	bundle, err := os.Getwd()
	if err != nil {
		return err
	}
	where, err := p.locate(in, bundle)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*readyTimeout)
	defer cancel()
	for {
		held, err := where.dir.Hold(ctx)
		if err != nil {
			return err
		}
		err = startOrFind(ctx, in, where, held)
		held.Release()
		if err == nil {
			break
		}
		if !errors.Is(err, errEnded) {
			return err
		}
	}
	address := "unix://" + where.socket
	// containerd up to 1.6 reads it from there after a restart.
	if err := state.WriteFile(filepath.Join(bundle, "address"), []byte(address)); err != nil {
		return fmt.Errorf("bundle: %w", err)
	}
	answer, err := in.Answer(address)
	if err != nil {
		return err
	}
	_, err = stdout.Write(answer)
	return err
}

// location is where a sandbox is on the host.
type location struct {
	dir    state.Dir
	socket string
	pod    string // its name, for people; empty if there is none
}

// locate says where the sandbox of a bundle's container is, or is to be.
func (p *Program) locate(in bootstrap.Invocation, bundle string) (location, error) {
	// Create would refuse it, but a group's name may hide it from here.
	if err := identifiers.Validate(in.ID); err != nil {
		return location{}, fmt.Errorf("container id: %w", err)
	}
	group, pod, err := sandboxOf(bundle, in.ID)
	if err != nil {
		return location{}, err
	}
	dir, err := state.At(p.stateRoot, in.Namespace, group)
	if err != nil {
		return location{}, err
	}
	socket, err := socketPath(in, group)
	return location{dir: dir, socket: socket, pod: pod}, err
}

// socketPath names the socket by what tells sandboxes apart: two containerds
// may have one of the same name.
func socketPath(in bootstrap.Invocation, group string) (string, error) {
	sum := sha256.Sum256([]byte(strings.Join([]string{Name, in.Address, in.Namespace, group}, "\x00")))
	path := filepath.Join(in.SocketDir, fmt.Sprintf("%x", sum[:20]))
	if len(path) >= maxSocketPath {
		return "", fmt.Errorf("socket path %s is longer than %d bytes: socket_dir in containerd's configuration has to be shorter",
			path, maxSocketPath-1)
	}
	return path, nil
}

// errEnded is about a shim that has ended while we waited for it.
var errEnded = errors.New("the sandbox has ended")

// startOrFind makes sure that the socket is served.
func startOrFind(ctx context.Context, in bootstrap.Invocation, where location, held *state.Held) error {
	dir, socket := where.dir, where.socket
	lock, err := dir.Lock()
	if errors.Is(err, state.ErrLocked) {
		if conn, dialErr := net.DialTimeout("unix", socket, time.Second); dialErr == nil {
			conn.Close()
			return nil
		}
		record, recordErr := dir.Load()
		if recordErr == nil && record.Socket != socket {
			return fmt.Errorf("sandbox %s is run by the shim of another containerd", dir.Path)
		}
		// It does not listen any more: it is about to end.
		wait, cancel := context.WithTimeout(ctx, readyTimeout)
		defer cancel()
		lock, err = dir.LockWait(wait)
	}
	if err == nil {
		defer lock.Close()
	}
	if held.Gone() {
		return errEnded
	}
	if err != nil {
		return fmt.Errorf("sandbox %s: %w", dir.Path, err)
	}
	// It was not shut down if there is something left of it.
	if err := cleanUp(ctx, dir); err != nil {
		return err
	}
	if err := spawn(in, where, lock); err != nil {
		return errors.Join(err, dir.Remove())
	}
	return nil
}

// spawn starts the serving process and waits until it serves.
func spawn(in bootstrap.Invocation, where location, lock *os.File) (err error) {
	listener, err := listen(where.socket)
	if err != nil {
		return err
	}
	defer listener.Close()
	defer func() {
		if err != nil {
			os.Remove(where.socket)
		}
	}()
	hostNamespace, err := os.Open("/proc/self/ns/mnt")
	if err != nil {
		return err
	}
	defer hostNamespace.Close()
	ready, report, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	defer report.Close()
	config, err := json.Marshal(settings{Dir: where.dir, Socket: where.socket, TTRPCAddress: in.TTRPCAddress, Options: in.Options})
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, serveArgs(in, where.pod)...)
	cmd.Env = append(os.Environ(), "GOMAXPROCS=2",
		// Go's heap has 2 MiB. Hosts that give huge pages to whoever does not
		// refuse them, as Debian's do, would make it 4 MiB.
		"GODEBUG=disablethp=1,"+os.Getenv("GODEBUG"))
	cmd.Stdin = bytes.NewReader(config)
	cmd.ExtraFiles = []*os.File{listener, report, lock, hostNamespace} // in the order of the constants
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true,
		// What the shim mounts has to go when it does. Unshareflags would do
		// too much: Go makes the mounts private then, and what the host mounts
		// or unmounts later would not be seen.
		Cloneflags: unix.CLONE_NEWNS,
	}
	if err := limitCapabilities(); err != nil {
		return fmt.Errorf("start the shim: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the shim: %w", err)
	}
	report.Close()
	if score, err := os.ReadFile("/proc/" + fmt.Sprint(os.Getppid()) + "/oom_score_adj"); err == nil {
		// containerd is to be killed after its shims.
		adjust(cmd.Process.Pid, string(trimEnd(score)))
	}
	ready.SetReadDeadline(time.Now().Add(readyTimeout))
	said, err := io.ReadAll(io.LimitReader(ready, 64<<10))
	if err == nil && string(said) == readyMessage {
		// It goes on without this process.
		return cmd.Process.Release()
	}
	cmd.Process.Kill()
	cmd.Wait()
	switch {
	case err != nil:
		return fmt.Errorf("the shim did not become ready: %w", err)
	case len(said) == 0:
		return errors.New("the shim ended before it was ready")
	}
	return errors.New(string(said))
}

// serveArgs are the serving process's, which tell people which shim it is.
func serveArgs(in bootstrap.Invocation, pod string) []string {
	args := []string{"-namespace", in.Namespace, "-id", in.ID, "-address", in.Address}
	if pod != "" {
		args = append(args, "-pod", printable.Word(pod, control.MaxName))
	}
	if in.Debug {
		args = append(args, "-debug")
	}
	return args
}

// adjust makes the process one point more likely to be killed than its parent.
// Hosts may forbid it.
func adjust(pid int, parent string) {
	var score int
	if _, err := fmt.Sscan(parent, &score); err == nil && score < 1000 {
		_ = setOOMScore(pid, score+1)
	}
}

// listen makes the socket anew: whatever has its name serves nobody, because
// the caller has the sandbox's lock.
func listen(path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("shim socket: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("shim socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("shim socket: %w", err)
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		os.Remove(path)
		return nil, fmt.Errorf("shim socket: %w", err)
	}
	f, err := l.File()
	if err != nil {
		os.Remove(path)
		return nil, fmt.Errorf("shim socket: %w", err)
	}
	return f, nil
}
