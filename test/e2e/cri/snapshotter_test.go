//go:build e2e

package cri

import (
	"testing"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// usePodOnDisks runs containers whose root file systems are on disks: each has its own, and one that comes in the place of another
// has nothing of that.
func usePodOnDisks(t *testing.T, snapshotter, fstype string) {
	t.Helper()
	n := pods.WithDisks(t, snapshotter)
	p := n.Pod(t)
	a, b := p.Run(t), p.Run(t)
	const write = `sed -n 's,^[^ ]* / \([^ ]*\) .*,\1,p' /proc/mounts; [ -x /bin/busybox ]; cat /file 2>/dev/null; echo written >/file; sync`
	for _, c := range []*pods.Container{a, b} {
		if got := c.Get(t, write); got != fstype {
			t.Errorf("file system and file: %q", got)
		}
	}
	a.Stop(t, 0)
	a.Remove(t)
	if got := p.Run(t).Get(t, write); got != fstype {
		t.Errorf("in the place of a container, file system and file: %q", got)
	}
	if got := b.Get(t, "cat /file; rm /bin/ls; echo changed >/etc/passwd; cat /etc/passwd"); got != "written\nchanged" {
		t.Errorf("the other one: %q", got)
	}
	p.Remove(t)
	if got := n.Pod(t).Run(t).Get(t, "ls -d /bin /file 2>/dev/null; head -n 1 /etc/passwd"); got != "/bin\nroot:x:0:0:root:/root:/bin/sh" {
		t.Errorf("another pod of the image: %q", got)
	}
}

func TestPodOnBlockfile(t *testing.T) { usePodOnDisks(t, "blockfile", "ext4") }

func TestPodOnErofs(t *testing.T) { usePodOnDisks(t, "erofs", "overlay") }

func TestPodOnDevmapper(t *testing.T) {
	if node.HasThinPools(t) {
		usePodOnDisks(t, "devmapper", "ext4")
	}
}
