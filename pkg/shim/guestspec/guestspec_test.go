package guestspec

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// base is what containerd makes for `ctr run`, as far as it matters here.
func base() *specs.Spec {
	return &specs.Spec{
		Version:  "1.2.0",
		Process:  &specs.Process{Args: []string{"sh"}, Cwd: "/"},
		Root:     &specs.Root{Path: "rootfs"},
		Hostname: "host",
		Linux: &specs.Linux{
			CgroupsPath: "/default/c1",
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
				{Type: specs.MountNamespace}, {Type: specs.NetworkNamespace},
			},
		},
	}
}

var first = Input{ID: "c1", Bundle: "/bundle", First: true}

func rewrite(t *testing.T, spec *specs.Spec, in Input) *Result {
	t.Helper()
	r, err := Rewrite(spec, in)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRoot(t *testing.T) {
	spec := base()
	spec.Root.Readonly = true
	in := first
	in.Terminal = true
	r := rewrite(t, spec, in)
	if want := (specs.Root{Path: "/run/microvm/shared/c1/rootfs", Readonly: true}); *r.Spec.Root != want {
		t.Errorf("root %+v", *r.Spec.Root)
	}
	in.Root = "/run/microvm/storage/c1/0"
	if r := rewrite(t, base(), in); r.Spec.Root.Path != in.Root {
		t.Errorf("root %+v", *r.Spec.Root)
	}
	if !r.Spec.Process.Terminal || r.Spec.Linux.CgroupsPath != "" {
		t.Errorf("terminal %v, cgroup %q", r.Spec.Process.Terminal, r.Spec.Linux.CgroupsPath)
	}
}

func TestNamespaces(t *testing.T) {
	ns := func(pairs ...string) (list []specs.LinuxNamespace) {
		for i := 0; i < len(pairs); i += 2 {
			list = append(list, specs.LinuxNamespace{Type: specs.LinuxNamespaceType(pairs[i]), Path: pairs[i+1]})
		}
		return list
	}
	sandbox, other := "", "c9"
	tasks := map[uint32]string{7: sandbox, 9: other}
	mapping := []specs.LinuxIDMapping{{HostID: 65536, Size: 65536}}
	for _, test := range []struct {
		name     string
		first    bool
		in, want []specs.LinuxNamespace
		hostname string
		pids     *string
	}{
		{"the first container", true,
			ns("pid", "", "ipc", "", "uts", "", "mount", "", "network", "", "cgroup", "", "user", ""),
			ns("pid", "", "mount", "", "cgroup", "", "user", ""), "", nil},
		{"the first, with a network of its own", true,
			ns("pid", "", "ipc", "", "uts", "", "mount", "", "network", "/run/netns/cni-1"),
			ns("pid", "", "mount", "", "cgroup", ""), "", nil},
		{"a pod's container", false,
			ns("pid", "", "ipc", "/proc/7/ns/ipc", "uts", "/proc/7/ns/uts", "mount", "", "network", "/proc/7/ns/net"),
			ns("pid", "", "mount", "", "cgroup", ""), "", nil},
		{"one that shares the pod's pids", false,
			ns("pid", "/proc/7/ns/pid", "ipc", "/proc/7/ns/ipc", "uts", "/proc/7/ns/uts", "mount", "", "network", "/proc/7/ns/net"),
			ns("mount", "", "cgroup", ""), "", &sandbox},
		{"one that shares another one's pids", false,
			ns("pid", "/proc/9/ns/pid", "ipc", "/proc/7/ns/ipc", "uts", "/proc/7/ns/uts", "mount", "", "network", "/proc/7/ns/net"),
			ns("mount", "", "cgroup", ""), "", &other},
		{"one with the pod's user namespace", false,
			ns("pid", "", "ipc", "/proc/7/ns/ipc", "uts", "/proc/7/ns/uts", "mount", "", "network", "/proc/7/ns/net", "user", "/proc/7/ns/user"),
			ns("pid", "", "mount", "", "user", "", "cgroup", ""), "", nil},
		{"namespaces that the caller keeps by mounts", false,
			ns("pid", "", "ipc", "/run/ipcns/1", "uts", "/run/utsns/1", "mount", "", "network", "/run/netns/1", "cgroup", ""),
			ns("pid", "", "mount", "", "cgroup", ""), "", nil},
		{"another one in the group that shares nothing", false,
			ns("pid", "", "ipc", "", "uts", "", "mount", "", "network", ""),
			ns("pid", "", "ipc", "", "uts", "", "mount", "", "cgroup", ""), "host", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			spec := base()
			spec.Linux.Namespaces = test.in
			spec.Linux.UIDMappings, spec.Linux.GIDMappings = mapping, mapping
			in := first
			in.First, in.Tasks = test.first, tasks
			r := rewrite(t, spec, in)
			if !reflect.DeepEqual(r.Spec.Linux.Namespaces, test.want) {
				t.Errorf("got  %v\nwant %v", r.Spec.Linux.Namespaces, test.want)
			}
			if r.Spec.Hostname != test.hostname {
				t.Errorf("host name %q", r.Spec.Hostname)
			}
			if !reflect.DeepEqual(r.PIDs, test.pids) {
				t.Errorf("pids of %v, want %v", r.PIDs, test.pids)
			}
		})
	}
}

// On a host with cgroup version 1 no container has a cgroup namespace; one that
// is privileged is to see them all.
func TestPrivilegedSeesAllCgroups(t *testing.T) {
	spec := base()
	spec.Linux.Resources = &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}}
	if r := rewrite(t, spec, first); hasNamespace(r.Spec.Linux.Namespaces, specs.CgroupNamespace) {
		t.Errorf("namespaces %v", r.Spec.Linux.Namespaces)
	}
}

// tree is a directory with something of each kind that is bound.
func tree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, err := range []error{
		os.Mkdir(filepath.Join(dir, "dir"), 0o755),
		os.WriteFile(filepath.Join(dir, "file"), nil, 0o644),
		os.Symlink("dir", filepath.Join(dir, "link")),
		os.Symlink("/proc/sys", filepath.Join(dir, "sneaky")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestMounts(t *testing.T) {
	dir := tree(t)
	mount := func(kind, source string, options ...string) specs.Mount {
		return specs.Mount{Destination: "/mnt", Type: kind, Source: source, Options: options}
	}
	ids := []specs.LinuxIDMapping{{HostID: 65536, Size: 65536}}
	mapped := func(m specs.Mount) specs.Mount {
		m.UIDMappings, m.GIDMappings = ids, ids
		return m
	}
	const shared = "/run/microvm/shared/c1/mounts/0"
	for _, test := range []struct {
		name  string
		mount specs.Mount
		want  specs.Mount
		host  *Mount
	}{
		{"directory", mount("bind", dir+"/dir", "rbind", "rw"), mount("bind", shared, "rbind", "rw"),
			&Mount{Source: dir + "/dir", Recursive: true}},
		{"file, read-only", mount("bind", dir+"/file", "bind", "ro"), mount("bind", shared, "bind", "ro"),
			&Mount{Source: dir + "/file", File: true, ReadOnly: true}},
		{"the last word counts", mount("bind", dir+"/dir", "ro", "rbind", "rw", "bind"), mount("bind", shared, "ro", "rbind", "rw", "bind"),
			&Mount{Source: dir + "/dir"}},
		{"recursively read-only", mount("bind", dir+"/dir", "rbind", "ro", "rro"), mount("bind", shared, "rbind", "ro", "rro"),
			&Mount{Source: dir + "/dir", Recursive: true, ReadOnly: true, RecursiveReadOnly: true}},
		{"nothing of the host's later", mount("bind", dir+"/dir", "rbind", "rprivate", "rslave"), mount("bind", shared, "rbind", "rprivate", "rslave"),
			&Mount{Source: dir + "/dir", Recursive: true, RecursivePrivate: true}},
		{"nothing in itself", mount("bind", dir+"/dir", "rbind", "private"), mount("bind", shared, "rbind", "private"),
			&Mount{Source: dir + "/dir", Recursive: true, Private: true}},
		{"what the host mounts later", mount("bind", dir+"/dir", "rbind", "rslave"), mount("bind", shared, "rbind", "rslave"),
			&Mount{Source: dir + "/dir", Recursive: true}},
		{"a bind by its options", mount("none", dir+"/link", "rbind"), mount("bind", shared, "rbind"),
			&Mount{Source: dir + "/link", Recursive: true}},
		{"relative to the bundle", mount("bind", "file", "bind"), mount("bind", shared, "bind"),
			&Mount{Source: dir + "/file", File: true}},
		{"memory", mount("tmpfs", "tmpfs", "size=1m"), mount("tmpfs", "tmpfs", "size=1m"), nil},
		{"proc", mount("proc", "proc"), mount("proc", "proc"), nil},
		{"the kernel's state is the guest's", mount("bind", "/sys", "rbind", "ro"), mount("bind", "/sys", "rbind", "ro"), nil},
		{"also through a link", mount("bind", dir+"/sneaky", "rbind"), mount("bind", "/proc/sys", "rbind"), nil},
		{"a device that the guest has", mount("bind", "/dev/null", "bind"), mount("bind", "/dev/null", "bind"), nil},
		{"all of /dev", mount("bind", "/dev", "rbind"), mount("bind", "/dev", "rbind"), nil},
		{"with mapped ids", mapped(mount("bind", dir+"/dir", "rbind", "ridmap")), mount("bind", shared, "rbind"),
			&Mount{Source: dir + "/dir", Recursive: true, UIDs: ids, GIDs: ids, RecursiveIDs: true}},
		{"another file system", mount("ext4", "/dev/sdz", "ro", "noload"), mount("bind", shared, "rbind", "ro"),
			&Mount{Source: "/dev/sdz", Type: "ext4", Options: []string{"ro", "noload"}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			spec := base()
			spec.Mounts = []specs.Mount{test.mount}
			in := first
			in.Bundle = dir
			if test.host != nil {
				test.host.Destination = test.mount.Destination
			}
			r := rewrite(t, spec, in)
			if !reflect.DeepEqual(r.Spec.Mounts[0], test.want) {
				t.Errorf("got  %+v\nwant %+v", r.Spec.Mounts[0], test.want)
			}
			switch {
			case test.host == nil && len(r.Mounts) > 0:
				t.Errorf("mounted on the host: %+v", r.Mounts)
			case test.host != nil && (len(r.Mounts) != 1 || !reflect.DeepEqual(r.Mounts[0], *test.host)):
				t.Errorf("on the host %+v, want %+v", r.Mounts, *test.host)
			}
		})
	}
}

// An emptyDir is the same mount for all containers of the pod: the guest keeps those from writing that may only read.
func TestReadOnlyEmptyDir(t *testing.T) {
	kubelet := t.TempDir()
	for _, test := range []struct {
		dir   string
		guest []string
		host  Mount
	}{
		{"pods/u/volumes/kubernetes.io~empty-dir/v", []string{"rbind", "rprivate", "ro", "rro"}, Mount{}},
		{"pods/u/volumes/kubernetes.io~empty-dir/v/dir", []string{"rbind", "rprivate", "ro"}, Mount{ReadOnly: true}},
		{"pods/other/volumes/kubernetes.io~empty-dir/v", []string{"rbind", "rprivate", "ro"}, Mount{ReadOnly: true}},
		{"pods/u/volumes/kubernetes.io~secret/v", []string{"rbind", "rprivate", "ro"}, Mount{ReadOnly: true}},
	} {
		test.host.Source = filepath.Join(kubelet, test.dir)
		test.host.Destination, test.host.Recursive, test.host.RecursivePrivate = "/v", true, true
		if err := os.MkdirAll(test.host.Source, 0o755); err != nil {
			t.Fatal(err)
		}
		spec := base()
		spec.Annotations = map[string]string{sandboxUID: "u"}
		spec.Mounts = []specs.Mount{{Destination: "/v", Type: "bind", Source: test.host.Source, Options: []string{"rbind", "rprivate", "ro"}}}
		r := rewrite(t, spec, first)
		if len(r.Mounts) != 1 || !reflect.DeepEqual(r.Mounts[0], test.host) {
			t.Errorf("%s: on the host %+v, want %+v", test.dir, r.Mounts, test.host)
		}
		if got := r.Spec.Mounts[0].Options; !slices.Equal(got, test.guest) {
			t.Errorf("%s: in the guest %q, want %q", test.dir, got, test.guest)
		}
	}
}

// device is what stat says of one.
type device struct {
	os.FileInfo
	mode os.FileMode
	rdev uint64
}

func (d device) Mode() os.FileMode { return d.mode }
func (d device) Sys() any          { return &syscall.Stat_t{Rdev: d.rdev} }

func TestDeviceAsMount(t *testing.T) {
	m := &specs.Mount{Destination: "/mnt", Source: "/dev/x"}
	null := device{mode: os.ModeDevice | os.ModeCharDevice, rdev: unix.Mkdev(1, 3)}
	if own, err := guestsOwn(m, "/dev/x", null, unix.Statfs_t{}, ""); own != "/dev/x" || err != nil {
		t.Errorf("null: %q, %v", own, err)
	}
	for _, d := range []device{
		{mode: os.ModeDevice | os.ModeCharDevice, rdev: unix.Mkdev(10, 232)},
		{mode: os.ModeDevice | os.ModeCharDevice, rdev: unix.Mkdev(8, 0)},
	} {
		if own, err := guestsOwn(m, "/dev/x", d, unix.Statfs_t{}, ""); !errdefs.IsNotImplemented(err) {
			t.Errorf("%+v: %q, %v", d, own, err)
		}
	}
}

func TestMountsAreNumbered(t *testing.T) {
	dir := tree(t)
	spec := base()
	spec.Mounts = []specs.Mount{
		{Destination: "/a", Type: "bind", Source: dir + "/dir"},
		{Destination: "/proc", Type: "proc", Source: "proc"},
		{Destination: "/b", Type: "bind", Source: dir + "/file"},
	}
	r := rewrite(t, spec, first)
	if got := r.Spec.Mounts[2].Source; got != "/run/microvm/shared/c1/mounts/1" || len(r.Mounts) != 2 {
		t.Errorf("%s, %+v", got, r.Mounts)
	}
}

// A pod's name resolution is three files that the CRI plugin mounts into each of
// its containers. They are shared as such, and stay as writable as they were.
func TestFilesOfAPod(t *testing.T) {
	dir := t.TempDir()
	spec := base()
	names := []string{"hostname", "hosts", "resolv.conf"}
	for _, name := range names {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
		spec.Mounts = append(spec.Mounts, specs.Mount{
			Destination: "/etc/" + name, Type: "bind", Source: filepath.Join(dir, name), Options: []string{"rbind", "rprivate", "rw"},
		})
	}
	r := rewrite(t, spec, first)
	for i, name := range names {
		want := Mount{Destination: "/etc/" + name, Source: filepath.Join(dir, name), File: true, Recursive: true, RecursivePrivate: true}
		if !reflect.DeepEqual(r.Mounts[i], want) {
			t.Errorf("on the host %+v, want %+v", r.Mounts[i], want)
		}
		m := r.Spec.Mounts[i]
		if m.Destination != "/etc/"+name || m.Type != "bind" || m.Source != fmt.Sprintf("/run/microvm/shared/c1/mounts/%d", i) ||
			!reflect.DeepEqual(m.Options, []string{"rbind", "rprivate", "rw"}) {
			t.Errorf("in the guest %+v", m)
		}
	}
}

// A pod's containers share the guest's /dev/shm, whichever way the caller says
// so; memory that is mounted there for another reason is something else.
func TestShm(t *testing.T) {
	var fs unix.Statfs_t
	const memory = "/dev/shm" // any tmpfs of the host's
	if err := unix.Statfs(memory, &fs); err != nil || fs.Type != unix.TMPFS_MAGIC {
		t.Fatalf("%s is no tmpfs: %v", memory, err)
	}
	size := fs.Blocks * uint64(fs.Bsize)
	volume := t.TempDir() // on whatever file system
	bound := func(source string) specs.Mount {
		return specs.Mount{Destination: "/dev/shm", Type: "bind", Source: source, Options: []string{"rbind", "rw"}}
	}
	own := specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "mode=1777", "size=65536k"}}
	guests := bound("/dev/shm")
	shared := bound("/run/microvm/shared/c1/mounts/0")
	for _, test := range []struct {
		name     string
		in       Input
		mount    specs.Mount
		want     specs.Mount
		wantSize Shm
	}{
		{"the first container's", first, bound(memory), guests, Shm{memory, size}},
		{"the pod's", Input{ID: "c1", Shm: memory}, bound(memory), guests, Shm{}},
		{"a volume", Input{ID: "c1", Shm: memory}, bound(volume), shared, Shm{}},
		{"the default", first, own, own, Shm{}},
		{"the default in a pod", Input{ID: "c1", Pod: true}, own,
			specs.Mount{Destination: "/dev/shm", Type: "bind", Source: "/dev/shm", Options: []string{"rbind", "nosuid"}}, Shm{}},
	} {
		spec := base()
		spec.Mounts = []specs.Mount{test.mount}
		spec.Mounts[0].Options = append([]string{}, test.mount.Options...)
		r := rewrite(t, spec, test.in)
		if !reflect.DeepEqual(r.Spec.Mounts[0], test.want) || r.Shm != test.wantSize {
			t.Errorf("%s: %+v, %+v\nwant %+v, %+v", test.name, r.Spec.Mounts[0], r.Shm, test.want, test.wantSize)
		}
	}

	pod := base()
	pod.Annotations = map[string]string{containerType: "sandbox"}
	pod.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1"}
	pod.Mounts = []specs.Mount{bound(memory)}
	pod.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "/h"}}}
	s, err := ReadSandbox(pod)
	if err != nil || !IsSandbox(pod) || IsSandbox(base()) {
		t.Fatalf("%v, %v", IsSandbox(pod), err)
	}
	if want := (&Sandbox{Sysctls: pod.Linux.Sysctl, Shm: Shm{memory, size}, HostHooks: specs.Hooks{Poststop: []specs.Hook{{Path: "/h"}}}}); !reflect.DeepEqual(s, want) {
		t.Errorf("%+v, want %+v", s, want)
	}
	pod.Linux.Namespaces = pod.Linux.Namespaces[1:]
	if _, err := ReadSandbox(pod); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "hostPID") {
		t.Errorf("hostPID: %v", err)
	}
	pod = base()
	pod.Linux.Namespaces = append(pod.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	pod.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: 65536, Size: 65536}}
	pod.Linux.GIDMappings = []specs.LinuxIDMapping{{ContainerID: 1, HostID: 65536, Size: 65536}}
	if _, err := ReadSandbox(pod); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "group id 0") {
		t.Errorf("nobody to be root: %v", err)
	}
	pod.Linux.GIDMappings = pod.Linux.UIDMappings
	if _, err := ReadSandbox(pod); err != nil {
		t.Errorf("mapped ids: %v", err)
	}
	pod.Linux = nil
	if _, err := ReadSandbox(pod); !errdefs.IsInvalidArgument(err) {
		t.Errorf("without linux: %v", err)
	}
}

func TestDevices(t *testing.T) {
	null := specs.LinuxDevice{Path: "/dev/null", Type: "c", Major: 1, Minor: 3}
	fuse := specs.LinuxDevice{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}
	pipe := specs.LinuxDevice{Path: "/dev/p", Type: "p"}
	disk := specs.LinuxDevice{Path: "/dev/sda", Type: "b", Major: 8, Minor: 0}
	fakeNull := specs.LinuxDevice{Path: "/dev/x", Type: "b", Major: 1, Minor: 3}

	spec := base()
	spec.Linux.Devices = []specs.LinuxDevice{null, fuse, pipe}
	if r := rewrite(t, spec, first); !reflect.DeepEqual(r.Spec.Linux.Devices, []specs.LinuxDevice{null, fuse, pipe}) {
		t.Errorf("devices %v", r.Spec.Linux.Devices)
	}
	spec = base()
	spec.Linux.Devices = []specs.LinuxDevice{null, disk, fakeNull}
	spec.Linux.Resources = &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{
		{Allow: false, Access: "rwm"}, {Allow: true, Access: "rwm"},
	}}
	r := rewrite(t, spec, first)
	if !reflect.DeepEqual(r.Spec.Linux.Devices, []specs.LinuxDevice{null}) || len(r.Remarks) != 2 || !r.AllDevices {
		t.Errorf("privileged: devices %v, remarks %q, all %v", r.Spec.Linux.Devices, r.Remarks, r.AllDevices)
	}
	// As with privileged_without_host_devices of containerd's CRI.
	spec = base()
	spec.Linux.Resources = &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}}
	if r := rewrite(t, spec, first); len(r.Spec.Linux.Devices) > 0 || !r.AllDevices {
		t.Errorf("privileged, without the host's devices: %v, all %v", r.Spec.Linux.Devices, r.AllDevices)
	}
}

func TestDisks(t *testing.T) {
	n := func(v int64) *int64 { return &v }
	rule := func(allow bool, kind string, major, minor *int64, access string) specs.LinuxDeviceCgroup {
		return specs.LinuxDeviceCgroup{Allow: allow, Type: kind, Major: major, Minor: minor, Access: access}
	}
	// Not one that a host has.
	const major = 4094
	disk := func(path string, minor int64) specs.LinuxDevice {
		return specs.LinuxDevice{Path: path, Type: "b", Major: major, Minor: minor}
	}
	denied := rule(false, "", nil, nil, "rwm")
	for _, tc := range []struct {
		name    string
		devices []specs.LinuxDevice
		rules   []specs.LinuxDeviceCgroup
		disks   []Disk
		left    int // of the rules
	}{
		{"without rules", []specs.LinuxDevice{disk("/dev/x", 1)}, nil, []Disk{{"/dev/x", major, 1, true}}, 0},
		{"read and write", []specs.LinuxDevice{disk("/dev/x", 1)},
			[]specs.LinuxDeviceCgroup{denied, rule(true, "b", n(major), n(1), "rwm")}, []Disk{{"/dev/x", major, 1, false}}, 2},
		{"read only", []specs.LinuxDevice{disk("/dev/x", 1)},
			[]specs.LinuxDeviceCgroup{denied, rule(true, "b", nil, nil, "m"), rule(true, "b", n(major), n(1), "r")},
			[]Disk{{"/dev/x", major, 1, true}}, 3},
		{"taken back", []specs.LinuxDevice{disk("/dev/x", 1)},
			[]specs.LinuxDeviceCgroup{rule(true, "b", n(major), n(1), "rw"), rule(false, "a", nil, nil, "w")},
			[]Disk{{"/dev/x", major, 1, true}}, 2},
		{"under two paths", []specs.LinuxDevice{disk("/dev/x", 1), disk("/dev/y", 1), disk("/dev/z", 2)},
			[]specs.LinuxDeviceCgroup{rule(true, "b", nil, nil, "rw")},
			[]Disk{{"/dev/x", major, 1, false}, {"/dev/z", major, 2, false}}, 1},
		{"rules for others", []specs.LinuxDevice{disk("/dev/x", 1)},
			[]specs.LinuxDeviceCgroup{
				rule(true, "b", n(major), n(1), "r"), rule(true, "b", n(major), n(2), "rw"), rule(true, "b", n(254), nil, "rw"),
				rule(false, "b", n(8), n(0), "rwm"), rule(true, "c", n(254), n(0), "rw"),
			}, []Disk{{"/dev/x", major, 1, true}}, 2},
		{"privileged, and by name", []specs.LinuxDevice{disk("/dev/x", 1), disk("/dev/y", 2)},
			[]specs.LinuxDeviceCgroup{rule(true, "", nil, nil, "rwm"), rule(true, "b", n(major), n(2), "rwm")},
			[]Disk{{"/dev/y", major, 2, false}}, 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			spec := base()
			spec.Linux.Devices = tc.devices
			if tc.rules != nil {
				spec.Linux.Resources = &specs.LinuxResources{Devices: tc.rules}
			}
			r := rewrite(t, spec, first)
			if !reflect.DeepEqual(r.Disks, tc.disks) {
				t.Errorf("disks %+v, want %+v", r.Disks, tc.disks)
			}
			for _, d := range r.Spec.Linux.Devices {
				if !r.disk(d.Major, d.Minor) {
					t.Errorf("%s is no disk", d.Path)
				}
			}
			if tc.rules != nil && len(r.Spec.Linux.Resources.Devices) != tc.left {
				t.Errorf("rules %+v, want %d", r.Spec.Linux.Resources.Devices, tc.left)
			}
		})
	}
}

func TestHooks(t *testing.T) {
	hook := []specs.Hook{{Path: "/bin/hook"}}
	spec := base()
	spec.Hooks = &specs.Hooks{CreateRuntime: hook, StartContainer: hook, Poststop: hook}
	r := rewrite(t, spec, first)
	if !reflect.DeepEqual(r.HostHooks, specs.Hooks{CreateRuntime: hook, Poststop: hook}) {
		t.Errorf("on the host: %+v", r.HostHooks)
	}
	if !reflect.DeepEqual(r.Spec.Hooks, &specs.Hooks{StartContainer: hook}) {
		t.Errorf("in the guest: %+v", r.Spec.Hooks)
	}
}

func TestRefused(t *testing.T) {
	without := func(kind specs.LinuxNamespaceType) func(*specs.Spec) {
		return func(s *specs.Spec) {
			var kept []specs.LinuxNamespace
			for _, ns := range s.Linux.Namespaces {
				if ns.Type != kind {
					kept = append(kept, ns)
				}
			}
			s.Linux.Namespaces = kept
		}
	}
	bind := func(source string) func(*specs.Spec) {
		return func(s *specs.Spec) {
			s.Mounts = []specs.Mount{{Destination: "/mnt", Type: "bind", Source: source}}
		}
	}
	for _, test := range []struct {
		name    string
		change  func(*specs.Spec)
		want    string
		invalid bool
	}{
		{"no process", func(s *specs.Spec) { s.Process = nil }, "no process", true},
		{"no root", func(s *specs.Spec) { s.Root = nil }, "no root", true},
		{"no linux", func(s *specs.Spec) { s.Linux = nil }, "no linux section", true},
		{"host network", without(specs.NetworkNamespace), "--net-host", false},
		{"host pids", without(specs.PIDNamespace), "hostPID", false},
		{"host ipc", without(specs.IPCNamespace), "hostIPC", false},
		{"host uts", without(specs.UTSNamespace), "uts", false},
		{"host mounts", without(specs.MountNamespace), "mount", false},
		{"another container's pids", func(s *specs.Spec) { s.Linux.Namespaces[0].Path = "/proc/1/ns/pid" }, "/proc/1/ns/pid", false},
		{"mount source missing", bind("/nonexistent/dir"), "mount /mnt: source /nonexistent/dir: lstat /nonexistent", true},
		{"another sandbox's ipc", func(s *specs.Spec) { s.Linux.Namespaces[1].Path = "/proc/1/ns/ipc" }, "/proc/1/ns/ipc", false},
		{"pids that a mount keeps", func(s *specs.Spec) { s.Linux.Namespaces[0].Path = "/run/pidns" }, "/run/pidns", false},
		{"another time", func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace, Path: "/proc/1/ns/time"})
		}, "/proc/1/ns/time", false},
		{"users without mappings", func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace, Path: "/proc/1/ns/user"})
		}, "how user ids are mapped", true},
		{"mapped memory", func(s *specs.Spec) {
			s.Mounts = []specs.Mount{{Destination: "/mnt", Type: "tmpfs", UIDMappings: []specs.LinuxIDMapping{{Size: 1}}}}
		}, "mapped in bind mounts only", false},
		{"a mapped disk", func(s *specs.Spec) {
			s.Mounts = []specs.Mount{{Destination: "/mnt", Type: "ext4", Source: "/dev/sdz", Options: []string{"idmap"}}}
		}, "mapped in bind mounts only", false},
		{"mounts for the host", func(s *specs.Spec) {
			s.Mounts = []specs.Mount{{Destination: "/mnt", Type: "bind", Source: "/", Options: []string{"rbind", "rshared"}}}
		}, "Bidirectional", false},
		{"device of the host", func(s *specs.Spec) {
			s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/kvm", Type: "c", Major: 10, Minor: 232}}
		}, "/dev/kvm (c 10:232)", false},
		{"network device", func(s *specs.Spec) {
			s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"eth1": {}}
		}, "netDevices", false},
		{"seccomp agent", func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{ListenerPath: "/run/s"}
		}, "seccomp", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			spec := base()
			test.change(spec)
			_, err := Rewrite(spec, first)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("error %v does not say %q", err, test.want)
			}
			if test.invalid != errdefs.IsInvalidArgument(err) || test.invalid == errdefs.IsNotImplemented(err) {
				t.Errorf("%v is of another kind", err)
			}
		})
	}
}

// FuzzRewrite: a specification comes from containerd, but its content from its
// clients.
func FuzzRewrite(f *testing.F) {
	data, err := json.Marshal(base())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"process":{},"root":{},"linux":{"devices":[{}],"resources":{"cpu":{}}},"mounts":[{"type":"bind","source":"/"}],"hooks":{}}`))
	f.Add([]byte(`{"process":{},"root":{},"linux":{"namespaces":[{"type":"pid","path":"/proc/9/ns/pid"},{"type":"network"},{"type":"ipc","path":"/proc/99999999999/ns/ipc"},{"type":"uts"},{"type":"mount"}]},"mounts":[{"destination":"/dev/shm","type":"tmpfs","options":["a=b"]}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var spec specs.Spec
		if json.Unmarshal(data, &spec) != nil {
			return
		}
		in := first
		in.First, in.Pod, in.Tasks = false, true, map[uint32]string{7: "", 9: "c9"}
		if _, err := ReadSandbox(&spec); err == nil && spec.Linux == nil {
			t.Error("a sandbox without namespaces")
		}
		r, err := Rewrite(&spec, in)
		if err != nil {
			return
		}
		if r.PIDs != nil && *r.PIDs != "" && *r.PIDs != "c9" {
			t.Errorf("pids of %q", *r.PIDs)
		}
		if _, err := json.Marshal(r.Spec); err != nil {
			t.Error(err)
		}
		for _, ns := range r.Spec.Linux.Namespaces {
			if ns.Path != "" {
				t.Errorf("namespace of the host: %+v", ns)
			}
		}
	})
}

// Annotations may name what is the host's. In the guest they are for the state of
// hooks.
func TestAnnotations(t *testing.T) {
	for _, hooks := range []*specs.Hooks{nil, {Poststop: []specs.Hook{{Path: "/h"}}}, {StartContainer: []specs.Hook{{Path: "/h"}}}} {
		spec := base()
		spec.Annotations = map[string]string{"nerdctl/log-uri": "file:///var/log/c"}
		spec.Hooks = hooks
		r := rewrite(t, spec, first)
		if want := hooks != nil && hooks.StartContainer != nil; (len(r.Spec.Annotations) > 0) != want {
			t.Errorf("with hooks %+v: %v", hooks, r.Spec.Annotations)
		}
	}
}
