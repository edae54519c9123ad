// Package guest makes a kernel that has just booted into a machine in which
// containers can run, and turns it off again. It is for the first process.
package guest

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	cgroupRoot = "/sys/fs/cgroup"

	shm      = "/dev/shm"
	shmFlags = unix.MS_NOSUID | unix.MS_NODEV
)

// mounts are the file systems of the guest, in order. The root file system is
// read-only and has only the mount points at the first level. Flags and options
// are those of systemd (src/shared/mount-setup.c), which containers expect to
// find below their own.
var mounts = []struct {
	target, fstype string
	flags          uintptr
	data           string
}{
	{"/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
	// 5 is the group tty of every distribution; runc's default too.
	{"/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666"},
	{shm, "tmpfs", shmFlags, "mode=1777"},
	{"/dev/mqueue", "mqueue", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
	{"/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	// nsdelegate: a cgroup namespace is a border for its processes.
	// memory_recursiveprot: a container's memory.min and .low hold for cgroups
	// it makes itself.
	{cgroupRoot, "cgroup2", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, "nsdelegate,memory_recursiveprot"},
}

// sysctls are the kernel parameters of a fresh guest: those that nodes are
// usually given, since a container expects a node. What a pod itself asks for is
// set over them.
var sysctls = []struct{ name, value string }{
	// A guest without its first process ends at once; the VMM is told.
	{"kernel.panic", "-1"},
	// The default is 32768 on small machines, shared by all containers.
	{"kernel.pid_max", "4194304"},
	// Hard limits of open files which come with a specification made on a
	// node with LimitNOFILE=infinity. It is the kernel's largest.
	{"fs.nr_open", "1073741816"},
	// The defaults of 128 instances and of watches by memory size are for a
	// desktop user, who root in all containers is not.
	{"fs.inotify.max_user_instances", "8192"},
	{"fs.inotify.max_user_watches", "1048576"},
	// Databases and JVMs ask the node's administrator for more than 65530.
	{"vm.max_map_count", "1048576"},
	// What the kernel takes from the size of memory at its start: with 512 MiB
	// some 4,000 threads, 50,000 files, 110,000 watches and 4,096 connections,
	// which stay when the guest grows. All but the last count for the memory of
	// the container that has them.
	{"kernel.threads-max", "4194304"},
	{"fs.file-max", "9223372036854775807"},
	{"fs.epoll.max_user_watches", "4194304"},
	{"net.netfilter.nf_conntrack_max", "65536"},
	// In a sticky directory, /tmp or a volume, one user's links, files and FIFOs
	// are not followed or opened for another who meant to create a file. The
	// kernel's own are 0; these are Debian's (procps), systemd's but for a 1 for
	// regular files.
	{"fs.protected_symlinks", "1"},
	{"fs.protected_hardlinks", "1"},
	{"fs.protected_regular", "2"},
	{"fs.protected_fifos", "1"},
}

// rlimits are the limits that a container has whose specification names none:
// those of a containerd run by systemd.
var rlimits = []struct {
	resource int
	limit    uint64
}{
	{unix.RLIMIT_NOFILE, 1048576},
	{unix.RLIMIT_NPROC, unix.RLIM_INFINITY},
	{unix.RLIMIT_CORE, unix.RLIM_INFINITY},
	// The kernel's is half of the threads that it would have had, systemd's the
	// same for a node of 32 GiB.
	{unix.RLIMIT_SIGPENDING, 131072},
}

// Setup makes the file systems, limits and the loopback of a guest. What a
// container could do without is only logged when it fails.
func Setup(log *slog.Logger) error {
	syscall.Umask(0o022)
	for _, m := range mounts {
		if err := mount(m.target, m.fstype, m.flags, m.data); err != nil {
			return err
		}
	}
	// So that a mount can be shared with a container which asks for it
	// (rshared, rslave): the kernel's own root is private.
	if err := unix.Mount("", "/", "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make mounts shared: %w", err)
	}
	if err := enableControllers(log); err != nil {
		return err
	}
	for _, s := range sysctls {
		if err := WriteSysctl(s.name, s.value); err != nil {
			log.Warn("kernel parameter not set", "error", err)
		}
	}
	for _, l := range rlimits {
		// Not unix.Prlimit: package syscall must know of a new limit of files,
		// or it gives children the old one.
		if err := syscall.Setrlimit(l.resource, &syscall.Rlimit{Cur: l.limit, Max: l.limit}); err != nil {
			log.Warn("limit not set", "resource", l.resource, "error", err)
		}
	}
	return loopbackUp()
}

func mount(target, fstype string, flags uintptr, data string) error {
	// Those on the root file system are there; it cannot be written.
	if err := os.Mkdir(target, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("mount %s: %w", fstype, err)
	}
	err := unix.Mount(fstype, target, fstype, flags, data)
	// The kernel itself has mounted /dev (CONFIG_DEVTMPFS_MOUNT).
	if err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("mount %s on %s: %w", fstype, target, err)
	}
	return nil
}

// ResizeShm sets the size of /dev/shm, in bytes; by default it is half of the
// memory (tmpfs(5)).
func ResizeShm(size uint64) error {
	if err := unix.Mount("", shm, "", unix.MS_REMOUNT|shmFlags, fmt.Sprintf("size=%d", size)); err != nil {
		return fmt.Errorf("set the size of %s to %d: %w", shm, size, err)
	}
	return nil
}

// enableControllers lets every controller of the kernel be used below the root
// cgroup.
func enableControllers(log *slog.Logger) error {
	list, err := os.ReadFile(filepath.Join(cgroupRoot, "cgroup.controllers"))
	if err != nil {
		return fmt.Errorf("list the cgroup controllers: %w", err)
	}
	for c := range strings.FieldsSeq(string(list)) {
		if err := os.WriteFile(filepath.Join(cgroupRoot, "cgroup.subtree_control"), []byte("+"+c), 0); err != nil {
			log.Warn("cgroup controller not enabled", "controller", c, "error", err)
		}
	}
	return nil
}

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find the loopback: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring up the loopback: %w", err)
	}
	return nil
}
