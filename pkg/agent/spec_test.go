package agent

import (
	"encoding/json"
	"maps"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const minimalSpec = `{
	"root": {"path": "/run/microvm/shared/c/rootfs"},
	"process": {"args": ["sh"], "cwd": "/"},
	"linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]}
}`

// edited returns minimalSpec with one change.
func edited(t *testing.T, change func(*specs.Spec)) []byte {
	t.Helper()
	var spec specs.Spec
	if err := json.Unmarshal([]byte(minimalSpec), &spec); err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(&spec)
	}
	data, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestParseSpecRefuses(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*specs.Spec)
		want   string
	}{
		"no root":            {func(s *specs.Spec) { s.Root = nil }, "root.path"},
		"relative root":      {func(s *specs.Spec) { s.Root.Path = "rootfs" }, "root.path"},
		"no process":         {func(s *specs.Spec) { s.Process = nil }, "process is missing"},
		"no arguments":       {func(s *specs.Spec) { s.Process.Args = nil }, "process.args"},
		"no directory":       {func(s *specs.Spec) { s.Process.Cwd = "" }, "process.cwd"},
		"relative directory": {func(s *specs.Spec) { s.Process.Cwd = "tmp" }, "process.cwd"},
		"no linux":           {func(s *specs.Spec) { s.Linux = nil }, "linux"},
		"no mount namespace": {func(s *specs.Spec) { s.Linux.Namespaces = s.Linux.Namespaces[1:] }, "mount namespace"},
		"path":               {func(s *specs.Spec) { s.Linux.Namespaces[1].Path = "/proc/1/ns/pid" }, "no namespaces to join"},
		"seccomp agent":      {func(s *specs.Spec) { s.Linux.Seccomp = &specs.LinuxSeccomp{ListenerPath: "/x"} }, "listenerPath"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, _, err := parseSpec(edited(t, test.change), "c")
			if err == nil || !strings.Contains(err.Error(), test.want) || !errdefs.IsInvalidArgument(err) {
				t.Errorf("error %v, want an invalid argument with %q", err, test.want)
			}
		})
	}
	for _, data := range []string{"", "x", "[]", `{"root": 1}`, "null"} {
		if _, _, _, err := parseSpec([]byte(data), "c"); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", data, err)
		}
	}
}

func TestParseSpec(t *testing.T) {
	weight := uint16(100)
	spec, sysctls, remarks, err := parseSpec(edited(t, func(s *specs.Spec) {
		s.Hostname, s.Domainname = "h", "d"
		s.Process.ApparmorProfile, s.Process.SelinuxLabel = "a", "l"
		s.Hooks = &specs.Hooks{
			CreateRuntime:  []specs.Hook{{Path: "/host"}},
			StartContainer: []specs.Hook{{Path: "/container"}},
		}
		l := s.Linux
		l.CgroupsPath = "/kubepods/pod1/c"
		l.MountLabel = "m"
		l.Namespaces = append(l.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace}, specs.LinuxNamespace{Type: specs.IPCNamespace})
		l.NetDevices = map[string]specs.LinuxNetDevice{"eth0": {}}
		l.IntelRdt = &specs.LinuxIntelRdt{ClosID: "x"}
		l.Sysctl = map[string]string{
			"net.ipv4.ip_forward": "1", "kernel.shmmax": "2", "fs/mqueue/msg_max": "3", "kernel.hostname": "4", "vm.swappiness": "5",
		}
		l.Resources = &specs.LinuxResources{
			Network: &specs.LinuxNetwork{},
			BlockIO: &specs.LinuxBlockIO{Weight: &weight},
			// 3MB and 5MB are no page sizes anywhere.
			HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "3MB", Limit: 0}, {Pagesize: "5MB", Limit: 1}},
		}
	}), "c")
	if err != nil {
		t.Fatal(err)
	}
	if spec.Hostname+spec.Domainname+spec.Process.ApparmorProfile+spec.Process.SelinuxLabel+spec.Linux.MountLabel != "" {
		t.Errorf("left: %+v", spec)
	}
	if len(spec.Hooks.CreateRuntime) != 0 || len(spec.Hooks.StartContainer) != 1 {
		t.Errorf("hooks %+v", spec.Hooks)
	}
	l := spec.Linux
	if l.CgroupsPath != "/microvm/c" || l.NetDevices != nil || l.IntelRdt != nil || hasNamespace(spec, specs.NetworkNamespace) ||
		!hasNamespace(spec, specs.IPCNamespace) || !hasNamespace(spec, specs.PIDNamespace) {
		t.Errorf("linux %+v", l)
	}
	r := l.Resources
	if r.Network != nil || *r.BlockIO.Weight != 100 || len(r.HugepageLimits) != 0 {
		t.Errorf("resources %+v", r)
	}
	if want := map[string]string{"kernel.shmmax": "2", "fs/mqueue/msg_max": "3"}; !maps.Equal(l.Sysctl, want) {
		t.Errorf("own sysctls %v, want %v", l.Sysctl, want)
	}
	if want := map[string]string{"net.ipv4.ip_forward": "1", "kernel.hostname": "4", "vm.swappiness": "5"}; !maps.Equal(sysctls, want) {
		t.Errorf("the guest's sysctls %v, want %v", sysctls, want)
	}
	// AppArmor, SELinux twice and a page size.
	if len(remarks) != 4 {
		t.Errorf("remarks %q", remarks)
	}
}

func TestLibcontainerProcess(t *testing.T) {
	p, remarks, err := parseProcess([]byte(`{"args": ["a", "b"], "cwd": "/x", "env": ["A=1"], "terminal": true, "noNewPrivileges": true,
		"consoleSize": {"height": 70000, "width": 80}, "user": {"uid": 1, "gid": 2, "additionalGids": [3, 4]},
		"capabilities": {"bounding": ["CAP_KILL"]}, "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 5, "hard": 6}],
		"apparmorProfile": "p", "unknown": {}}`))
	if err != nil || len(remarks) != 1 {
		t.Fatal(remarks, err)
	}
	lp, err := libcontainerProcess(p)
	if err != nil {
		t.Fatal(err)
	}
	if lp.UID != 1 || lp.GID != 2 || len(lp.AdditionalGroups) != 2 || lp.Cwd != "/x" || !*lp.NoNewPrivileges ||
		lp.ConsoleHeight != 0xffff || lp.ConsoleWidth != 80 || lp.Capabilities.Bounding[0] != "CAP_KILL" ||
		lp.Rlimits[0] != (configs.Rlimit{Type: unix.RLIMIT_NOFILE, Hard: 6, Soft: 5}) {
		t.Errorf("%+v", lp)
	}
	p.Rlimits[0].Type = "RLIMIT_NONE"
	if _, err := libcontainerProcess(p); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown limit: %v", err)
	}
	for _, bad := range []string{"", "{}", `{"args":[],"cwd":"/"}`, `{"args":["x"]}`, `{"args":["x"],"cwd":"y"}`} {
		if _, _, err := parseProcess([]byte(bad)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestMergeResources(t *testing.T) {
	const current = `{"memory":{"limit":100,"swap":100,"reservation":50},"cpu":{"shares":2,"quota":3,"period":4},"pids":{"limit":5},"unified":{"a.b":"1"}}`
	for update, want := range map[string]string{
		`{}`:                                   current,
		`{"memory":{"limit":200}}`:             `{"memory":{"limit":200,"reservation":50},"cpu":{"shares":2,"quota":3,"period":4},"pids":{"limit":5},"unified":{"a.b":"1"}}`,
		`{"memory":{"limit":200,"swap":300}}`:  `{"memory":{"limit":200,"swap":300,"reservation":50},"cpu":{"shares":2,"quota":3,"period":4},"pids":{"limit":5},"unified":{"a.b":"1"}}`,
		`{"cpu":{"quota":-1,"cpus":"0"}}`:      `{"memory":{"limit":100,"swap":100,"reservation":50},"cpu":{"shares":2,"quota":-1,"period":4,"cpus":"0"},"pids":{"limit":5},"unified":{"a.b":"1"}}`,
		`{"unified":{"c.d":"2"},"pids":{}}`:    `{"memory":{"limit":100,"swap":100,"reservation":50},"cpu":{"shares":2,"quota":3,"period":4},"pids":{"limit":5},"unified":{"a.b":"1","c.d":"2"}}`,
		`{"cpu":{"idle":1}}`:                   `{"memory":{"limit":100,"swap":100,"reservation":50},"cpu":{"quota":3,"period":4,"idle":1},"pids":{"limit":5},"unified":{"a.b":"1"}}`,
		`{"cpu":{"idle":0,"shares":6}}`:        `{"memory":{"limit":100,"swap":100,"reservation":50},"cpu":{"shares":6,"quota":3,"period":4,"idle":0},"pids":{"limit":5},"unified":{"a.b":"1"}}`,
		`{"hugepageLimits":[],"unknown":true}`: current,
	} {
		var before specs.LinuxResources
		if err := json.Unmarshal([]byte(current), &before); err != nil {
			t.Fatal(err)
		}
		merged, err := mergeResources(&before, []byte(update))
		if err != nil {
			t.Errorf("%s: %v", update, err)
			continue
		}
		if got := marshal(t, merged); got != reformat(t, want) {
			t.Errorf("%s:\ngot  %s\nwant %s", update, got, reformat(t, want))
		}
		if got := marshal(t, &before); got != reformat(t, current) {
			t.Errorf("%s changed the old resources: %s", update, got)
		}
	}
	for _, bad := range []string{"", "x", "[]", `{"memory":1}`} {
		if _, err := mergeResources(nil, []byte(bad)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if _, err := mergeResources(nil, []byte(`{"memory":{"limit":1}}`)); err != nil {
		t.Error(err)
	}
}

func marshal(t *testing.T, r *specs.LinuxResources) string {
	t.Helper()
	data, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func reformat(t *testing.T, s string) string {
	t.Helper()
	var r specs.LinuxResources
	if err := json.Unmarshal([]byte(s), &r); err != nil {
		t.Fatal(err)
	}
	return marshal(t, &r)
}

func TestCheckID(t *testing.T) {
	for _, id := range []string{"a", "A-b_c.d+e", "0123456789abcdef", strings.Repeat("x", maxIDLength)} {
		if err := checkID(id); err != nil {
			t.Error(err)
		}
	}
	for _, id := range []string{"", ".", "..", "-x", "a/b", "../x", "a b", "a\n", "\x00", "ä", strings.Repeat("x", maxIDLength+1)} {
		if err := checkID(id); !errdefs.IsInvalidArgument(err) {
			t.Errorf("id %q: %v", id, err)
		}
	}
}

func FuzzParseSpec(f *testing.F) {
	f.Add([]byte(minimalSpec))
	f.Add([]byte(`{"root":{"path":"/"},"process":{"args":["x"],"cwd":"/","rlimits":[{}]},"linux":{"namespaces":[{"type":"mount"}],"sysctl":{"":""},"resources":{"blockIO":{},"hugepageLimits":[{}]}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		spec, _, _, err := parseSpec(data, "c")
		if err != nil {
			return
		}
		for _, ns := range spec.Linux.Namespaces {
			if ns.Path != "" || ns.Type == specs.NetworkNamespace {
				t.Errorf("namespace %+v", ns)
			}
		}
		libcontainerProcess(spec.Process)
	})
}
