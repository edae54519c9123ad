//go:build agentkernel

package agent

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// The kernel's clock is set where it is far from the host's, in either direction,
// and drawn near where it is not.
func TestClock(t *testing.T) {
	s := newSandbox(t)
	// compare has the agent find the clock wrong by off, or little more.
	compare := func(off time.Duration) {
		t.Helper()
		for {
			before := time.Now()
			if _, err := s.agent.NoteTime(t.Context(), &emptypb.Empty{}); err != nil {
				t.Fatal(err)
			}
			if time.Since(before) > 100*time.Millisecond {
				continue // the machine is emulated, and the host may be busy
			}
			host := timestamppb.New(before.Add(off))
			if _, err := s.agent.CorrectTime(t.Context(), &agentproto.CorrectTimeRequest{Earliest: host, Latest: host}); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	left := func() time.Duration {
		t.Helper()
		x := unix.Timex{Modes: 0xa001} // ADJ_OFFSET_SS_READ
		if _, err := unix.Adjtimex(&x); err != nil {
			t.Fatal(err)
		}
		return time.Duration(x.Offset) * time.Microsecond
	}
	for _, off := range []time.Duration{300 * time.Millisecond, -300 * time.Millisecond} {
		compare(off)
		if got := left(); (got - off).Abs() > 200*time.Millisecond {
			t.Errorf("%v are left to slew of %v", got, off)
		}
	}
	begin := time.Now()
	gained := func() time.Duration {
		now := time.Now()
		return now.Round(0).Sub(begin.Round(0)) - now.Sub(begin)
	}
	for _, test := range []struct{ off, gained time.Duration }{{time.Hour, time.Hour}, {-time.Hour, 0}} {
		compare(test.off)
		if got := gained(); (got - test.gained).Abs() > time.Second {
			t.Errorf("stepped by %v, the clock has gained %v", test.off, got)
		}
		if got := left(); got != 0 {
			t.Errorf("%v are left to slew", got)
		}
	}
}
