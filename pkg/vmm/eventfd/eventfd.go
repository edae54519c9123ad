// Package eventfd wraps eventfd(2): KVM signals one at a doorbell write
// (ioeventfd) and injects an interrupt when we signal one (irqfd).
package eventfd

import (
	"encoding/binary"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// EventFD is a non-blocking eventfd whose Wait parks in the Go runtime's
// poller. All methods may be called concurrently.
type EventFD struct {
	file *os.File
	fd   int
}

// New makes an eventfd with a count of zero. The caller owns it and closes it.
func New() (*EventFD, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	return &EventFD{file: os.NewFile(uintptr(fd), "eventfd"), fd: fd}, nil
}

// FD returns the descriptor to hand to KVM. It stays owned by e.
func (e *EventFD) FD() int { return e.fd }

// Signal adds one to the count: wakes a Wait, or raises the interrupt behind
// an irqfd.
func (e *EventFD) Signal() error {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	_, err := e.file.Write(one[:])
	return err
}

// Wait blocks until the count is not zero and takes it to zero. After Close it
// returns an error that wraps os.ErrClosed.
func (e *EventFD) Wait() error {
	var count [8]byte
	_, err := e.file.Read(count[:])
	return err
}

// Close closes the descriptor and wakes every Wait.
func (e *EventFD) Close() error { return e.file.Close() }
