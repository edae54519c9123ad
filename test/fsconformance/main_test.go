package main

import (
	"os"
	"strings"
	"testing"
)

// TestNative runs the checks on the file system of the temporary directory,
// which shows that they are right. It needs root.
func TestNative(t *testing.T) {
	var out strings.Builder
	sum, err := runAll(&out, os.TempDir(), func(string) bool { return true })
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(out.String()) {
		if !strings.HasPrefix(line, "PASS") {
			t.Log(line)
		}
	}
	if sum.failed > 0 || sum.passed == 0 {
		t.Errorf("%d passed, %d failed", sum.passed, sum.failed)
	}
}
