package guestspec

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// A mount that is to be mapped, and does not say how, is mapped as its container's user namespace is.
func TestIDMap(t *testing.T) {
	namespace := []specs.LinuxIDMapping{{HostID: 65536, Size: 65536}}
	own := []specs.LinuxIDMapping{{HostID: 1000, Size: 10}}
	dir := t.TempDir()
	for _, test := range []struct {
		name       string
		option     string
		uids, gids []specs.LinuxIDMapping
		alone      bool // the container has no user namespace
		want       Mount
		refused    bool
	}{
		{name: "the namespace's", option: "idmap", want: Mount{UIDs: namespace, GIDs: namespace}},
		{name: "the namespace's, below as well", option: "ridmap", want: Mount{UIDs: namespace, GIDs: namespace, RecursiveIDs: true}},
		{name: "its own", option: "idmap", uids: own, gids: own, want: Mount{UIDs: own, GIDs: own}},
		{name: "its own, without a namespace", option: "idmap", uids: own, gids: own, alone: true, want: Mount{UIDs: own, GIDs: own}},
		{name: "not asked for", option: "rw"},
		{name: "none to take", option: "idmap", alone: true, refused: true},
		{name: "of users only", option: "idmap", uids: own, refused: true},
		{name: "of groups only", option: "rw", gids: own, refused: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			spec := base()
			// Without the namespace they mean nothing.
			spec.Linux.UIDMappings, spec.Linux.GIDMappings = namespace, namespace
			if !test.alone {
				spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
			}
			spec.Mounts = []specs.Mount{{
				Destination: "/mnt", Type: "bind", Source: dir, Options: []string{"rbind", test.option},
				UIDMappings: test.uids, GIDMappings: test.gids,
			}}
			r, err := Rewrite(spec, first)
			if test.refused {
				if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "mount /mnt: ids are to be mapped") {
					t.Errorf("error %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			test.want.Destination, test.want.Source, test.want.Recursive = "/mnt", dir, true
			if !reflect.DeepEqual(r.Mounts, []Mount{test.want}) {
				t.Errorf("on the host %+v\nwant %+v", r.Mounts, test.want)
			}
			m := r.Spec.Mounts[0]
			if m.UIDMappings != nil || m.GIDMappings != nil || slices.Contains(m.Options, "idmap") || slices.Contains(m.Options, "ridmap") {
				t.Errorf("mapped once more in the guest: %+v", m)
			}
		})
	}
}

// The flags of a mount are the guest's: it is the guest's kernel that executes and opens what is there. The options of a
// file system are the host's, which mounts it.
func TestMountFlags(t *testing.T) {
	for _, test := range []struct{ options, host, guest []string }{
		{nil, nil, nil},
		{
			[]string{"nosuid", "nodev", "noexec", "data=ordered", "noatime", "ro"},
			[]string{"nosuid", "nodev", "noexec", "data=ordered", "noatime", "ro"},
			[]string{"nosuid", "nodev", "noexec", "noatime", "ro"},
		},
		{
			[]string{"ro", "suid", "rw", "dev", "exec", "sync", "nodiratime", "strictatime"},
			[]string{"ro", "suid", "rw", "dev", "exec", "sync", "nodiratime", "strictatime"},
			[]string{"ro", "suid", "rw", "dev", "exec", "nodiratime", "strictatime"},
		},
		// What is read-only is so on the host's side.
		{[]string{"rro", "rnoatime", "relatime"}, []string{"ro", "noatime", "relatime"}, []string{"rro", "rnoatime", "relatime"}},
		{[]string{"ro", "rrw"}, []string{"ro"}, []string{"ro", "rrw"}},
		// Words that would be taken for the file system's on the host.
		{
			[]string{"nosymfollow", "rnosymfollow", "rprivate", "rslave", "unbindable", "noload"},
			[]string{"noload"},
			[]string{"nosymfollow", "rnosymfollow", "rprivate", "rslave", "unbindable"},
		},
	} {
		spec := base()
		spec.Mounts = []specs.Mount{{Destination: "/data", Type: "ext4", Source: "/dev/sdz", Options: test.options}}
		r := rewrite(t, spec, first)
		if want := (Mount{Destination: "/data", Source: "/dev/sdz", Type: "ext4", Options: test.host}); !reflect.DeepEqual(r.Mounts, []Mount{want}) {
			t.Errorf("%q: on the host %+v\nwant %+v", test.options, r.Mounts, want)
		}
		if got, want := r.Spec.Mounts[0].Options, append([]string{"rbind"}, test.guest...); !slices.Equal(got, want) {
			t.Errorf("%q: in the guest %q, want %q", test.options, got, want)
		}
	}
}

// The bind of a directory of the host's has its flags in the guest.
func TestBindFlags(t *testing.T) {
	options := []string{"rbind", "nosuid", "nodev", "noexec", "nosymfollow", "noatime", "rnosuid", "rro", "rslave"}
	spec := base()
	spec.Mounts = []specs.Mount{{Destination: "/data", Type: "bind", Source: t.TempDir(), Options: slices.Clone(options)}}
	if got := rewrite(t, spec, first).Spec.Mounts[0].Options; !slices.Equal(got, options) {
		t.Errorf("in the guest %q, want %q", got, options)
	}
}
