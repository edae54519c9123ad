//go:build e2e

package vm

import (
	"fmt"
	"os"
	"testing"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

// The file system of the shims' own directories is full: a start fails and says so, nothing is left of it, and all is well once
// there is room.
func TestFullStateDirectory(t *testing.T) {
	for name, fill := range map[string]string{
		"bytes":  "dd if=/dev/zero of=/run/microvm/ballast bs=64k count=1 status=none",
		"inodes": "i=0; while touch /run/microvm/ballast$i 2>/dev/null; do i=$((i+1)); done",
	} {
		t.Run(name, func(t *testing.T) {
			n := node.WithMounts(t, `
				mkdir -p /run/microvm
				mount -t tmpfs -o size=64k,nr_inodes=32 tmpfs /run/microvm
				`+fill)
			n.Run(t, nil, "true").WantError(t, "no space left on device")
			// Where the containerd of this test sees them.
			dir := fmt.Sprintf("/proc/%d/root/run/microvm", n.ContainerdPid(t))
			left, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range left {
				if err := os.Remove(dir + "/" + f.Name()); err != nil {
					t.Errorf("something is left: %v", err) // a directory with something in it
				}
			}
			n.MustRun(t, nil, "true")
		})
	}
}
