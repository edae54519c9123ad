package shim

import (
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
)

// describeRootfs is a short form, one line for each mount.
func describeRootfs(r *guestRootfs) string {
	if r == nil {
		return "host"
	}
	var lines []string
	for _, s := range r.storages {
		var parts []string
		for _, d := range s.disks {
			mode := "rw"
			if d.readOnly {
				mode = "ro"
			}
			if d.pmem != (s.request.Fstype == "erofs") {
				mode += " not as it should be"
			}
			if d.exclusive {
				mode += " exclusive"
			}
			parts = append(parts, d.path+" "+mode)
		}
		for _, d := range s.request.Directories {
			parts = append(parts, fmt.Sprintf("mkdir %s %o", d.Path, d.Mode))
		}
		lines = append(lines, fmt.Sprintf("%s [%s] %s on %s", s.request.Fstype, strings.Join(s.request.Options, ","), strings.Join(parts, ", "), s.request.Mountpoint))
	}
	return strings.Join(append(lines, "root "+r.path), "\n")
}

func TestPlanGuestRootfs(t *testing.T) {
	const at = "/run/microvm/storage/c1/"
	erofs := func(name string, options ...string) mount.Mount {
		return mount.Mount{Type: "erofs", Source: "/layers/" + name, Options: append([]string{"ro", "loop"}, options...)}
	}
	writable := mount.Mount{Type: "ext4", Source: "/snapshots/1/rwlayer.img", Options: []string{"rw", "loop"}}
	overlay := func(options ...string) mount.Mount {
		return mount.Mount{Type: "format/mkdir/overlay", Source: "overlay", Options: options}
	}
	upper := []string{
		"X-containerd.mkdir.path={{ mount 0 }}/upper:0755", "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
		"workdir={{ mount 0 }}/work", "upperdir={{ mount 0 }}/upper",
	}
	many := []mount.Mount{writable}
	for i := range maxRootDisks {
		many = append(many, erofs(fmt.Sprint(i)))
	}
	for _, tc := range []struct {
		name   string
		mounts []mount.Mount
		want   []string
		kind   func(error) bool
	}{
		{name: "nothing", want: []string{"host"}},
		{name: "overlayfs", mounts: []mount.Mount{{Type: "overlay", Options: []string{"lowerdir=/a:/b", "upperdir=/c", "workdir=/d"}}}, want: []string{"host"}},
		{name: "native", mounts: []mount.Mount{{Type: "bind", Source: "/a", Options: []string{"rbind", "rw"}}}, want: []string{"host"}},
		{name: "a path that looks like the guest's", mounts: []mount.Mount{{Type: "bind", Source: at + "0"}}, want: []string{"host"}},
		{name: "blockfile", mounts: []mount.Mount{{Type: "ext4", Source: "/snapshots/1", Options: []string{"loop", "rw"}}},
			want: []string{"ext4 [rw] /snapshots/1 rw exclusive on " + at + "0", "root " + at + "0"}},
		{name: "devmapper, to look at", mounts: []mount.Mount{{Type: "xfs", Source: "/dev/mapper/pool-1", Options: []string{"nouuid", "ro"}}},
			want: []string{"xfs [nouuid,ro] /dev/mapper/pool-1 ro on " + at + "0", "root " + at + "0"}},
		{name: "xfs without nouuid", mounts: []mount.Mount{{Type: "xfs", Source: "/snapshots/1"}},
			want: []string{"xfs [nouuid] /snapshots/1 rw exclusive on " + at + "0", "root " + at + "0"}},
		{name: "one erofs layer, to look at", mounts: []mount.Mount{erofs("1")},
			want: []string{"erofs [ro,dax=always] /layers/1 ro on " + at + "0", "root " + at + "0"}},
		{name: "erofs with a writable layer in an image", mounts: []mount.Mount{writable, erofs("2"), erofs("1"), overlay(append(upper, "lowerdir={{ overlay 1 2 }}")...)},
			want: []string{
				"ext4 [rw] /snapshots/1/rwlayer.img rw exclusive on " + at + "0",
				"erofs [ro,dax=always] /layers/2 ro on " + at + "1",
				"erofs [ro,dax=always] /layers/1 ro on " + at + "2",
				"overlay [workdir=" + at + "0/work,upperdir=" + at + "0/upper,lowerdir=" + at + "1:" + at + "2] mkdir " + at + "0/upper 755, mkdir " + at + "0/work 755 on " + at + "3",
				"root " + at + "3",
			}},
		{name: "erofs, merged", mounts: []mount.Mount{writable, erofs("meta", "device=/layers/1", "device=/layers/2"), overlay(append(upper, "lowerdir={{ mount 1 }}")...)},
			want: []string{
				"ext4 [rw] /snapshots/1/rwlayer.img rw exclusive on " + at + "0",
				"erofs [ro,dax=always] /layers/meta ro, /layers/1 ro, /layers/2 ro on " + at + "1",
				"overlay [workdir=" + at + "0/work,upperdir=" + at + "0/upper,lowerdir=" + at + "1] mkdir " + at + "0/upper 755, mkdir " + at + "0/work 755 on " + at + "2",
				"root " + at + "2",
			}},
		{name: "erofs, one layer to look at", mounts: []mount.Mount{erofs("1"), {Type: "format/bind", Source: "{{ mount 0 }}", Options: []string{"ro", "rbind"}}},
			want: []string{"erofs [ro,dax=always] /layers/1 ro on " + at + "0", "root " + at + "0"}},
		{name: "erofs, layers to look at", mounts: []mount.Mount{erofs("2"), erofs("1"), overlay("ro", "lowerdir={{ overlay 0 1 }}")},
			want: []string{
				"erofs [ro,dax=always] /layers/2 ro on " + at + "0", "erofs [ro,dax=always] /layers/1 ro on " + at + "1",
				"overlay [ro,lowerdir=" + at + "0:" + at + "1]  on " + at + "2", "root " + at + "2",
			}},
		{name: "erofs that says rw", mounts: []mount.Mount{{Type: "erofs", Source: "/layers/1", Options: []string{"rw"}}},
			want: []string{"erofs [rw,dax=always] /layers/1 ro on " + at + "0", "root " + at + "0"}},

		// The host's part.
		{name: "erofs with a writable layer in directories", mounts: []mount.Mount{erofs("2"), erofs("1"), overlay("workdir=/snapshots/1/work", "upperdir=/snapshots/1/fs", "lowerdir={{ overlay 0 1 }}")},
			want: []string{"host"}},
		{name: "erofs with mapped ids", mounts: []mount.Mount{writable, erofs("1"), overlay(append(upper, "uidmap=0:1000:1", "lowerdir={{ mount 1 }}")...)}, want: []string{"host"}},
		{name: "an empty image", mounts: []mount.Mount{writable, {Type: "format/mkdir/bind", Source: "{{ mount 0 }}/upper", Options: []string{"X-containerd.mkdir.path={{ mount 0 }}/upper:0755", "rw"}}},
			want: []string{"host"}},
		{name: "a directory elsewhere", mounts: []mount.Mount{writable, erofs("1"), overlay("X-containerd.mkdir.path=/etc/x", "lowerdir={{ mount 1 }}")}, want: []string{"host"}},
		{name: "one lower directory of the host's", mounts: []mount.Mount{erofs("1"), overlay("lowerdir={{ mount 0 }}:/x")}, want: []string{"host"}},
		{name: "out of the guest's", mounts: []mount.Mount{erofs("1"), overlay("lowerdir={{ mount 0 }}/../../../../x")}, want: []string{"host"}},
		{name: "too many layers", mounts: append(many, overlay(append(upper, fmt.Sprintf("lowerdir={{ overlay 1 %d }}", maxRootDisks))...)), want: []string{"host"}},
		{name: "on a part", mounts: []mount.Mount{{Type: "ext4", Source: "/a", Target: "x"}}, want: []string{"host"}},

		{name: "dm-verity", mounts: []mount.Mount{erofs("1", "X-containerd.dmverity=/layers/1.dmverity")}, kind: errdefs.IsNotImplemented},
		{name: "a mount that is not there", mounts: []mount.Mount{erofs("1"), overlay("lowerdir={{ mount 1 }}")}, kind: errdefs.IsInvalidArgument},
		{name: "an image that is to be made", mounts: []mount.Mount{{Type: "mkfs/ext4", Source: "/a"}}, kind: errdefs.IsNotImplemented},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r, err := planGuestRootfs("c1", tc.mounts)
			if tc.kind != nil {
				if !tc.kind(err) {
					t.Errorf("%v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Split(describeRootfs(r), "\n"); !reflect.DeepEqual(got, tc.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tc.want, "\n"))
			}
		})
	}
}
