package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/pkg/vmm/control"
)

// podConfig is the CRI plugin's, as options of a sandbox.
func podConfig(t *testing.T, config *cri.PodSandboxConfig) *anypb.Any {
	t.Helper()
	data, err := proto.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	return &anypb.Any{TypeUrl: "runtime.v1.PodSandboxConfig", Value: data}
}

var testPod = &cri.PodSandboxConfig{
	Metadata:  &cri.PodSandboxMetadata{Name: "web", Uid: "u", Namespace: "n"},
	Hostname:  "web-0",
	DnsConfig: &cri.DNSConfig{Servers: []string{"10.0.0.10", "fd00::a"}, Searches: []string{"n.svc", "svc"}, Options: []string{"ndots:5"}},
	Linux: &cri.LinuxPodSandboxConfig{
		CgroupParent: "/kubepods/pod1",
		Sysctls:      map[string]string{"kernel.shm_rmid_forced": "1", "net.ipv4.ip_unprivileged_port_start": "80"},
		Resources:    &cri.LinuxContainerResources{CpuQuota: 250000, CpuPeriod: 100000, MemoryLimitInBytes: 1 << 30},
	},
}

func (f *fixture) createSandbox(id string) (bundle string) {
	f.t.Helper()
	bundle = f.t.TempDir()
	if err := os.Symlink(f.t.TempDir(), filepath.Join(bundle, "work")); err != nil {
		f.t.Fatal(err)
	}
	_, err := f.CreateSandbox(context.Background(), &sandboxapi.CreateSandboxRequest{
		SandboxID: id, BundlePath: bundle, NetnsPath: "/run/netns/cni-1", Options: podConfig(f.t, testPod),
	})
	if err != nil {
		f.t.Fatal(err)
	}
	return bundle
}

func (f *fixture) startSandbox(id string) error {
	_, err := f.StartSandbox(context.Background(), &sandboxapi.StartSandboxRequest{SandboxID: id})
	return err
}

func (f *fixture) stopSandbox(id string) error {
	_, err := f.StopSandbox(context.Background(), &sandboxapi.StopSandboxRequest{SandboxID: id, TimeoutSecs: 1})
	return err
}

func (f *fixture) shutdownSandbox(id string) error {
	_, err := f.ShutdownSandbox(context.Background(), &sandboxapi.ShutdownSandboxRequest{SandboxID: id})
	return err
}

func (f *fixture) sandboxStatus(id string) *sandboxapi.SandboxStatusResponse {
	f.t.Helper()
	r, err := f.SandboxStatus(context.Background(), &sandboxapi.SandboxStatusRequest{SandboxID: id, Verbose: true})
	if err != nil {
		f.t.Fatal(err)
	}
	return r
}

func (f *fixture) ping(id string) error {
	_, err := f.PingSandbox(context.Background(), &sandboxapi.PingRequest{SandboxID: id})
	return err
}

// A sandbox goes through its life with and without containers.
func TestSandboxAPI(t *testing.T) {
	f := newFixture(t)
	ctx := context.Background()
	bundle := f.createSandbox("pod")
	if s := f.sandboxStatus("pod"); s.State != "SANDBOX_NOTREADY" || s.Pid != 0 || s.ExitedAt != nil || time.Since(s.CreatedAt.AsTime()) > time.Hour {
		t.Errorf("created: %v", s)
	}
	r, err := f.StartSandbox(ctx, &sandboxapi.StartSandboxRequest{SandboxID: "pod"})
	if err != nil || r.Pid != uint32(os.Getpid()) || r.CreatedAt == nil {
		t.Fatalf("start: %v, %v", r, err)
	}
	sandbox := f.agent.Sandbox()
	want := map[string]string{"kernel.shm_rmid_forced": "1", "net.ipv4.ip_unprivileged_port_start": "80", "net.ipv4.ping_group_range": "0 2147483647"}
	if sandbox.Hostname != "web-0" || sandbox.ShmBytes != 64<<20 || len(sandbox.Sysctls) != len(want) {
		t.Errorf("sandbox configured with %v", sandbox)
	}
	for name, value := range want {
		if sandbox.Sysctls[name] != value {
			t.Errorf("sysctl %s is %q", name, sandbox.Sysctls[name])
		}
	}
	if q := f.requests[0]; q.size.vcpus != 3 || q.size.memory < 1<<30 {
		t.Errorf("size %+v", q.size)
	}
	if name := f.requests[0].name; !slices.Equal(name, []string{"n/web", "pod"}) {
		t.Errorf("it is called %q", name)
	}
	if !slices.Equal(f.cgroups, []string{"/kubepods/pod1/pod"}) {
		t.Errorf("cgroups %v", f.cgroups)
	}
	status := f.sandboxStatus("pod")
	var info struct {
		Pid    uint32
		Status string `json:"processStatus"`
		Config *cri.PodSandboxConfig
	}
	if err := json.Unmarshal([]byte(status.Info["info"]), &info); err != nil || info.Status != "running" || info.Config.GetMetadata().GetName() != "web" {
		t.Errorf("info %q, %v", status.Info["info"], err)
	}
	if machine := status.Info["machine"]; !strings.Contains(machine, "6.12.0") || !strings.Contains(machine, "/run/netns/cni-1") {
		t.Errorf("machine %q", machine)
	}
	if status.State != "SANDBOX_READY" || status.Pid != r.Pid || !status.CreatedAt.AsTime().Equal(r.CreatedAt.AsTime()) {
		t.Errorf("running: %v", status)
	}
	if err := f.ping("pod"); err != nil {
		t.Error(err)
	}
	if p, err := f.Platform(ctx, &sandboxapi.PlatformRequest{SandboxID: "pod"}); err != nil || p.Platform.OS != "linux" || p.Platform.Architecture != "amd64" {
		t.Errorf("platform %v, %v", p, err)
	}
	if c, err := f.Connect(ctx, &taskapi.ConnectRequest{ID: "pod"}); err != nil || c.TaskPid != r.Pid {
		t.Errorf("connect %v, %v", c, err)
	}

	// A container that has gone leaves the sandbox alone.
	for range 2 {
		if err := f.createInPod("c1", r.Pid, r.Pid, "exit"); err != nil {
			t.Fatal(err)
		}
		if q := f.agent.Request("c1"); q.PidNamespace == nil || q.PidNamespace.ContainerId != "" {
			t.Errorf("c1: %v", q)
		}
		f.start("c1", "")
		f.wait("c1", "")
		f.delete("c1", "")
		f.shutdown("c1")
	}
	select {
	case <-f.down:
		t.Fatal("shut down with its last container")
	default:
	}
	for name, content := range map[string]string{
		"hostname":    "web-0\n",
		"resolv.conf": "search n.svc svc\nnameserver 10.0.0.10\nnameserver fd00::a\noptions ndots:5\n",
	} {
		if data, err := os.ReadFile(filepath.Join(bundle, "work", "microvm-"+name)); err != nil || string(data) != content {
			t.Errorf("%s: %q, %v", name, data, err)
		}
	}
	var etc []string
	for _, m := range f.agent.Spec("c1").Mounts {
		etc = append(etc, m.Destination)
	}
	if !slices.Equal(etc, []string{"/etc/hostname", "/etc/hosts", "/etc/resolv.conf"}) {
		t.Errorf("mounts %q", etc)
	}

	m, err := f.SandboxMetrics(ctx, &sandboxapi.SandboxMetricsRequest{SandboxID: "pod"})
	if err != nil || m.Metrics.ID != "pod" || m.Metrics.Timestamp == nil {
		t.Fatalf("metrics %v, %v", m, err)
	}
	data, err := typeurl.UnmarshalAny(m.Metrics.Data)
	if metrics, ok := data.(*cgroup2.Metrics); err != nil || !ok || metrics.Memory.Usage <= 1<<20 || metrics.Memory.InactiveFile != 1<<10 {
		t.Errorf("metrics %v, %v", data, err)
	}

	// Containers that still run end with the sandbox.
	if err := f.createInPod("c2", r.Pid, 0, "sleep"); err != nil {
		t.Fatal(err)
	}
	f.start("c2", "")
	waited := make(chan *sandboxapi.WaitSandboxResponse, 1)
	go func() {
		w, _ := f.WaitSandbox(ctx, &sandboxapi.WaitSandboxRequest{SandboxID: "pod"})
		waited <- w
	}()
	for range 2 {
		if err := f.stopSandbox("pod"); err != nil {
			t.Error(err)
		}
	}
	if code := f.wait("c2", ""); code != 137 {
		t.Errorf("ended with %d", code)
	}
	w := <-waited
	if w.GetExitStatus() != 0 || time.Since(w.GetExitedAt().AsTime()) > time.Hour {
		t.Errorf("waited: %v", w)
	}
	if s := f.sandboxStatus("pod"); s.State != "SANDBOX_NOTREADY" || !s.ExitedAt.AsTime().Equal(w.ExitedAt.AsTime()) || !strings.Contains(s.Info["machine"], "has ended") {
		t.Errorf("stopped: %v", s)
	}
	f.delete("c2", "")
	for range 2 {
		if err := f.shutdownSandbox("pod"); err != nil {
			t.Error(err)
		}
	}
	<-f.down
}

// Calls in the wrong order, and again, and for another sandbox.
func TestSandboxAPIOrder(t *testing.T) {
	ctx := context.Background()
	calls := map[string]func(*fixture, string) error{
		"create": func(f *fixture, id string) error {
			_, err := f.CreateSandbox(ctx, &sandboxapi.CreateSandboxRequest{SandboxID: id, BundlePath: f.t.TempDir()})
			return err
		},
		"start": (*fixture).startSandbox,
		"stop":  (*fixture).stopSandbox,
		"ping":  (*fixture).ping,
		"platform": func(f *fixture, id string) error {
			_, err := f.Platform(ctx, &sandboxapi.PlatformRequest{SandboxID: id})
			return err
		},
		"status": func(f *fixture, id string) error {
			_, err := f.SandboxStatus(ctx, &sandboxapi.SandboxStatusRequest{SandboxID: id})
			return err
		},
		"metrics": func(f *fixture, id string) error {
			_, err := f.SandboxMetrics(ctx, &sandboxapi.SandboxMetricsRequest{SandboxID: id})
			return err
		},
		"wait": func(f *fixture, id string) error {
			_, err := f.WaitSandbox(ctx, &sandboxapi.WaitSandboxRequest{SandboxID: id})
			return err
		},
		"shutdown": (*fixture).shutdownSandbox,
		"task": func(f *fixture, id string) error {
			_, err := f.Create(ctx, &taskapi.CreateTaskRequest{ID: id, Bundle: f.bundle(nil, "sleep")})
			return err
		},
		"die": func(f *fixture, _ string) error {
			f.machine().end(control.ReasonPanic, "")
			<-f.pod.stopped
			return nil
		},
	}
	ok := func(err error) bool { return err == nil }
	type step struct {
		call, id string
		is       func(error) bool
	}
	for name, steps := range map[string][]step{
		"nothing there": {
			{"start", "pod", errdefs.IsNotFound}, {"stop", "pod", errdefs.IsNotFound}, {"ping", "pod", errdefs.IsNotFound},
			{"platform", "pod", errdefs.IsNotFound}, {"status", "pod", errdefs.IsNotFound}, {"metrics", "pod", errdefs.IsNotFound},
			{"wait", "pod", errdefs.IsNotFound}, {"shutdown", "pod", ok}, {"create", "pod", errdefs.IsUnavailable},
		},
		"bad names": {{"create", "../pod", errdefs.IsInvalidArgument}, {"create", "", errdefs.IsInvalidArgument}},
		"another one's": {
			{"create", "pod", ok}, {"create", "pod", errdefs.IsAlreadyExists}, {"create", "other", errdefs.IsAlreadyExists},
			{"start", "other", errdefs.IsNotFound}, {"stop", "other", errdefs.IsNotFound}, {"wait", "other", errdefs.IsNotFound},
			{"shutdown", "other", errdefs.IsNotFound}, {"status", "other", errdefs.IsNotFound},
		},
		"created": {
			{"create", "pod", ok}, {"ping", "pod", errdefs.IsFailedPrecondition}, {"metrics", "pod", errdefs.IsFailedPrecondition},
			{"task", "c1", errdefs.IsFailedPrecondition}, {"platform", "pod", ok},
			{"stop", "pod", ok}, {"stop", "pod", ok}, {"wait", "pod", ok}, {"start", "pod", errdefs.IsFailedPrecondition}, {"shutdown", "pod", ok},
		},
		"running": {
			{"create", "pod", ok}, {"start", "pod", ok}, {"start", "pod", errdefs.IsFailedPrecondition},
			{"create", "pod", errdefs.IsAlreadyExists}, {"ping", "pod", ok}, {"shutdown", "pod", ok}, {"wait", "pod", ok},
			{"start", "pod", errdefs.IsUnavailable}, {"task", "c1", errdefs.IsUnavailable}, {"shutdown", "pod", ok},
		},
		"stopped": {
			{"create", "pod", ok}, {"start", "pod", ok}, {"stop", "pod", ok}, {"ping", "pod", errdefs.IsFailedPrecondition},
			{"metrics", "pod", errdefs.IsFailedPrecondition}, {"start", "pod", errdefs.IsFailedPrecondition},
			{"task", "c1", errdefs.IsFailedPrecondition}, {"status", "pod", ok}, {"wait", "pod", ok},
		},
		"dead": {
			{"create", "pod", ok}, {"start", "pod", ok}, {"die", "", ok}, {"ping", "pod", errdefs.IsFailedPrecondition},
			{"task", "c1", errdefs.IsFailedPrecondition}, {"wait", "pod", ok}, {"stop", "pod", ok}, {"shutdown", "pod", ok},
		},
		"containers without a sandbox": {
			{"task", "c1", ok}, {"create", "pod", errdefs.IsFailedPrecondition}, {"start", "pod", errdefs.IsNotFound},
			{"shutdown", "pod", errdefs.IsNotFound},
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			for i, s := range steps {
				if err := calls[s.call](f, s.id); !s.is(err) {
					t.Errorf("step %d, %s %s: %v", i, s.call, s.id, err)
				}
			}
			f.delete("c1", "") // if there is one
		})
	}
}

func TestSandboxAPIRefuses(t *testing.T) {
	host := func(change func(*cri.NamespaceOption)) *cri.PodSandboxConfig {
		options := &cri.NamespaceOption{}
		change(options)
		return &cri.PodSandboxConfig{Linux: &cri.LinuxPodSandboxConfig{
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: options},
		}}
	}
	const node = cri.NamespaceMode_NODE
	users := func(mode cri.NamespaceMode, ids ...*cri.IDMapping) *anypb.Any {
		return podConfig(t, host(func(o *cri.NamespaceOption) {
			o.UsernsOptions = &cri.UserNamespace{Mode: mode, Uids: ids, Gids: ids}
		}))
	}
	ids := &cri.IDMapping{HostId: 65536, Length: 65536}
	for _, test := range []struct {
		name    string
		bundle  string
		options *anypb.Any
		want    string
		is      func(error) bool
	}{
		{"hostNetwork", "/b", podConfig(t, host(func(o *cri.NamespaceOption) { o.Network = node })), "hostNetwork", errdefs.IsNotImplemented},
		{"hostPID", "/b", podConfig(t, host(func(o *cri.NamespaceOption) { o.Pid = node })), "hostPID", errdefs.IsNotImplemented},
		{"hostIPC", "/b", podConfig(t, host(func(o *cri.NamespaceOption) { o.Ipc = node })), "hostIPC", errdefs.IsNotImplemented},
		{"ids mapped without a user namespace", "/b", users(node, ids), "no user namespace", errdefs.IsInvalidArgument},
		{"another container's user namespace", "/b", users(cri.NamespaceMode_TARGET), "TARGET", errdefs.IsInvalidArgument},
		{"a user namespace without mappings", "/b", users(cri.NamespaceMode_POD), "how user ids are mapped", errdefs.IsInvalidArgument},
		{"several mappings", "/b", users(cri.NamespaceMode_POD, ids, ids), "one mapping", errdefs.IsInvalidArgument},
		{"nobody to be root", "/b", users(cri.NamespaceMode_POD, &cri.IDMapping{ContainerId: 1, HostId: 65536, Length: 65536}), "user id 0", errdefs.IsInvalidArgument},
		{"a range without ids", "/b", users(cri.NamespaceMode_POD, &cri.IDMapping{HostId: 65536}), "user id 0", errdefs.IsInvalidArgument},
		{"other options", "/b", &anypb.Any{TypeUrl: "containerd.runc.v1.Options"}, "containerd.runc.v1.Options", errdefs.IsInvalidArgument},
		{"broken options", "/b", &anypb.Any{TypeUrl: "x/runtime.v1.PodSandboxConfig", Value: []byte{0xff}}, "options", errdefs.IsInvalidArgument},
		{"no bundle", "b", nil, "absolute", errdefs.IsInvalidArgument},
		{"a bundle that is not there", "/nonexistent/b", nil, "/nonexistent/b", func(err error) bool { return errors.Is(err, os.ErrNotExist) }},
	} {
		f := newFixture(t)
		_, err := f.CreateSandbox(context.Background(), &sandboxapi.CreateSandboxRequest{
			SandboxID: "pod", BundlePath: test.bundle, Options: test.options,
		})
		if !test.is(err) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v", test.name, err)
		}
		if err := f.shutdownSandbox("pod"); err != nil {
			t.Errorf("%s: shutdown: %v", test.name, err)
		}
		<-f.down
	}
}

// A sandbox that does not start leaves nothing, and has ended.
func TestSandboxAPIFailedStart(t *testing.T) {
	f := newFixture(t)
	f.launchError = errors.New("no /dev/kvm")
	f.createSandbox("pod")
	if err := f.startSandbox("pod"); err == nil || !strings.Contains(err.Error(), "no /dev/kvm") {
		t.Errorf("start: %v", err)
	}
	if f.tree.open {
		t.Error("the shared directory is left")
	}
	if w, err := f.WaitSandbox(context.Background(), &sandboxapi.WaitSandboxRequest{SandboxID: "pod"}); err != nil || w.ExitStatus != 255 {
		t.Errorf("wait: %v, %v", w, err)
	}
	if err := f.startSandbox("pod"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("start again: %v", err)
	}
	if err := f.shutdownSandbox("pod"); err != nil {
		t.Error(err)
	}
	<-f.down
}

// What stops a sandbox that boots does not wait for it.
func TestSandboxAPIStopWhileBooting(t *testing.T) {
	for name, stop := range map[string]func(*fixture) error{
		"stop":     func(f *fixture) error { return f.stopSandbox("pod") },
		"shutdown": func(f *fixture) error { return f.shutdownSandbox("pod") },
		"signal":   func(f *fixture) error { return f.end() },
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			f.silent = true
			f.createSandbox("pod")
			started := make(chan error)
			go func() { started <- f.startSandbox("pod") }()
			for booting := false; !booting; time.Sleep(time.Millisecond) {
				f.mu.Lock()
				booting = len(f.machines) > 0
				f.mu.Unlock()
			}
			if err := stop(f); err != nil {
				t.Error(err)
			}
			if err := <-started; !errdefs.IsAborted(err) {
				t.Errorf("start: %v", err)
			}
			if s := f.sandboxStatus("pod"); s.State != "SANDBOX_NOTREADY" || s.ExitedAt == nil {
				t.Errorf("afterwards: %v", s)
			}
		})
	}
}

// A container with files of its own below /etc keeps them, and one whose root
// is read-only gets the pod's so.
func TestPodFiles(t *testing.T) {
	f := newFixture(t)
	pod := f.createSandbox("pod")
	if err := f.startSandbox("pod"); err != nil {
		t.Fatal(err)
	}
	own := filepath.Join(t.TempDir(), "hosts")
	if err := os.WriteFile(own, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	bundle := f.bundle(func(s *specs.Spec) {
		s.Root.Readonly = true
		s.Mounts = []specs.Mount{{Destination: "/etc/hosts", Type: "bind", Source: own, Options: []string{"bind"}}}
	}, "sleep")
	if _, err := f.Create(t.Context(), &taskapi.CreateTaskRequest{ID: "c1", Bundle: bundle}); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range f.agent.Spec("c1").Mounts {
		got = append(got, m.Destination+" "+strings.Join(m.Options, ","))
	}
	if want := []string{"/etc/hosts bind", "/etc/hostname rbind,rprivate,ro", "/etc/resolv.conf rbind,rprivate,ro"}; !slices.Equal(got, want) {
		t.Errorf("mounts %q", got)
	}
	// They are not in memory with the bundle: a container may make them longer.
	work, err := os.Readlink(filepath.Join(pod, "work"))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range f.tree.mounts["c1"][1:] {
		if filepath.Dir(m.Source) != work {
			t.Errorf("%s is %s", m.Destination, m.Source)
		}
	}
	if s := f.status("c1", ""); s.Status != tasktypes.Status_CREATED {
		t.Errorf("state %v", s)
	}
	f.delete("c1", "")
}

func TestCgroupsPath(t *testing.T) {
	for parent, want := range map[string]string{
		"/kubepods/burstable/pod1":                           "/kubepods/burstable/pod1/id",
		"/kubepods.slice/kubepods-pod1.slice":                "kubepods-pod1.slice:cri-containerd:id",
		"kubepods-burstable-pod1.slice":                      "kubepods-burstable-pod1.slice:cri-containerd:id",
		"/system.slice/containerd.service/kubepods-pod.slic": "/system.slice/containerd.service/kubepods-pod.slic/id",
	} {
		if got := cgroupsPath(parent, "id"); got != want {
			t.Errorf("%s: %s", parent, got)
		}
	}
	p := &pod{id: "id"}
	if got := p.sandboxConfig("k8s.io").cgroupsPath; got != "/k8s.io/id" {
		t.Errorf("without a parent: %s", got)
	}
	bundle := t.TempDir()
	for path, want := range map[string]string{"": "/c1", "/a/b": "/a/b"} {
		writeConfig(t, bundle, fmt.Appendf(nil, `{"process":{},"root":{"path":"rootfs"},"linux":{"cgroupsPath":%q,"namespaces":[{"type":"pid"},{"type":"network"},{"type":"ipc"},{"type":"uts"},{"type":"mount"}]}}`, path))
		plan, err := newService("ns", &host{}, nil, nil).plan(&taskapi.CreateTaskRequest{ID: "c1", Bundle: bundle}, true)
		if err != nil || plan.sandbox.cgroupsPath != want {
			t.Errorf("%q: %+v, %v", path, plan, err)
		}
	}
}

func TestUsage(t *testing.T) {
	stat := []byte("7 (a) b) S 1 2 3 4 5 6 7 8 9 10 150 250 0 0 20 0 1 0 99\n")
	status := []byte("Name:\tx\nVmRSS:\t999 kB\nRssAnon:\t     100 kB\nRssFile:\t50 kB\nRssShmem:\t       4 kB\n")
	if u, err := parseUsage(stat, status); err != nil || u != (hostUsage{cpu: 4_000_000, memory: 104 << 10}) {
		t.Errorf("%+v, %v", u, err)
	}
	for _, bad := range [][2]string{
		{"", ""}, {"7 (a) S 1 2", ""}, {"7 (a) S 1 2 3 4 5 6 7 8 9 10 x 250 0", ""},
		{string(stat), "RssAnon:\tmuch kB"}, {string(stat), "RssShmem:\t-1 kB"}, {string(stat), "RssShmem:\t99999999999999999999 kB"},
	} {
		if u, err := parseUsage([]byte(bad[0]), []byte(bad[1])); err == nil {
			t.Errorf("%q: %+v", bad, u)
		}
	}
	if u, err := processUsage(os.Getpid()); err != nil || u.memory == 0 {
		t.Errorf("own: %+v, %v", u, err)
	}

	for _, test := range []struct {
		name         string
		guest        *cgroup2.Metrics
		host         hostUsage
		cpu, system  uint64
		memory, anon uint64
	}{
		{"overhead is added", &cgroup2.Metrics{CPU: &cgroup2.CPUStat{UsageUsec: 30, UserUsec: 20, SystemUsec: 10}, Memory: &cgroup2.MemoryStat{Usage: 100, Anon: 60}},
			hostUsage{cpu: 50, memory: 130}, 50, 30, 130, 90},
		{"a guest that claims more", &cgroup2.Metrics{CPU: &cgroup2.CPUStat{UsageUsec: 30, SystemUsec: 10}, Memory: &cgroup2.MemoryStat{Usage: 100, Anon: 60}},
			hostUsage{cpu: 5, memory: 5}, 30, 10, 100, 60},
		{"a guest that says nothing", &cgroup2.Metrics{}, hostUsage{cpu: 5, memory: 7}, 5, 5, 7, 7},
	} {
		m := addOverhead(test.guest, test.host)
		if m.CPU.UsageUsec != test.cpu || m.CPU.SystemUsec != test.system || m.Memory.Usage != test.memory || m.Memory.Anon != test.anon {
			t.Errorf("%s: %v", test.name, m)
		}
	}
}
