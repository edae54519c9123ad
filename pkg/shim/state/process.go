package state

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Process names a process for longer than it lives: a process id alone may be
// another process's by the time it is used.
type Process struct {
	Pid int `json:"pid"`
	// StartTime is in clock ticks since the host booted, field 22 of
	// /proc/pid/stat, see proc_pid_stat(5).
	StartTime uint64 `json:"start_time"`
}

// Identify describes a running process.
func Identify(pid int) (Process, error) {
	start, err := startTime(pid)
	if err != nil {
		return Process{}, fmt.Errorf("process %d: %w", pid, err)
	}
	return Process{Pid: pid, StartTime: start}, nil
}

func startTime(pid int) (uint64, error) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	return parseStartTime(stat)
}

func parseStartTime(stat []byte) (uint64, error) {
	// The second field, the program's name, is in parentheses and may hold
	// anything, spaces and parentheses too.
	end := bytes.LastIndexByte(stat, ')')
	fields := bytes.Fields(stat[end+1:])
	const field = 22 - 3 // the first one after the name is field 3
	if end < 0 || len(fields) <= field {
		return 0, errors.New("unexpected form of /proc/pid/stat")
	}
	return strconv.ParseUint(string(fields[field]), 10, 64)
}

// Kill ends the process with SIGKILL and waits until it has ended. It does
// nothing when the process has ended already, or its id has passed to another
// one.
func (p Process) Kill(ctx context.Context) error {
	if p.Pid <= 0 {
		return nil
	}
	fd, err := unix.PidfdOpen(p.Pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("process %d: %w", p.Pid, err)
	}
	defer unix.Close(fd)
	// If the start time is right now, then the descriptor, which is older, is
	// of this process or of one that has ended.
	if start, err := startTime(p.Pid); err != nil || start != p.StartTime {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		return fmt.Errorf("kill process %d: %w", p.Pid, err)
	}
	for {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(poll, int((20 * time.Millisecond).Milliseconds()))
		if n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for process %d: %w", p.Pid, err)
		}
		if ctx.Err() != nil {
			return fmt.Errorf("process %d did not end after SIGKILL: %w", p.Pid, ctx.Err())
		}
	}
}
