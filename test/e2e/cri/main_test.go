//go:build e2e

// Package cri tests what a pod does, through CRI and crictl, under any runtime handler: E2E_RUNTIME_HANDLER names it. What
// holds for every runtime is tested here, so that the suite itself can be checked against runc.
package cri

import (
	"os"
	"testing"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 3 {
		for name, run := range map[string]func(path string) int{"watch": watch, "listen": listen, "dial": dial} {
			if os.Args[1] == name {
				os.Exit(run(os.Args[2]))
			}
		}
	}
	node.MainPods(m)
}
