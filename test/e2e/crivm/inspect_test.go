//go:build e2e

package crivm

import (
	"encoding/json"
	"strconv"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// inspected is what crictl inspectp says of a pod.
type inspected struct {
	Status struct{ State string }
	Info   struct {
		Pid           int
		ProcessStatus string
		Config        struct{ Metadata struct{ Name string } }
		// Where containerd makes the sandbox, sandboxer = "podsandbox".
		RuntimeSpec *struct {
			Linux struct{ Namespaces []struct{ Type, Path string } }
		}
	}
	// Where the shim makes it.
	Machine *struct {
		NetworkNamespace string
		VMM              int
		Kernel           string
		Agent            string
		CPUs             int
		MemoryBytes      int64
		End              string
	}
}

func inspect(t *testing.T, n *pods.Node, p *pods.Pod) (i inspected) {
	t.Helper()
	out := n.MustCrictl(t, "inspectp", p.ID).Stdout
	if err := json.Unmarshal([]byte(out), &i); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if (i.Machine == nil) == (i.Info.RuntimeSpec == nil) {
		t.Fatalf("crictl inspectp: %s", out)
	}
	return i
}

// networkNamespace is the path of the pod's on the host.
func (i inspected) networkNamespace(t *testing.T) string {
	t.Helper()
	if i.Machine != nil {
		return i.Machine.NetworkNamespace
	}
	for _, namespace := range i.Info.RuntimeSpec.Linux.Namespaces {
		if namespace.Type == "network" && namespace.Path != "" {
			return namespace.Path
		}
	}
	t.Fatalf("crictl inspectp names no network namespace: %+v", i)
	return ""
}

// crictl inspectp is true of the pod's machine: its process, its network, and with the shim as sandboxer its kernel and its size, as it
// changes.
func TestInspect(t *testing.T) {
	n := pods.For(t)
	p, pid := only(t, n, vmm, func() *pods.Pod { return n.Pod(t) })
	c := p.Run(t, pods.Resources(&cri.LinuxContainerResources{MemoryLimitInBytes: 128 << 20, CpuPeriod: 100000, CpuQuota: 100000}))
	check := func() {
		t.Helper()
		i := inspect(t, n, p)
		if i.Status.State != "SANDBOX_READY" || i.Info.Pid != pid || i.Info.ProcessStatus != "running" || i.Info.Config.Metadata.Name != p.Config().Metadata.Name {
			t.Errorf("crictl inspectp, of process %d: %+v", pid, i)
		}
		if m := i.Machine; m != nil {
			total := int64(memTotal(t, c)) << 20
			if m.VMM != pid || m.Kernel != c.Get(t, "uname -r") || m.Agent == "" || strconv.Itoa(m.CPUs) != c.Get(t, "nproc") || m.End != "" ||
				m.MemoryBytes < total || m.MemoryBytes > total+128<<20 {
				t.Errorf("of a machine with MemTotal %d: %+v", total, m)
			}
		}
		v4, _ := p.IPs(t)
		if addresses := node.Tool(t, "nsenter", "--net="+i.networkNamespace(t), "ip", "addr"); !strings.Contains(addresses, " "+v4+"/") {
			t.Errorf("the network namespace lacks %s: %s", v4, addresses)
		}
	}
	check()
	n.MustCrictl(t, "update", "--memory", strconv.Itoa(1<<30), "--cpu-quota", "200000", "--cpu-period", "100000", c.ID)
	if m := inspect(t, n, p).Machine; m != nil && (m.CPUs != 2 || m.MemoryBytes < 1<<30) {
		t.Errorf("grown: %+v", m)
	}
	check()
}
