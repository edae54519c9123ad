package main

import (
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestNative runs the checks on the file system of the temporary directory,
// which shows that they are right. It needs root.
func TestNative(t *testing.T) {
	var out strings.Builder
	sum, err := runAll(&out, os.TempDir(), 100_000, func(string) bool { return true })
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

// What ends a check ends it also when it happens with other ids.
func TestEndAsAnother(t *testing.T) {
	for name, end := range map[string]func(*T){
		"skipped": func(t *T) { t.optional("x", unix.EOPNOTSUPP) },
		"failed":  func(t *T) { t.must(unix.EIO) },
	} {
		c := &T{}
		done, after := make(chan struct{}), false
		go func() {
			defer close(done)
			c.as(0, 0, nil, func() { end(c) })
			after = true
		}()
		<-done
		if after || (name == "skipped") != (c.skipped != "") || (name == "failed") != (len(c.failures) == 1) {
			t.Errorf("%s: it went on %v, %+v", name, after, c)
		}
	}
}
