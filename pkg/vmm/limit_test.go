package vmm

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"
)

func TestRateLimit(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(limitRate(slog.NewTextHandler(&out, nil)))
	for range 10 * logBurst {
		log.With("a", 1).Error("the guest did it")
		log.WithGroup("g").Error("again")
	}
	if n := strings.Count(out.String(), "\n"); n != logBurst {
		t.Errorf("%d lines were logged, want %d", n, logBurst)
	}
}

func TestBudget(t *testing.T) {
	now := time.Unix(1000, 0)
	b := &budget{tokens: 2, updated: now}
	for i, tc := range []struct {
		after   time.Duration
		dropped int
		ok      bool
	}{
		{0, 0, true}, {0, 0, true}, {0, 0, false}, {logInterval - 1, 0, false},
		{1, 2, true}, {0, 0, false},
		{logInterval, 1, true}, {2*logInterval - 1, 0, true}, {0, 0, false}, {1, 1, true},
	} {
		now = now.Add(tc.after)
		if dropped, ok := b.take(now); dropped != tc.dropped || ok != tc.ok {
			t.Errorf("step %d: %d, %v; want %d, %v", i, dropped, ok, tc.dropped, tc.ok)
		}
	}
	now = now.Add(1000 * logInterval)
	for n := range 2 * logBurst {
		if _, ok := b.take(now); ok != (n < logBurst) {
			t.Errorf("message %d after a long silence: %v", n, ok)
		}
	}
}
