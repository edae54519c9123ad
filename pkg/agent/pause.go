package agent

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"

	"golang.org/x/sys/unix"
)

// PauseName is the name, argv[0], under which the agent's program runs Pause.
// Processes of a pod that shares its pids find it as their first one, where
// they find the pause image's elsewhere.
const PauseName = "/pause"

const (
	// pauseBegin is the argument of a first process that has yet to give up what
	// it has, pauseReady what one says that has done so.
	pauseBegin = "begin"
	pauseReady = "ready"
	// pauseID is the pause image's user and group.
	pauseID = 65535
	// pauseRoot is where its root directory is made. It is seen there by nobody.
	pauseRoot = "/mnt"
)

// Pause is the first process of the namespaces that a pod's containers share:
// it adopts orphans. It does not return, and no signal of the pod's ends it.
//
// A container with CAP_SYS_PTRACE may go wherever the process may, and may do
// with it what the process may. So that this is nothing, it has first given up
// all it had, and was executed again: capabilities are a thread's, and Go's
// runtime has more of these before any code of ours runs.
func Pause() {
	var err error
	if len(os.Args) > 1 {
		err = confine()
	} else {
		err = getReady()
	}
	if err != nil {
		fmt.Fprint(os.Stderr, err)
		os.Exit(1)
	}
	for {
		unix.Pause()
	}
}

// confine makes this a process in a root directory of its own, in which there is
// nothing but the program, of a user without capabilities, and executes the
// program. It returns only with an error.
func confine() error {
	runtime.LockOSThread()
	program, err := os.Executable()
	if err != nil {
		return err
	}
	if err := changeRoot(program); err != nil {
		return err
	}
	// None is inheritable, so exec leaves none.
	for c := uintptr(0); ; c++ {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) && c > unix.CAP_SETFCAP {
			break // the kernel knows no more
		}
		if err != nil {
			return fmt.Errorf("PR_CAPBSET_DROP %d: %w", c, err)
		}
	}
	if err := unix.Setgroups(nil); err != nil {
		return fmt.Errorf("setgroups: %w", err)
	}
	// EINVAL is that of a user namespace which has no such id. It stays the root
	// of that, of whom the containers have more.
	if err := unix.Setresgid(pauseID, pauseID, pauseID); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("setresgid: %w", err)
	}
	if err := unix.Setresuid(pauseID, pauseID, pauseID); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("setresuid: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_NO_NEW_PRIVS: %w", err)
	}
	return &os.PathError{Op: "exec", Path: PauseName, Err: unix.Exec(PauseName, []string{PauseName}, os.Environ())}
}

// changeRoot makes the root of this mount namespace one that has only the
// program, as PauseName, and that is read-only.
func changeRoot(program string) error {
	// What is done here is not to be done to the agent's mounts.
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("tmpfs", pauseRoot, "tmpfs", flags, "mode=0755"); err != nil {
		return fmt.Errorf("mount a root directory: %w", err)
	}
	if err := os.WriteFile(pauseRoot+PauseName, nil, 0o600); err != nil {
		return err
	}
	if err := unix.Mount(program, pauseRoot+PauseName, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s: %w", program, err)
	}
	if err := unix.Mount("", pauseRoot, "", unix.MS_REMOUNT|unix.MS_RDONLY|flags, ""); err != nil {
		return fmt.Errorf("make the root directory read-only: %w", err)
	}
	if err := os.Chdir(pauseRoot); err != nil {
		return err
	}
	// The old root ends on top of the new one, see pivot_root(2).
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the old root: %w", err)
	}
	return os.Chdir("/")
}

// getReady is what is left to do for a process that has given up all it had.
func getReady() error {
	// SIGCHLD among them: the kernel itself reaps for a parent who ignores it,
	// see wait(2).
	signal.Ignore()
	// Who has its user and no capability cannot trace it, which would be a way
	// round a seccomp filter: it has none.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_DUMPABLE: %w", err)
	}
	if _, err := os.Stdout.WriteString(pauseReady); err != nil {
		return err
	}
	// The agent reads until the end.
	return errors.Join(os.Stdin.Close(), os.Stdout.Close(), os.Stderr.Close())
}
