// Package jailtest is for tests of the jail.
package jailtest

import (
	"fmt"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

const inNamespace = "MICROVM_TEST_MOUNT_NAMESPACE"

// EnterNamespace returns in a mount namespace of the process's own, from which nothing
// propagates: it executes the program again there. It is for the beginning of
// TestMain, and ends the process where that cannot be had, as without root's
// rights.
func EnterNamespace() {
	if os.Getenv(inNamespace) != "" {
		return
	}
	runtime.LockOSThread()
	err := unix.Unshare(unix.CLONE_NEWNS)
	if err == nil {
		err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	}
	if err == nil {
		err = unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), inNamespace+"=1"))
	}
	fmt.Fprintln(os.Stderr, "cannot run the tests (they need root):", err)
	os.Exit(1)
}

// TempDir is a file system with devices, which a temporary directory may not be.
func TempDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	return dir
}
