//go:build e2e

package cri

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
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

// Processor time is that of programs or that of the kernel, as the processes have it themselves.
func TestProcessorTimes(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	// Fields of proc_pid_stat(5), in hundredths of a second: 14 to 17 are the shell's own times in programs and in the kernel, then
	// those of its children that have ended.
	const script = `while
		%s
		read -r stat </proc/$$/stat
		set -- $stat
		user=$((${14} + ${16})) system=$((${15} + ${17}))
		[ $%s -lt 200 ]
	do :; done
	echo $user $system
	exec sleep 1000`
	for field, burn := range map[string]string{
		"user":   "i=0; while [ $i -lt 10000 ]; do i=$((i + 1)); done",
		"system": "dd if=/dev/zero of=/dev/null bs=1M count=200 2>/dev/null",
	} {
		t.Run(field, func(t *testing.T) {
			c := p.Run(t, pods.Shell(fmt.Sprintf(script, burn, field)))
			var user, system uint64 // microseconds
			node.Until(t, "the container has used its time", func() bool {
				stdout, _ := c.Output(t)
				fields, err := fmt.Sscan(stdout, &user, &system)
				return err == nil && fields == 2
			})
			user, system = user*1e4, system*1e4
			got := processorTimes(t, n, c)
			t.Logf("the container has used %d and %d µs; its metrics: %+v", user, system, got)
			// Its start is in it too.
			most := 2 * (user + system)
			if max(got.user, got.system) < max(user, system)*3/4 || got.total > most {
				t.Error("these are not its times")
			}
			if (got.user > got.system) != (user > system) {
				t.Error("they are in the wrong fields")
			}
			if sum := got.user + got.system; sum < got.total*9/10 || sum > got.total*11/10 {
				t.Error("they are not the whole")
			}
			if usage := containerStats(t, n, c).GetCpu().GetUsageCoreNanoSeconds().GetValue() / 1000; usage < got.total || usage > most {
				t.Errorf("CRI has %d µs", usage)
			}
		})
	}
}

// times are in microseconds.
type times struct{ user, system, total uint64 }

// processorTimes are a container's in the metrics that CRI makes its statistics of.
func processorTimes(t *testing.T, n *pods.Node, c *pods.Container) times {
	t.Helper()
	var m struct {
		CPU struct {
			UserUsec   uint64 `json:"user_usec"`
			SystemUsec uint64 `json:"system_usec"`
			UsageUsec  uint64 `json:"usage_usec"`
			// Of cgroups v1, in nanoseconds.
			Usage *struct{ User, Kernel, Total uint64 }
		}
	}
	n.Metrics(t, c.ID, &m)
	if v1 := m.CPU.Usage; v1 != nil {
		return times{v1.User / 1000, v1.Kernel / 1000, v1.Total / 1000}
	}
	return times{m.CPU.UserUsec, m.CPU.SystemUsec, m.CPU.UsageUsec}
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

// number is a 64-bit one as protobuf has it in JSON.
type number struct {
	Value uint64 `json:",string"`
}

// What crictl shows in JSON is true: of a container and its pod, of memory, processes, and what was sent.
func TestCrictlStats(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	c := p.Run(t, pods.Shell("head -c 30000000 /dev/zero >/dev/shm/ballast; sleep 1001 & sleep 1002 & head -c 100000 /dev/zero >/written; touch /up; wait"))
	node.Until(t, "the container is up", func() bool { return c.Shell(t, "[ -e /up ]").Code == 0 })
	crictl := func(into any, args ...string) {
		t.Helper()
		out := n.MustCrictl(t, args...).Stdout
		if err := json.Unmarshal([]byte(out), into); err != nil {
			t.Fatalf("crictl %s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
	var container struct {
		Stats []struct {
			Attributes struct {
				ID       string
				Metadata struct{ Name string }
			}
			Memory        struct{ WorkingSetBytes, UsageBytes number }
			CPU           struct{ UsageCoreNanoSeconds number }
			WritableLayer struct{ UsedBytes number }
		}
	}
	// containerd looks at the disk now and then.
	node.Until(t, "what the container has written shows", func() bool {
		crictl(&container, "stats", "-o", "json", "--id", c.ID)
		if len(container.Stats) != 1 {
			t.Fatalf("crictl stats: %+v", container)
		}
		return container.Stats[0].WritableLayer.UsedBytes.Value >= 100_000
	})
	s := container.Stats[0]
	if s.Attributes.ID != c.ID || s.Attributes.Metadata.Name != "c1" || s.CPU.UsageCoreNanoSeconds.Value == 0 ||
		s.Memory.WorkingSetBytes.Value < 30_000_000 || s.Memory.UsageBytes.Value < s.Memory.WorkingSetBytes.Value {
		t.Errorf("crictl stats: %+v", s)
	}

	type pod struct {
		Attributes struct{ ID string }
		Linux      struct {
			Memory  struct{ WorkingSetBytes, UsageBytes number }
			CPU     struct{ UsageCoreNanoSeconds number }
			Process struct{ ProcessCount number }
			Network struct {
				DefaultInterface struct{ TxBytes, RxBytes number }
			}
			Containers []struct{ Attributes struct{ ID string } }
		}
	}
	look := func() pod {
		t.Helper()
		var seen struct{ Stats []pod }
		crictl(&seen, "statsp", "-o", "json", "--id", p.ID)
		if len(seen.Stats) != 1 || seen.Stats[0].Attributes.ID != p.ID {
			t.Fatalf("crictl statsp: %+v", seen)
		}
		return seen.Stats[0]
	}
	before := look()
	// The shell and two that sleep.
	if l := before.Linux; l.Process.ProcessCount.Value < 3 || l.CPU.UsageCoreNanoSeconds.Value == 0 || len(l.Containers) != 1 || l.Containers[0].Attributes.ID != c.ID ||
		l.Memory.WorkingSetBytes.Value < 30_000_000 || l.Memory.UsageBytes.Value < l.Memory.WorkingSetBytes.Value {
		t.Errorf("crictl statsp: %+v", before)
	}
	received := receive(t, hostV4)
	c.Get(t, fmt.Sprintf("head -c 3000000 /dev/zero | timeout 300 nc %s", received.address))
	if got := <-received.bytes; got != 3_000_000 {
		t.Errorf("%d bytes were received", got)
	}
	node.Until(t, "what was sent shows", func() bool {
		return look().Linux.Network.DefaultInterface.TxBytes.Value-before.Linux.Network.DefaultInterface.TxBytes.Value >= 3_000_000
	})
}

// receive takes one connection on an address of the host until its end.
func receive(t *testing.T, host string) (server struct {
	address string // for nc
	bytes   chan int64
}) {
	t.Helper()
	l, err := net.Listen("tcp", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	server.address = strings.ReplaceAll(l.Addr().String(), ":", " ")
	server.bytes = make(chan int64, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			close(server.bytes)
			return
		}
		defer conn.Close()
		count, _ := io.Copy(io.Discard, conn)
		server.bytes <- count
	}()
	return server
}

// What a container has read of files is memory that it uses, but nothing that it needs: its working set is without it.
func TestWorkingSet(t *testing.T) {
	const size = 20 << 20
	n := pods.For(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	write(t, file, strings.Repeat("0123456789abcdef", size/16))
	// Else the host's cache has it already, and counts it as the test's.
	dropCache(t, file)
	c := n.Pod(t).Run(t, pods.Mount(dir, "/v", pods.ReadOnly))
	before := containerStats(t, n, c).Memory
	c.Get(t, "dd if=/v/file of=/dev/null bs=1M 2>/dev/null")
	var s *cri.MemoryUsage
	node.Until(t, "what was read is in use", func() bool {
		s = containerStats(t, n, c).Memory
		return s.UsageBytes.Value >= before.UsageBytes.Value+size/2
	})
	if s.WorkingSetBytes.Value > before.WorkingSetBytes.Value+size/4 {
		t.Errorf("before: %v; after reading %d bytes: %v", before, size, s)
	}
}

// dropCache takes a file out of the host's page cache.
func dropCache(t *testing.T, file string) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
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
