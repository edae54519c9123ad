//go:build e2e

package chaos

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// A lever does something to the agent from inside its guest. The kernel ignores SIGKILL and SIGSTOP for the first process, and a
// container is in a pid namespace of its own; but a privileged one may name the program that gets the kernel's core dumps, which
// runs as the guest's root outside of every container.
type lever struct {
	dir string // shared with the container
	act string // a shell script; its busybox is in $B
}

// As another hostile signal does it, the agent panics, and the guest's kernel with its first process.
func newLever(t *testing.T) *lever { return &lever{dir: t.TempDir(), act: "$B kill -ABRT 1"} }

// A frozen agent does not run, and all else in the guest does: the kernel takes connections, and containers go on.
func newFreezer(t *testing.T) *lever {
	return &lever{dir: t.TempDir(), act: `
		$B mkdir /sys/fs/cgroup/frozen
		echo 1 >/sys/fs/cgroup/frozen/cgroup.procs
		echo 1 >/sys/fs/cgroup/frozen/cgroup.freeze`}
}

// attach starts the lever's container in a pod, which has to be privileged.
func (l *lever) attach(t *testing.T, p *pods.Pod) *pods.Container {
	t.Helper()
	// %P is the number of the dumping process in the first pid namespace: core(5).
	return p.Run(t, pods.Mount(l.dir, "/lever"), pods.Privileged, pods.Shell(`
		cat >/act <<'X'
		B=/proc/$1/root/bin/busybox
		`+l.act+`
X
		echo '|/proc/%P/root/bin/busybox sh /proc/%P/root/act %P' >/proc/sys/kernel/core_pattern
		touch /lever/ready
		until [ -e /lever/go ]; do sleep 0.1; done
		sh -c 'kill -SEGV $$'
		touch /lever/pulled
		sleep 1000`))
}

// await waits until it can be pulled.
func (l *lever) await(t *testing.T) {
	t.Helper()
	node.Until(t, "the lever is ready", func() bool { return node.Exists(l.dir, "ready") })
}

// pull has it act, a second later or so.
func (l *lever) pull(t *testing.T) {
	t.Helper()
	l.await(t)
	if err := os.WriteFile(filepath.Join(l.dir, "go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
}
