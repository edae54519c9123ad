//go:build e2e

package vm

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

func TestOwnKernel(t *testing.T) {
	n := node.For(t)
	release := strings.TrimSpace(n.MustRun(t, nil, "uname", "-r").Stdout)
	if release == hostKernel(t) || !strings.HasPrefix(release, "6.12.") {
		t.Errorf("the container's kernel is %s, the host's %s; want a 6.12 of its own", release, hostKernel(t))
	}
	if cpu := n.MustRun(t, nil, "cat", "/proc/cpuinfo").Stdout; !strings.Contains(cpu, " hypervisor ") {
		t.Errorf("the processor of a virtual machine has the flag hypervisor:\n%s", cpu)
	}
}

func TestEachContainerHasItsMachine(t *testing.T) {
	n := node.For(t)
	a := n.Detach(t, nil, "sleep", "1000")
	b := n.Detach(t, nil, "sleep", "1000")
	if found := n.Processes(vmm); len(found) != 2 {
		t.Errorf("want two virtual machines: %v", found)
	}
	if x, y, host := bootID(t, n, a), bootID(t, n, b), hostBootID(t); x == y || x == host || y == host {
		t.Errorf("boot ids %q, %q, the host's %q: want three", x, y, host)
	}
}

func TestContainersOfOneSandboxShareAMachine(t *testing.T) {
	for _, name := range []string{"io.kubernetes.cri.sandbox-id", "io.containerd.runc.v2.group"} {
		t.Run(name, func(t *testing.T) {
			n := node.For(t)
			sandbox := annotation(name, n.ID(t))
			a := n.Detach(t, sandbox, "sh", "-c", "echo a >/file; sleep 1000")
			b := n.Detach(t, sandbox, "sh", "-c", "echo b >/file; sleep 1000")
			only(t, n, vmm)
			only(t, n, shim)
			if x, y := bootID(t, n, a), bootID(t, n, b); x != y {
				t.Errorf("boot ids %q and %q", x, y)
			}
			// They share the machine and its network, not their files or processes.
			n.Exec(t, b, nil, "cat", "/file").WantOutput(t, "b\n")
			if ps := n.MustExec(t, b, nil, "ps").Stdout; strings.Contains(ps, "echo a") {
				t.Errorf("a container sees another's processes:\n%s", ps)
			}
			n.Remove(a)
			n.Exec(t, b, nil, "echo", "alive").WantOutput(t, "alive\n")
			c := n.Detach(t, sandbox, "sleep", "1000")
			if x, y := bootID(t, n, b), bootID(t, n, c); x != y {
				t.Errorf("a container that comes late is in another machine: boot ids %q and %q", x, y)
			}
			n.Remove(b)
			n.Remove(c)
			node.Until(t, "the machine has ended with its last container", func() bool { return len(n.Processes(vmm)) == 0 })
		})
	}
}

// Memory and processors of the machine hold the container's limits.
func TestMachineSize(t *testing.T) {
	n := node.For(t)
	n.Configure(t, "default_vcpus = 2\ndefault_memory = '300MiB'\n")
	n.Run(t, nil, "nproc").WantOutput(t, "2\n")
	total := func(flags ...string) int {
		fields := strings.Fields(n.MustRun(t, flags, "grep", "MemTotal", "/proc/meminfo").Stdout)
		kib, err := strconv.Atoi(fields[1])
		if err != nil {
			t.Fatal(err)
		}
		return kib >> 10
	}
	if mib := total(); mib < 200 || mib > 300 {
		t.Errorf("a machine of 300 MiB shows %d", mib)
	}
	if mib := total("--memory-limit", strconv.Itoa(700<<20)); mib < 700 {
		t.Errorf("a container with a limit of 700 MiB is in a machine of %d MiB", mib)
	}
}

// The share between host and guest behaves like a file system: every check of fsconformance, with smaller directories than
// beside the file server, where one has 100,000 entries: that is too much for an emulated machine.
func TestFileSystemConformance(t *testing.T) {
	n := node.For(t)
	program := filepath.Join(node.Top(), "bin/fsconformance")
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("%v: go build -o bin/ ./test/fsconformance", err)
	}
	// Not below /tmp: a tmpfs has no user xattrs, and is not what containers' files lie on.
	dir, err := os.MkdirTemp("/var/tmp", "e2efs")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil { // some checks are another user's
		t.Fatal(err)
	}
	r := n.Run(t, []string{
		"--privileged-without-host-devices", "--privileged",
		"--mount", "type=bind,src=" + program + ",dst=/fsconformance,options=bind:ro",
		"--mount", "type=bind,src=" + dir + ",dst=/share,options=rbind:rw",
	}, "/fsconformance", "-entries", "300", "/share")
	for line := range strings.Lines(r.Stdout) {
		// What the host lacks is skipped; ACLs it has.
		if strings.HasPrefix(line, "FAIL") || strings.HasPrefix(line, "SKIP acl/") {
			t.Error(strings.TrimSpace(line))
		}
	}
	r.WantExit(t, 0)
}
