//go:build e2e

package crivm

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// Each pod has a kernel of its own, which its containers share; one shim and one VMM serve it.
func TestOneMachinePerPod(t *testing.T) {
	n := pods.For(t)
	p, _ := only(t, n, vmm, func() *pods.Pod { return n.Pod(t) })
	q, _ := only(t, n, shim, func() *pods.Pod { return n.Pod(t) })
	a, b, c := p.Run(t), p.Run(t), q.Run(t)
	if x, y, z := bootID(t, a), bootID(t, b), bootID(t, c); x != y || x == z {
		t.Errorf("boot ids %q and %q of one pod, %q of another", x, y, z)
	}
	if host := hostFile(t, "/proc/sys/kernel/random/boot_id"); bootID(t, a) == host {
		t.Error("the pod runs on the host's kernel")
	}
	if machines, shims := len(n.Processes(vmm)), len(n.Processes(shim)); machines != 2 || shims != 2 {
		t.Errorf("%d VMMs and %d shims for two pods", machines, shims)
	}
	p.Remove(t)
	node.Until(t, "the pod's VMM has ended with it", func() bool { return len(n.Processes(vmm)) == 1 })
	c.Get(t, "true")
}

// What a virtual machine cannot share with the host is refused, in words that name what the user wrote.
func TestHostNamespacesRefused(t *testing.T) {
	n := pods.For(t)
	for name, set := range map[string]func(*cri.NamespaceOption){
		"hostNetwork": func(o *cri.NamespaceOption) { o.Network = cri.NamespaceMode_NODE },
		"hostPID":     func(o *cri.NamespaceOption) { o.Pid = cri.NamespaceMode_NODE },
		"hostIPC":     func(o *cri.NamespaceOption) { o.Ipc = cri.NamespaceMode_NODE },
	} {
		t.Run(name, func(t *testing.T) {
			config := n.PodConfig(t, func(c *cri.PodSandboxConfig) { set(c.Linux.SecurityContext.NamespaceOptions) })
			_, err := n.TryPod(t, config)
			if err == nil || !strings.Contains(err.Error(), name) {
				t.Errorf("want an error about %s: %v", name, err)
			}
		})
	}
}

// Devices of the host that a guest's kernel has not are refused, in words that name them.
func TestHostDeviceRefused(t *testing.T) {
	p := pods.For(t).Pod(t)
	c, err := p.TryCreate(t, pods.Device("/dev/kvm", "/dev/kvm", "rw"))
	if err == nil {
		err = c.TryStart(t)
	}
	if err == nil || !strings.Contains(err.Error(), "/dev/kvm") {
		t.Errorf("want an error about /dev/kvm: %v", err)
	}
}

// A privileged pod has all rights over its own kernel and none over the host's.
func TestPrivilegedInTheGuestOnly(t *testing.T) {
	n := pods.For(t)
	const sysctl = "/proc/sys/kernel/panic"
	before := hostFile(t, sysctl)
	c := n.Pod(t, pods.PrivilegedPod).Run(t, pods.Privileged)
	c.Get(t, "echo 17 >"+sysctl)
	if got := c.Get(t, "cat "+sysctl); got != "17" {
		t.Errorf("in the guest: %s", got)
	}
	if after := hostFile(t, sysctl); after != before {
		t.Errorf("the host's setting has changed from %s to %s", before, after)
	}
	c.Get(t, "[ ! -e /dev/kvm ]")
	c.Get(t, ": <>/dev/net/tun && [ -b /dev/pmem0 ] && head -c 1 /dev/pmem0") // the guest's image, which it may read
}

// The pod's machine and its shim are in the pod's cgroup, in every hierarchy that has controllers, as the host sees it, the machine
// where it can open no device, and ps shows whose it is.
func TestMachineIsInThePodsCgroup(t *testing.T) {
	n := pods.For(t)
	shims := n.Processes(shim)
	p, pid := only(t, n, vmm, func() *pods.Pod { return n.Pod(t) })
	both := append(processes(n, shim, shims), pid)
	if len(both) != 2 {
		t.Fatalf("want one shim and one VMM: %v", both)
	}
	parent := p.Config().Linux.CgroupParent + "/"
	cgroups := func(pid int) []string {
		return strings.Split(hostFile(t, fmt.Sprintf("/proc/%d/cgroup", pid)), "\n")
	}
	for _, pid := range both {
		lines := cgroups(pid)
		for _, line := range lines {
			// cgroups(7): "hierarchy:controllers:path". Version 2 has number 0, and no controllers where version 1 has them.
			f := strings.SplitN(line, ":", 3)
			if len(f) != 3 {
				t.Fatalf("/proc/%d/cgroup: %q", pid, line)
			}
			if f[0] == "0" && len(lines) > 1 {
				continue
			}
			if !strings.Contains(f[2], parent) {
				t.Errorf("process %d is not in the pod's cgroup: %s", pid, line)
			}
		}
	}
	confined := parent + p.ID + "/microvm-vmm"
	if lines := cgroups(pid); !slices.ContainsFunc(lines, func(line string) bool { return strings.HasSuffix(line, confined) }) {
		t.Errorf("the machine is not in the cgroup …%s, but in %q", confined, lines)
	}
	metadata := p.Config().Metadata
	if got, want := n.Processes(vmm)[pid], fmt.Sprintf(" %s/%s %s", metadata.Namespace, metadata.Name, p.ID); !strings.HasSuffix(got, want) {
		t.Errorf("ps shows %q, without %q", got, want)
	}
}

// What a pod takes of memory is more than what its containers take: the guest's kernel, the VMM and the shim are in it.
func TestPodStatsHaveTheMachine(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	for range 2 {
		p.Run(t, pods.Shell("head -c 10000000 /dev/zero >$(mktemp /dev/shm/XXXXXX); sleep 1000"))
	}
	var s *cri.PodSandboxStats
	var sum uint64
	node.Until(t, "memory in use shows", func() bool {
		r, err := n.CRI.PodSandboxStats(n.Context(t), &cri.PodSandboxStatsRequest{PodSandboxId: p.ID})
		if err != nil {
			t.Fatalf("stats of the pod: %v", err)
		}
		s, sum = r.Stats, 0
		for _, c := range s.Linux.Containers {
			sum += c.GetMemory().GetUsageBytes().GetValue()
		}
		return sum >= 20_000_000
	})
	if m := s.Linux.Memory; m.GetUsageBytes().GetValue() < sum+20<<20 || m.GetWorkingSetBytes().GetValue() < sum {
		t.Errorf("memory of the pod: %v; of its containers: %d", m, sum)
	}
}

func memTotal(t *testing.T, c *pods.Container) int {
	t.Helper()
	kib, err := strconv.Atoi(c.Get(t, "awk '/^MemTotal/ {print $2}' /proc/meminfo"))
	if err != nil {
		t.Fatal(err)
	}
	return kib >> 10
}

// The machine holds what the pod's resources say, from its start.
func TestSizeOfPod(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t, func(c *cri.PodSandboxConfig) {
		c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 800 << 20, CpuPeriod: 100000, CpuQuota: 200000}
	})
	c := p.Run(t)
	if got := memTotal(t, c); got < 800 {
		t.Errorf("MemTotal is %d MiB", got)
	}
	if got := c.Get(t, "nproc"); got != "2" {
		t.Errorf("nproc says %s", got)
	}
	// Each processor has a queue of its own.
	if got := c.Get(t, "ls /sys/class/net/eth0/queues | grep -c rx-"); got != "2" {
		t.Errorf("the NIC has %s receive queues", got)
	}
}

// A container's limits change, and so does what its machine has.
func TestMachineGrowsAndShrinks(t *testing.T) {
	n := pods.For(t)
	c := n.Pod(t).Run(t, pods.Resources(&cri.LinuxContainerResources{MemoryLimitInBytes: 128 << 20, CpuPeriod: 100000, CpuQuota: 100000}))
	small := memTotal(t, c)
	n.MustCrictl(t, "update", "--memory", strconv.Itoa(1<<30), "--cpu-quota", "200000", "--cpu-period", "100000", c.ID)
	node.Until(t, "there is more of both", func() bool { return memTotal(t, c) >= 1024 && c.Get(t, "nproc") == "2" })
	n.MustCrictl(t, "update", "--memory", strconv.Itoa(128<<20), "--cpu-quota", "100000", "--cpu-period", "100000", c.ID)
	node.Until(t, "there is less of both", func() bool { return memTotal(t, c) <= small+64 && c.Get(t, "nproc") == "1" })

	// Enough for the kernel to have a part of it, and not only programs: its
	// limit of all memory of TCP follows.
	limit := func() int {
		pages, err := strconv.Atoi(c.Get(t, "awk '{print $2}' /proc/sys/net/ipv4/tcp_mem"))
		if err != nil {
			t.Fatal(err)
		}
		return pages
	}
	before := limit()
	n.MustCrictl(t, "update", "--memory", strconv.Itoa(3<<30), c.ID)
	if now := limit(); memTotal(t, c) < 3072 || now <= before {
		t.Errorf("MemTotal is %d MiB, the limit of TCP is %d pages, before it was %d", memTotal(t, c), now, before)
	}
}

// A container that comes later brings what it may use, for those that are there to see, and takes it along when it goes. A limit of
// processor time alone makes no small machine.
func TestMachineFollowsItsContainers(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	first := p.Run(t, pods.Resources(&cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 50000}))
	small := memTotal(t, first)
	if got := first.Get(t, "nproc"); small <= 400 || small >= 1024 || got != "1" {
		t.Errorf("with a limit of processor time alone, MemTotal is %d MiB and nproc says %s", small, got)
	}
	second := p.Run(t, pods.Resources(&cri.LinuxContainerResources{MemoryLimitInBytes: 1 << 30, CpuPeriod: 100000, CpuQuota: 150000}))
	if got := first.Get(t, "nproc"); memTotal(t, first) < 1024 || got != "2" {
		t.Errorf("with a second container, MemTotal is %d MiB and nproc says %s", memTotal(t, first), got)
	}
	second.Stop(t, 0)
	second.Remove(t)
	node.Until(t, "the machine has shrunk", func() bool { return memTotal(t, first) <= small+64 && first.Get(t, "nproc") == "1" })
}

// resident is the memory of a process that is its own, in MiB.
func resident(t *testing.T, pid int) int64 {
	t.Helper()
	var kib int64
	for line := range strings.Lines(hostFile(t, fmt.Sprintf("/proc/%d/status", pid))) {
		name, value, _ := strings.Cut(line, ":")
		if name != "RssAnon" && name != "RssShmem" {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		kib += n
	}
	return kib >> 10
}

// Memory that a container has used and freed is the host's again, without a word from anybody.
func TestFreedMemoryComesBack(t *testing.T) {
	const used = 200 // MiB
	n := pods.For(t)
	p, pid := only(t, n, vmm, func() *pods.Pod { return n.Pod(t) })
	c := p.Run(t, pods.Shell(fmt.Sprintf(`
		until [ -e /use ]; do sleep 0.1; done
		dd if=/dev/zero bs=%dM count=1 2>/dev/null | until [ -e /free ]; do sleep 0.1; done
		exec sleep 1000000`, used)))
	before := resident(t, pid)
	c.Get(t, "touch /use")
	node.Until(t, "the machine has the memory", func() bool { return resident(t, pid) >= before+used })
	most := resident(t, pid)
	c.Get(t, "touch /free")
	var now int64
	node.Until(t, "it has given the memory back", func() bool { now = resident(t, pid); return now <= most-used*3/4 })
	t.Logf("%d MiB before, %d MiB in use, %d MiB when that was freed", before, most, now)
}

// The guest's kernel panics: only a privileged container can do that to its own machine.
func TestGuestPanics(t *testing.T) {
	n := pods.For(t)
	from := n.LogSize()
	p := n.Pod(t, pods.PrivilegedPod)
	c := p.Run(t, pods.Shell("sleep 1; echo c >/proc/sysrq-trigger; sleep 1000"), pods.Privileged)
	if code := c.Wait(t); code == 0 {
		t.Errorf("exit code %d", code)
	}
	node.Until(t, "the pod is not ready", func() bool { return !ready(t, p) })
	node.Until(t, "containerd's log says why", func() bool { return strings.Contains(n.Log(from), "sysrq triggered crash") })
}
