package share

import (
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
)

func TestResolve(t *testing.T) {
	points := []string{"/m/0", "/m/1", "/m/2"}
	for _, tc := range []struct {
		name        string
		in, want    mount.Mount
		directories []Directory
		kind        func(error) bool
	}{
		{name: "a plain mount stays", in: mount.Mount{Type: "ext4", Source: "{{ mount 0 }}", Options: []string{"ro", "X-containerd.mkdir.path=/x"}},
			want: mount.Mount{Type: "ext4", Source: "{{ mount 0 }}", Options: []string{"ro", "X-containerd.mkdir.path=/x"}}},
		{name: "bind of another", in: mount.Mount{Type: "format/bind", Source: "{{ mount 2 }}/upper", Options: []string{"rbind"}},
			want: mount.Mount{Type: "bind", Source: "/m/2/upper", Options: []string{"rbind"}}},
		{name: "erofs, with a writable layer",
			in: mount.Mount{Type: "format/mkdir/overlay", Source: "overlay", Options: []string{
				"X-containerd.mkdir.path={{ mount 0 }}/upper:0755", "X-containerd.mkdir.path={{ mount 0 }}/work",
				"workdir={{ mount 0 }}/work", "upperdir={{mount 0}}/upper", "lowerdir={{ overlay 1 2 }}",
			}},
			want:        mount.Mount{Type: "overlay", Source: "overlay", Options: []string{"workdir=/m/0/work", "upperdir=/m/0/upper", "lowerdir=/m/1:/m/2"}},
			directories: []Directory{{"/m/0/upper", 0o755}, {"/m/0/work", 0o700}}},
		{name: "the other way round", in: mount.Mount{Type: "format/overlay", Options: []string{"lowerdir={{ overlay 2 0 }}", "x={{ overlay 1 1 }}"}},
			want: mount.Mount{Type: "overlay", Options: []string{"lowerdir=/m/2:/m/1:/m/0", "x=/m/1"}}},
		{name: "owner root", in: mount.Mount{Type: "mkdir/bind", Options: []string{"X-containerd.mkdir.path=/x:711:0:0"}},
			want: mount.Mount{Type: "bind"}, directories: []Directory{{"/x", 0o711}}},

		{name: "no such mount", in: mount.Mount{Type: "format/bind", Source: "{{ mount 3 }}"}, kind: errdefs.IsInvalidArgument},
		{name: "a number that is too large", in: mount.Mount{Type: "format/bind", Source: "{{ mount 99999999999999999999 }}"}, kind: errdefs.IsInvalidArgument},
		{name: "no such range", in: mount.Mount{Type: "format/overlay", Options: []string{"{{ overlay 4 0 }}"}}, kind: errdefs.IsInvalidArgument},
		{name: "half a range", in: mount.Mount{Type: "format/overlay", Options: []string{"{{ overlay 1 }}"}}, kind: errdefs.IsNotImplemented},
		{name: "a range of a mount", in: mount.Mount{Type: "format/overlay", Options: []string{"{{ mount 1 2 }}"}}, kind: errdefs.IsNotImplemented},
		{name: "another placeholder", in: mount.Mount{Type: "format/bind", Source: "{{ source 0 }}"}, kind: errdefs.IsNotImplemented},
		{name: "another prefix", in: mount.Mount{Type: "mkfs/ext4", Source: "/x"}, kind: errdefs.IsNotImplemented},
		{name: "mode", in: mount.Mount{Type: "mkdir/bind", Options: []string{"X-containerd.mkdir.path=/x:9"}}, kind: errdefs.IsInvalidArgument},
		{name: "mode with more than permissions", in: mount.Mount{Type: "mkdir/bind", Options: []string{"X-containerd.mkdir.path=/x:4755"}}, kind: errdefs.IsInvalidArgument},
		{name: "another owner", in: mount.Mount{Type: "mkdir/bind", Options: []string{"X-containerd.mkdir.path=/x:0755:1:0"}}, kind: errdefs.IsInvalidArgument},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, directories, err := Resolve(tc.in, points)
			if tc.kind != nil {
				if !tc.kind(err) {
					t.Errorf("%+v, %v", got, err)
				}
				return
			}
			if err != nil || !reflect.DeepEqual(got, tc.want) || !reflect.DeepEqual(directories, tc.directories) {
				t.Errorf("%+v, %+v, %v", got, directories, err)
			}
		})
	}
}

func FuzzResolve(f *testing.F) {
	f.Add("format/mkdir/overlay", "{{ mount 0 }}/x", "X-containerd.mkdir.path={{ overlay 0 1 }}:0755:0:0")
	f.Add("mkfs/ext4", "{{ overlay 9 }}", "{{}}")
	f.Fuzz(func(t *testing.T, kind, source, option string) {
		m, _, err := Resolve(mount.Mount{Type: kind, Source: source, Options: []string{option}}, []string{"/a", "/b"})
		if err == nil && (IsTemplate(m) || strings.HasPrefix(kind, "format/") && strings.Contains(m.Source, "{{")) {
			t.Errorf("%+v is left", m)
		}
	})
}
