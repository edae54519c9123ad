package agent

import (
	"errors"
	"io"
	"log/slog"
	"math"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// What is surely wrong is corrected, and no more: little of it slowly.
func TestCorrectTime(t *testing.T) {
	const none = math.MinInt64
	for name, test := range map[string]struct {
		earliest, latest time.Duration // the host's clock, from what the guest's showed
		later            time.Duration // that CorrectTime comes
		slew, step       time.Duration
	}{
		"right":                      {-time.Millisecond, time.Millisecond, 0, 0, none},
		"right, exactly":             {0, 0, 0, 0, none},
		"right, as far as is seen":   {-3 * time.Second, 100 * time.Millisecond, time.Second, 0, none},
		"slow":                       {3 * time.Millisecond, 4 * time.Millisecond, 0, 3 * time.Millisecond, none},
		"fast":                       {-4 * time.Millisecond, -3 * time.Millisecond, 0, -3 * time.Millisecond, none},
		"slow, as much as is little": {500 * time.Millisecond, 600 * time.Millisecond, 0, 500 * time.Millisecond, none},
		"much too slow":              {501 * time.Millisecond, 600 * time.Millisecond, 0, none, 501 * time.Millisecond},
		"much too fast":              {-time.Hour, -time.Hour, 0, none, -time.Hour},
		"centuries":                  {math.MaxInt64, math.MaxInt64, 0, none, math.MaxInt64},
		"told much later":            {time.Hour, time.Hour, noteTime + 1, none, none},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var slew, step time.Duration = none, none
				a := &Agent{clock: &wallClock{
					slew: func(d time.Duration) error { slew = d; return nil },
					step: func(d time.Duration) error { step = d; return nil },
					log:  slog.New(slog.NewTextHandler(io.Discard, nil)),
				}}
				if _, err := a.NoteTime(t.Context(), &emptypb.Empty{}); err != nil {
					t.Fatal(err)
				}
				r := &agentproto.CorrectTimeRequest{
					Earliest: timestamppb.New(time.Now().Add(test.earliest)),
					Latest:   timestamppb.New(time.Now().Add(test.latest)),
				}
				time.Sleep(test.later)
				if _, err := a.CorrectTime(t.Context(), r); err != nil {
					t.Error(err)
				}
				if slew != test.slew || step != test.step {
					t.Errorf("slewed by %v and stepped by %v, want %v and %v", slew, step, test.slew, test.step)
				}
				// A note is for one correction.
				if _, err := a.CorrectTime(t.Context(), r); !errdefs.IsFailedPrecondition(err) {
					t.Errorf("without a note: %v", err)
				}
			})
		})
	}
}

func TestCorrectTimeRefuses(t *testing.T) {
	fail := func(d time.Duration) error { return errors.New("the clock was touched") }
	a := &Agent{clock: &wallClock{slew: fail, step: fail, log: slog.New(slog.NewTextHandler(io.Discard, nil))}}
	now := timestamppb.Now()
	for name, r := range map[string]*agentproto.CorrectTimeRequest{
		"nothing":       {},
		"no earliest":   {Latest: now},
		"no latest":     {Earliest: now},
		"no time":       {Earliest: now, Latest: &timestamppb.Timestamp{Seconds: now.Seconds, Nanos: -1}},
		"after the end": {Earliest: now, Latest: &timestamppb.Timestamp{Seconds: math.MaxInt64}},
		"backwards":     {Earliest: now, Latest: timestamppb.New(now.AsTime().Add(-1))},
	} {
		a.clock.note()
		if _, err := a.CorrectTime(t.Context(), r); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
