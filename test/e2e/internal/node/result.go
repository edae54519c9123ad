package node

import (
	"fmt"
	"strings"
	"testing"
)

// A Result is how a command ended: ctr's, or one in a container.
type Result struct {
	Stdout, Stderr string
	Code           int
}

func (r Result) String() string {
	const most = 4000
	short := func(s string) string {
		if len(s) > most {
			return fmt.Sprintf("%s... (%d bytes)", s[:most], len(s))
		}
		return s
	}
	return fmt.Sprintf("exit code %d\nstdout: %s\nstderr: %s", r.Code, short(r.Stdout), short(r.Stderr))
}

// WantExit fails the test unless a command ended with a code.
func (r Result) WantExit(t *testing.T, code int) {
	t.Helper()
	if r.Code != code {
		t.Errorf("want exit code %d: %s", code, r)
	}
}

// WantOutput fails the test unless a command succeeded and wrote exactly this.
func (r Result) WantOutput(t *testing.T, stdout string) {
	t.Helper()
	if r.Code != 0 || r.Stdout != stdout {
		t.Errorf("want exit code 0 and output %q: %s", stdout, r)
	}
}

// WantError fails the test unless a command failed and its message has all of these words.
func (r Result) WantError(t *testing.T, words ...string) {
	t.Helper()
	if r.Code == 0 {
		t.Errorf("want a failure: %s", r)
	}
	for _, w := range words {
		if !strings.Contains(r.Stderr, w) {
			t.Errorf("the error message lacks %q: %s", w, r)
		}
	}
}
