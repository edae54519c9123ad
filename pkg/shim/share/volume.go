package share

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/shim/guestspec"
)

// volumesName is where bind mounts are; no container's id begins with a dot.
const volumesName = ".volumes"

// volume is a bind mount of all containers of the sandbox that ask for the same.
// The guest makes a file system of each mount, and processes meet in a unix socket
// or a FIFO only where that is one inode for all of them.
type volume struct {
	key   string
	point point
	users int
}

// source is what a bind mount is made of.
type source struct {
	file *os.File // opened by O_PATH
	// key is the same for what can be one volume: the same file on the same mount,
	// with the same mounts below, if these are wanted, bound in the same way.
	key string
}

// openSources opens the sources of the bind mounts, as they are now on the host.
// Other mounts have none. The caller closes the files, on an error as well.
func (t *Tree) openSources(mounts []guestspec.Mount) ([]source, error) {
	list := make([]source, len(mounts))
	if !slices.ContainsFunc(mounts, func(m guestspec.Mount) bool { return m.Type == "" }) {
		return list, nil
	}
	err := t.OnHost(func() error {
		stats, paths := make([]unix.Statx_t, len(mounts)), make([]string, len(mounts))
		for i, m := range mounts {
			if m.Type != "" {
				continue
			}
			fd, err := unix.OpenTree(unix.AT_FDCWD, m.Source, unix.OPEN_TREE_CLOEXEC)
			if err != nil {
				return fmt.Errorf("mount %s on %s: %w", m.Source, m.Destination, err)
			}
			list[i].file = os.NewFile(uintptr(fd), m.Source)
			if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_INO|unix.STATX_MNT_ID, &stats[i]); err != nil {
				return fmt.Errorf("statx %s: %w", m.Source, err)
			}
			if paths[i], err = os.Readlink(procPath(list[i].file)); err != nil {
				return err
			}
		}
		// The flags of a mount may change, and its number may be given to another one.
		mounted := make([][]string, len(mounts))
		_, err := mountinfo.GetMounts(func(at *mountinfo.Info) (skip, stop bool) {
			for i, m := range mounts {
				below := m.Recursive && strings.HasPrefix(at.Mountpoint, strings.TrimSuffix(paths[i], "/")+"/")
				if list[i].file != nil && (below || uint64(at.ID) == stats[i].Mnt_id) {
					mounted[i] = append(mounted[i], fmt.Sprintf("%d %s %s", at.ID, at.Mountpoint, at.Options))
				}
			}
			return true, false
		})
		for i, m := range mounts {
			m.Source, m.Destination = "", ""
			slices.Sort(mounted[i])
			list[i].key = fmt.Sprintf("%d:%d %d %+v %q", stats[i].Dev_major, stats[i].Dev_minor, stats[i].Ino, m, mounted[i])
		}
		return err
	})
	return list, err
}

func closeSources(list []source) {
	for _, s := range list {
		if s.file != nil {
			s.file.Close()
		}
	}
}

func procPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

// addVolume makes link lead to the volume that is made of s, which is mounted if
// it is not yet.
func (t *Tree) addVolume(c *content, link string, s source, m guestspec.Mount) error {
	v := t.volumes[s.key]
	if v == nil {
		v = &volume{key: s.key, point: point{name: filepath.Join(volumesName, strconv.Itoa(t.nextVolume)), file: m.File}}
		t.nextVolume++
		if err := t.makePoint(v.point); err != nil {
			return err
		}
		m.Source = procPath(s.file)
		if err := t.bind(v.point.name, m); err != nil {
			t.removePoint(v.point)
			return err
		}
		t.volumes[v.key] = v
	}
	v.users++
	c.volumes = append(c.volumes, v)
	to, err := filepath.Rel(filepath.Dir(link), v.point.name)
	if err != nil {
		return err
	}
	if err := unix.Symlinkat(to, int(t.writable.Fd()), link); err != nil {
		return fmt.Errorf("make %s: %w", link, err)
	}
	c.points = append(c.points, point{name: link, file: true})
	return nil
}

// removeVolume is for one of its users.
func (t *Tree) removeVolume(v *volume) error {
	if v.users == 1 {
		if err := unmount(filepath.Join(t.path, v.point.name)); err != nil {
			return err
		}
		if err := t.removePoint(v.point); err != nil {
			return err
		}
		delete(t.volumes, v.key)
	}
	v.users--
	return nil
}
