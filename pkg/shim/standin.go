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

// newStandIn makes a thread that is in the network namespace of the VMM: who
// looks up a container's network by its process must not find the host's.
func newStandIn(vmm int) (*standIn, error) {
	s := &standIn{end: make(chan struct{})}
	started := make(chan error)
	go s.run(vmm, started)
	if err := <-started; err != nil {
		return nil, fmt.Errorf("thread in the network namespace of the VMM: %w", err)
	}
	return s, nil
}

func (s *standIn) run(vmm int, started chan<- error) {
	runtime.LockOSThread() // for good: the thread ends with this goroutine
	tid := unix.Gettid()
	if tid == unix.Getpid() {
		// The namespaces of the first thread are taken for those of the
		// process. With that one held, it will be another.
		done := make(chan struct{})
		go func() {
			defer close(done)
			s.run(vmm, started)
		}()
		<-done
		runtime.UnlockOSThread()
		return
	}
	s.tid = uint32(tid)
	err := joinNetwork(vmm)
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
