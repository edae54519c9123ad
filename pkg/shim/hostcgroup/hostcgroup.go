// Package hostcgroup places the processes of a sandbox, the shim and the VMM,
// in the sandbox's cgroup on the host: in each hierarchy of version 1, or the
// one of version 2, whichever has the host's memory and cpu. It sets no limits: a
// container's limits are enforced in the guest, and the machine needs more than the
// container may use.
package hostcgroup

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// hierarchy is a mounted cgroup file system.
type hierarchy struct {
	mountpoint string
	// controllers as /proc/self/cgroup writes them: "cpu,cpuacct" or
	// "name=systemd"; empty for version 2.
	controllers string
	v2          bool
}

// limits says whether version 1's memory or cpu is here, by which pods are limited.
func (h hierarchy) limits() bool {
	controllers := strings.Split(h.controllers, ",")
	return slices.Contains(controllers, "memory") || slices.Contains(controllers, "cpu")
}

// Group is a sandbox's cgroup. It is not for concurrent use.
type Group struct {
	path        string // below each mount point
	hierarchies []hierarchy
	// unified is where version 2 is mounted, also beside hierarchies of version 1;
	// empty if nowhere.
	unified string
	// before is where the process was, by mount point.
	before map[string]string
	// back are the files by which it returns there. They are opened by Enter:
	// there may be no descriptor left to be had when it leaves.
	back []*os.File
}

// New prepares for the cgroup that a spec's linux.cgroupsPath names, which is
// systemd's slice:prefix:name form or a path below the mount points.
func New(cgroupsPath string) (*Group, error) {
	path, err := expand(cgroupsPath)
	if err != nil {
		return nil, err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, fmt.Errorf("cgroup mounts: %w", err)
	}
	self, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("own cgroups: %w", err)
	}
	hierarchies, before := inspect(mounts, self)
	if len(hierarchies) == 0 {
		return nil, errors.New("no cgroup file system is mounted")
	}
	g := &Group{path: path, hierarchies: hierarchies, before: before}
	if i := slices.IndexFunc(mounts, func(m *mountinfo.Info) bool { return m.FSType == "cgroup2" }); i >= 0 {
		g.unified = mounts[i].Mountpoint
	}
	return g, nil
}

// expand turns a cgroupsPath into a path below a mount point.
func expand(cgroupsPath string) (string, error) {
	parts := strings.Split(cgroupsPath, ":")
	if len(parts) != 3 {
		// Cleaning it as an absolute path takes every ".." away.
		path := filepath.Clean("/" + cgroupsPath)
		if path == "/" {
			return "", fmt.Errorf("cgroups path %q is the root cgroup", cgroupsPath)
		}
		return path, nil
	}
	slice, prefix, name := parts[0], parts[1], parts[2]
	if slice == "" {
		slice = "system.slice"
	}
	if !strings.HasSuffix(slice, ".slice") || strings.Contains(cgroupsPath, "/") || name == "" {
		return "", fmt.Errorf("cgroups path %q is not of the form slice:prefix:name", cgroupsPath)
	}
	unit := name
	if !strings.HasSuffix(name, ".slice") {
		unit = prefix + "-" + name + ".scope"
		if prefix == "" {
			unit = name + ".scope"
		}
	}
	// a-b.slice lies in a.slice, see systemd.slice(5).
	path := "/"
	if slice == "-.slice" { // the root
		return path + unit, nil
	}
	for i, r := range slice {
		if r == '-' {
			path = filepath.Join(path, slice[:i]+".slice")
		}
	}
	return filepath.Join(path, slice, unit), nil
}

// inspect finds the hierarchies that count and where the process is in each. A
// controller is version 1's or version 2's. Where memory or cpu are version 1's,
// version 2 is left alone, also if it is mounted, as systemd's hybrid mode does;
// else a hierarchy of version 1 is something that somebody has mounted beside
// version 2, as VPN clients do with net_cls, and that runc and the kubelet do not
// look at either.
func inspect(mounts []*mountinfo.Info, self []byte) ([]hierarchy, map[string]string) {
	position := map[string]string{} // by controllers
	for line := range bytes.Lines(self) {
		parts := strings.SplitN(strings.TrimSpace(string(line)), ":", 3)
		if len(parts) == 3 {
			position[parts[1]] = parts[2]
		}
	}
	var v1, v2 []hierarchy
	before := map[string]string{}
	for _, m := range mounts {
		if m.FSType == "cgroup2" {
			v2 = append(v2, hierarchy{mountpoint: m.Mountpoint, v2: true})
			before[m.Mountpoint] = below(m.Root, position[""])
			continue
		}
		options := strings.Split(m.VFSOptions, ",")
		for controllers, path := range position {
			if controllers == "" || !containsAll(options, strings.Split(controllers, ",")) {
				continue
			}
			v1 = append(v1, hierarchy{mountpoint: m.Mountpoint, controllers: controllers})
			before[m.Mountpoint] = below(m.Root, path)
		}
	}
	if len(v2) == 0 || slices.ContainsFunc(v1, hierarchy.limits) {
		return v1, before
	}
	if len(v2) > 1 {
		v2 = v2[:1] // the same hierarchy, mounted again
	}
	return v2, before
}

// below takes the root of a mount, which is not / in a container, off a path.
func below(root, path string) string {
	if rel, err := filepath.Rel(root, path); err == nil && !strings.HasPrefix(rel, "..") {
		return filepath.Join("/", rel)
	}
	return "/"
}

func containsAll(have, want []string) bool {
	for _, w := range want {
		if !slices.Contains(have, w) {
			return false
		}
	}
	return true
}

// Owned are the directories that Enter and Confine will make, parents first, and those on
// the way that other sandboxes have made, of which the last one to leave is to
// remove them. Recorded before Enter, they can be removed if the shim is
// killed.
func (g *Group) Owned(others []string) []string {
	var owned []string
	add := func(dirs []string) {
		for _, dir := range dirs {
			if _, err := os.Stat(dir); !slices.Contains(owned, dir) && (errors.Is(err, fs.ErrNotExist) || slices.Contains(others, dir)) {
				owned = append(owned, dir)
			}
		}
	}
	for _, h := range g.hierarchies {
		add(steps(h.mountpoint, g.path))
	}
	if g.unified != "" {
		add(steps(g.unified, filepath.Join(g.path, machine)))
	}
	return owned
}

// steps are the directories from the mount point, exclusive, down to path.
func steps(mountpoint, path string) []string {
	var dirs []string
	dir := mountpoint
	for name := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		dir = filepath.Join(dir, name)
		dirs = append(dirs, dir)
	}
	return dirs
}

// Enter makes the cgroup and moves this process into it; children follow. After
// an error Leave brings the process back to where it was.
func (g *Group) Enter() error {
	for _, h := range g.hierarchies {
		back, err := os.OpenFile(filepath.Join(h.mountpoint, g.before[h.mountpoint], procs), os.O_WRONLY, 0)
		if err != nil {
			return fmt.Errorf("the cgroup that the process is in: %w", err)
		}
		g.back = append(g.back, back)
		if err := g.enter(h); err != nil {
			return fmt.Errorf("cgroup %s: %w", filepath.Join(h.mountpoint, g.path), err)
		}
	}
	return nil
}

func (g *Group) enter(h hierarchy) error {
	dirs := steps(h.mountpoint, g.path)
	if err := makeAll(dirs); err != nil {
		return err
	}
	parents := append([]string{h.mountpoint}, dirs[:len(dirs)-1]...)
	switch {
	case h.v2:
		for _, dir := range parents {
			enableControllers(dir)
		}
	case slices.Contains(strings.Split(h.controllers, ","), "cpuset"):
		for _, dir := range dirs {
			if err := inheritCpuset(dir); err != nil {
				return err
			}
		}
	}
	return join(dirs[len(dirs)-1])
}

// makeAll makes directories whose parents another shim may take away as the
// last one to leave them.
func makeAll(dirs []string) error {
	var err error
	for range 100 {
		if err = os.MkdirAll(dirs[len(dirs)-1], 0o755); err == nil ||
			!errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return err
}

// enableControllers lets the children of dir have all of its controllers.
// What cannot be enabled is not needed for the processes to run.
func enableControllers(dir string) {
	available, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	for controller := range strings.FieldsSeq(string(available)) {
		// One at a time, because the kernel enables all of a line or none.
		os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+controller), 0)
	}
}

// inheritCpuset fills in a new cpuset cgroup, which has no CPUs and no memory
// nodes to begin with and takes no process without them.
func inheritCpuset(dir string) error {
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		own, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		if len(bytes.TrimSpace(own)) > 0 {
			continue
		}
		parent, err := os.ReadFile(filepath.Join(filepath.Dir(dir), name))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name), parent, 0); err != nil {
			return err
		}
	}
	return nil
}

// procs is the file of a cgroup to which the processes are written that are to
// be in it.
const procs = "cgroup.procs"

func own() []byte { return []byte(strconv.Itoa(os.Getpid())) }

func join(dir string) error {
	return os.WriteFile(filepath.Join(dir, procs), own(), 0)
}

// Leave moves this process back to where it was before Enter. It takes no
// further descriptor.
func (g *Group) Leave() error {
	var errs []error
	for _, f := range g.back {
		if _, err := f.Write(own()); err != nil {
			errs = append(errs, fmt.Errorf("leave cgroup: %w", err))
		}
		f.Close()
	}
	g.back = nil
	return errors.Join(errs...)
}

// OOMKills counts the processes of the cgroup that the host's kernel has killed
// because memory ran out, there or on the whole host.
func (g *Group) OOMKills() int {
	for _, h := range g.hierarchies {
		name := "memory.oom_control" // version 1
		if h.v2 {
			name = "memory.events"
		}
		data, err := os.ReadFile(filepath.Join(h.mountpoint, g.path, name))
		if err != nil {
			continue // another controller's hierarchy
		}
		for line := range strings.Lines(string(data)) {
			if n, ok := strings.CutPrefix(strings.TrimSpace(line), "oom_kill "); ok {
				count, _ := strconv.Atoi(n)
				return count
			}
		}
	}
	return 0
}

// Join moves a process into an existing cgroup, in every hierarchy.
func Join(cgroupsPath string) error {
	g, err := New(cgroupsPath)
	if err != nil {
		return err
	}
	for _, h := range g.hierarchies {
		dir := filepath.Join(h.mountpoint, g.path)
		if err := join(dir); err != nil {
			return fmt.Errorf("join cgroup %s: %w", dir, err)
		}
	}
	return nil
}

// Remove takes away the directories that Owned has named, unless they are
// in use by others. A cgroup stays busy for a moment after its last process
// has ended, so those that had some of the sandbox's are tried for a while.
func Remove(dirs []string) error {
	var errs []error
	for i, dir := range slices.Backward(dirs) {
		leaf := i+1 == len(dirs) || filepath.Dir(dirs[i+1]) != dir || filepath.Base(dirs[i+1]) == machine
		for attempt := 0; ; attempt++ {
			err := unix.Rmdir(dir)
			if err == nil || errors.Is(err, unix.ENOENT) {
				break
			}
			if !leaf {
				break // another sandbox is in there, and will remove it
			}
			if !errors.Is(err, unix.EBUSY) || attempt == 50 {
				errs = append(errs, fmt.Errorf("remove cgroup %s: %w", dir, err))
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	return errors.Join(errs...)
}
