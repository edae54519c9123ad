// Package printable makes text that comes from a guest fit for logs and error
// messages.
package printable

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// String replaces what is not printable, line ends and terminal escapes
// included, and cuts the result to max bytes.
func String(s string, max int) string {
	cut := len(s) > max
	if cut {
		s = s[:max] // before anything is done with it: it may be megabytes
	}
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '\t' || r == '\n' || r == '\r':
			return ' '
		case r == utf8.RuneError || !unicode.IsPrint(r):
			return '?'
		}
		return r
	}, s)
	if cut {
		s += "..."
	}
	return s
}

// Word makes one word of text, for an argument that is shown among others:
// whatever is not a visible character of ASCII is replaced, and what is more than
// max bytes is cut off.
func Word(s string, max int) string {
	if len(s) > max {
		s = s[:max]
	}
	return strings.Map(func(r rune) rune {
		if r <= ' ' || r >= 0x7f {
			return '?'
		}
		return r
	}, s)
}
