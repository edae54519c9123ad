package hostcgroup

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"github.com/moby/sys/mountinfo"
)

func TestExpand(t *testing.T) {
	for _, test := range []struct{ path, want string }{
		{"/default/c1", "/default/c1"},
		{"default/c1", "/default/c1"},
		{"/kubepods/burstable/pod1/c1", "/kubepods/burstable/pod1/c1"},
		{"/../../etc", "/etc"},
		{"../c1", "/c1"},
		{"system.slice:cri-containerd:c1", "/system.slice/cri-containerd-c1.scope"},
		{":docker:c1", "/system.slice/docker-c1.scope"},
		{"kubepods-burstable-pod1.slice:cri-containerd:c1",
			"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-c1.scope"},
		{"a.slice::c1", "/a.slice/c1.scope"},
		{"a.slice::b.slice", "/a.slice/b.slice"},
		{"-.slice:p:c1", "/p-c1.scope"},
	} {
		got, err := expand(test.path)
		if err != nil || got != test.want {
			t.Errorf("%q: %q, %v, want %q", test.path, got, err, test.want)
		}
	}
	for _, bad := range []string{"", "/", "/..", "a:b:c", "a.slice:b:", "a.slice:b:../../c", "a/b.slice:c:d"} {
		if got, err := expand(bad); err == nil {
			t.Errorf("%q: %q", bad, got)
		}
	}
}

func mount(fstype, root, mountpoint, options string) *mountinfo.Info {
	return &mountinfo.Info{FSType: fstype, Root: root, Mountpoint: mountpoint, VFSOptions: options}
}

func TestInspect(t *testing.T) {
	for _, test := range []struct {
		name   string
		mounts []*mountinfo.Info
		self   string
		want   []hierarchy
		before map[string]string
	}{
		{
			"version 2",
			[]*mountinfo.Info{mount("cgroup2", "/", "/sys/fs/cgroup", "rw,nsdelegate")},
			"0::/system.slice/containerd.service\n",
			[]hierarchy{{mountpoint: "/sys/fs/cgroup", v2: true}},
			map[string]string{"/sys/fs/cgroup": "/system.slice/containerd.service"},
		},
		{
			"version 1 beside an empty version 2",
			[]*mountinfo.Info{
				mount("cgroup", "/", "/sys/fs/cgroup/cpu,cpuacct", "rw,cpu,cpuacct"),
				mount("cgroup", "/", "/sys/fs/cgroup/systemd", "rw,xattr,name=systemd"),
				mount("cgroup2", "/", "/sys/fs/cgroup/unified", "rw"),
			},
			"3:cpu,cpuacct:/a\n1:name=systemd:/b:c\n0::/d\n",
			[]hierarchy{
				{mountpoint: "/sys/fs/cgroup/cpu,cpuacct", controllers: "cpu,cpuacct"},
				{mountpoint: "/sys/fs/cgroup/systemd", controllers: "name=systemd"},
			},
			map[string]string{"/sys/fs/cgroup/cpu,cpuacct": "/a", "/sys/fs/cgroup/systemd": "/b:c", "/sys/fs/cgroup/unified": "/d"},
		},
		{
			"version 1's memory with what is left in version 2",
			[]*mountinfo.Info{
				mount("cgroup2", "/", "/sys/fs/cgroup/unified", "rw"),
				mount("cgroup", "/", "/sys/fs/cgroup/memory", "rw,memory"),
			},
			"3:memory:/a\n0::/d\n",
			[]hierarchy{{mountpoint: "/sys/fs/cgroup/memory", controllers: "memory"}},
			map[string]string{"/sys/fs/cgroup/memory": "/a", "/sys/fs/cgroup/unified": "/d"},
		},
		{
			"version 2 beside a stray one of version 1", // as VPN clients mount one
			[]*mountinfo.Info{
				mount("cgroup2", "/", "/sys/fs/cgroup", "rw,nsdelegate"),
				mount("cgroup", "/", "/run/vpn/net_cls", "rw,net_cls"),
				mount("cgroup", "/", "/run/cpuset", "rw,cpuset,cpuacct"),
			},
			"2:cpuset,cpuacct:/\n1:net_cls:/\n0::/system.slice/containerd.service\n",
			[]hierarchy{{mountpoint: "/sys/fs/cgroup", v2: true}},
			map[string]string{"/sys/fs/cgroup": "/system.slice/containerd.service", "/run/vpn/net_cls": "/", "/run/cpuset": "/"},
		},
		{
			"version 1 without memory and cpu, and nothing else",
			[]*mountinfo.Info{mount("cgroup", "/", "/sys/fs/cgroup/systemd", "rw,name=systemd")},
			"1:name=systemd:/a\n",
			[]hierarchy{{mountpoint: "/sys/fs/cgroup/systemd", controllers: "name=systemd"}},
			map[string]string{"/sys/fs/cgroup/systemd": "/a"},
		},
		{
			"inside a container",
			[]*mountinfo.Info{mount("cgroup", "/docker/1", "/sys/fs/cgroup/memory", "rw,memory")},
			"3:memory:/docker/1/x\n",
			[]hierarchy{{mountpoint: "/sys/fs/cgroup/memory", controllers: "memory"}},
			map[string]string{"/sys/fs/cgroup/memory": "/x"},
		},
		{
			"version 2 mounted twice",
			[]*mountinfo.Info{mount("cgroup2", "/", "/sys/fs/cgroup", "rw"), mount("cgroup2", "/a", "/mnt", "rw")},
			"0::/a\n",
			[]hierarchy{{mountpoint: "/sys/fs/cgroup", v2: true}},
			map[string]string{"/sys/fs/cgroup": "/a", "/mnt": "/"},
		},
		{"nothing", nil, "garbage\n\n", nil, map[string]string{}},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, before := inspect(test.mounts, []byte(test.self))
			if !reflect.DeepEqual(got, test.want) {
				t.Errorf("hierarchies %+v, want %+v", got, test.want)
			}
			if !reflect.DeepEqual(before, test.before) {
				t.Errorf("before %v, want %v", before, test.before)
			}
		})
	}
}

func TestOwnedAndRemove(t *testing.T) {
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "kubepods"), 0o755); err != nil {
		t.Fatal(err)
	}
	parent := filepath.Join(root, "kubepods/pod1")
	sandbox := func(name string) *Group {
		return &Group{path: "/kubepods/pod1/" + name, hierarchies: []hierarchy{{mountpoint: root, v2: true}}, unified: root}
	}
	check := func(got []string, want ...string) {
		t.Helper()
		if !slices.Equal(got, want) {
			t.Errorf("owned %v, want %v", got, want)
		}
		if err := makeAll(want); err != nil {
			t.Fatal(err)
		}
	}
	gone := func(path string) bool {
		_, err := os.Stat(path)
		return errors.Is(err, fs.ErrNotExist)
	}

	first := sandbox("c1").Owned(nil)
	check(first, parent, filepath.Join(parent, "c1"), filepath.Join(parent, "c1", machine))
	second := sandbox("c2").Owned(first)
	check(second, parent, filepath.Join(parent, "c2"), filepath.Join(parent, "c2", machine))

	if err := Remove(first); err != nil {
		t.Error(err)
	}
	if !gone(filepath.Join(parent, "c1")) || gone(filepath.Join(parent, "c2")) {
		t.Error("removed something else than the first sandbox's cgroup")
	}
	// The last one to leave removes the parent that the first one has made,
	// but not what was there before.
	if err := Remove(second); err != nil {
		t.Error(err)
	}
	if !gone(parent) || gone(filepath.Join(root, "kubepods")) {
		t.Error("removed something else than the made parent")
	}
}

func TestOOMKills(t *testing.T) {
	for _, test := range []struct {
		v2            bool
		name, content string
		want          int
	}{
		{true, "memory.events", "low 0\noom 7\noom_kill 3\noom_group_kill 5\n", 3},
		{false, "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n", 2},
		{true, "memory.oom_control", "oom_kill 2\n", 0},
		{false, "memory.oom_control", "garbage", 0},
	} {
		root := t.TempDir()
		if err := os.Mkdir(filepath.Join(root, "c1"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, "c1", test.name), []byte(test.content), 0o600); err != nil {
			t.Fatal(err)
		}
		g := &Group{path: "/c1", hierarchies: []hierarchy{{mountpoint: "/nonexistent"}, {mountpoint: root, v2: test.v2}}}
		if n := g.OOMKills(); n != test.want {
			t.Errorf("%+v: %d", test, n)
		}
	}
}

// A host without version 2 cannot, and says so.
func TestConfineWithoutVersion2(t *testing.T) {
	g := &Group{path: "/c1", hierarchies: []hierarchy{{mountpoint: "/nonexistent"}}}
	if dir, err := g.Confine(); dir != nil || !errors.Is(err, ErrNoDeviceControl) {
		t.Errorf("%v, %v", dir, err)
	}
}
