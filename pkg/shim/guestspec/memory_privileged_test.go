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
	mount := func(source, dir, fstype string, flags uintptr, data string) {
		t.Helper()
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(source, dir, fstype, flags, data); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	}
	pod := filepath.Join(kubelet, "pods/u")
	memory := filepath.Join(pod, "volumes/kubernetes.io~empty-dir/memory")
	mount("tmpfs", memory, "tmpfs", 0, "size=8m,mode=2777,gid=4000")
	part := filepath.Join(memory, "a/b")
	if err := os.MkdirAll(part, 0o750); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(memory, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	subPath := filepath.Join(pod, "volume-subpaths/memory/c/0")
	mount(part, subPath, "", unix.MS_BIND, "")
	filePath := filepath.Join(pod, "volume-subpaths/memory/c/1")
	if err := os.WriteFile(filePath, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(file, filePath, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(filePath, unix.MNT_DETACH) })
	disk := filepath.Join(pod, "volumes/kubernetes.io~empty-dir/disk")
	secret := filepath.Join(pod, "volumes/kubernetes.io~secret/memory")
	mount("tmpfs", secret, "tmpfs", 0, "")
	other := filepath.Join(kubelet, "pods/other/volumes/kubernetes.io~empty-dir/memory")
	mount("tmpfs", other, "tmpfs", 0, "")
	if err := os.MkdirAll(disk, 0o755); err != nil {
		t.Fatal(err)
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
