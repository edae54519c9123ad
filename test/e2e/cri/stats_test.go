//go:build e2e

package cri

import (
	"encoding/json"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

func containerStats(t *testing.T, n *pods.Node, c *pods.Container) *cri.ContainerStats {
	t.Helper()
	r, err := n.CRI.ContainerStats(n.Context(t), &cri.ContainerStatsRequest{ContainerId: c.ID})
	if err != nil {
		t.Fatalf("stats: %v", err)
	}
	return r.Stats
}

// What the statistics say of a container that uses memory, processor and disk.
func TestContainerStats(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	c := p.Run(t, pods.Shell("head -c 30000000 /dev/zero >/dev/shm/ballast; head -c 20000000 /dev/zero >/file; while :; do :; done"))
	idle := p.Run(t)
	node.Until(t, "memory in use shows", func() bool {
		s := containerStats(t, n, c)
		used, set := s.GetMemory().GetUsageBytes().GetValue(), s.GetMemory().GetWorkingSetBytes().GetValue()
		if used > 500<<20 || set > used {
			t.Fatalf("memory: %v", s.Memory)
		}
		return set >= 30_000_000
	})
	node.Until(t, "disk usage shows", func() bool {
		s := containerStats(t, n, c)
		return s.GetWritableLayer().GetUsedBytes().GetValue() >= 20_000_000
	})
	first := containerStats(t, n, c).GetCpu()
	node.Until(t, "processor time grows", func() bool {
		now := containerStats(t, n, c).GetCpu()
		spent, passed := now.UsageCoreNanoSeconds.Value-first.UsageCoreNanoSeconds.Value, uint64(now.Timestamp-first.Timestamp)
		if now.Timestamp > first.Timestamp && spent > 2*passed+1e8 {
			t.Fatalf("a single process has used %d ns in %d ns", spent, passed)
		}
		return spent > 200e6
	})
	if s := containerStats(t, n, idle); s.GetMemory().GetWorkingSetBytes().GetValue() > 20<<20 {
		t.Errorf("memory of an idle container: %v", s.Memory)
	}
	list, err := n.CRI.ListContainerStats(n.Context(t), &cri.ListContainerStatsRequest{Filter: &cri.ContainerStatsFilter{PodSandboxId: p.ID}})
	if err != nil || len(list.Stats) != 2 {
		t.Errorf("stats of the pod's containers: %v, %v", list, err)
	}
}

// The pod's statistics have its network, its processes and its containers.
func TestPodStats(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	v4, _ := p.IPs(t)
	c := p.Run(t, pods.Shell("sleep 1000 & sleep 1000 & tcpsvd 0.0.0.0 7010 sh -c 'wc -c >/dev/null; echo read'"))
	c.Listening(t, "tcp", 7010)
	stats := func() *cri.PodSandboxStats {
		t.Helper()
		r, err := n.CRI.PodSandboxStats(n.Context(t), &cri.PodSandboxStatsRequest{PodSandboxId: p.ID})
		if err != nil {
			t.Fatalf("stats of the pod: %v", err)
		}
		return r.Stats
	}
	before := stats()
	other := n.Pod(t).Run(t)
	other.Shell(t, "head -c 3000000 /dev/zero | timeout 60 nc "+v4+" 7010").WantOutput(t, "read\n")
	node.Until(t, "what was received shows", func() bool {
		now := stats().Linux.Network.DefaultInterface
		return now.Name == "eth0" && now.RxBytes.Value-before.Linux.Network.DefaultInterface.RxBytes.Value >= 3_000_000
	})
	s := stats()
	if len(s.Linux.Containers) != 1 || s.Linux.Containers[0].Attributes.Id != c.ID {
		t.Errorf("containers: %v", s.Linux.Containers)
	}
	if s.Attributes.Metadata.Name != p.Config().Metadata.Name || s.Linux.Memory.GetUsageBytes().GetValue() == 0 || s.Linux.Cpu.GetUsageCoreNanoSeconds().GetValue() == 0 {
		t.Errorf("pod: %v", s)
	}
	var seen struct {
		Stats []struct {
			Attributes struct{ ID string }
		}
	}
	out := n.MustCrictl(t, "statsp", "-o", "json", "--id", p.ID).Stdout
	if err := json.Unmarshal([]byte(out), &seen); err != nil || len(seen.Stats) != 1 || seen.Stats[0].Attributes.ID != p.ID {
		t.Errorf("crictl statsp: %s", out)
	}
}

// readLimits reads what the container sees of its limits, on a kernel with either version of cgroups, in the words of version 2.
const readLimits = `cd /sys/fs/cgroup
if [ -e memory.max ]; then echo $(cat memory.max cpu.max)
else echo $(cat memory/memory.limit_in_bytes cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us); fi`

// Limits are there from the start and change while the container runs: memory, processor, and what CRI says of them.
func TestUpdate(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	c := p.Run(t, pods.Resources(&cri.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuPeriod: 100000, CpuQuota: 50000}))
	if got := c.Get(t, readLimits); got != "67108864 50000 100000" {
		t.Errorf("limits at the start: %q", got)
	}
	n.MustCrictl(t, "update", "--memory", "134217728", "--cpu-quota", "150000", "--cpu-period", "100000", c.ID)
	if got := c.Get(t, readLimits); got != "134217728 150000 100000" {
		t.Errorf("limits after growing: %q", got)
	}
	if r := c.Status(t).Resources.GetLinux(); r.GetMemoryLimitInBytes() != 128<<20 || r.GetCpuQuota() != 150000 {
		t.Errorf("limits in the status: %v", r)
	}
	n.MustCrictl(t, "update", "--memory", "33554432", "--cpu-quota", "20000", "--cpu-period", "100000", c.ID)
	if got := c.Get(t, readLimits); got != "33554432 20000 100000" {
		t.Errorf("limits after shrinking: %q", got)
	}
	if code := c.Shell(t, "tail /dev/zero").Code; code == 0 {
		t.Error("more memory than the new limit could be used")
	}
}
