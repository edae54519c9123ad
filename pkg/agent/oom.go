package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// oomWatch publishes an event when the kernel has killed processes of a
// container for want of memory. It is told of changes of the containers'
// memory.events by inotify (Documentation/admin-guide/cgroup-v2.rst, "[Un]populated
// Notification" and "memory.events": each change is a file modified event).
type oomWatch struct {
	log     *slog.Logger
	events  *eventQueue
	inotify *os.File
	fd      int // inotify's

	mu         sync.Mutex
	containers map[int32]*container // by watch descriptor
}

func newOOMWatch(events *eventQueue, log *slog.Logger) (*oomWatch, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch for containers out of memory: %w", err)
	}
	return &oomWatch{
		log:        log,
		events:     events,
		inotify:    os.NewFile(uintptr(fd), "inotify"),
		fd:         fd,
		containers: make(map[int32]*container),
	}, nil
}

// add begins to watch a container, which has its cgroup.
func (w *oomWatch) add(c *container) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	wd, err := unix.InotifyAddWatch(w.fd, filepath.Join(c.cgroupDir(), "memory.events"), unix.IN_MODIFY)
	if err != nil {
		return fmt.Errorf("watch the memory of container %q: %w", c.id, err)
	}
	c.wd = int32(wd)
	w.containers[c.wd] = c
	return nil
}

// remove ends the watch on a container. Its cgroup may be gone already, which
// has ended the watch too.
func (w *oomWatch) remove(c *container) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.containers[c.wd] == c {
		delete(w.containers, c.wd)
		unix.InotifyRmWatch(w.fd, uint32(c.wd))
	}
}

// check publishes an event if there were kills that no event was published for,
// one for all of them, and waits until it is sent. It is called for a process
// that has ended, so that its client hears why before it hears that.
func (w *oomWatch) check(c *container) {
	if sent := w.publish(c); sent != nil {
		awaitSent(sent)
	}
}

func (w *oomWatch) publish(c *container) (sent <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	kills, err := c.oomKills()
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil // the container is being deleted
	}
	if err != nil {
		w.log.Error("cannot read a container's memory events", "container", c.id, "error", err)
		return nil
	}
	if kills <= c.kills {
		return nil
	}
	c.kills = kills
	return w.events.publish(&agentproto.Event{
		Timestamp: timestamppb.Now(),
		Kind:      &agentproto.Event_OomKill{OomKill: &agentproto.OOMKill{ContainerId: c.id}},
	})
}

// run publishes events until the watch is closed.
func (w *oomWatch) run() {
	// Of one event, include/uapi/linux/inotify.h: wd, mask, cookie and len of
	// 32 bits each, then len bytes of a name, which only watches of
	// directories have.
	buf := make([]byte, 4096)
	for {
		n, err := w.inotify.Read(buf)
		if err != nil {
			if !errors.Is(err, os.ErrClosed) {
				w.log.Error("no more events about containers out of memory", "error", err)
			}
			return
		}
		for rest := buf[:n]; len(rest) >= unix.SizeofInotifyEvent; {
			wd := int32(binary.NativeEndian.Uint32(rest))
			next := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(rest[12:]))
			rest = rest[min(next, len(rest)):]
			w.mu.Lock()
			c := w.containers[wd]
			w.mu.Unlock()
			if c != nil {
				w.publish(c)
			}
		}
	}
}
