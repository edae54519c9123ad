package virtiotest

import (
	"context"
	"log/slog"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"time"
)

// Usage is what the process used of the host when it was measured.
type Usage struct {
	t           testing.TB
	goroutines  int
	descriptors int
	threads     int
}

// Measure notes what is used now.
func Measure(t testing.TB) *Usage {
	t.Helper()
	return &Usage{t: t, goroutines: runtime.NumGoroutine(), descriptors: entries(t, "/proc/self/fd"), threads: entries(t, "/proc/self/task")}
}

func entries(t testing.TB, dir string) int {
	t.Helper()
	names, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

// moreThreads is how many threads may stay: Go ends none, and each of a
// device's goroutines may have been in a system call at the same time.
const moreThreads = 64

// Settle waits until goroutines and descriptors are what they were, and fails
// the test if they do not come back to it, or if threads grew without a bound.
func (u *Usage) Settle() {
	u.t.Helper()
	for start := time.Now(); ; time.Sleep(time.Millisecond) {
		goroutines, descriptors := runtime.NumGoroutine(), entries(u.t, "/proc/self/fd")
		if goroutines <= u.goroutines && descriptors <= u.descriptors {
			break
		}
		if time.Since(start) > hangs {
			u.t.Fatalf("left: %d goroutines of %d, %d descriptors of %d", goroutines, u.goroutines, descriptors, u.descriptors)
		}
	}
	if n := entries(u.t, "/proc/self/task"); n > u.threads+moreThreads {
		u.t.Errorf("%d threads, there were %d", n, u.threads)
	}
}

// lineCounter is a log that counts its lines.
type lineCounter struct{ n atomic.Int64 }

func (c *lineCounter) Enabled(context.Context, slog.Level) bool { return true }

func (c *lineCounter) Handle(context.Context, slog.Record) error {
	c.n.Add(1)
	return nil
}

func (c *lineCounter) WithAttrs([]slog.Attr) slog.Handler { return c }
func (c *lineCounter) WithGroup(string) slog.Handler      { return c }
