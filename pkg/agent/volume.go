package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"

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
	// files of the last time. They are open, so that the file server on the host
	// keeps them too: what is only looked up there is ESTALE once the host has
	// removed it.
	files []*os.File
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
	path, err := followShare(filepath.Join(c.shared, "mounts", strconv.FormatUint(uint64(mount), 10)))
	if err != nil {
		return err
	}
	dir, err := openBelow(unix.AT_FDCWD, path)
	if err != nil {
		return err
	}
	defer dir.Close()
	var errs []error
	if known {
		errs = append(errs, touchAll(dir, v.files))
	}
	v.close()
	v.files, err = volumeFiles(dir)
	return errors.Join(append(errs, err)...)
}

// openShares has the kernel mount what is shared for a container's mounts, here
// and not in the container's namespace: each time that it goes to a mount of the
// host's for the first time in a namespace it makes another file system of it,
// whose watches know nothing of this one's events, nor its sockets of this one's
// listeners. The mounts are made to name what the shared directory's links lead to.
//
// What is read-only, but not recursively, gets so as a file system, and libcontainer
// is not to see to it. Where the host has a mount below, the kernel makes one
// with the flags of that which it is below (fs/namespace.c, finish_automount);
// it would be read-only as well.
func (c *container) openShares(mounts []specs.Mount) error {
	for i, m := range mounts {
		if rel, err := filepath.Rel(c.shared, m.Source); err != nil || !filepath.IsLocal(rel) {
			continue
		}
		source, err := followShare(m.Source)
		if err != nil {
			return err
		}
		if source != m.Source {
			mounts[i].Source = source
			c.sharedMounts.hold(c, source)
		}
		dir, err := openBelow(unix.AT_FDCWD, source)
		if err != nil {
			continue // It may be a file, or not be there, of which libcontainer will tell.
		}
		if readOnly(m.Options) && isMount(dir) {
			err = setReadOnly(dir, true)
			mounts[i].Options = without(m.Options, func(o string) bool { return o == "ro" || o == "rw" })
		}
		dir.Close()
		if err != nil {
			return fmt.Errorf("make the mount on %s read-only: %w", m.Destination, err)
		}
	}
	return nil
}

// followShare returns what a link in the shared directory leads to, or the path
// itself.
func followShare(path string) (string, error) {
	target, err := os.Readlink(path)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, os.ErrNotExist) {
		return path, nil
	}
	if err != nil {
		return "", err
	}
	return filepath.Join(filepath.Dir(path), target), nil
}

// sharedMounts are the volumes that several containers may have: the last one to
// end unmounts them.
type sharedMounts struct {
	mu    sync.Mutex
	users map[string][]*container // by path
}

func (s *sharedMounts) hold(c *container, path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.users == nil {
		s.users = map[string][]*container{}
	}
	s.users[path] = append(s.users[path], c)
}

// release is for all that the container holds.
func (s *sharedMounts) release(c *container) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for path, users := range s.users {
		left := without(users, func(u *container) bool { return u == c })
		if len(left) > 0 {
			s.users[path] = left
			continue
		}
		delete(s.users, path)
		errs = append(errs, unmountShares(path))
	}
	return errors.Join(errs...)
}

// readOnly says whether a mount with these options is read-only, but not what is
// mounted below.
func readOnly(options []string) (ro bool) {
	recursive := false
	for _, o := range options { // the last word counts
		switch o {
		case "ro", "rw":
			ro = o == "ro"
		case "rro", "rrw":
			recursive = o == "rro"
		}
	}
	return ro && !recursive
}

// isMount says whether something is mounted on the directory, which was opened on
// that.
func isMount(dir *os.File) bool {
	var st unix.Statx_t
	err := unix.Statx(int(dir.Fd()), "", unix.AT_EMPTY_PATH, 0, &st)
	return err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}

// setReadOnly makes the whole file system that the directory is in read-only, or
// no longer. Whether something of it can be changed is the host's decision.
func setReadOnly(dir *os.File, readOnly bool) error {
	fd, err := unix.Fspick(int(dir.Fd()), "", unix.FSPICK_EMPTY_PATH|unix.FSPICK_CLOEXEC)
	if err != nil {
		return fmt.Errorf("fspick: %w", err)
	}
	defer unix.Close(fd)
	flag := "rw"
	if readOnly {
		flag = "ro"
	}
	err = unix.FsconfigSetFlag(fd, flag)
	if err == nil {
		err = unix.FsconfigReconfigure(fd)
	}
	if err != nil {
		return fmt.Errorf("fsconfig: %w", err)
	}
	return nil
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

// touchAll touches a directory and files in it. The file system may be one that
// openShares has made read-only: then it is not, for that moment.
func touchAll(dir *os.File, files []*os.File) (err error) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &fs); err != nil {
		return fmt.Errorf("statfs: %w", err)
	}
	if fs.Flags&unix.ST_RDONLY != 0 {
		if err := setReadOnly(dir, false); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, setReadOnly(dir, true)) }()
	}
	var errs []error
	for _, f := range append([]*os.File{dir}, files...) {
		errs = append(errs, touch(f))
	}
	return errors.Join(errs...)
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
		f, err := openRegular(int(data.Fd()), name)
		if err != nil {
			continue
		}
		files = append(files, f)
	}
	return files, nil
}

// openRegular opens a file for reading if it is a regular one. To open any other
// may wait, or do something.
func openRegular(at int, name string) (*os.File, error) {
	fd, err := unix.Openat(at, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, errors.New("no regular file")
	}
	return os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
}

// openBelow opens a directory, and not through a symbolic link.
func openBelow(at int, path string) (*os.File, error) {
	fd, err := unix.Openat(at, path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}
