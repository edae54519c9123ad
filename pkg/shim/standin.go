package shim

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// standIn is a thread of this process that stands for a container on the host:
// callers know a container by the id of a process, and name its namespaces by
// paths like /proc/PID/ns/pid, so that each one needs a number of its own. It
// does nothing, and costs about 20 KiB and the kernel's stack for it.
type standIn struct {
	tid uint32
	end chan struct{}
}

// newStandIn makes a thread that is in the network namespace of the VMM and in a
// root directory where nothing is: who looks up a container's network by its
// process must not find the host's, nor who looks for its files (nerdctl cp, by
// /proc/PID/root) those of the host.
func newStandIn(vmm int) (*standIn, error) {
	return startStandIn(func() error {
		if err := joinNetwork(vmm); err != nil {
			return fmt.Errorf("network namespace of the VMM: %w", err)
		}
		return leaveRoot()
	})
}

// startStandIn makes a thread that calls enter first.
func startStandIn(enter func() error) (*standIn, error) {
	s := &standIn{end: make(chan struct{})}
	started := make(chan error)
	go s.run(enter, started)
	if err := <-started; err != nil {
		return nil, fmt.Errorf("thread that stands for a container: %w", err)
	}
	return s, nil
}

func (s *standIn) run(enter func() error, started chan<- error) {
	runtime.LockOSThread() // for good: the thread ends with this goroutine
	tid := unix.Gettid()
	if tid == unix.Getpid() {
		// The namespaces of the first thread are taken for those of the
		// process. With that one held, it will be another.
		done := make(chan struct{})
		go func() {
			defer close(done)
			s.run(enter, started)
		}()
		<-done
		runtime.UnlockOSThread()
		return
	}
	s.tid = uint32(tid)
	err := enter()
	started <- err
	if err == nil {
		<-s.end
	}
}

// close ends the thread.
func (s *standIn) close() { close(s.end) }

// joinNetwork moves the calling thread to the network namespace of a process.
func joinNetwork(pid int) error {
	target, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return err
	}
	defer target.Close()
	wanted, err := target.Stat()
	if err != nil {
		return err
	}
	if own, err := os.Stat("/proc/thread-self/ns/net"); err == nil && os.SameFile(own, wanted) {
		return nil
	}
	return unix.Setns(int(target.Fd()), unix.CLONE_NEWNET)
}

// leaveRoot gives the calling thread an empty root directory that nobody can write
// to. It is mounted nowhere, and goes with the thread.
func leaveRoot() error {
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("empty root directory: fsopen: %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return fmt.Errorf("empty root directory: fsconfig: %w", err)
	}
	const flags = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	root, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, flags)
	if err != nil {
		return fmt.Errorf("empty root directory: fsmount: %w", err)
	}
	defer unix.Close(root)
	// Of this thread alone.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Fchdir(root); err != nil {
		return fmt.Errorf("empty root directory: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	return nil
}
