//go:build e2e

// Package task tests what a user can do with ctr and one container after the other, under any runtime: E2E_RUNTIME names it.
// What holds for every runtime is tested here, so that the suite itself can be checked against runc.
package task

import (
	"strings"
	"testing"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

func TestMain(m *testing.M) { node.Main(m) }

// wantExit fails the test unless a command ended with a code.
func wantExit(t *testing.T, r node.Result, code int) {
	t.Helper()
	if r.Code != code {
		t.Errorf("want exit code %d: %s", code, r)
	}
}

// wantOutput fails the test unless a command succeeded and wrote exactly this.
func wantOutput(t *testing.T, r node.Result, stdout string) {
	t.Helper()
	if r.Code != 0 || r.Stdout != stdout {
		t.Errorf("want exit code 0 and output %q: %s", stdout, r)
	}
}

// wantError fails the test unless a command failed and its message has all of these words.
func wantError(t *testing.T, r node.Result, words ...string) {
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
