package passthrough

import (
	"math"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSpans compares with a byte for each byte.
func TestSpans(t *testing.T) {
	const end = 24 // of the model; all that is behind is one byte
	random := rand.New(rand.NewPCG(1, 2))
	for range 500 {
		var list spans
		var model [end + 1]bool
		for range 40 {
			l := unix.Flock_t{Type: unix.F_RDLCK, Start: random.Int64N(end)}
			if random.IntN(2) == 0 {
				l.Type = unix.F_UNLCK
			}
			last := int64(end)
			if random.IntN(4) > 0 {
				last = l.Start + random.Int64N(end-l.Start)
				l.Len = last - l.Start + 1
			}
			for i := l.Start; i <= last; i++ {
				model[i] = l.Type == unix.F_RDLCK
			}
			list = list.set(l)
			var got [end + 1]bool
			for i, s := range list {
				for n := s.first; n <= min(s.last, end); n++ {
					if got[n] {
						t.Fatalf("byte %d is in two of %v", n, list)
					}
					got[n] = true
				}
				for _, other := range list[:i] {
					if s.first-1 == other.last || other.first-1 == s.last {
						t.Fatalf("%v touch", list)
					}
				}
				if l := s.readLock(); spanOf(&l) != s || s.last >= end && s.last != math.MaxInt64 {
					t.Fatalf("%v becomes %+v", s, l)
				}
			}
			if got != model {
				t.Fatalf("%v, want %v", list, model)
			}
		}
	}
}
