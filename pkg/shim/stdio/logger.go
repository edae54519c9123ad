package stdio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"time"
)

// How long a logging program may take to become ready, to end when its input
// has, and to end when it was told to.
const (
	loggerReady = 30 * time.Second
	loggerEnd   = 10 * time.Second
	loggerKill  = 2 * time.Second
)

// logger is a running logging program,
// https://github.com/containerd/containerd/blob/v2.4.2/docs/runtime-v2.md#logging
type logger struct {
	cmd   *exec.Cmd
	ended chan struct{}
}

// startLogger runs the program and waits until it is ready. It reads stdout
// from descriptor 3 and stderr from 4, and reports on 5; the files are the
// other ends of the first two.
func startLogger(ctx context.Context, location *url.URL, c Config) (_ *logger, outputs [2]*os.File, err error) {
	var theirs, ours []*os.File
	closeAll := func(files []*os.File) {
		for _, f := range files {
			f.Close()
		}
	}
	defer func() {
		closeAll(theirs)
		if err != nil {
			closeAll(ours)
		}
	}()
	for range outputs {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, outputs, fmt.Errorf("logging program: %w", err)
		}
		theirs, ours = append(theirs, r), append(ours, w)
	}
	ready, report, err := os.Pipe()
	if err != nil {
		return nil, outputs, fmt.Errorf("logging program: %w", err)
	}
	defer ready.Close()
	theirs = append(theirs, report)

	cmd := exec.Command(location.Path, arguments(location.Query())...)
	cmd.Env = []string{"CONTAINER_ID=" + c.ID, "CONTAINER_NAMESPACE=" + c.Namespace}
	cmd.ExtraFiles = theirs
	if err := cmd.Start(); err != nil {
		return nil, outputs, fmt.Errorf("logging program: %w", err)
	}
	l := &logger{cmd: cmd, ended: make(chan struct{})}
	go func() {
		cmd.Wait()
		close(l.ended)
	}()
	report.Close() // or reading would not see the program end

	deadline := time.Now().Add(loggerReady)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	ready.SetReadDeadline(deadline)
	n, err := ready.Read(make([]byte, 1))
	switch {
	case err != nil && !errors.Is(err, io.EOF):
		cmd.Process.Kill()
		return nil, outputs, fmt.Errorf("logging program %s did not become ready: %w", location.Path, err)
	case n == 0 && location.Scheme == "binary-v2":
		// The first version of the protocol cannot tell a program that is
		// ready from one that has crashed.
		cmd.Process.Kill()
		return nil, outputs, fmt.Errorf("logging program %s ended without becoming ready", location.Path)
	}
	return l, [2]*os.File(ours), nil
}

// arguments are the query's keys and values, in the order of the keys, because
// the query has none of its own once parsed.
func arguments(query url.Values) []string {
	var args []string
	keys := make([]string, 0, len(query))
	for key := range query {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	for _, key := range keys {
		args = append(args, key)
		if value := query.Get(key); value != "" {
			args = append(args, value)
		}
	}
	return args
}

// stop waits until the program has ended: by itself because its input has, or
// because it was told to.
func (l *logger) stop() {
	for _, step := range []struct {
		signal syscall.Signal
		wait   time.Duration
	}{{0, loggerEnd}, {syscall.SIGTERM, loggerKill}, {syscall.SIGKILL, loggerKill}} {
		if step.signal != 0 {
			l.cmd.Process.Signal(step.signal)
		}
		select {
		case <-l.ended:
			return
		case <-time.After(step.wait):
		}
	}
}
