//go:build privileged

package share

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// A root file system that the snapshotter describes by its layers, as that of
// erofs does.
func TestRootfsOfLayers(t *testing.T) {
	tree := newTree(t)
	upper := mount.Mount{Type: "tmpfs", Source: "tmpfs", Options: []string{"mode=755"}}
	layer := func(dir string) mount.Mount {
		return mount.Mount{Type: "bind", Source: dir, Options: []string{"ro", "rbind"}}
	}
	overlay := mount.Mount{Type: "format/mkdir/overlay", Source: "overlay", Options: []string{
		"X-containerd.mkdir.path={{ mount 0 }}/upper:0755", "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
		"upperdir={{ mount 0 }}/upper", "workdir={{ mount 0 }}/work", "lowerdir={{ overlay 1 2 }}",
	}}
	top, bottom := files(t, "top", "both/top"), files(t, "bottom", "both/bottom")
	if err := tree.Add("c1", Rootfs{Mounts: []mount.Mount{upper, layer(top), layer(bottom), overlay}}, nil); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"top", "bottom", "both/top", "both/bottom"} {
		read(t, tree, "c1/rootfs/"+name, name)
	}
	if err := os.WriteFile(filepath.Join(tree.path, "c1/rootfs/new"), []byte("new"), 0o644); err != nil {
		t.Error(err)
	}
	if n := mountsBelow(t, tree.base); n != 2 { // the tree and what is in it
		t.Errorf("%d mounts", n)
	}
	if err := tree.Remove("c1"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(tree.path, "c1")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("something is left: %v", err)
	}

	// A layer that leads out of itself; the second time it is there.
	evil := t.TempDir()
	outside := t.TempDir()
	for name, to := range map[string]string{"link": outside, "up": "."} {
		if err := os.Symlink(to, filepath.Join(evil, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{"{{ mount 0 }}/link/x", "{{ mount 0 }}/../x", outside + "/x", "{{ mount 0 }}"} {
		mounts := []mount.Mount{{Type: "bind", Source: evil, Options: []string{"rbind"}}, {
			Type: "format/mkdir/bind", Source: "{{ mount 0 }}", Options: []string{"rbind", "X-containerd.mkdir.path=" + path},
		}}
		if err := tree.Add("c1", Rootfs{Mounts: mounts}, nil); err == nil {
			t.Errorf("%s was made", path)
			tree.Remove("c1")
		}
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("outside: %v, %v", left, err)
	}
	// What a guest that had the layer for a disk may have left in the place of the
	// directories.
	for _, m := range []mount.Mount{
		{Type: "format/mkdir/bind", Source: "{{ mount 0 }}/link", Options: []string{"rbind", "X-containerd.mkdir.path={{ mount 0 }}/link"}},
		{Type: "format/bind", Source: "{{ mount 0 }}/up/link", Options: []string{"rbind"}},
		{Type: "format/overlay", Source: "overlay", Options: []string{"lowerdir={{ mount 0 }}/link:" + top}},
		{Type: "format/mkdir/overlay", Source: "overlay", Options: []string{
			"X-containerd.mkdir.path={{ mount 0 }}/link", "X-containerd.mkdir.path={{ mount 0 }}/work",
			"upperdir={{ mount 0 }}/link", "workdir={{ mount 0 }}/work", "lowerdir=" + top,
		}},
	} {
		mounts := []mount.Mount{{Type: "bind", Source: evil, Options: []string{"rbind"}}, m}
		if err := tree.Add("c1", Rootfs{Mounts: mounts}, nil); !errors.Is(err, unix.ELOOP) && !errors.Is(err, unix.ENOTDIR) {
			t.Errorf("%+v: %v", m, err)
			tree.Remove("c1")
		}
	}
	if _, err := os.Stat(filepath.Join(tree.path, "c1")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("something is left: %v", err)
	}
}

// erofsLayer makes an image of files.
func erofsLayer(t *testing.T, names ...string) mount.Mount {
	t.Helper()
	image := filepath.Join(t.TempDir(), "layer.erofs")
	if out, err := exec.Command("mkfs.erofs", "--quiet", image, files(t, names...)).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.erofs: %v: %s", err, out)
	}
	return mount.Mount{Type: "erofs", Source: image, Options: []string{"ro", "loop"}}
}

// wantNoLoops fails the test if an image of its is in use.
func wantNoLoops(t *testing.T) {
	t.Helper()
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, loop := range loops {
		if image, err := os.ReadFile(loop); err == nil && strings.HasPrefix(string(image), filepath.Dir(t.TempDir())+"/") {
			t.Errorf("%s is still in use", strings.TrimSpace(string(image)))
		}
	}
}

// Layers of erofs and a writable layer in directories, as the snapshotter has it
// by default.
func TestRootfsOfErofs(t *testing.T) {
	tree := newTree(t)
	// An overlay cannot be the upper layer of another: not on every root there is.
	snapshot := t.TempDir()
	if err := unix.Mount("tmpfs", snapshot, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(snapshot, unix.MNT_DETACH)
	for _, dir := range []string{"fs", "work"} {
		if err := os.Mkdir(filepath.Join(snapshot, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mounts := []mount.Mount{erofsLayer(t, "top"), erofsLayer(t, "bottom"), {Type: "format/mkdir/overlay", Source: "overlay", Options: []string{
		"workdir=" + snapshot + "/work", "upperdir=" + snapshot + "/fs", "lowerdir={{ overlay 0 1 }}",
	}}}
	if err := tree.Add("c1", Rootfs{Mounts: mounts}, nil); err != nil {
		t.Fatal(err)
	}
	read(t, tree, "c1/rootfs/top", "top")
	read(t, tree, "c1/rootfs/bottom", "bottom")
	if err := os.Remove(filepath.Join(tree.path, "c1/rootfs/bottom")); err != nil {
		t.Error(err)
	}
	if err := tree.Remove("c1"); err != nil {
		t.Fatal(err)
	}
	wantNoLoops(t)
}

// A guest that has a container looks for the writable layer of the next one, to
// have links to a directory of the host in the place of the overlay's directories.
func TestLayersAreOutOfReach(t *testing.T) {
	tree := newTree(t)
	host := files(t, "etc/shadow", "var/file")
	root, err := tree.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	guest := t.TempDir() // what the VMM has for its root
	if err := unix.MoveMount(int(root.Fd()), "", unix.AT_FDCWD, guest, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(guest, unix.MNT_DETACH)

	// As the erofs snapshotter has it with default_size, in more layers than there
	// may be disks.
	image := filepath.Join(t.TempDir(), "rwlayer.img")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 16<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", image).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	mounts := []mount.Mount{{Type: "ext4", Source: image, Options: []string{"rw", "loop"}}}
	for n := range 9 {
		mounts = append(mounts, erofsLayer(t, fmt.Sprint("layer", n)))
	}
	mounts = append(mounts, mount.Mount{Type: "format/mkdir/overlay", Source: "overlay", Options: []string{
		"X-containerd.mkdir.path={{ mount 0 }}/upper:0755", "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
		"workdir={{ mount 0 }}/work", "upperdir={{ mount 0 }}/upper", "lowerdir={{ overlay 1 9 }}",
	}})

	added, ended := make(chan struct{}), make(chan struct{})
	seen := map[string]bool{}
	go func() {
		defer close(ended)
		for {
			filepath.WalkDir(filepath.Join(guest, "c2"), func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					seen[strings.TrimPrefix(path, guest+"/")] = true
					os.Symlink(filepath.Join(host, "etc"), filepath.Join(path, "upper"))
					os.Symlink(filepath.Join(host, "var"), filepath.Join(path, "work"))
				}
				return nil
			})
			select {
			case <-added:
				return
			default:
			}
		}
	}()
	err = tree.Add("c2", Rootfs{Mounts: mounts}, nil)
	close(added)
	<-ended
	if err != nil {
		t.Fatal(err)
	}
	read(t, tree, "c2/rootfs/layer8", "layer8")
	if data, err := os.ReadFile(filepath.Join(guest, "c2/rootfs/shadow")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the guest reads a file of the host: %q, %v", data, err)
	}
	if _, err := os.Stat(filepath.Join(host, "var/file")); err != nil {
		t.Errorf("the host's work directory: %v", err)
	}
	for _, name := range []string{"c2", "c2/rootfs", "c2/mounts"} {
		delete(seen, name)
	}
	if n := mountsBelow(t, guest); len(seen) > 0 || n != 1 {
		t.Errorf("the guest has seen %v, and has %d mounts", seen, n)
	}
	if err := tree.Remove("c2"); err != nil {
		t.Fatal(err)
	}
	wantNoLoops(t)
}
