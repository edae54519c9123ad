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
		{"a quota without a period", limits{quota: 250000}, 8, 16384 * mib, size{3, 512 * mib}},
		{"CPU time alone", limits{quota: 400000, period: 100000}, 8, 16384 * mib, size{4, 512 * mib}},
		{"a tiny host", limits{}, 1, 256 * mib, size{1, 256 * mib}},
	} {
		if got := machineSize(conf, test.limits, test.cpus, test.hostMemory); got != test.want {
			t.Errorf("%s: %+v, want %+v", test.name, got, test.want)
		}
	}
}

func TestSizeLimit(t *testing.T) {
	const mib = 1 << 20
	for _, test := range []struct {
		name       string
		conf       config.Config
		cpus       int
		hostMemory uint64
		want       size
	}{
		{"what the host has", config.Config{}, 8, 16384*mib + 4096, size{8, 16384 * mib}},
		{"more than a machine can have", config.Config{}, 256, 1 << 40, size{32, 1 << 40}},
		{"as configured", config.Config{MaxVCPUs: 4, MaxMemory: 1024 * mib}, 8, 16384 * mib, size{4, 1024 * mib}},
		{"more than the host has", config.Config{MaxVCPUs: 16, MaxMemory: 32768 * mib}, 8, 16384 * mib, size{8, 16384 * mib}},
	} {
		if got := sizeLimit(&test.conf, test.cpus, test.hostMemory); got != test.want {
			t.Errorf("%s: %+v, want %+v", test.name, got, test.want)
		}
	}
	conf := &config.Config{DefaultVCPUs: 1, DefaultMemory: 512 * mib, MaxVCPUs: 2, MaxMemory: 1024 * mib}
	if got := machineSize(conf, limits{quota: 800000, period: 100000, memory: 1 << 40}, 8, 16384*mib); got != (size{2, 1024 * mib}) {
		t.Errorf("above the limit: %+v", got)
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
		{"none", specs.Spec{}, limits{container: true}},
		{"container", specs.Spec{Linux: resources}, limits{quota: quota, period: period, memory: memory, container: true}},
		{"pod", specs.Spec{Annotations: pod}, limits{quota: 400000, period: 100000, memory: 1 << 20}},
		{"the pod's count", specs.Spec{Linux: resources, Annotations: pod}, limits{quota: 400000, period: 100000, memory: 1 << 20}},
		{"a pod without limits", specs.Spec{Linux: resources, Annotations: map[string]string{
			annotationCPUQuota: "0", annotationCPUPeriod: "100000", annotationMemory: "0",
		}}, limits{quota: quota, period: period, memory: memory, container: true}},
		{"nonsense", specs.Spec{Annotations: map[string]string{annotationMemory: "much", annotationCPUQuota: "-1"}}, limits{container: true}},
	} {
		if got := limitsOf(&test.spec); got != test.want {
			t.Errorf("%s: %+v, want %+v", test.name, got, test.want)
		}
	}
}
