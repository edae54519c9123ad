// Package jail is what holds a VMM that its guest has taken over. Start, in the
// shim, makes the process; Enter, the first thing that the VMM does, closes the
// door behind it. There is no jail with a part missing: what this kernel cannot
// do is an error that names it.
//
// What Start gives the process, which has it from its first instruction on:
//
//   - a user and a group id that no other process has, no other groups;
//   - no descriptor but those that it is given;
//   - namespaces of its own: mount, pid, ipc, uts, cgroup and an empty network;
//   - the cgroup that the caller chooses, best one that keeps it from devices;
//   - no-new-privileges, an empty capability bounding set, and secure bits, locked,
//     that take the meaning of user 0 away;
//   - the capabilities of the file server, and CAP_SYS_ADMIN for Enter;
//   - SIGKILL when the thread that called Start ends.
//
// What Enter then does, in this order:
//
//  1. resource limits;
//  2. a procfs that shows this process only, mounted nowhere, of which just the
//     descriptor of /proc/self/fd stays: the file server opens through it what it
//     has looked up;
//  3. the host's mounts become read-only, the shared directory becomes the root
//     directory, and all else is unmounted;
//  4. Landlock, where the kernel has it: nothing above the root, no execution;
//  5. all capabilities but those of the file server go, on all threads;
//  6. not dumpable: nobody but the host's root reads its memory.
//
// The filters of system calls come last, when the machine is assembled: see
// package seccomp and cmd/microvm-vmm.
package jail

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Capabilities are those that the VMM keeps, because the file server
// (pkg/vmm/virtio/fs/passthrough) acts on the guest's files as the guest's root
// does, whoever they belong to. Every thread has them: a goroutine of the file
// server runs on any. They reach the shared directory only, as there is nothing
// else in the root, and no device in there can be opened (the mounts are nodev, and
// the shim starts it in a cgroup that denies them); for what descriptors lead to see
// Protect.
var Capabilities = []uintptr{
	unix.CAP_DAC_OVERRIDE, // open, list and change what the sandbox's uid may not
	unix.CAP_CHOWN,        // give a new file to who created it; chown
	unix.CAP_FOWNER,       // chmod, utimes, xattrs, ACLs, sticky directories, O_NOATIME
	unix.CAP_FSETID,       // keep set-id bits of files of other groups
	unix.CAP_MKNOD,        // device nodes in an image or a volume
	unix.CAP_SETFCAP,      // security.capability, as package managers set it
	// setfsuid and setfsgid, in volumes of a pod with a user namespace: a mount that
	// maps ids lets only those make files whose own it maps. The filter has none of
	// the other calls that these are for.
	unix.CAP_SETUID,
	unix.CAP_SETGID,
}

// Limits of the process. What is not here stays as the shim has it: the size of
// files above all, which are the guest's.
const (
	// maxFiles is up to what the limit of descriptors may be: the file server
	// takes its limits from it.
	maxFiles = 1 << 20
	// maxThreads is far above what 32 vCPUs, and requests that block in the
	// host's file systems, take: 16 for the share and for each disk.
	maxThreads = 2048
)

// Inside is what a process has when it is in the jail.
type Inside struct {
	// Root is the root directory, O_PATH.
	Root *os.File
	// ProcSelfFD is a descriptor of /proc/self/fd.
	ProcSelfFD *os.File
	// Missing names what this kernel lacks of what the jail can do without; empty
	// if nothing.
	Missing string
}

// Enter closes the jail around this process, which Start has made. root is the
// mount that becomes its root directory, from Detached. It stays the caller's, and
// is to be closed.
func Enter(root *os.File) (*Inside, error) {
	if err := checkStart(); err != nil {
		return nil, fmt.Errorf("jail: %w", err)
	}
	if err := setLimits(); err != nil {
		return nil, fmt.Errorf("jail: %w", err)
	}
	proc, err := procSelfFD()
	if err != nil {
		return nil, fmt.Errorf("jail: procfs: %w", err)
	}
	inside := &Inside{ProcSelfFD: proc}
	if inside.Root, err = changeRoot(root); err != nil {
		return nil, fmt.Errorf("jail: root directory: %w", err)
	}
	if inside.Missing, err = restrictPaths(inside.Root); err != nil {
		return nil, fmt.Errorf("jail: Landlock: %w", err)
	}
	if err := dropCapabilities(); err != nil {
		return nil, fmt.Errorf("jail: capabilities: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("jail: PR_SET_DUMPABLE: %w", err)
	}
	return inside, nil
}

// checkStart refuses to go on in a process that Start has not made.
func checkStart() error {
	noNewPrivs, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	if err != nil {
		return fmt.Errorf("PR_GET_NO_NEW_PRIVS: %w", err)
	}
	if os.Getuid() == 0 || os.Getgid() == 0 || os.Getpid() != 1 || noNewPrivs != 1 {
		return errors.New("this process was not started for a jail; the shim does that")
	}
	return nil
}

func setLimits() error {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return fmt.Errorf("RLIMIT_NOFILE: %w", err)
	}
	for _, l := range []struct {
		resource int
		name     string
		most     uint64
	}{
		{unix.RLIMIT_CORE, "RLIMIT_CORE", 0},
		{unix.RLIMIT_MSGQUEUE, "RLIMIT_MSGQUEUE", 0},
		{unix.RLIMIT_NPROC, "RLIMIT_NPROC", maxThreads},
		{unix.RLIMIT_NOFILE, "RLIMIT_NOFILE", min(files.Max, maxFiles)},
	} {
		// More than there is would take a capability.
		var now unix.Rlimit
		err := unix.Getrlimit(l.resource, &now)
		if most := min(l.most, now.Max); err == nil {
			err = unix.Setrlimit(l.resource, &unix.Rlimit{Cur: most, Max: most})
		}
		if err != nil {
			return fmt.Errorf("%s: %w", l.name, err)
		}
	}
	return nil
}

const noFlags = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC

// procSelfFD mounts a procfs of this pid namespace nowhere, and opens the
// directory in there. The host's would lead by ".." to all of the host's /proc;
// from this one there is no way but to this process.
func procSelfFD() (*os.File, error) {
	fs, err := unix.Fsopen("proc", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsopen (Linux 5.2): %w", err)
	}
	defer unix.Close(fs)
	// Without /proc/sys, /proc/sysrq-trigger and the like.
	if err := unix.FsconfigSetString(fs, "subset", "pid"); err != nil {
		return nil, fmt.Errorf("option subset=pid (Linux 5.8): %w", err)
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fmt.Errorf("fsconfig: %w", err)
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, noFlags|unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return nil, fmt.Errorf("fsmount: %w", err)
	}
	defer unix.Close(mount) // it goes with the last descriptor of what is in there
	fd, err := unix.Openat(mount, "self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("self/fd: %w", err)
	}
	return os.NewFile(uintptr(fd), "/proc/self/fd"), nil
}

// Detached makes a mount of the directory at path that is mounted nowhere, for
// Enter. What is mounted below the directory, now or later, is in there if the
// directory's mount is shared; nothing that is done to the detached mount is seen
// at path.
func Detached(path string) (*os.File, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return nil, fmt.Errorf("open_tree %s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &unix.MountAttr{
		Attr_set:    noFlags,
		Propagation: unix.MS_SLAVE,
	}); err != nil {
		f.Close()
		return nil, fmt.Errorf("mount_setattr %s: %w", path, err)
	}
	return f, nil
}

// changeRoot makes the mount the root directory and unmounts all else, in the
// mount namespace that is this process's own.
func changeRoot(root *os.File) (*os.File, error) {
	// None of this is to be seen elsewhere. Read-only is for what stays open of the
	// host's: this program, which /proc/self/exe leads to.
	if err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &unix.MountAttr{
		Attr_set:    unix.MOUNT_ATTR_RDONLY,
		Propagation: unix.MS_PRIVATE,
	}); err != nil {
		return nil, fmt.Errorf("mount_setattr (Linux 5.12): make the host's mounts private and read-only: %w", err)
	}
	if err := unix.MoveMount(int(root.Fd()), "", unix.AT_FDCWD, "/", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return nil, fmt.Errorf("move_mount: %w", err)
	}
	if err := unix.Fchdir(int(root.Fd())); err != nil {
		return nil, fmt.Errorf("fchdir: %w", err)
	}
	// The old root is then mounted on top of the new one, see pivot_root(2).
	if err := unix.PivotRoot(".", "."); err != nil {
		return nil, fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return nil, fmt.Errorf("unmount the host's file systems: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return nil, fmt.Errorf("chdir: %w", err)
	}
	fd, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	return os.NewFile(uintptr(fd), "/"), nil
}

// capabilityMask is caps as the kernel's bit mask, in its two halves.
func capabilityMask(caps []uintptr) (mask [2]uint32) {
	for _, c := range caps {
		mask[c/32] |= 1 << (c % 32)
	}
	return mask
}
