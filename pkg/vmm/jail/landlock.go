package jail

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// landlockRights are the rights that Landlock knows, by its ABI version: those of
// version 1 are the first 13.
func landlockRights(abi int) uint64 {
	rights := uint64(unix.LANDLOCK_ACCESS_FS_MAKE_SYM)<<1 - 1
	for _, since := range []struct {
		abi   int
		right uint64
	}{
		{2, unix.LANDLOCK_ACCESS_FS_REFER},
		{3, unix.LANDLOCK_ACCESS_FS_TRUNCATE},
		{5, unix.LANDLOCK_ACCESS_FS_IOCTL_DEV},
	} {
		if abi >= since.abi {
			rights |= since.right
		}
	}
	return rights
}

// landlockABI is the version of the kernel's Landlock, 0 if it has none.
func landlockABI() (int, error) {
	abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	switch {
	case errno == unix.ENOSYS || errno == unix.EOPNOTSUPP: // not built, not enabled
		return 0, nil
	case errno != 0:
		return 0, fmt.Errorf("version: %w", errno)
	}
	return int(abi), nil
}

// restrictPaths denies everything that is not below the root, should a descriptor
// lead out of it, and within it the execution of files and ioctls of devices. The
// root is the wall; this is a second one. It says what the kernel lacks for it.
func restrictPaths(root *os.File) (missing string, err error) {
	abi, err := landlockABI()
	if err != nil {
		return "", err
	}
	if abi < 2 { // would forbid renames between directories
		return "Landlock of ABI 2 (Linux 5.19, CONFIG_SECURITY_LANDLOCK and lsm=landlock)", nil
	}
	rights := landlockRights(abi)
	// The size of the structure in ABI 1: what is handled besides files is left
	// to the filter of system calls.
	const size = 8
	ruleset, err := createRuleset(&unix.LandlockRulesetAttr{Access_fs: rights}, size)
	if err != nil {
		return "", err
	}
	defer unix.Close(ruleset)
	within := rights &^ (unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_IOCTL_DEV)
	if err := addRule(ruleset, &unix.LandlockPathBeneathAttr{Allowed_access: within, Parent_fd: int32(root.Fd())}); err != nil {
		return "", err
	}
	return "", restrictSelf(ruleset)
}
