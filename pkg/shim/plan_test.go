package shim

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/microvm-runtime/microvm/pkg/internal/alloctest"
	"github.com/microvm-runtime/microvm/pkg/shim/config"
	"github.com/microvm-runtime/microvm/pkg/shim/guestspec"
)

// FuzzPlan: whatever a bundle's config.json says, Create refuses it or makes a
// plan of it, and nothing yet. What the guest gets names no place of the host; a
// machine has a size that there is.
func FuzzPlan(f *testing.F) {
	seed := func(change func(*specs.Spec)) []byte {
		quota, memory := int64(1<<62), int64(-1)
		spec := &specs.Spec{
			Version: "1.2.0", Hostname: "h",
			Process: &specs.Process{Args: []string{"sleep"}, Cwd: "/"},
			Root:    &specs.Root{Path: "rootfs"},
			Annotations: map[string]string{
				"io.kubernetes.cri.sandbox-cpu-quota": "-9223372036854775808", "io.kubernetes.cri.sandbox-cpu-period": "1",
				"io.kubernetes.cri.sandbox-memory": "9223372036854775807", "io.microvm.disk-bytes-per-second": "1MiB burst 2MiB",
			},
			Linux: &specs.Linux{
				CgroupsPath: "../../c1", Resources: &specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: &quota}, Memory: &specs.LinuxMemory{Limit: &memory}},
				Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.NetworkNamespace, Path: "/proc/1/ns/net"}},
			},
		}
		change(spec)
		data, err := json.Marshal(spec)
		if err != nil {
			f.Fatal(err)
		}
		return data
	}
	f.Add(true, []byte(nil))
	f.Add(true, []byte(`{"process":{},"root":{},"linux":{}}`))
	f.Add(false, []byte(`{"process":{},"root":null,"linux":{},"mounts":[{}],"annotations":{"io.microvm.nothing":""}}`))
	f.Add(false, seed(func(*specs.Spec) {}))
	f.Add(true, seed(func(s *specs.Spec) {
		s.Root.Path = "../../../etc"
		s.Mounts = []specs.Mount{
			{Destination: "/a", Type: "bind", Source: "../../..", Options: []string{"rbind", "ro", "rro"}},
			{Destination: "/dev/shm", Type: "bind", Source: "/dev/shm"}, {Destination: "/b", Type: "nfs", Source: "host:/b"},
			{Destination: "/p", Type: "bind", Source: "/proc/self/root", Options: []string{"bind"}}, {Destination: "/t", Type: "tmpfs"},
		}
		s.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "/bin/true"}}, StartContainer: []specs.Hook{{Path: "/h"}}}
	}))
	f.Add(true, seed(func(s *specs.Spec) { s.Annotations["io.kubernetes.cri.container-type"] = "sandbox" }))

	bundle := f.TempDir()
	conf := &config.Config{DefaultVCPUs: 1, DefaultMemory: 512 << 20}
	f.Fuzz(func(t *testing.T, first bool, data []byte) {
		writeConfig(t, bundle, data)
		s := newService("ns", &host{}, nil, nil)
		if !first {
			s.sandbox = &sandbox{tree: &fakeTree{}, shm: "/dev/shm"}
		}
		defer alloctest.Limit(t, 4<<20+256*uint64(len(data)))()
		p, err := s.plan(&taskapi.CreateTaskRequest{ID: "c1", Bundle: bundle}, first)
		if list, _ := os.ReadDir(bundle); len(list) != 1 {
			t.Errorf("made: %v", list)
		}
		if err != nil {
			return
		}
		const hostCPUs, hostMemory = 4, 8 << 30
		if m := machineSize(conf, p.sandbox.limits, hostCPUs, hostMemory); m.vcpus < 1 || m.vcpus > hostCPUs || m.memory < config.MinMemory || m.memory > hostMemory {
			t.Errorf("a machine of %+v", m)
		}
		_, _ = conf.RateLimitsFor(p.sandbox.annotations)
		if p.pause {
			return
		}
		var spec specs.Spec
		if err := json.Unmarshal(p.request.GetSpec(), &spec); err != nil {
			t.Fatal(err)
		}
		if spec.Root.Path != filepath.Join(guestspec.SharedRoot, "c1", guestspec.RootfsName) || spec.Linux.CgroupsPath != "" {
			t.Errorf("root %q, cgroup %q", spec.Root.Path, spec.Linux.CgroupsPath)
		}
		shared := 0
		for _, m := range spec.Mounts {
			if strings.HasPrefix(m.Source, guestspec.SharedRoot) {
				shared++
			}
		}
		if shared < len(p.mounts) {
			t.Errorf("%d mounts of the guest's for %d of the host's", shared, len(p.mounts))
		}
		for _, m := range p.mounts {
			if m.Type == "" && !filepath.IsAbs(m.Source) {
				t.Errorf("%q is mounted", m.Source)
			}
		}
		if i := slices.IndexFunc(spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Path != "" }); i >= 0 {
			t.Errorf("namespace %v", spec.Linux.Namespaces[i])
		}
	})
}
