// Package share builds the directory tree that a sandbox's guest sees: for
// each container its root file system and what is bound into it. The tree is
// mounted in the shim's own mount namespace, so that nothing of it stays on
// the host however the shim ends.
//
//	<container id>/rootfs
//	<container id>/mounts/<n>
//	.volumes/<k>
//
// What is bound is a volume, to which the containers' mounts lead as symbolic
// links: those that bind the same have the same one.
//
// The directories of the tree itself are read-only for the guest. All that it may
// write to appears at once and finished: no mount is made by way of a path in there,
// where a guest can put a link.
//
// The VMM has a copy of the tree for its root directory, in a mount namespace of
// its own that follows this one: what is mounted here appears there, and goes from
// there. It gets no device and no program from it: every mount is nodev, nosuid
// and noexec before it appears.
package share

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/shim/guestspec"
	"github.com/microvm-runtime/microvm/pkg/vmm/jail"
)

// Tree is a mounted tree. Its methods may be called concurrently.
type Tree struct {
	// base is a private mount that holds the mount points of the tree and of what
	// is prepared for it.
	base string
	path string // of the tree
	host *os.File

	mu sync.Mutex
	// writable is the same file system as the one mounted at path, but not
	// read-only and not reachable by any path.
	writable   *os.File
	containers map[string]*content
	volumes    map[string]*volume // by key
	nextVolume int
}

// content is what there is of a container, relative to the tree's path and in
// the order it was made.
type content struct {
	points  []point
	mounts  []string
	volumes []*volume
}

// point is a directory, or a file to mount a file on, or a link.
type point struct {
	name string
	file bool
}

// Rootfs says where a container's root file system comes from.
type Rootfs struct {
	// Mounts are the snapshotter's.
	Mounts []mount.Mount
	// Path is used when there are none: a directory of the host.
	Path string
	// InGuest says that the guest mounts it from disks.
	InGuest bool
}

// restricted is what no mount in the tree is without.
const restricted = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC

// New mounts a tree below path, which is made. host is the mount namespace in
// which sources are looked up: mounts that are made there later need not
// appear in the shim's own. It stays the caller's; nil is the caller's own
// namespace.
func New(path string, host *os.File) (_ *Tree, err error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("shared directory: %w", err)
	}
	defer func() {
		if err != nil {
			unix.Unmount(path, unix.MNT_DETACH)
		}
	}()
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	base := path
	if err := unix.Mount("microvm", base, "tmpfs", flags, "mode=0700,size=16k,nr_inodes=4"); err != nil {
		return nil, fmt.Errorf("mount %s: %w", base, err)
	}
	if err := unix.Mount("", base, "", unix.MS_PRIVATE, ""); err != nil {
		return nil, fmt.Errorf("make %s private: %w", base, err)
	}
	path = filepath.Join(base, "tree")
	for _, dir := range []string{path, filepath.Join(base, stage), filepath.Join(base, layers)} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return nil, fmt.Errorf("shared directory: %w", err)
		}
	}
	// It holds directories and mount points only.
	if err := unix.Mount("microvm", path, "tmpfs", flags, "mode=0755,size=4m,nr_inodes=16k"); err != nil {
		return nil, fmt.Errorf("mount shared directory %s: %w", path, err)
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("clone shared directory: %w", err)
	}
	writable := os.NewFile(uintptr(fd), path)
	if err := unix.Mkdirat(fd, volumesName, 0o755); err != nil {
		writable.Close()
		return nil, fmt.Errorf("shared directory: %w", err)
	}
	err = unix.MountSetattr(unix.AT_FDCWD, path, 0, &unix.MountAttr{
		Attr_set:    unix.MOUNT_ATTR_RDONLY,
		Propagation: unix.MS_SHARED, // with the VMM's copy
	})
	if err != nil {
		writable.Close()
		return nil, fmt.Errorf("make shared directory read-only and shared: %w", err)
	}
	return &Tree{
		base: base, path: path, host: host, writable: writable,
		containers: map[string]*content{}, volumes: map[string]*volume{},
	}, nil
}

const (
	// stage is where file systems are mounted before they appear in the tree.
	stage = "stage"
	// layers is where the parts are that a root file system is made of on the host,
	// which no guest gets to see.
	layers = "layers"
)

// Open makes a copy of the tree that is mounted nowhere yet. Once it is, what Add
// mounts appears in there.
func (t *Tree) Open() (*os.File, error) {
	f, err := jail.Detached(t.path)
	if err != nil {
		return nil, fmt.Errorf("shared directory: %w", err)
	}
	return f, nil
}

// Add mounts what a container needs. On an error nothing of it is left. id is
// a valid identifier, see containerd's identifiers package.
func (t *Tree) Add(id string, rootfs Rootfs, mounts []guestspec.Mount) (err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.containers[id] != nil {
		return fmt.Errorf("container %s is in the shared directory already", id)
	}
	c := &content{}
	t.containers[id] = c
	defer func() {
		if err != nil {
			err = errors.Join(err, t.remove(id))
		}
	}()
	for _, dir := range []string{id, filepath.Join(id, guestspec.RootfsName), filepath.Join(id, guestspec.MountsName)} {
		if err := t.makePointOf(c, point{name: dir}); err != nil {
			return err
		}
	}
	if err := t.addRootfs(c, id, rootfs); err != nil {
		return fmt.Errorf("root file system: %w", err)
	}
	sources, err := t.openSources(mounts)
	defer closeSources(sources)
	if err != nil {
		return err
	}
	for n, m := range mounts {
		at := filepath.Join(id, guestspec.MountsName, strconv.Itoa(n))
		if m.Type == "" {
			err = t.addVolume(c, at, sources[n], m)
		} else if err = t.makePointOf(c, point{name: at}); err == nil {
			err = t.mountAll(c, at, []mount.Mount{{Type: m.Type, Source: m.Source, Options: m.Options}})
		}
		if err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.Source, m.Destination, err)
		}
	}
	return nil
}

func (t *Tree) addRootfs(c *content, id string, rootfs Rootfs) error {
	target := filepath.Join(id, guestspec.RootfsName)
	switch {
	case rootfs.InGuest:
		return nil
	case slices.ContainsFunc(rootfs.Mounts, IsTemplate):
		return t.addLayers(c, target, rootfs.Mounts)
	case len(rootfs.Mounts) > 0:
		return t.mountAll(c, target, rootfs.Mounts)
	}
	var info fs.FileInfo
	if err := t.OnHost(func() (err error) {
		info, err = os.Stat(rootfs.Path)
		return err
	}); err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s is not a directory", rootfs.Path)
	}
	if err := t.bind(target, guestspec.Mount{Source: rootfs.Path, Recursive: true}); err != nil {
		return err
	}
	c.mounts = append(c.mounts, target)
	return nil
}

// mountAll makes file systems appear at target: from the stage, because in the
// tree a mount is seen at once, and a change of its flags nowhere else.
func (t *Tree) mountAll(c *content, target string, mounts []mount.Mount) (err error) {
	at := filepath.Join(t.base, stage)
	defer func() { err = errors.Join(err, unmount(at)) }()
	if err := mount.All(mounts, at); err != nil {
		return err
	}
	if err := unix.MountSetattr(unix.AT_FDCWD, at, unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: restricted}); err != nil {
		return fmt.Errorf("mount_setattr: %w", err)
	}
	if err := unix.MoveMount(unix.AT_FDCWD, at, unix.AT_FDCWD, filepath.Join(t.path, target), 0); err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	c.mounts = append(c.mounts, target)
	return nil
}

// makePointOf makes a point that goes with the container.
func (t *Tree) makePointOf(c *content, p point) error {
	err := t.makePoint(p)
	if err == nil {
		c.points = append(c.points, p)
	}
	return err
}

func (t *Tree) makePoint(p point) error {
	root := int(t.writable.Fd())
	if p.file {
		fd, err := unix.Openat(root, p.name, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return fmt.Errorf("make %s: %w", p.name, err)
		}
		unix.Close(fd)
	} else if err := unix.Mkdirat(root, p.name, 0o755); err != nil {
		return fmt.Errorf("make %s: %w", p.name, err)
	}
	return nil
}

// removePoint removes one that may have gone. Nothing is mounted on it any more:
// should a directory not be empty, what is in it is not ours.
func (t *Tree) removePoint(p point) error {
	flags := unix.AT_REMOVEDIR
	if p.file {
		flags = 0
	}
	if err := unix.Unlinkat(int(t.writable.Fd()), p.name, flags); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove %s: %w", p.name, err)
	}
	return nil
}

// bind makes the source, as it is now in the host's mount namespace, appear at
// target. What is mounted below it on the host later appears as well, where
// the host's mounts are shared and m does not want it private: from the host's
// mount, whose slave this one is, to this one, and on to the VMM's copy of the tree.
func (t *Tree) bind(target string, m guestspec.Mount) error {
	var recursive uint
	if m.Recursive {
		recursive = unix.AT_RECURSIVE
	}
	var fd int
	err := t.OnHost(func() (err error) {
		fd, err = unix.OpenTree(unix.AT_FDCWD, m.Source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|recursive)
		return err
	})
	if err != nil {
		return fmt.Errorf("open_tree: %w", err)
	}
	defer unix.Close(fd)
	ids := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP}
	if len(m.UIDs) > 0 || len(m.GIDs) > 0 {
		namespace, err := mount.GetUsernsFD(idMap(m.UIDs), idMap(m.GIDs))
		if err != nil {
			return fmt.Errorf("map ids: %w", err)
		}
		defer namespace.Close()
		ids.Userns_fd = uint64(namespace.Fd())
	}
	var allIDs uint
	if m.RecursiveIDs {
		allIDs = unix.AT_RECURSIVE
	}
	for _, change := range []struct {
		needed bool
		flags  uint
		attr   unix.MountAttr
	}{
		{ids.Userns_fd != 0, allIDs, ids},
		{true, unix.AT_RECURSIVE, unix.MountAttr{Attr_set: restricted, Propagation: unix.MS_SLAVE}},
		{m.Private, 0, unix.MountAttr{Propagation: unix.MS_PRIVATE}},
		{m.RecursivePrivate, unix.AT_RECURSIVE, unix.MountAttr{Propagation: unix.MS_PRIVATE}},
		{m.ReadOnly, 0, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}},
		{m.RecursiveReadOnly, unix.AT_RECURSIVE, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}},
	} {
		if !change.needed {
			continue
		}
		err := unix.MountSetattr(fd, "", change.flags|unix.AT_EMPTY_PATH, &change.attr)
		if errors.Is(err, unix.EINVAL) && change.attr.Userns_fd != 0 {
			return fmt.Errorf("the host's file system cannot map ids (tmpfs can from Linux 6.3 on): %w", err)
		}
		if err != nil {
			return fmt.Errorf("mount_setattr: %w", err)
		}
	}
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, filepath.Join(t.path, target), unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	return nil
}

// idMap writes mappings as containerd's mount package reads them.
func idMap(mappings []specs.LinuxIDMapping) string {
	var list []string
	for _, m := range mappings {
		list = append(list, fmt.Sprintf("%d:%d:%d", m.ContainerID, m.HostID, m.Size))
	}
	return strings.Join(list, ",")
}

// OnHost runs f where the host's mounts are as they are now. Those that came
// after this process show in its own namespace only if the host's are shared.
func (t *Tree) OnHost(f func() error) error { return in(t.host, f) }

// in runs f in another mount namespace, on a thread that ends with it.
func in(namespace *os.File, f func() error) error {
	if namespace == nil {
		return f()
	}
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // for good
		// A thread that shares its working directory with others cannot
		// change the namespace that it is in.
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			err = unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNS)
		}
		if err != nil {
			result <- fmt.Errorf("enter the host's mount namespace: %w", err)
			return
		}
		result <- f()
	}()
	return <-result
}

// Mount is the path of a container's n-th mount.
func (t *Tree) Mount(id string, n int) string {
	return filepath.Join(t.path, id, guestspec.MountsName, strconv.Itoa(n))
}

// Remove unmounts what Add has mounted. A file system that the guest still
// holds open is unmounted as soon as it does not.
func (t *Tree) Remove(id string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.remove(id)
}

func (t *Tree) remove(id string) error {
	c := t.containers[id]
	if c == nil {
		return nil
	}
	for len(c.mounts) > 0 {
		last := len(c.mounts) - 1
		if err := unmount(filepath.Join(t.path, c.mounts[last])); err != nil {
			return err
		}
		c.mounts = c.mounts[:last]
	}
	for len(c.points) > 0 {
		last := len(c.points) - 1
		if err := t.removePoint(c.points[last]); err != nil {
			return err
		}
		c.points = c.points[:last]
	}
	for len(c.volumes) > 0 {
		last := len(c.volumes) - 1
		if err := t.removeVolume(c.volumes[last]); err != nil {
			return err
		}
		c.volumes = c.volumes[:last]
	}
	delete(t.containers, id)
	return nil
}

// unmount takes away all that is mounted at path, one on top of another.
func unmount(path string) error {
	for {
		err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			err = unix.Unmount(path, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			return nil // not mounted
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
}

// Close unmounts everything and removes the mount point.
func (t *Tree) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	for id := range t.containers {
		errs = append(errs, t.remove(id))
	}
	t.writable.Close()
	errs = append(errs, unmount(t.path), unmount(t.base))
	if err := os.Remove(t.base); err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
