//go:build e2e

package crivm

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// A mapping is what /proc/pid/smaps says of one: its permissions, and sizes in KiB.
type mapping struct {
	permissions string
	kib         map[string]int64
}

// mappingsOf are those that a process has of a file.
func mappingsOf(t *testing.T, pid int, file string) (found []mapping) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		t.Fatal(err)
	}
	// proc_pid_maps(5): address, permissions, offset, device, inode. The process sees the file under another path.
	header := regexp.MustCompile(`^[0-9a-f]+-[0-9a-f]+ (\S+) [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) (\d+)`)
	device := fmt.Sprintf("%02x:%02x", unix.Major(st.Dev), unix.Minor(st.Dev))
	ours := false
	for line := range strings.Lines(hostFile(t, fmt.Sprintf("/proc/%d/smaps", pid))) {
		if h := header.FindStringSubmatch(line); h != nil {
			ours = h[2]+":"+h[3] == device && h[4] == strconv.FormatUint(st.Ino, 10)
			if ours {
				found = append(found, mapping{h[1], map[string]int64{}})
			}
			continue
		}
		name, value, _ := strings.Cut(line, ":")
		if number, ok := strings.CutSuffix(strings.TrimSpace(value), " kB"); ok && ours {
			n, err := strconv.ParseInt(strings.TrimSpace(number), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			found[len(found)-1].kib[name] = n
		}
	}
	return found
}

// A layer of an image is in the host's memory once, however many pods use it: each machine has the host's pages of it, and may
// only read them, and no guest has pages of its own.
func TestErofsLayersAreShared(t *testing.T) {
	n := pods.WithDisks(t, "erofs")
	const program = "/bin/busybox"
	var machines []int
	for range 2 {
		p, pid := only(t, n, vmm, func() *pods.Pod { return n.Pod(t, pods.PrivilegedPod) })
		machines = append(machines, pid)
		c := p.Run(t, pods.Privileged)
		c.Get(t, "md5sum "+program)
		// What is mounted a second time is what is mounted already, with its options.
		if mounts := c.Get(t, "mkdir /layer && mount -t erofs -o ro /dev/pmem1 /layer && grep ' /layer ' /proc/mounts"); !regexp.MustCompile(`(?m)^/dev/pmem1 \S+ erofs ro\S*,dax=always`).MatchString(mounts) {
			t.Errorf("without DAX: %s", mounts)
		}
	}
	layers, err := filepath.Glob(n.Path("root/io.containerd.snapshotter.v1.erofs/snapshots/*/layer.erofs"))
	if err != nil {
		t.Fatal(err)
	}
	shared := 0
	for _, layer := range layers {
		info, err := os.Stat(layer)
		if err != nil {
			t.Fatal(err)
		}
		for _, pid := range machines {
			for _, m := range mappingsOf(t, pid, layer) {
				t.Logf("process %d has of %s, of %d KiB: %s %v", pid, layer, info.Size()>>10, m.permissions, m.kib)
				if m.permissions != "r--s" || m.kib["Anonymous"] > 0 {
					t.Errorf("it is not the file's: %+v", m)
				}
				// The program is most of the image. Pages that two processes have count half for each.
				if m.kib["Rss"] > info.Size()>>11 && m.kib["Pss"] <= m.kib["Rss"]*3/4 {
					shared++
				}
			}
		}
	}
	if shared != len(machines) {
		t.Errorf("%d of %d machines share what they have read", shared, len(machines))
	}
}
