package ratelimittest

import (
	"testing"
	"time"
)

// slack is for waits that are longer than they have to be, because none is
// shorter than a millisecond.
const slack = 2 * time.Millisecond

// Took fails the test unless something took the time that was wanted, or up to
// more than that: who charges afterwards may wait already for what is next.
func Took(t testing.TB, what string, got, want, more time.Duration) {
	t.Helper()
	if got < want || got > want+more+slack {
		t.Errorf("%s took %v, want %v, or up to %v more", what, got, want, more)
	}
}
