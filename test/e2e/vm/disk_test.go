//go:build e2e

package vm

import (
	"testing"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

// A layer of erofs is persistent memory of the guest, its second after the guest's own image, and the writable layer is a
// disk.
func TestErofsLayers(t *testing.T) {
	n := node.WithDisks(t, "erofs")
	n.MustRun(t, []string{"--snapshotter", "erofs"}, "ls", "/sys/block").WantOutput(t, "pmem0\npmem1\nvda\n")
}
