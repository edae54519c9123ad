package shim

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/internal/printable"
)

// setupLog sends the log to containerd, which reads it from a fifo in the
// bundle, and so does what the Go runtime writes when the program crashes.
// Callers without such a fifo get no log.
func setupLog(path string, debug bool) {
	log.L.Logger.SetOutput(io.Discard)
	if err := log.SetFormat(log.TextFormat); err != nil {
		panic(err) // a constant of the package's own
	}
	setLogLevel(debug)
	// Holding the reading end too, we get no SIGPIPE when containerd is away.
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	unix.Dup3(fd, int(os.Stderr.Fd()), 0)
	log.L.Logger.SetOutput(newLogWriter(fd))
}

func setLogLevel(debug bool) {
	level := log.InfoLevel
	if debug {
		level = log.DebugLevel
	}
	if err := log.SetLevel(level.String()); err != nil {
		panic(err) // a constant of the package's own
	}
}

// logWriter writes lines to a fifo that nobody may be reading, and not more of
// them than are good for a log: a guest can cause lines.
type logWriter struct {
	fd      int
	rate    *limiter
	dropped int
}

// Bounds of the shim's log, in lines: at once after a time of rest, and per second.
const (
	logBurst     = 500
	logPerSecond = 50
)

// newLogWriter writes to a non-blocking descriptor.
func newLogWriter(fd int) *logWriter {
	return &logWriter{fd: fd, rate: newLimiter(logBurst, logPerSecond)}
}

// Write is called with one line at a time, by the logger under its lock.
func (w *logWriter) Write(line []byte) (int, error) {
	if !w.rate.allow() {
		w.dropped++
		return len(line), nil
	}
	if w.dropped > 0 {
		notice := fmt.Sprintf("time=%q level=warning msg=\"%d lines of the shim's log were dropped\"\n",
			time.Now().Format(time.RFC3339Nano), w.dropped)
		if _, err := unix.Write(w.fd, []byte(notice)); err == nil {
			w.dropped = 0
		}
	}
	if _, err := unix.Write(w.fd, line); err != nil {
		w.dropped++ // containerd does not read
	}
	return len(line), nil
}

// limiter is a token bucket.
type limiter struct {
	mu        sync.Mutex
	burst     float64
	perSecond float64
	tokens    float64
	last      time.Time
}

func newLimiter(burst, perSecond float64) *limiter {
	return &limiter{burst: burst, perSecond: perSecond, tokens: burst, last: time.Now()}
}

func (l *limiter) allow() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	l.tokens = min(l.burst, l.tokens+l.perSecond*now.Sub(l.last).Seconds())
	l.last = now
	if l.tokens < 1 {
		return false
	}
	l.tokens--
	return true
}

// Bounds of what is kept and logged of a guest's console and the VMM's log.
const (
	maxLine   = 512
	keepLines = 40
)

// lineLog keeps the last lines of a pipe.
type lineLog struct {
	mu    sync.Mutex
	lines []string
	done  chan struct{}
}

// readLines reads r until it ends, and calls each with every line.
func readLines(r io.ReadCloser, each func(line string)) *lineLog {
	l := &lineLog{done: make(chan struct{})}
	go func() {
		defer close(l.done)
		defer r.Close()
		lines := bufio.NewReaderSize(r, maxLine)
		for {
			// A line that is too long is several.
			data, err := lines.ReadSlice('\n')
			if line := printable.String(string(trimEnd(data)), maxLine); line != "" {
				l.add(line)
				each(line)
			}
			if err != nil && err != bufio.ErrBufferFull {
				return
			}
		}
	}()
	return l
}

func trimEnd(line []byte) []byte {
	for len(line) > 0 && (line[len(line)-1] == '\n' || line[len(line)-1] == '\r') {
		line = line[:len(line)-1]
	}
	return line
}

func (l *lineLog) add(line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.lines) == keepLines {
		copy(l.lines, l.lines[1:])
		l.lines = l.lines[:keepLines-1]
	}
	l.lines = append(l.lines, line)
}

// last returns up to n lines, the newest at the end.
func (l *lineLog) last(n int) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	from := max(0, len(l.lines)-n)
	return append([]string(nil), l.lines[from:]...)
}

// wait waits until the pipe has ended, for as long as the writer might take
// to close it.
func (l *lineLog) wait(timeout time.Duration) {
	select {
	case <-l.done:
	case <-time.After(timeout):
	}
}
