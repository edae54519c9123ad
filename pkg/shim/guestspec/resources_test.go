package guestspec

import (
	"maps"
	"reflect"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestResources(t *testing.T) {
	period, runtime, limit, weight := uint64(1), int64(2), int64(64<<20), uint16(100)
	res := &specs.LinuxResources{
		CPU:    &specs.LinuxCPU{Cpus: "2-3", Mems: "0", RealtimePeriod: &period, RealtimeRuntime: &runtime, Quota: &limit},
		Memory: &specs.LinuxMemory{Limit: &limit},
		BlockIO: &specs.LinuxBlockIO{
			Weight: &weight, WeightDevice: []specs.LinuxWeightDevice{{Weight: &weight}},
			ThrottleReadBpsDevice: []specs.LinuxThrottleDevice{{Rate: 1}}, ThrottleWriteBpsDevice: []specs.LinuxThrottleDevice{{Rate: 1}},
			ThrottleReadIOPSDevice: []specs.LinuxThrottleDevice{{Rate: 1}}, ThrottleWriteIOPSDevice: []specs.LinuxThrottleDevice{{Rate: 1}},
		},
		Rdma: map[string]specs.LinuxRdma{"mlx4_0": {}},
	}
	remarks := Resources(res)
	want := &specs.LinuxResources{
		CPU: &specs.LinuxCPU{Quota: &limit}, Memory: &specs.LinuxMemory{Limit: &limit}, BlockIO: &specs.LinuxBlockIO{Weight: &weight},
	}
	if !reflect.DeepEqual(res, want) || len(remarks) != 4 {
		t.Errorf("%+v, %q", res, remarks)
	}
}

// What is named by the host's numbers and names would be something else in the guest.
func TestUnifiedResources(t *testing.T) {
	for _, test := range []struct {
		key, value, want string
		remark           bool
	}{
		{"memory.high", "1000", "1000", false},
		{"pids.max", "max", "max", false},
		{"cpu.weight", "50", "50", false},
		{"hugetlb.2MB.max", "0", "0", false},
		{"io.max", "8:16 rbps=2097152 wiops=120", "", true},
		{"io.max", " 8: 16 rbps=2097152", "", true}, // the kernel takes that
		{"io.latency", "253:0 target=75\n8:16 target=10", "", true},
		{"io.cost.qos", "8:16 enable=1", "", true},
		{"io.weight", "200", "200", false},
		{"io.weight", "default 200", "default 200", false},
		{"io.weight", "default 200\n8:16 300\n", "default 200\n", true},
		{"io.bfq.weight", "8:16 300", "", true},
		{"io.prio.class", "idle", "idle", false},
		{"cpuset.cpus", "2-3", "", true},
		{"cpuset.mems", "1", "", true},
		{"cpuset.cpus.partition", "isolated", "", true},
		{"rdma.max", "mlx4_0 hca_handle=2", "", true},
		{"misc.max", "sev 10", "", true},
		{"dmem.max", "drm/0000:03:00.0/vram0 1000", "", true},
	} {
		res := &specs.LinuxResources{Unified: map[string]string{test.key: test.value}}
		remarks := Resources(res)
		want := map[string]string{}
		if test.want != "" {
			want[test.key] = test.want
		}
		if !maps.Equal(res.Unified, want) {
			t.Errorf("%s: %q becomes %q", test.key, test.value, res.Unified)
		}
		if test.remark != (len(remarks) == 1 && strings.Contains(remarks[0], test.key)) || len(remarks) > 1 {
			t.Errorf("%s: %q: remarks %q", test.key, test.value, remarks)
		}
	}
}

func TestIntelRdt(t *testing.T) {
	spec := base()
	spec.Linux.IntelRdt = &specs.LinuxIntelRdt{ClosID: "x"}
	if r := rewrite(t, spec, first); r.Spec.Linux.IntelRdt != nil || len(r.Remarks) != 1 || !strings.Contains(r.Remarks[0], "intelRdt") {
		t.Errorf("%+v, remarks %q", r.Spec.Linux.IntelRdt, r.Remarks)
	}
}
