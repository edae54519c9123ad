package shim

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/shim/guestspec"
)

const (
	// volumeDelay is how long the guest may have in its caches what the host has
	// changed, and a little more: who looks because of an event is to see what is
	// there now. Changes in between are one.
	volumeDelay = 1200 * time.Millisecond
	// volumeTime bounds what is told to the guest of one change.
	volumeTime = time.Minute
	// maxVolumes bounds the watches of a sandbox, of which a user of the host has
	// 8192 by the kernel's default.
	maxVolumes = 64

	// dataLink is what the kubelet replaces when it updates a volume: its
	// pkg/volume/util/atomic_writer.go.
	dataLink = "..data"
)

// volume names a container's mount.
type volume struct {
	id    string
	mount int
}

// volumes are the directories that the host updates as the kubelet does. They are
// watched, because in a guest nothing tells of what the host changes.
type volumes struct {
	mu      sync.Mutex
	inotify *os.File // nil: nothing is watched yet
	watched map[int32][]volume
	pending map[int32]bool // a change is going to be told
}

// watchVolumes begins to watch those of a container that is in the guest. Without
// it the container runs all the same.
func (s *sandbox) watchVolumes(ctx context.Context, id string, mounts []guestspec.Mount) {
	for n, m := range mounts {
		if m.File || m.Type != "" {
			continue
		}
		dir := s.tree.Mount(id, n)
		if info, err := os.Lstat(filepath.Join(dir, dataLink)); err != nil || info.Mode()&os.ModeSymlink == 0 {
			continue
		}
		err := s.watchVolume(dir, volume{id, n})
		if err == nil {
			err = s.agent.VolumeChanged(ctx, id, n)
		}
		if err != nil {
			log.L.WithError(err).Warnf("container %s: inotify will not tell of changes in %s", id, m.Destination)
		}
	}
}

func (s *sandbox) watchVolume(dir string, v volume) error {
	s.volumes.mu.Lock()
	defer s.volumes.mu.Unlock()
	if len(s.volumes.watched) >= maxVolumes {
		return fmt.Errorf("%d directories are watched already", maxVolumes)
	}
	if s.volumes.inotify == nil {
		fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
		if err != nil {
			return fmt.Errorf("inotify: %w", err)
		}
		s.volumes.inotify = os.NewFile(uintptr(fd), "inotify")
		s.volumes.watched, s.volumes.pending = map[int32][]volume{}, map[int32]bool{}
		go s.readVolumes(s.volumes.inotify)
	}
	var wd int
	var err error
	s.volumes.control(func(fd int) {
		wd, err = unix.InotifyAddWatch(fd, dir, unix.IN_MOVED_TO|unix.IN_ONLYDIR)
	})
	if err != nil {
		return fmt.Errorf("watch %s: %w", dir, err)
	}
	s.volumes.watched[int32(wd)] = append(s.volumes.watched[int32(wd)], v)
	return nil
}

// control uses the descriptor. Fd would make the file blocking.
func (v *volumes) control(use func(fd int)) {
	raw, err := v.inotify.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) { use(int(fd)) })
	}
	if err != nil {
		log.L.WithError(err).Error("inotify")
	}
}

// unwatchVolumes is for a container that is no longer in the guest.
func (s *sandbox) unwatchVolumes(id string) {
	s.volumes.mu.Lock()
	defer s.volumes.mu.Unlock()
	for wd, list := range s.volumes.watched {
		list = slices.DeleteFunc(list, func(v volume) bool { return v.id == id })
		if len(list) > 0 {
			s.volumes.watched[wd] = list
			continue
		}
		delete(s.volumes.watched, wd)
		s.volumes.control(func(fd int) { unix.InotifyRmWatch(fd, uint32(wd)) })
	}
}

// closeVolumes ends the watching.
func (s *sandbox) closeVolumes() {
	s.volumes.mu.Lock()
	defer s.volumes.mu.Unlock()
	if s.volumes.inotify != nil {
		s.volumes.inotify.Close()
		s.volumes.watched = nil
	}
}

// readVolumes has the guest told of changes, some time after.
func (s *sandbox) readVolumes(inotify *os.File) {
	buf := make([]byte, 16<<10)
	for {
		n, err := inotify.Read(buf)
		if err != nil {
			if !errors.Is(err, os.ErrClosed) {
				log.L.WithError(err).Error("inotify will not tell of changes in volumes any more")
			}
			return
		}
		for _, wd := range dataMoves(buf[:n]) {
			s.volumes.mu.Lock()
			wait := s.volumes.pending[wd] || s.volumes.watched[wd] == nil
			if !wait {
				s.volumes.pending[wd] = true
				time.AfterFunc(s.host.volumeDelay, func() { s.tellVolume(wd) })
			}
			s.volumes.mu.Unlock()
		}
	}
}

// dataMoves are the watches whose directory has got a new ..data. The kernel
// writes whole events, inotify(7).
func dataMoves(events []byte) (list []int32) {
	for len(events) >= unix.SizeofInotifyEvent {
		wd, mask := int32(binary.NativeEndian.Uint32(events)), binary.NativeEndian.Uint32(events[4:])
		end := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(events[12:]))
		if end > len(events) {
			break
		}
		name := strings.TrimRight(string(events[unix.SizeofInotifyEvent:end]), "\x00")
		if mask&unix.IN_MOVED_TO != 0 && name == dataLink && !slices.Contains(list, wd) {
			list = append(list, wd)
		}
		events = events[end:]
	}
	return list
}

func (s *sandbox) tellVolume(wd int32) {
	s.volumes.mu.Lock()
	delete(s.volumes.pending, wd)
	list := slices.Clone(s.volumes.watched[wd])
	s.volumes.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), volumeTime)
	defer cancel()
	for _, v := range list {
		if s.alive() != nil {
			return
		}
		if err := s.agent.VolumeChanged(ctx, v.id, v.mount); err != nil {
			log.L.WithError(err).Warnf("container %s: inotify does not tell of a change in mount %d", v.id, v.mount)
		}
	}
}
