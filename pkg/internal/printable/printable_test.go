package printable

import (
	"strings"
	"testing"
	"unicode"
)

func TestString(t *testing.T) {
	for _, test := range []struct {
		in   string
		max  int
		want string
	}{
		{"plain text, grüße", 100, "plain text, grüße"},
		{"two\nlines\tand\rmore", 100, "two lines and more"},
		{"\x1b[31mred\x00\x7f", 100, "?[31mred??"},
		{"bad \xff\xfe utf8", 100, "bad ?? utf8"},
		{"right\u202eleft", 100, "right?left"},
		{"too long", 3, "too..."},
		{"", 3, ""},
	} {
		if got := String(test.in, test.max); got != test.want {
			t.Errorf("%q: %q, want %q", test.in, got, test.want)
		}
	}
}

func TestWord(t *testing.T) {
	for _, test := range []struct {
		in   string
		max  int
		want string
	}{
		{"default/web-0.a_b:c", 100, "default/web-0.a_b:c"},
		{"two words\n", 100, "two?words?"},
		{"\x00\x1b[31m\x7f", 100, "??[31m?"},
		{"grüße \xff", 100, "gr??e??"},
		{"too long", 3, "too"},
		{"gré", 3, "gr?"}, // cut in the middle of a character
		{"", 3, ""},
	} {
		if got := Word(test.in, test.max); got != test.want {
			t.Errorf("%q: %q, want %q", test.in, got, test.want)
		}
	}
}

func FuzzString(f *testing.F) {
	f.Add("text \x1b[0m\xff", 5)
	f.Fuzz(func(t *testing.T, s string, max int) {
		max &= 0xffff
		got := String(s, max)
		if strings.ContainsFunc(got, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("%q is not printable", got)
		}
		if len(got) > max+len("...") {
			t.Errorf("%d bytes of at most %d", len(got), max)
		}
	})
}
