//go:build race

package seccomp

import "golang.org/x/sys/unix"

// raceRules is what a program with the race detector calls on top: its threads are
// made by the C library, and the detector sees to its own memory.
func raceRules() []Rule {
	return Calls(unix.SYS_CLONE3, unix.SYS_SET_ROBUST_LIST, unix.SYS_RSEQ, unix.SYS_MPROTECT)
}
