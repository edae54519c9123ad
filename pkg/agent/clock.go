package agent

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

const (
	// maxSlew is what the kernel slews in 17 minutes, by 500 ppm (MAX_TICKADJ in
	// its kernel/time/ntp.c).
	maxSlew = 500 * time.Millisecond
	// noteTime is how long a note is good for: meanwhile a slew changes the clock
	// by 2.5 ms at most.
	noteTime = 5 * time.Second
)

// wallClock follows the host's. kvm-clock, which it is read from, does not: its
// frequency is that of the host's raw clock, which nobody disciplines
// (get_kvmclock_base_ns in the kernel's arch/x86/kvm/x86.c).
type wallClock struct {
	slew, step func(time.Duration) error
	log        *slog.Logger

	mu sync.Mutex
	// noted is what the clock showed at the last NoteTime; zero when that has
	// been used.
	noted time.Time
}

// NoteTime is the first half of a comparison with the host's clock.
func (a *Agent) NoteTime(context.Context, *emptypb.Empty) (*emptypb.Empty, error) {
	a.clock.note()
	return &emptypb.Empty{}, nil
}

// CorrectTime is the second half.
func (a *Agent) CorrectTime(_ context.Context, r *agentproto.CorrectTimeRequest) (*emptypb.Empty, error) {
	for _, t := range []interface{ CheckValid() error }{r.GetEarliest(), r.GetLatest()} {
		if err := t.CheckValid(); err != nil {
			return nil, fmt.Errorf("time: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	return &emptypb.Empty{}, a.clock.correct(r.GetEarliest().AsTime(), r.GetLatest().AsTime())
}

func (c *wallClock) note() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.noted = time.Now()
}

// correct is told what the host's clock has shown before and after the note. It
// corrects no more than what is wrong for every time in between, so that it
// never makes the clock worse.
func (c *wallClock) correct(earliest, latest time.Time) error {
	if latest.Before(earliest) {
		return fmt.Errorf("time: %v is after %v: %w", earliest, latest, errdefs.ErrInvalidArgument)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	noted := c.noted
	c.noted = time.Time{}
	if noted.IsZero() {
		return fmt.Errorf("time: it was not noted: %w", errdefs.ErrFailedPrecondition)
	}
	if time.Since(noted) > noteTime {
		return nil // the next time will do
	}
	var wrong time.Duration
	if noted.Before(earliest) {
		wrong = earliest.Sub(noted)
	} else if noted.After(latest) {
		wrong = latest.Sub(noted)
	}
	if wrong.Abs() <= maxSlew {
		// Also by nothing: what is left of the slew before is out of date.
		return c.slew(wrong)
	}
	c.log.Warn("the wall clock was wrong", "by", -wrong)
	return c.step(wrong)
}
