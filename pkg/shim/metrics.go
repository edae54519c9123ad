package shim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
)

// hostUsage is what a process takes of the host.
type hostUsage struct {
	cpu    uint64 // microseconds
	memory uint64 // bytes that are its own, not those of a shared file
}

// metrics are those of the sandbox as the host pays for it: the counters of all
// containers, from the guest, with what the guest's kernel, the VMM and the
// shim take on top of it. The VMM's processor time has the guest's in it, and
// its memory is the guest's.
func (s *sandbox) metrics(ctx context.Context) (*cgroup2.Metrics, error) {
	m, err := s.agent.SandboxStats(ctx)
	if err != nil {
		return nil, err
	}
	var host hostUsage
	for _, pid := range []int{os.Getpid(), s.vm.Pid()} {
		u, err := processUsage(pid)
		if err != nil {
			return nil, fmt.Errorf("process %d: %w", pid, err)
		}
		host.cpu += u.cpu
		host.memory += u.memory
	}
	return addOverhead(m, host), nil
}

// addOverhead makes what the guest says into the whole: more is the system's,
// or memory that cannot be taken back.
func addOverhead(m *cgroup2.Metrics, host hostUsage) *cgroup2.Metrics {
	if m.CPU == nil {
		m.CPU = &cgroup2.CPUStat{}
	}
	if host.cpu > m.CPU.UsageUsec {
		m.CPU.SystemUsec += host.cpu - m.CPU.UsageUsec
		m.CPU.UsageUsec = host.cpu
	}
	if m.Memory == nil {
		m.Memory = &cgroup2.MemoryStat{}
	}
	if host.memory > m.Memory.Usage {
		m.Memory.Anon += host.memory - m.Memory.Usage
		m.Memory.Usage = host.memory
	}
	return m
}

func processUsage(pid int) (hostUsage, error) {
	dir := "/proc/" + strconv.Itoa(pid)
	stat, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return hostUsage{}, err
	}
	status, err := os.ReadFile(dir + "/status")
	if err != nil {
		return hostUsage{}, err
	}
	return parseUsage(stat, status)
}

// parseUsage reads /proc/pid/stat and /proc/pid/status.
func parseUsage(stat, status []byte) (u hostUsage, err error) {
	// The second field, the program's name, is in parentheses and may hold
	// anything.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	const (
		utime = 14 - 3 // the first one after the name is field 3
		stime = 15 - 3
		tick  = 10_000 // microseconds: USER_HZ is 100, include/asm-generic/param.h
	)
	if len(fields) <= stime {
		return hostUsage{}, errors.New("unexpected form of /proc/pid/stat")
	}
	for _, field := range [][]byte{fields[utime], fields[stime]} {
		ticks, err := strconv.ParseUint(string(field), 10, 64)
		if err != nil {
			return hostUsage{}, fmt.Errorf("processor time: %w", err)
		}
		u.cpu += ticks * tick
	}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		if name != "RssAnon" && name != "RssShmem" {
			continue
		}
		kib, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 54)
		if err != nil {
			return hostUsage{}, fmt.Errorf("%s: %w", name, err)
		}
		u.memory += kib << 10
	}
	return u, nil
}
