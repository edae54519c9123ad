package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

const (
	// deviceTimeout is how long a device that was just put on the bus may take
	// to appear.
	deviceTimeout = 5 * time.Second
	devicePoll    = 2 * time.Millisecond
	// releaseTimeout is how long a file system that was unmounted, but that some
	// namespace was still in, may keep its disk.
	releaseTimeout = 5 * time.Second
)

// pciAddress is domain:bus:device.function as sysfs names PCI functions.
var pciAddress = regexp.MustCompile(`^[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$`)

// blockPaths are where sysfs shows the block device of a virtio function:
// virtio-blk, and virtio-pmem with its region and namespace of libnvdimm.
var blockPaths = []string{
	"virtio*/block/*",
	"virtio*/ndbus*/region*/namespace*/block/*",
}

// mountStorages mounts what a container was given on devices, in order. After an
// error nothing is mounted.
func mountStorages(sys, root string, storages []*agentproto.Storage) (mountpoints []string, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, unmountStorages(mountpoints))
			mountpoints = nil
		}
	}()
	for _, s := range storages {
		if err := mountStorage(sys, root, s); err != nil {
			return mountpoints, fmt.Errorf("mount %s %s at %s: %w", s.Fstype, strings.Join(s.PciAddresses, ", "), s.Mountpoint, err)
		}
		mountpoints = append(mountpoints, s.Mountpoint)
	}
	return mountpoints, nil
}

func mountStorage(sys, root string, s *agentproto.Storage) error {
	if s.Volume != "" {
		return mountVolume(root, s)
	}
	for _, d := range s.Directories {
		dir, err := makeBelow(root, d.Path, d.Mode)
		if err != nil {
			return err
		}
		dir.Close()
	}
	source, options, err := storageSource(sys, s)
	if err != nil {
		return err
	}
	dir, err := makeBelow(root, s.Mountpoint, 0o711)
	if err != nil {
		return err
	}
	defer dir.Close()
	flags, data := mountOptions(options)
	return mountAt(source, dir, s.Fstype, flags, data)
}

// volumesDir is where volumes in memory are, below Config.Root.
const volumesDir = "volumes"

// makingVolume is held while one is made.
var makingVolume sync.Mutex

// mountVolume makes a part of a volume in memory appear at the mountpoint. The
// containers that have the volume write it: no link in there is followed.
func mountVolume(root string, s *agentproto.Storage) error {
	if s.Volume != filepath.Base(s.Volume) || !filepath.IsLocal(s.Volume) || s.Volume == "." {
		return fmt.Errorf("volume %q: %w", s.Volume, errdefs.ErrInvalidArgument)
	}
	volume := filepath.Join(root, volumesDir, s.Volume)
	part, err := openVolume(root, volume, s)
	if err != nil {
		return fmt.Errorf("volume %s: %w", s.Volume, err)
	}
	for _, d := range s.Directories {
		part.Close()
		if part, err = makeBelow(volume, filepath.Join(volume, d.Path), d.Mode); err != nil {
			return err
		}
	}
	defer part.Close()
	dir, err := makeBelow(root, s.Mountpoint, 0o711)
	if err != nil {
		return err
	}
	defer dir.Close()
	tree, err := unix.OpenTree(int(part.Fd()), "", unix.AT_EMPTY_PATH|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open_tree: %w", err)
	}
	defer unix.Close(tree)
	if err := unix.MoveMount(tree, "", int(dir.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	return nil
}

// openVolume opens the root of a volume, which is mounted if it is not yet.
func openVolume(root, volume string, s *agentproto.Storage) (*os.File, error) {
	makingVolume.Lock()
	defer makingVolume.Unlock()
	dir, err := makeBelow(root, volume, 0o711)
	if err != nil || isMount(dir) {
		return dir, err
	}
	defer dir.Close()
	flags, data := mountOptions(s.Options)
	if err := mountAt(s.Fstype, dir, s.Fstype, flags, data); err != nil {
		return nil, err
	}
	return makeBelow(root, volume, 0o711)
}

// storageSource is what to mount: the first device, with the others as options,
// or nothing but a name where there is none.
func storageSource(sys string, s *agentproto.Storage) (source string, options []string, err error) {
	if len(s.PciAddresses) == 0 {
		if s.Fstype != "overlay" {
			return "", nil, fmt.Errorf("a file system of the type %q needs a device: %w", s.Fstype, errdefs.ErrInvalidArgument)
		}
		return s.Fstype, s.Options, nil
	}
	options = slices.Clone(s.Options)
	for i, address := range s.PciAddresses {
		name, err := awaitDevice(sys, address, "block", blockPaths, deviceTimeout)
		if err != nil {
			return "", nil, err
		}
		if i == 0 {
			source = filepath.Join("/dev", name)
		} else {
			options = append(options, "device="+filepath.Join("/dev", name))
		}
	}
	return source, options, nil
}

// mountAt mounts on a directory that was opened before, wherever its path may
// lead by now.
func mountAt(source string, dir *os.File, fstype string, flags uintptr, data string) error {
	target := fmt.Sprintf("/proc/self/fd/%d", dir.Fd())
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s as %s: %w", source, fstype, err)
	}
	return nil
}

// unmountStorages unmounts in the opposite order. What is still in use is
// unmounted when it no longer is; all that was written by now is on the devices.
func unmountStorages(mountpoints []string) error {
	var errs []error
	for _, m := range slices.Backward(mountpoints) {
		err := syncFS(m)
		if err != nil {
			errs = append(errs, fmt.Errorf("sync %s: %w", m, err))
		}
		err = unix.Unmount(m, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			err = unix.Unmount(m, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", m, err))
		}
	}
	return errors.Join(errs...)
}

// syncFS writes the file system that is mounted at path back.
func syncFS(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Syncfs(fd)
}

// removeDevice has the kernel let go of a virtio function. One that it does not
// know is no error.
func removeDevice(sys, dev, address string, timeout time.Duration) error {
	if !pciAddress.MatchString(address) {
		return fmt.Errorf("invalid PCI address %q: %w", address, errdefs.ErrInvalidArgument)
	}
	function := filepath.Join(sys, "bus/pci/devices", address)
	var errs []error
	for _, path := range blockPaths {
		found, err := filepath.Glob(filepath.Join(function, path))
		if err != nil {
			return err
		}
		for _, disk := range found {
			if err := releaseDisk(filepath.Join(dev, filepath.Base(disk)), timeout); err != nil {
				errs = append(errs, fmt.Errorf("device %s: %w", address, err))
			}
		}
	}
	err := os.WriteFile(filepath.Join(function, "remove"), []byte("1"), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, fmt.Errorf("remove %s from the bus: %w", address, err))
	}
	return errors.Join(errs...)
}

// releaseDisk waits until no file system is on a disk any more, and for what was
// written to it. O_EXCL is what a mounted file system has its device opened with
// (block/bdev.c, bd_may_claim).
func releaseDisk(path string, timeout time.Duration) error {
	var fd int
	for deadline := time.Now().Add(timeout); ; time.Sleep(devicePoll) {
		var err error
		fd, err = unix.Open(path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return &os.PathError{Op: "claim", Path: path, Err: err}
		}
	}
	defer unix.Close(fd)
	if err := unix.Fsync(fd); err != nil {
		return &os.PathError{Op: "sync", Path: path, Err: err}
	}
	return nil
}

// unmountShares unmounts what the kernel has mounted by itself at dir and below: where
// the host has a mount in the shared directory, the guest gets one when it first
// goes there. As long as the guest has it, the host cannot unmount its own.
func unmountShares(dir string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return fmt.Errorf("list the mounts below %s: %w", dir, err)
	}
	var errs []error
	for _, m := range mounts {
		// Takes along what is mounted below; that is EINVAL then.
		err := unix.Unmount(m.Mountpoint, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", m.Mountpoint, err))
		}
	}
	return errors.Join(errs...)
}

// awaitDevice returns the name of the device of a kind that a virtio function
// is; paths are where it may be. One that was put on the bus after boot appears
// after a rescan.
func awaitDevice(sys, address, kind string, paths []string, timeout time.Duration) (string, error) {
	if !pciAddress.MatchString(address) {
		return "", fmt.Errorf("invalid PCI address %q: %w", address, errdefs.ErrInvalidArgument)
	}
	function := filepath.Join(sys, "bus/pci/devices", address)
	if _, err := os.Stat(function); errors.Is(err, os.ErrNotExist) {
		if err := os.WriteFile(filepath.Join(sys, "bus/pci/rescan"), []byte("1"), 0); err != nil {
			return "", fmt.Errorf("rescan the PCI bus: %w", err)
		}
	}
	for deadline := time.Now().Add(timeout); ; time.Sleep(devicePoll) {
		for _, path := range paths {
			found, err := filepath.Glob(filepath.Join(function, path))
			if err != nil {
				return "", err
			}
			if len(found) > 0 {
				return filepath.Base(found[0]), nil
			}
		}
		if time.Now().After(deadline) {
			return "", fmt.Errorf("no %s device at PCI address %s: %w", kind, address, errdefs.ErrNotFound)
		}
	}
}

// makeBelow is makeDir for an absolute path, which has to be below root.
func makeBelow(root, path string, mode uint32) (*os.File, error) {
	rel, err := filepath.Rel(root, path)
	if err != nil || rel == "." || !filepath.IsLocal(rel) {
		return nil, fmt.Errorf("%s is not below %s: %w", path, root, errdefs.ErrInvalidArgument)
	}
	return makeDir(root, rel, mode)
}

// makeDir makes the directory rel below root and opens it; mode is for the last
// element of its path. It follows no symbolic link: on the way there may be a
// file system that a container writes.
func makeDir(root, rel string, mode uint32) (*os.File, error) {
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: root, Err: err}
	}
	names := strings.Split(filepath.Clean(rel), "/")
	for i, name := range names {
		m := uint32(0o711)
		if i == len(names)-1 {
			m = mode & 0o7777
		}
		made := unix.Mkdirat(fd, name, m)
		if made != nil && !errors.Is(made, unix.EEXIST) {
			unix.Close(fd)
			return nil, &os.PathError{Op: "mkdir", Path: filepath.Join(root, rel), Err: made}
		}
		next, err := unix.Openat(fd, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		unix.Close(fd)
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: filepath.Join(root, rel), Err: err}
		}
		if made == nil {
			// Whatever the umask is; and of what was opened, because the name may
			// be that of a link by now.
			if err := unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", next), m); err != nil {
				unix.Close(next)
				return nil, &os.PathError{Op: "chmod", Path: filepath.Join(root, rel), Err: err}
			}
		}
		fd = next
	}
	return os.NewFile(uintptr(fd), filepath.Join(root, rel)), nil
}

// mountFlags are the options of mount(8) that are flags of mount(2).
var mountFlags = map[string]struct {
	set   bool
	flags uintptr
}{
	"defaults":      {true, 0},
	"ro":            {true, unix.MS_RDONLY},
	"rw":            {false, unix.MS_RDONLY},
	"nosuid":        {true, unix.MS_NOSUID},
	"suid":          {false, unix.MS_NOSUID},
	"nodev":         {true, unix.MS_NODEV},
	"dev":           {false, unix.MS_NODEV},
	"noexec":        {true, unix.MS_NOEXEC},
	"exec":          {false, unix.MS_NOEXEC},
	"sync":          {true, unix.MS_SYNCHRONOUS},
	"async":         {false, unix.MS_SYNCHRONOUS},
	"dirsync":       {true, unix.MS_DIRSYNC},
	"noatime":       {true, unix.MS_NOATIME},
	"atime":         {false, unix.MS_NOATIME},
	"nodiratime":    {true, unix.MS_NODIRATIME},
	"diratime":      {false, unix.MS_NODIRATIME},
	"relatime":      {true, unix.MS_RELATIME},
	"norelatime":    {false, unix.MS_RELATIME},
	"strictatime":   {true, unix.MS_STRICTATIME},
	"nostrictatime": {false, unix.MS_STRICTATIME},
	"nosymfollow":   {true, unix.MS_NOSYMFOLLOW},
	"symfollow":     {false, unix.MS_NOSYMFOLLOW},
}

// mountOptions divides options into the flags of mount(2) and the rest, which
// is the file system's.
func mountOptions(options []string) (flags uintptr, data string) {
	var rest []string
	for _, o := range options {
		f, ok := mountFlags[o]
		switch {
		case !ok:
			rest = append(rest, o)
		case f.set:
			flags |= f.flags
		default:
			flags &^= f.flags
		}
	}
	return flags, strings.Join(rest, ",")
}
