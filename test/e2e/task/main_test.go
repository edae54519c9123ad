//go:build e2e

// Package task tests what a user can do with ctr and one container after the other, under any runtime: E2E_RUNTIME names it.
// What holds for every runtime is tested here, so that the suite itself can be checked against runc.
package task

import (
	"testing"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

func TestMain(m *testing.M) { node.Main(m) }
