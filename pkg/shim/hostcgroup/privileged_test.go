//go:build privileged

package hostcgroup

import (
	"errors"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/internal/fdtest"
)

// The real file systems of the host, whichever version they are.
func TestEnterAndLeave(t *testing.T) {
	before, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	path := "/microvm-test-" + strconv.Itoa(os.Getpid()) + "/c1"
	g, err := New(path)
	if err != nil {
		t.Fatal(err)
	}
	missing := g.Owned(nil)
	for _, h := range g.hierarchies {
		for _, dir := range steps(h.mountpoint, path) {
			if !slices.Contains(missing, dir) {
				t.Errorf("%s is not among the missing directories %v", dir, missing)
			}
		}
	}
	if err := g.Enter(); err != nil {
		t.Error(err)
	}
	inside, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(inside), ":"+path+"\n"); n != len(g.hierarchies) {
		t.Errorf("in %d of %d hierarchies:\n%s", n, len(g.hierarchies), inside)
	}
	fdtest.WithoutRoom(t, func() {
		if err := g.Leave(); err != nil {
			t.Error(err)
		}
	})
	after, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	if string(after) != string(before) {
		t.Errorf("before\n%s\nafter\n%s", before, after)
	}
	removeOwned(t, missing)
}

// removeOwned removes what Owned has named, all of it.
func removeOwned(t *testing.T, dirs []string) {
	t.Helper()
	if err := Remove(dirs); err != nil {
		t.Error(err)
	}
	for _, dir := range dirs {
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", dir, err)
		}
	}
}
