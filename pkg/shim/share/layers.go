package share

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// addLayers mounts a root file system whose last mount is made of those before
// it. These are mounted out of the guest's sight, and only as long as that takes:
// a bind and an overlay have clones of what they are made of. Else a guest could
// exchange the overlay's upper directory for a link before that is mounted.
func (t *Tree) addLayers(c *content, target string, mounts []mount.Mount) (err error) {
	dir := filepath.Join(t.base, layers)
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("microvm", dir, "tmpfs", flags, "mode=0700,size=16k,nr_inodes=1k"); err != nil {
		return fmt.Errorf("mount %s: %w", dir, err)
	}
	// With all that is mounted in there.
	defer func() { err = errors.Join(err, unmount(dir)) }()
	var points []string
	for i, m := range mounts {
		m, directories, err := Resolve(m, points)
		if err != nil {
			return err
		}
		for _, d := range directories {
			if err := makeIn(points, d); err != nil {
				return err
			}
		}
		pinned, files, err := pin(m, points)
		if err == nil && i == len(mounts)-1 {
			err = t.mountAll(c, target, []mount.Mount{pinned})
		} else if err == nil {
			points = append(points, filepath.Join(dir, strconv.Itoa(i)))
			if err = os.Mkdir(points[i], 0o700); err == nil {
				err = mount.All([]mount.Mount{pinned}, points[i])
			}
		}
		for _, f := range files {
			f.Close()
		}
		if err != nil {
			return fmt.Errorf("mount %s of the type %s: %w", m.Source, m.Type, err)
		}
	}
	return nil
}

// within says in which layer a path is, and where in there.
func within(points []string, path string) (point, name string, ok bool) {
	for _, point := range points {
		name, err := filepath.Rel(point, path)
		if err == nil && name != "." && filepath.IsLocal(name) {
			return point, name, true
		}
	}
	return "", "", false
}

// makeIn makes a directory in a layer. Links in there lead nowhere else.
func makeIn(points []string, d Directory) error {
	point, name, ok := within(points, d.Path)
	if !ok {
		return fmt.Errorf("directory %s is not in a layer", d.Path)
	}
	root, err := os.OpenRoot(point)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := root.Mkdir(name, fs.FileMode(d.Mode)); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// pin puts descriptors in the place of the paths that a mount names in layers:
// its source, and what its options are set to, as overlay's directories. None is
// found by way of a link: what is in a layer may have been written by a guest that
// had it as a disk. The caller closes the files when it has mounted.
func pin(m mount.Mount, points []string) (_ mount.Mount, files []*os.File, err error) {
	open := func(path string) string {
		point, name, ok := within(points, path)
		if !ok || err != nil {
			return path
		}
		var f *os.File
		if f, err = openIn(point, name); err != nil {
			return path
		}
		files = append(files, f)
		return procPath(f)
	}
	m.Source = open(m.Source)
	m.Options = slices.Clone(m.Options)
	for i, option := range m.Options {
		key, value, ok := strings.Cut(option, "=")
		if !ok {
			continue
		}
		paths := strings.Split(value, ":")
		for n := range paths {
			paths[n] = open(paths[n])
		}
		m.Options[i] = key + "=" + strings.Join(paths, ":")
	}
	return m, files, err
}

// openIn opens a directory in a layer.
func openIn(point, name string) (*os.File, error) {
	root, err := os.Open(point)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	fd, err := unix.Openat2(int(root.Fd()), name, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return nil, &os.PathError{Op: "openat2", Path: filepath.Join(point, name), Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}
