//go:build e2e

package chaos

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

// The file system is full where containerd, or the shims, keep what they know of the containers that run. One more cannot be
// started, and the error says why; those that run can be ended; of neither is anything left, and all is well once there is room.
func TestFullStateDirectory(t *testing.T) {
	first := nodeFor(t)
	for _, row := range []struct{ name, dir string }{
		{"containerd", "$STATE/state"},
		{"shim", "/run/microvm"},
	} {
		if row.name == "shim" && !isVM(first) {
			continue
		}
		t.Run(row.name, func(t *testing.T) {
			var seen []string
			defer func() { promise(t, seen...) }()
			t.Cleanup(func() { os.Remove("/run/microvm") }) // it is made as a mount point; shims that are in there keep it
			// Without -n, mount(8) makes a directory of its own in /run.
			n := node.WithMounts(t, fmt.Sprintf("mkdir -p %[1]s; mount -n -t tmpfs -o size=1m,nr_inodes=200 tmpfs %[1]s", row.dir))
			n.Runtime = first.Runtime
			n.Import(t, node.Box, "overlayfs")
			run := func() node.Result {
				id := n.ID(t)
				n.RemoveIfFailed(t, id)
				return n.Ctr(t, n.RunArgs(node.Box, id, []string{"--rm"}, "echo", "hello")...)
			}
			run().WantOutput(t, "hello\n")
			dir := os.Expand(row.dir, func(string) string { return n.Path("") })
			dir = fmt.Sprintf("/proc/%d/root%s", n.ContainerdPid(t), dir) // where containerd sees it
			usual := files(t, dir)

			before := parts(first)
			id := n.DetachImage(t, node.Box, nil, "sleep", "1000")
			ballast := fill(t, dir)
			run().WantError(t, "no space left on device")
			seen = append(seen, "a start says no space left on device")
			if isVM(first) { // runc itself writes to the bundle
				n.MustExec(t, id, nil, "true")
				seen = append(seen, "exec works")
			}
			n.MustCtr(t, "tasks", "delete", "--force", id)
			n.MustCtr(t, "containers", "rm", id)
			untilEnded(t, first, before)
			seen = append(seen, "ctr task delete --force while it is full")
			if err := os.RemoveAll(ballast); err != nil {
				t.Fatal(err)
			}
			if left := files(t, dir); !slices.Equal(left, usual) {
				t.Errorf("there was %q, and is now %q", usual, left)
			}
			run().WantOutput(t, "hello\n")
			seen = append(seen, "nothing is left", "a start works when there is room again")
		})
	}
}

// fill leaves neither a byte nor an inode free in a directory's file system. All is in the directory that it returns.
func fill(t *testing.T, dir string) (ballast string) {
	t.Helper()
	ballast = filepath.Join(dir, "ballast")
	if err := os.Mkdir(ballast, 0o700); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(ballast, "bytes"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for err == nil {
		_, err = f.Write(make([]byte, os.Getpagesize()))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	for i := 0; ; i++ {
		switch err := os.Mkdir(filepath.Join(ballast, fmt.Sprint(i)), 0o700); {
		case errors.Is(err, unix.ENOSPC):
			return ballast
		case err != nil:
			t.Fatal(err)
		}
	}
}

// files are the paths of all that is in a directory.
func files(t *testing.T, dir string) (paths []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		paths = append(paths, path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return paths
}
