//go:build privileged

package guestspec

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// A volume that the kubelet has in memory becomes the guest's, whole and in part; everything else is shared.
func TestMemoryVolume(t *testing.T) {
	kubelet := t.TempDir()
	mkdir := func(dir string, mode os.FileMode) {
		t.Helper()
		if err := os.MkdirAll(dir, mode); err != nil {
			t.Fatal(err)
		}
	}
	touch := func(file string) {
		t.Helper()
		if err := os.WriteFile(file, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	mount := func(source, target, fstype string, flags uintptr, data string) {
		t.Helper()
		if err := unix.Mount(source, target, fstype, flags, data); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(target, unix.MNT_DETACH) })
	}
	pod := filepath.Join(kubelet, "pods/u")
	memory := filepath.Join(pod, "volumes/kubernetes.io~empty-dir/memory")
	mkdir(memory, 0o755)
	mount("tmpfs", memory, "tmpfs", 0, "size=8m,mode=2777,gid=4000")
	part := filepath.Join(memory, "a/b")
	mkdir(part, 0o750)
	file := filepath.Join(memory, "file")
	touch(file)
	subPath := filepath.Join(pod, "volume-subpaths/memory/c/0")
	mkdir(subPath, 0o755)
	mount(part, subPath, "", unix.MS_BIND, "")
	filePath := filepath.Join(pod, "volume-subpaths/memory/c/1")
	touch(filePath)
	mount(file, filePath, "", unix.MS_BIND, "")
	disk := filepath.Join(pod, "volumes/kubernetes.io~empty-dir/disk")
	mkdir(disk, 0o755)
	secret := filepath.Join(pod, "volumes/kubernetes.io~secret/memory")
	other := filepath.Join(kubelet, "pods/other/volumes/kubernetes.io~empty-dir/memory")
	for _, dir := range []string{secret, other} {
		mkdir(dir, 0o755)
		mount("tmpfs", dir, "tmpfs", 0, "")
	}

	whole := MemoryVolume{Name: "memory", Bytes: 8 << 20, Mode: 0o2777, GID: 4000, Mountpoint: "/run/microvm/storage/c1/memory/0"}
	sub := whole
	sub.Directories = []Directory{{"a", 0o2750}, {"a/b", 0o2750}}
	for source, want := range map[string]*MemoryVolume{
		memory: &whole, subPath: &sub,
		filePath: nil, disk: nil, secret: nil, other: nil, part: nil,
	} {
		spec := base()
		spec.Annotations = map[string]string{sandboxUID: "u"}
		spec.Mounts = []specs.Mount{{Destination: "/v", Type: "bind", Source: source, Options: []string{"rbind", "ro"}}}
		r := rewrite(t, spec, first)
		if want == nil {
			if len(r.Memory) > 0 || len(r.Mounts) != 1 {
				t.Errorf("%s: not shared: %+v", source, r.Memory)
			}
			continue
		}
		if len(r.Mounts) > 0 || len(r.Memory) != 1 || !reflect.DeepEqual(r.Memory[0], *want) {
			t.Errorf("%s: %+v, want %+v", source, r.Memory, *want)
		}
		if m := r.Spec.Mounts[0]; m.Source != want.Mountpoint || !reflect.DeepEqual(m.Options, []string{"rbind", "ro"}) {
			t.Errorf("%s: mount %+v", source, m)
		}
	}
}
