//go:build e2e

package node

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

const cgroupRoot = "/sys/fs/cgroup"

// MemoryCgroup makes a cgroup, of version 2, whose processes get so many bytes of memory, as the kubelet makes one for a pod. It
// goes when the test ends; what is in there by then must not be. It returns the directory; name is the cgroup's path.
func MemoryCgroup(t *testing.T, name string, bytes int64) (dir string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(cgroupRoot, "cgroup.subtree_control"), []byte("+memory"), 0o644); err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(cgroupRoot, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "memory.max"), []byte(strconv.FormatInt(bytes, 10)), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}
