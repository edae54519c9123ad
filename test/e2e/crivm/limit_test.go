//go:build e2e

package crivm

import (
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// podFixed is the overhead of a pod in memory that the RuntimeClass declares, in MiB.
func podFixed(t *testing.T) int64 {
	t.Helper()
	class := hostFile(t, "../../../deploy/k8s/runtimeclass.yaml")
	found := regexp.MustCompile(`podFixed:\n +memory: (\d+)Mi\n`).FindStringSubmatch(class)
	if found == nil {
		t.Fatalf("no overhead: %s", class)
	}
	mib, err := strconv.ParseInt(found[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return mib
}

// value is that of a key in a file of a cgroup, as "key value" in a line.
func value(t *testing.T, file, key string) int64 {
	t.Helper()
	for line := range strings.Lines(hostFile(t, file)) {
		if name, number, _ := strings.Cut(strings.TrimSpace(line), " "); name == key {
			n, err := strconv.ParseInt(number, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("%s has no %s", file, key)
	return 0
}

// A pod whose container uses all that it may, in a cgroup that the kubelet would make for it: limit and declared overhead. It
// lives, and what it takes beyond its container's limit is within that overhead.
func TestFullPod(t *testing.T) {
	const limit, anonymous = 256, 200 // MiB
	overhead := podFixed(t)
	const parent = "/crivm-full"
	n := pods.For(t)
	cgroup := node.MemoryCgroup(t, parent, (limit+overhead)<<20)
	// What is swapped out would not show.
	if err := os.WriteFile(filepath.Join(cgroup, "memory.swap.max"), []byte("0"), 0o644); err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	p := n.Pod(t, func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = parent })
	resources := pods.Resources(&cri.LinuxContainerResources{MemoryLimitInBytes: limit << 20})
	// Ours, and not the pod's: where the node's files are in memory, what the pod writes is not to be had back.
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, 80<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	c := p.Run(t, resources, pods.Mount(file, "/file", pods.ReadOnly), pods.Shell("dd if=/dev/zero bs="+strconv.Itoa(anonymous)+"M count=1 2>/dev/null | sleep 1000000"))
	node.Until(t, "the container has its memory", func() bool { return value(t, filepath.Join(cgroup, "memory.stat"), "anon") > anonymous<<20 })
	// More than there is room for in the container's caches.
	c.Get(t, "for i in 1 2; do cat /file >/dev/null; done")
	if !ready(t, p) || c.Status(t).State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the pod is %v, the container %v", p.Status(t).State, c.Status(t).State)
	}
	if kills := value(t, filepath.Join(cgroup, "memory.events"), "oom_kill"); kills != 0 {
		t.Errorf("%d processes were killed for want of memory", kills)
	}
	beyond := value(t, filepath.Join(cgroup, "memory.stat"), "anon")>>20 - limit
	t.Logf("with a limit of %d MiB the pod has %d MiB beyond, of %d MiB declared", limit, beyond, overhead)
	if beyond > overhead {
		t.Errorf("the declared overhead is %d MiB, and %d MiB are used", overhead, beyond)
	}
	p.Remove(t)
}
