package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

const (
	cpuDir = "/sys/devices/system/cpu"

	// memoryPoll is how often the size of memory is looked at while it changes.
	memoryPoll = 10 * time.Millisecond
	// growStall and shrinkStall are how long memory may stay the same before the
	// wait for more, or less, is given up. Growing needs nothing but time; memory
	// that is in use may never be free.
	growStall   = 10 * time.Second
	shrinkStall = time.Second
)

// guestSize changes how many processors of the guest are on line, and watches
// its memory.
type guestSize struct {
	log *slog.Logger
	// dir is cpuDir, memory totalMemory, stall the time for a direction.
	dir    string
	memory func() (uint64, error)
	stall  func(growing bool) time.Duration

	mu sync.Mutex // one change at a time
	// booted is the memory without any that was plugged: the VMM plugs none
	// before the agent has said that it is ready.
	booted  uint64
	sockets *socketMemory
}

func newGuestSize(log *slog.Logger) (*guestSize, error) {
	booted, err := totalMemory()
	if err != nil {
		return nil, err
	}
	sockets, err := newSocketMemory("/proc")
	if err != nil {
		return nil, err
	}
	return &guestSize{log: log, dir: cpuDir, memory: totalMemory, booted: booted, sockets: sockets, stall: func(growing bool) time.Duration {
		if growing {
			return growStall
		}
		return shrinkStall
	}}, nil
}

// totalMemory is MemTotal: of plugged memory it counts what is on line, to the
// page.
func totalMemory() (uint64, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0, fmt.Errorf("sysinfo: %w", err)
	}
	return info.Totalram * uint64(info.Unit), nil
}

// ResizeSandbox changes the guest's size.
func (a *Agent) ResizeSandbox(ctx context.Context, r *agentproto.ResizeSandboxRequest) (*agentproto.ResizeSandboxResponse, error) {
	if r.GetCpus() < 1 {
		return nil, fmt.Errorf("a guest without processors: %w", errdefs.ErrInvalidArgument)
	}
	s := a.size
	s.mu.Lock()
	defer s.mu.Unlock()
	cpus, err := s.setCPUs(int(r.GetCpus()))
	if err != nil {
		return nil, err
	}
	plugged, err := s.awaitMemory(ctx, r.GetPluggedBytes())
	if err != nil {
		return nil, err
	}
	if err := s.sockets.follow(); err != nil {
		s.log.Warn("limits of sockets stay as they are", "error", err)
	}
	return &agentproto.ResizeSandboxResponse{Cpus: uint32(cpus), PluggedBytes: plugged}, nil
}

// setCPUs brings processors on and off line until want of them are, as far as
// the kernel plays along, and returns how many are. Processor 0 always is.
func (s *guestSize) setCPUs(want int) (int, error) {
	present, err := os.ReadFile(filepath.Join(s.dir, "present"))
	if err != nil {
		return 0, fmt.Errorf("list processors: %w", err)
	}
	last, err := lastOfList(string(present))
	if err != nil {
		return 0, fmt.Errorf("list processors: %w", err)
	}
	online := make([]bool, last+1)
	count := 0
	for cpu := range online {
		// A processor without the file is there for good, as 0 is.
		state, err := os.ReadFile(s.onlineFile(cpu))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return 0, fmt.Errorf("processor %d: %w", cpu, err)
		}
		online[cpu] = err != nil || strings.TrimSpace(string(state)) == "1"
		if online[cpu] {
			count++
		}
	}
	for cpu := 1; cpu <= last && count < want; cpu++ {
		if !online[cpu] && s.setOnline(cpu, "1") {
			count++
		}
	}
	for cpu := last; cpu > 0 && count > want; cpu-- {
		if online[cpu] && s.setOnline(cpu, "0") {
			count--
		}
	}
	return count, nil
}

func (s *guestSize) onlineFile(cpu int) string {
	return filepath.Join(s.dir, "cpu"+strconv.Itoa(cpu), "online")
}

func (s *guestSize) setOnline(cpu int, state string) bool {
	f, err := os.OpenFile(s.onlineFile(cpu), os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(state)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		s.log.Warn("processor stays as it is", "cpu", cpu, "wanted", state, "error", err)
	}
	return err == nil
}

// lastOfList is the last number of a list as the kernel writes it, "0-3,5".
func lastOfList(list string) (int, error) {
	list = strings.TrimSpace(list)
	last, err := strconv.Atoi(list[strings.LastIndexAny(list, "-,")+1:])
	if err != nil || last < 0 {
		return 0, fmt.Errorf("%q is no list of numbers", list)
	}
	return last, nil
}

// awaitMemory waits until want bytes of plugged memory are in use by the kernel,
// or it does not look as if they will be, and returns how many are.
func (s *guestSize) awaitMemory(ctx context.Context, want uint64) (uint64, error) {
	plugged := func() (uint64, error) {
		total, err := s.memory()
		return total - min(total, s.booted), err
	}
	now, err := plugged()
	if err != nil {
		return 0, err
	}
	growing := now < want
	changed := time.Now()
	tick := time.NewTicker(memoryPoll)
	defer tick.Stop()
	for growing && now < want || !growing && now > want {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return now, nil
		}
		before := now
		if now, err = plugged(); err != nil {
			return 0, err
		}
		switch {
		case now != before:
			changed = time.Now()
		case time.Since(changed) > s.stall(growing):
			return now, nil
		}
	}
	return now, nil
}
