package network

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// namespace is an open network namespace, which lives at least as long.
type namespace struct {
	path          string
	file          *os.File
	device, inode uint64
}

// errHost says that a namespace is the one that we are in.
var errHost = fmt.Errorf("a virtual machine cannot share the host's network (--net-host, hostNetwork): %w", errdefs.ErrNotImplemented)

// errNoNamespace says that a path is that of something else, such as of the file
// on which a namespace was mounted.
var errNoNamespace = fmt.Errorf("this is not a network namespace: %w", errdefs.ErrInvalidArgument)

func openNamespace(path string) (_ *namespace, err error) {
	// Nonblocking, or opening a FIFO would wait for its other end.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("network namespace: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	ns := &namespace{path: path, file: f}
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET { // ENOTTY for a file that is none
		return nil, fmt.Errorf("%s: %w", path, errNoNamespace)
	}
	if ns.device, ns.inode, err = identity(int(f.Fd())); err != nil {
		return nil, fmt.Errorf("network namespace %s: %w", path, err)
	}
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("the host's network namespace: %w", err)
	}
	defer own.Close()
	device, inode, err := identity(int(own.Fd()))
	if err != nil {
		return nil, fmt.Errorf("the host's network namespace: %w", err)
	}
	if device == ns.device && inode == ns.inode {
		return nil, fmt.Errorf("network namespace %s: %w", path, errHost)
	}
	return ns, nil
}

// identity tells a namespace from all others there are.
func identity(fd int) (device, inode uint64, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, 0, err
	}
	return st.Dev, st.Ino, nil
}

func (ns *namespace) close() { ns.file.Close() }

// do calls f on a thread that is in the namespace. What f opens, belongs there.
func (ns *namespace) do(f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		back, err := ns.enter()
		if err != nil {
			runtime.UnlockOSThread()
			result <- err
			return
		}
		err = f()
		if unix.Setns(int(back.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		} // else the thread ends with this goroutine
		back.Close()
		result <- err
	}()
	return <-result
}

// enter returns where the thread comes from.
func (ns *namespace) enter() (back *os.File, err error) {
	back, err = os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("the host's network namespace: %w", err)
	}
	if err := unix.Setns(int(ns.file.Fd()), unix.CLONE_NEWNET); err != nil {
		back.Close()
		return nil, fmt.Errorf("enter network namespace %s: %w", ns.path, err)
	}
	return back, nil
}
