package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// maxVolumeFiles is how many files of a volume are remembered, each by a
// descriptor.
const maxVolumeFiles = 64

// volume is a directory of a container's that the host updates as the kubelet
// does (pkg/volume/util/atomic_writer.go): the symbolic link ..data is replaced,
// and leads to a directory beside it that holds the files.
type volume struct {
	files []*os.File // O_PATH, of the last time
}

// VolumeChanged has inotify watches fire.
func (a *Agent) VolumeChanged(_ context.Context, r *agentproto.VolumeRequest) (*emptypb.Empty, error) {
	c, err := a.container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	if err := c.volumeChanged(r.GetMount()); err != nil {
		return nil, fmt.Errorf("mount %d of container %q: %w", r.GetMount(), c.id, err)
	}
	return &emptypb.Empty{}, nil
}

func (c *container) volumeChanged(mount uint32) error {
	c.volumesMu.Lock()
	defer c.volumesMu.Unlock()
	if c.ended {
		return os.ErrClosed
	}
	v, known := c.volumes[mount]
	if !known {
		v = &volume{}
		if c.volumes == nil {
			c.volumes = make(map[uint32]*volume)
		}
		c.volumes[mount] = v
	}
	dir, err := openBelow(unix.AT_FDCWD, filepath.Join(c.shared, "mounts", strconv.FormatUint(uint64(mount), 10)))
	if err != nil {
		return err
	}
	defer dir.Close()
	var errs []error
	if known {
		for _, f := range append([]*os.File{dir}, v.files...) {
			errs = append(errs, touch(f))
		}
	}
	v.close()
	v.files, err = volumeFiles(dir)
	return errors.Join(append(errs, err)...)
}

// openShares has the kernel mount what is shared for a container's mounts, here
// and not in the container's namespace: each time that it goes to a mount of the
// host's for the first time in a namespace it makes another file system of it,
// whose watches know nothing of this one's events.
func (c *container) openShares(mounts []specs.Mount) {
	for _, m := range mounts {
		if rel, err := filepath.Rel(c.shared, m.Source); err != nil || !filepath.IsLocal(rel) {
			continue
		}
		// It may be a file, or not be there, of which libcontainer will tell.
		if dir, err := openBelow(unix.AT_FDCWD, m.Source); err == nil {
			dir.Close()
		}
	}
}

// closeVolumes lets go of what was remembered, which would keep the mounts.
func (c *container) closeVolumes() {
	c.volumesMu.Lock()
	defer c.volumesMu.Unlock()
	c.ended = true
	for _, v := range c.volumes {
		v.close()
	}
}

func (v *volume) close() {
	for _, f := range v.files {
		f.Close()
	}
	v.files = nil
}

// touch gives a file the mode that it has. That changes nothing, and goes through
// on what the host has made read-only, but the kernel tells of it as IN_ATTRIB,
// also of a file that has no name any more.
func touch(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	mode := uint32(info.Mode().Perm())
	for bit, flag := range map[os.FileMode]uint32{os.ModeSetuid: unix.S_ISUID, os.ModeSetgid: unix.S_ISGID, os.ModeSticky: unix.S_ISVTX} {
		if info.Mode()&bit != 0 {
			mode |= flag
		}
	}
	return unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), mode)
}

// volumeFiles opens the regular files in the directory that ..data leads to, as
// far as they are few. A file that has gone meanwhile does not matter.
func volumeFiles(dir *os.File) ([]*os.File, error) {
	name := make([]byte, unix.NAME_MAX+1)
	n, err := unix.Readlinkat(int(dir.Fd()), "..data", name)
	if err != nil {
		return nil, &os.PathError{Op: "readlink", Path: filepath.Join(dir.Name(), "..data"), Err: err}
	}
	target := string(name[:n])
	if n > unix.NAME_MAX || target != filepath.Base(target) || target == ".." || target == "." {
		return nil, fmt.Errorf("%s/..data does not lead to a directory beside it", dir.Name())
	}
	data, err := openBelow(int(dir.Fd()), target)
	if err != nil {
		return nil, err
	}
	defer data.Close()
	// The first descriptor cannot be read.
	list, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", data.Fd()))
	if err != nil {
		return nil, err
	}
	defer list.Close()
	names, err := list.Readdirnames(maxVolumeFiles)
	if err != nil && len(names) == 0 {
		return nil, nil // it is empty
	}
	var files []*os.File
	for _, name := range names {
		fd, err := unix.Openat(int(data.Fd()), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			continue
		}
		f := os.NewFile(uintptr(fd), name)
		if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
			f.Close()
			continue
		}
		files = append(files, f)
	}
	return files, nil
}

// openBelow opens a directory, and not through a symbolic link.
func openBelow(at int, path string) (*os.File, error) {
	fd, err := unix.Openat(at, path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}
