package shim

import (
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/microvm-runtime/microvm/pkg/shim/config"
)

func TestMachineSize(t *testing.T) {
	const mib = 1 << 20
	conf := &config.Config{DefaultVCPUs: 1, DefaultMemory: 512 * mib}
	for _, test := range []struct {
		name       string
		limits     limits
		cpus       int
		hostMemory uint64
		want       size
	}{
		{"no limits", limits{}, 8, 16384 * mib, size{1, 512 * mib}},
		{"a small limit makes no small machine", limits{memory: 16 * mib}, 8, 16384 * mib, size{1, 512 * mib}},
		{"a large one a larger machine", limits{memory: 1024 * mib}, 8, 16384 * mib, size{1, 1152 * mib}},
		{"CPUs are rounded up", limits{quota: 150000, period: 100000}, 8, 16384 * mib, size{2, 512 * mib}},
		{"less than one", limits{quota: 1000, period: 100000}, 8, 16384 * mib, size{1, 512 * mib}},
		{"more CPUs than the host has", limits{quota: 6400000, period: 100000}, 4, 16384 * mib, size{4, 512 * mib}},
		{"more than a machine can have", limits{quota: 1 << 62, period: 1}, 256, 16384 * mib, size{32, 512 * mib}},
		{"more memory than the host has", limits{memory: 1 << 62}, 8, 2048 * mib, size{1, 2048 * mib}},
		{"negative is no limit", limits{quota: -1, period: 100000, memory: -1}, 8, 16384 * mib, size{1, 512 * mib}},
		{"no whole huge page", limits{memory: 600*mib + 4096}, 8, 16384 * mib, size{1, 728 * mib}},
		{"a tiny host", limits{}, 1, 256 * mib, size{1, 256 * mib}},
	} {
		if got := machineSize(conf, test.limits, test.cpus, test.hostMemory); got != test.want {
			t.Errorf("%s: %+v, want %+v", test.name, got, test.want)
		}
	}
}

func TestLimits(t *testing.T) {
	quota, period, memory := int64(200000), uint64(100000), int64(64<<20)
	resources := &specs.Linux{Resources: &specs.LinuxResources{
		CPU: &specs.LinuxCPU{Quota: &quota, Period: &period}, Memory: &specs.LinuxMemory{Limit: &memory},
	}}
	pod := map[string]string{annotationCPUQuota: "400000", annotationCPUPeriod: "100000", annotationMemory: "1048576"}
	for _, test := range []struct {
		name string
		spec specs.Spec
		want limits
	}{
		{"none", specs.Spec{}, limits{}},
		{"container", specs.Spec{Linux: resources}, limits{quota, period, memory}},
		{"pod", specs.Spec{Annotations: pod}, limits{400000, 100000, 1 << 20}},
		{"the pod's count", specs.Spec{Linux: resources, Annotations: pod}, limits{400000, 100000, 1 << 20}},
		{"a pod without limits", specs.Spec{Linux: resources, Annotations: map[string]string{
			annotationCPUQuota: "0", annotationCPUPeriod: "100000", annotationMemory: "0",
		}}, limits{quota, period, memory}},
		{"nonsense", specs.Spec{Annotations: map[string]string{annotationMemory: "much", annotationCPUQuota: "-1"}}, limits{}},
	} {
		if got := limitsOf(&test.spec); got != test.want {
			t.Errorf("%s: %+v, want %+v", test.name, got, test.want)
		}
	}
}
