package passthrough

import (
	"math"

	"golang.org/x/sys/unix"
)

// span is a range of bytes, from first to last; math.MaxInt64 is the end of the
// file, however far that moves.
type span struct{ first, last int64 }

func spanOf(l *unix.Flock_t) span {
	if l.Len == 0 {
		return span{l.Start, math.MaxInt64}
	}
	return span{l.Start, l.Start + l.Len - 1}
}

func (s span) readLock() unix.Flock_t {
	l := unix.Flock_t{Type: unix.F_RDLCK, Start: s.first}
	if s.last != math.MaxInt64 {
		l.Len = s.last - s.first + 1
	}
	return l
}

// spans are ranges that neither overlap nor touch, in no order: as many as the host
// has locks.
type spans []span

// set returns the ranges after l was set or removed, in place of those before.
func (list spans) set(l unix.Flock_t) spans {
	s := spanOf(&l)
	lock := l.Type != unix.F_UNLCK
	rest := list[:0]
	var more spans
	for _, have := range list {
		switch {
		case lock && have.first-1 <= s.last && s.first-1 <= have.last:
			s = span{min(s.first, have.first), max(s.last, have.last)}
		case lock || have.first > s.last || s.first > have.last:
			rest = append(rest, have)
		default:
			if have.first < s.first {
				rest = append(rest, span{have.first, s.first - 1})
			}
			if have.last > s.last {
				more = append(more, span{s.last + 1, have.last})
			}
		}
	}
	if lock {
		more = append(more, s)
	}
	return append(rest, more...)
}
