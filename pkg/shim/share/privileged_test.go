//go:build privileged

package share

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/shim/guestspec"
)

// The tests run in a mount namespace of their own, as the shim does, and have
// the one they came from as the host's.
func TestMain(m *testing.M) {
	const inside = "SHARE_TEST_HOST_NAMESPACE"
	if os.Getenv(inside) != "" {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	host, err := os.Open("/proc/self/ns/mnt")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=3")
	cmd.ExtraFiles = []*os.File{host}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
	if err := cmd.Run(); err != nil {
		os.Exit(1)
	}
}

// hostNamespace is one file: the end of another one would close the descriptor.
var hostNamespace = sync.OnceValue(func() *os.File { return os.NewFile(3, "host") })

// files makes a directory with these files, each with its name in it.
func files(t *testing.T, names ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range names {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func newTree(t *testing.T) *Tree {
	t.Helper()
	tree, err := New(filepath.Join(t.TempDir(), "shared"), hostNamespace())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tree.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(tree.path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the mount point is left: %v", err)
		}
	})
	return tree
}

func read(t *testing.T, tree *Tree, name, want string) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(tree.path, name))
	if err != nil || string(data) != want {
		t.Errorf("%s: %q, %v", name, data, err)
	}
}

// wantEmpty fails the test if the tree has more than it begins with.
func wantEmpty(t *testing.T, tree *Tree) {
	t.Helper()
	var names []string
	for _, dir := range []string{"", volumesName} {
		entries, err := os.ReadDir(filepath.Join(tree.path, dir))
		if err != nil {
			t.Error(err)
		}
		for _, e := range entries {
			names = append(names, filepath.Join(dir, e.Name()))
		}
	}
	if !slices.Equal(names, []string{volumesName}) || len(tree.volumes) > 0 {
		t.Errorf("left: %q and %d volumes", names, len(tree.volumes))
	}
}

func mountsBelow(t *testing.T, path string) int {
	t.Helper()
	// The first thread may be one that OnHost has left in the other namespace.
	data, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(data), " "+path+"/")
}

func TestTree(t *testing.T) {
	tree := newTree(t)
	lower, upper, work := files(t, "etc/lower"), t.TempDir(), t.TempDir()
	source := files(t, "file", "dir/inner")
	err := tree.Add("c1", Rootfs{Mounts: []mount.Mount{{
		Type: "overlay", Source: "overlay",
		Options: []string{"lowerdir=" + lower, "upperdir=" + upper, "workdir=" + work},
	}}}, []guestspec.Mount{
		{Source: source + "/dir", Recursive: true},
		{Source: source + "/file", File: true, ReadOnly: true},
		{Source: "tmpfs", Type: "tmpfs", Options: []string{"size=1m"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	read(t, tree, "c1/rootfs/etc/lower", "etc/lower")
	read(t, tree, "c1/mounts/0/inner", "dir/inner")
	read(t, tree, "c1/mounts/1", "file")
	for name, want := range map[string]error{
		"c1/rootfs/new":   nil,
		"c1/mounts/0/new": nil,
		"c1/mounts/2/new": nil,
		"c1/mounts/1":     unix.EROFS,
		"new":             unix.EROFS, // the tree itself
		"c1/mounts/new":   unix.EROFS,
	} {
		if err := os.WriteFile(filepath.Join(tree.path, name), nil, 0o644); !errors.Is(err, want) {
			t.Errorf("write %s: %v, want %v", name, err, want)
		}
	}
	if err := tree.Add("c1", Rootfs{Path: source}, nil); err == nil {
		t.Error("added twice")
	}
	// Something holds a file open.
	f, err := os.Open(filepath.Join(tree.path, "c1/rootfs/etc/lower"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := tree.Remove("c1"); err != nil {
		t.Error(err)
	}
	if err := tree.Remove("c1"); err != nil {
		t.Errorf("again: %v", err)
	}
	if n := mountsBelow(t, tree.path); n != 0 {
		t.Errorf("%d mounts left", n)
	}
	wantEmpty(t, tree)
	if _, err := os.Stat(filepath.Join(source, "file")); err != nil {
		t.Error(err)
	}
	// The same id again, from a directory.
	if err := tree.Add("c1", Rootfs{Path: source}, nil); err != nil {
		t.Fatal(err)
	}
	read(t, tree, "c1/rootfs/file", "file")
}

// A mount made on the host after the shim started is found, with what is
// mounted below it; read-only goes as deep as it was asked to.
func TestMountsOfTheHost(t *testing.T) {
	tree := newTree(t)
	source := files(t, "sub/hidden")
	err := in(hostNamespace(), func() error {
		for _, dir := range []string{source, filepath.Join(source, "sub")} {
			if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(dir, "file"), []byte("late"), 0o644); err != nil {
				return err
			}
			if err := os.MkdirAll(filepath.Join(dir, "sub"), 0o755); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in(hostNamespace(), func() error { return unix.Unmount(source, unix.MNT_DETACH) })
	})
	if err := tree.OnHost(func() error { _, err := os.Stat(filepath.Join(source, "sub/file")); return err }); err != nil {
		t.Errorf("who looks on the host: %v", err)
	}
	// A hook's program.
	if err := tree.OnHost(exec.Command("/bin/test", "-d", filepath.Join(source, "sub/sub")).Run); err != nil {
		t.Errorf("a program that is started on the host: %v", err)
	}
	if err := tree.Add("c2", Rootfs{Path: filepath.Join(source, "sub/sub")}, nil); err != nil {
		t.Errorf("a root file system that came after the shim: %v", err)
	}
	err = tree.Add("c1", Rootfs{Path: source}, []guestspec.Mount{
		{Source: source, Recursive: true},
		{Source: source},
		{Source: source, Recursive: true, ReadOnly: true},
		{Source: source, Recursive: true, RecursiveReadOnly: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	read(t, tree, "c1/rootfs/sub/file", "late")
	read(t, tree, "c1/mounts/0/sub/file", "late")
	if _, err := os.Stat(filepath.Join(tree.path, "c1/mounts/1/sub/file")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("below a mount that is not recursive: %v", err)
	}
	for name, want := range map[string]error{
		"c1/mounts/0/w":     nil,
		"c1/mounts/0/sub/w": nil,
		"c1/mounts/2/w":     unix.EROFS,
		"c1/mounts/2/sub/w": nil,
		"c1/mounts/3/w":     unix.EROFS,
		"c1/mounts/3/sub/w": unix.EROFS,
	} {
		if err := os.WriteFile(filepath.Join(tree.path, name), nil, 0o644); !errors.Is(err, want) {
			t.Errorf("write %s: %v, want %v", name, err, want)
		}
	}
}

// Containers that bind the same have one mount of it, as long as there is one of them.
func TestVolumes(t *testing.T) {
	tree := newTree(t)
	dir := files(t, "volume/file", "volume/dir/file", "other/file")
	root, volume := files(t), filepath.Join(dir, "volume")
	if err := os.Symlink(volume, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	remount := func(flags uintptr) {
		t.Helper()
		if err := in(hostNamespace(), func() error { return unix.Mount("", volume, "", unix.MS_BIND|unix.MS_REMOUNT|flags, "") }); err != nil {
			t.Fatal(err)
		}
	}
	bind := func(source, target string) {
		t.Helper()
		if err := in(hostNamespace(), func() error { return unix.Mount(source, target, "", unix.MS_BIND, "") }); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { in(hostNamespace(), func() error { return unix.Unmount(target, unix.MNT_DETACH) }) })
	}
	bind(volume, volume)
	ids := []specs.LinuxIDMapping{{HostID: 65536, Size: 65536}}
	add := func(id string, mounts ...guestspec.Mount) []string {
		t.Helper()
		if err := tree.Add(id, Rootfs{Path: root}, mounts); err != nil {
			t.Fatal(err)
		}
		var names []string
		for n := range mounts {
			name, err := os.Readlink(filepath.Join(tree.path, id, "mounts", fmt.Sprint(n)))
			if err != nil {
				t.Fatal(err)
			}
			names = append(names, strings.TrimPrefix(name, "../../.volumes/"))
		}
		return names
	}
	got := add("c1",
		guestspec.Mount{Destination: "/a", Source: volume, Recursive: true},
		guestspec.Mount{Destination: "/b", Source: filepath.Join(dir, "link"), Recursive: true}, // the same
		guestspec.Mount{Source: volume, Recursive: true, ReadOnly: true},
		guestspec.Mount{Source: volume, Recursive: true, RecursivePrivate: true},
		guestspec.Mount{Source: volume},
		guestspec.Mount{Source: volume, Recursive: true, UIDs: ids, GIDs: ids},
		guestspec.Mount{Source: filepath.Join(volume, "dir"), Recursive: true},
		guestspec.Mount{Source: filepath.Join(volume, "file"), File: true},
	)
	if want := []string{"0", "0", "1", "2", "3", "4", "5", "6"}; !slices.Equal(got, want) {
		t.Errorf("volumes %q, want %q", got, want)
	}
	mounts := mountsBelow(t, tree.path)
	got = add("c2",
		guestspec.Mount{Source: volume, Recursive: true},
		guestspec.Mount{Source: filepath.Join(volume, "file"), File: true},
		guestspec.Mount{Source: filepath.Join(dir, "other"), Recursive: true},
	)
	if want := []string{"0", "6", "7"}; !slices.Equal(got, want) {
		t.Errorf("volumes of the second container %q, want %q", got, want)
	}
	if now := mountsBelow(t, tree.path); now != mounts+2 { // other, and the root file system
		t.Errorf("%d mounts more", now-mounts)
	}
	// With other flags, or with more below, it is not what the first one has.
	remount(unix.MS_RDONLY)
	if got := add("c3", guestspec.Mount{Source: volume, Recursive: true}); got[0] != "8" {
		t.Errorf("of a mount that has become read-only: volume %s", got[0])
	}
	remount(0)
	bind(filepath.Join(dir, "other"), filepath.Join(volume, "dir"))
	got = add("c4", guestspec.Mount{Source: volume, Recursive: true}, guestspec.Mount{Source: volume})
	if want := []string{"9", "3"}; !slices.Equal(got, want) {
		t.Errorf("with a mount below: volumes %q, want %q", got, want)
	}
	read(t, tree, "c4/mounts/0/dir/file", "other/file")

	if err := tree.Remove("c1"); err != nil {
		t.Fatal(err)
	}
	read(t, tree, "c2/mounts/0/file", "volume/file")
	read(t, tree, "c2/mounts/1", "volume/file")
	if _, err := os.Stat(filepath.Join(tree.path, ".volumes/1")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a volume that nobody has is left: %v", err)
	}
	if err := tree.Add("c5", Rootfs{Path: root}, []guestspec.Mount{{Source: volume}, {Source: "/nonexistent"}}); err == nil {
		t.Error("a container was added whose second mount has no source")
	}
	for _, id := range []string{"c2", "c3", "c4"} {
		if err := tree.Remove(id); err != nil {
			t.Fatal(err)
		}
	}
	wantEmpty(t, tree)
}

// What the host mounts below a volume later appears in it, unless it is private;
// what it unmounts goes.
func TestPropagation(t *testing.T) {
	tree := newTree(t)
	source := files(t, "before/hidden")
	mountOnHost := func(path string) {
		t.Helper()
		err := in(hostNamespace(), func() error {
			err := os.MkdirAll(path, 0o755)
			if err == nil {
				err = unix.Mount("tmpfs", path, "tmpfs", 0, "")
			}
			if err == nil {
				err = unix.Mount("", path, "", unix.MS_SHARED, "")
			}
			if err == nil {
				err = os.WriteFile(filepath.Join(path, "file"), []byte("mounted"), 0o644)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	mountOnHost(source)
	t.Cleanup(func() {
		in(hostNamespace(), func() error { return unix.Unmount(source, unix.MNT_DETACH) })
	})
	mountOnHost(filepath.Join(source, "before"))
	err := tree.Add("c1", Rootfs{Path: files(t)}, []guestspec.Mount{
		{Source: source, Recursive: true},
		{Source: source, Recursive: true, Private: true},
		{Source: source, Recursive: true, RecursivePrivate: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	check := func(when, name string, want ...bool) {
		t.Helper()
		for n, want := range want {
			_, err := os.Stat(filepath.Join(tree.Mount("c1", n), name, "file"))
			if err != nil && !errors.Is(err, fs.ErrNotExist) || want != (err == nil) {
				t.Errorf("%s, %s in mount %d: %v", when, name, n, err)
			}
		}
	}
	check("at the start", "before", true, true, true)
	mountOnHost(filepath.Join(source, "late"))
	check("after a mount", "late", true, false, false)
	mountOnHost(filepath.Join(source, "before/late"))
	check("after a mount", "before/late", true, true, false)
	for _, name := range []string{"before/late", "before", "late"} {
		if err := in(hostNamespace(), func() error { return unix.Unmount(filepath.Join(source, name), 0) }); err != nil {
			t.Errorf("unmount %s: %v", name, err)
		}
	}
	check("after an unmount", "late", false, false, false)
	check("after an unmount", "before", false, true, true)
}

// The ids of files in a mapped mount are those of the user namespace, both ways.
func TestMappedIDs(t *testing.T) {
	tree := newTree(t)
	dir := files(t, "root/file", "volume/file")
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 65536, Size: 65536}}
	err := tree.Add("c1", Rootfs{Path: filepath.Join(dir, "root")}, []guestspec.Mount{
		{Destination: "/v", Source: filepath.Join(dir, "volume"), Recursive: true, UIDs: ids, GIDs: ids},
	})
	if errors.Is(err, unix.EINVAL) {
		t.Fatalf("the file system of %s cannot be mapped: %v", dir, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	owner := func(path string) [2]uint32 {
		var stat unix.Stat_t
		if err := unix.Stat(path, &stat); err != nil {
			t.Fatal(err)
		}
		return [2]uint32{stat.Uid, stat.Gid}
	}
	if ids := owner(filepath.Join(tree.path, "c1/mounts/0/file")); ids != [2]uint32{65536, 65536} {
		t.Errorf("the file belongs to %v", ids)
	}
	mapped := filepath.Join(tree.path, "c1/mounts/0")
	if err := os.Chown(filepath.Join(mapped, "file"), 65536+1000, 65536+1001); err != nil {
		t.Fatal(err)
	}
	if ids := owner(filepath.Join(dir, "volume/file")); ids != [2]uint32{1000, 1001} {
		t.Errorf("the file belongs to %v on the host", ids)
	}
}

func TestFailedAddLeavesNothing(t *testing.T) {
	tree := newTree(t)
	source := files(t, "file")
	for name, add := range map[string]func() error{
		"no rootfs":   func() error { return tree.Add("c1", Rootfs{Path: "/nonexistent"}, nil) },
		"rootfs file": func() error { return tree.Add("c1", Rootfs{Path: source + "/file"}, nil) },
		"no directory": func() error {
			return tree.Add("c1", Rootfs{Path: source}, []guestspec.Mount{{Source: source}, {Source: "/nonexistent"}})
		},
		"file over directory": func() error {
			return tree.Add("c1", Rootfs{Path: source}, []guestspec.Mount{{Source: source + "/file"}})
		},
		"bad overlay": func() error {
			return tree.Add("c1", Rootfs{Mounts: []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=/nonexistent"}}}}, nil)
		},
		"unknown file system": func() error {
			return tree.Add("c1", Rootfs{Path: source}, []guestspec.Mount{{Source: "x", Type: "nonsense"}})
		},
	} {
		if err := add(); err == nil {
			t.Errorf("%s: no error", name)
		}
		if n := mountsBelow(t, tree.path); n != 0 {
			t.Errorf("%s: %d mounts left", name, n)
		}
		wantEmpty(t, tree)
	}
}

// Nothing that the tree mounts appears on the host.
func TestHostSeesNothing(t *testing.T) {
	tree := newTree(t)
	if err := tree.Add("c1", Rootfs{Path: files(t, "file")}, nil); err != nil {
		t.Fatal(err)
	}
	err := in(hostNamespace(), func() error {
		data, err := os.ReadFile("/proc/thread-self/mountinfo")
		if err == nil && strings.Contains(string(data), tree.path) {
			t.Error("mounted on the host")
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
