package vmm

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// A guest may cause this many messages at once, and one more each interval.
const (
	logBurst    = 20
	logInterval = 5 * time.Second
)

// rateLimit passes on to another handler as many records as its budget allows,
// so that no guest can fill the host's log.
type rateLimit struct {
	slog.Handler
	budget *budget // shared by the handlers that With makes
}

type budget struct {
	mu      sync.Mutex
	tokens  int
	updated time.Time // when tokens was last brought up to date
	dropped int
}

func limitRate(h slog.Handler) slog.Handler {
	return &rateLimit{Handler: h, budget: &budget{tokens: logBurst, updated: time.Now()}}
}

// Handle passes the record on, with the number of those dropped before it, or
// drops it.
func (r *rateLimit) Handle(ctx context.Context, record slog.Record) error {
	dropped, ok := r.budget.take(time.Now())
	if !ok {
		return nil
	}
	if dropped > 0 {
		record = record.Clone()
		record.AddAttrs(slog.Int("dropped-before", dropped))
	}
	return r.Handler.Handle(ctx, record)
}

func (r *rateLimit) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &rateLimit{Handler: r.Handler.WithAttrs(attrs), budget: r.budget}
}

func (r *rateLimit) WithGroup(name string) slog.Handler {
	return &rateLimit{Handler: r.Handler.WithGroup(name), budget: r.budget}
}

func (b *budget) take(now time.Time) (dropped int, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n := now.Sub(b.updated) / logInterval; n > 0 {
		b.tokens = min(b.tokens+int(min(n, logBurst)), logBurst)
		b.updated = b.updated.Add(n * logInterval)
	}
	if b.tokens == 0 {
		b.dropped++
		return 0, false
	}
	b.tokens--
	dropped, b.dropped = b.dropped, 0
	return dropped, true
}
