//go:build e2e

// Package vm tests what only a runtime with virtual machines does, and how it ends when one of its parts does.
package vm

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

func TestMain(m *testing.M) { node.Main(m) }

const (
	vmm  = "microvm-vmm"
	shim = "containerd-shim-microvm-v2"
)

// hostKernel is the release of the kernel the tests run on.
func hostKernel(t *testing.T) string {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	return unix.ByteSliceToString(u.Release[:])
}

// only returns the one process of a program.
func only(t *testing.T, n *node.Node, program string) (pid int) {
	t.Helper()
	found := n.Processes(program)
	if len(found) != 1 {
		t.Fatalf("want one %s: %v", program, found)
	}
	for pid = range found {
	}
	return pid
}

// bootID tells virtual machines apart: each boot of a kernel has its own.
func bootID(t *testing.T, n *node.Node, id string) string {
	t.Helper()
	return n.MustExec(t, id, nil, "cat", "/proc/sys/kernel/random/boot_id").Stdout
}

func hostBootID(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// wantLog fails the test unless containerd's log since an offset has all these words.
func wantLog(t *testing.T, n *node.Node, from int64, words ...string) {
	t.Helper()
	for _, w := range words {
		if !node.Wait(func() bool { return strings.Contains(n.Log(from), w) }) {
			t.Errorf("containerd's log lacks %q", w)
		}
	}
}

func annotation(name, value string) []string {
	return []string{"--annotation", fmt.Sprint(name, "=", value)}
}
