package jail

import (
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// namespaces that a VMM has for itself.
const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWNET

// Bits of PR_SET_SECUREBITS, include/uapi/linux/securebits.h. They are for the
// process that follows: user 0 has no rights there, and a change of the user id
// takes or gives none.
const secureBits = 1<<0 | 1<<1 | // SECBIT_NOROOT, locked
	1<<2 | 1<<3 // SECBIT_NO_SETUID_FIXUP, locked

// Start starts cmd, whose program is to call Enter, with the user and group id, in
// the cgroup (of version 2) that this is the directory of, or in the caller's if it
// is nil.
//
// The calling goroutine must be locked to its thread and must never unlock it: the
// thread gives up what the process is not to have, and is of no use for anything
// but waiting for it. The process is killed when the thread ends. All descriptors of
// the caller's are close-on-exec from then on.
func Start(cmd *exec.Cmd, id uint32, cgroup *os.File) error {
	if id == 0 || id == ^uint32(0) {
		return fmt.Errorf("jail: %d is no user id for it", id)
	}
	runtime.LockOSThread() // once more, for those who forget
	capabilities := append([]uintptr{unix.CAP_SYS_ADMIN}, Capabilities...)
	if err := limitThread(capabilities); err != nil {
		return fmt.Errorf("jail: %w", err)
	}
	// What the shim itself was started with is nothing for a jail. (os/exec gives the
	// process copies of what cmd has.)
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("jail: close_range (Linux 5.11): %w", err)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  namespaces,
		Credential:  &syscall.Credential{Uid: id, Gid: id}, // and no groups
		AmbientCaps: capabilities,
		Pdeathsig:   syscall.SIGKILL,
	}
	if cgroup != nil {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(cgroup.Fd())
	}
	return cmd.Start()
}

// limitThread takes from this thread what no process that it starts is to get
// back by any means. What it can do itself is not changed.
func limitThread(capabilities []uintptr) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_NO_NEW_PRIVS: %w", err)
	}
	// What is inheritable can be made ambient with an empty bounding set too.
	if err := LimitCapabilities(capabilities, nil); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_SECUREBITS, secureBits, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_SECUREBITS: %w", err)
	}
	return nil
}

// LimitCapabilities sets this thread's inheritable capabilities, and takes all but
// those of bounding from its bounding set. What it can do itself is not changed,
// but what it starts, and their descendants, get no other ones. The caller is locked
// to its thread, whose bounding set cannot grow again.
func LimitCapabilities(inheritable, bounding []uintptr) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	for i, half := range capabilityMask(inheritable) {
		if missing := half &^ data[i].Permitted; missing != 0 {
			return fmt.Errorf("the shim lacks capabilities that the jail is made with: bits %#x of %d to %d", missing, 32*i, 32*i+31)
		}
		data[i].Inheritable = half
	}
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	for c := uintptr(0); ; c++ {
		if slices.Contains(bounding, c) {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) && c > unix.CAP_SETFCAP {
			return nil // the kernel knows no more
		}
		if err != nil {
			return fmt.Errorf("PR_CAPBSET_DROP %d: %w", c, err)
		}
	}
}
