package passthrough

import (
	"errors"
	"strconv"

	"golang.org/x/sys/unix"
)

// resolve is how names are looked up: see the package's documentation.
const resolve = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS

// statMask is what is asked of statx: Linux 6.8 knows mount ids that are never
// used again, older ones ignore the bit.
const statMask = unix.STATX_BASIC_STATS | unix.STATX_BTIME | unix.STATX_MNT_ID | unix.STATX_MNT_ID_UNIQUE

// hostErrno is the errno the guest gets for an error of the host's. ENOSYS
// would make the guest's kernel never send the operation again, so it must not
// come from a system call that one of the host's file systems lacks. EMFILE
// would tell a process of the guest that it has too many files.
func hostErrno(err error) unix.Errno {
	if err == nil {
		return 0
	}
	var errno unix.Errno
	if !errors.As(err, &errno) {
		return unix.EIO
	}
	switch errno {
	case unix.ENOSYS:
		return unix.EOPNOTSUPP
	case unix.EMFILE:
		return unix.ENFILE
	}
	return errno
}

// retry calls f until it is not interrupted: the signals that reach this
// process are the Go runtime's and mean nothing to the guest.
func retry(f func() error) unix.Errno {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return hostErrno(err)
		}
	}
}

// openat2 opens name, one component, in dir.
func openat2(dir int, name string, flags uint64, mode uint64) (fd int, errno unix.Errno) {
	how := unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Mode: mode, Resolve: resolve}
	errno = retry(func() (err error) {
		fd, err = unix.Openat2(dir, name, &how)
		return err
	})
	return fd, errno
}

// openChild returns an O_PATH descriptor of what name is in dir.
func openChild(dir int, name string) (fd int, errno unix.Errno) {
	return openat2(dir, name, unix.O_PATH|unix.O_NOFOLLOW, 0)
}

// statFD describes what fd is open on, O_PATH or not.
func statFD(fd int, st *unix.Statx_t) unix.Errno {
	return retry(func() error { return unix.Statx(fd, "", unix.AT_EMPTY_PATH, statMask, st) })
}

// statChild describes what name is in dir.
func statChild(dir int, name string, st *unix.Statx_t) unix.Errno {
	return retry(func() error {
		return unix.Statx(dir, name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, statMask, st)
	})
}

// closeFD closes a descriptor that nobody waits for the result of. Linux has
// closed it whatever close returns.
func closeFD(fd int) { _ = unix.Close(fd) }

// procDir is a descriptor of /proc/self/fd: the way from an O_PATH descriptor
// to what needs a path or an open file.
type procDir int

// open opens what fd, the caller's O_PATH or other descriptor, is open on. The
// caller has checked that it is a regular file or directory, unless flags have
// O_PATH.
func (p procDir) open(fd, flags int) (opened int, errno unix.Errno) {
	errno = retry(func() (err error) {
		// O_NONBLOCK: a lease of the host's must not block a worker, see untilFree.
		opened, err = unix.Openat(int(p), strconv.Itoa(fd), flags|unix.O_CLOEXEC|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
		return err
	})
	return opened, errno
}

// chmod changes the mode of what fd is open on.
func (p procDir) chmod(fd int, mode uint32) unix.Errno {
	return retry(func() error { return unix.Fchmodat(int(p), strconv.Itoa(fd), mode&0o7777, 0) })
}

// link makes name in dir another name of what fd is open on. Unlike
// AT_EMPTY_PATH this needs no CAP_DAC_READ_SEARCH.
func (p procDir) link(fd, dir int, name string) unix.Errno {
	return retry(func() error {
		return unix.Linkat(int(p), strconv.Itoa(fd), dir, name, unix.AT_SYMLINK_FOLLOW)
	})
}
