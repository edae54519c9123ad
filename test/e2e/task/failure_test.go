//go:build e2e

package task

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

// Each of these must fail with a message that names the cause, and leave nothing: node.For looks.
func TestBadInput(t *testing.T) {
	n := node.For(t)
	empty := t.TempDir()
	for _, c := range []struct {
		name  string
		flags []string
		image string
		args  []string
		words []string
	}{
		{name: "missing program", args: []string{"no-such-program"}, words: []string{"no-such-program", "not found"}},
		{name: "missing program by path", args: []string{"/no/such/program"}, words: []string{"/no/such/program", "no such file"}},
		{name: "program is a directory", args: []string{"/etc"}, words: []string{"/etc"}},
		{name: "program is not executable", args: []string{"/etc/passwd"}, words: []string{"/etc/passwd", "permission denied"}},
		{name: "missing user", flags: []string{"--user", "no-such-user"}, args: []string{"true"}, words: []string{"user"}},
		{
			name:  "missing mount source",
			flags: []string{"--mount", "type=bind,src=/no/such/source,dst=/mnt,options=rbind:rw"},
			args:  []string{"true"}, words: []string{"/no/such/source", "no such file or directory"},
		},
		{
			name:  "unknown mount type",
			flags: []string{"--mount", "type=nosuchfs,src=none,dst=/mnt"},
			args:  []string{"true"}, words: []string{"/mnt", "no such device"},
		},
		{name: "root file system without programs", flags: []string{"--rootfs"}, image: empty, args: []string{"/bin/sh"}, words: []string{"/bin/sh"}},
		{name: "missing root file system", flags: []string{"--rootfs"}, image: empty + "/gone", args: []string{"true"}, words: []string{"no such file or directory"}},
		{name: "missing image", image: "docker.io/microvm/nothing:latest", args: []string{"true"}, words: []string{"not found"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := node.For(t)
			image := c.image
			if image == "" {
				image = node.Busybox
			}
			id := n.ID(t)
			n.RemoveIfFailed(t, id)
			n.Ctr(t, n.RunArgs(image, id, append([]string{"--rm"}, c.flags...), c.args...)...).WantError(t, c.words...)
		})
	}
	// And nothing of it is in the way of the next one.
	n.MustRun(t, nil, "true")
}

func TestFullDiskInContainer(t *testing.T) {
	n := node.For(t)
	dir := t.TempDir()
	node.Tmpfs(t, dir, fmt.Sprint("size=", 1<<20))
	r := n.Run(t, []string{"--mount", "type=bind,src=" + dir + ",dst=/dir,options=rbind:rw"},
		"dd", "if=/dev/zero", "of=/dir/file", "bs=64k", "count=100")
	r.WantError(t, "No space left on device")
	info, err := os.Stat(filepath.Join(dir, "file"))
	if err != nil || info.Size() == 0 || info.Size() > 1<<20 {
		t.Errorf("file on the full disk: %v, %v", info, err)
	}
}

// containerd's own disk is full when a container is started: the start fails and says so, and all is well once there is room.
func TestFullDiskOfContainerd(t *testing.T) {
	dir, err := os.MkdirTemp("/var/tmp", "e2e")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(dir) })
	node.Tmpfs(t, dir, fmt.Sprint("size=", 256<<20))
	startOnFullDisk(t, node.New(t, filepath.Join(dir, "s")), dir, "overlayfs")
}

// The same for containers whose file systems are in images: there is no room for another one.
func TestFullDiskOfImages(t *testing.T) {
	for _, snapshotter := range []string{"blockfile", "erofs"} {
		t.Run(snapshotter, func(t *testing.T) {
			dir, err := os.MkdirTemp("/var/tmp", "e2e")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.Remove(dir) })
			node.Tmpfs(t, dir, fmt.Sprint("size=", 256<<20))
			state := filepath.Join(dir, "s")
			if err := os.Mkdir(state, 0o755); err != nil {
				t.Fatal(err)
			}
			node.PrepareDisks(t, state, snapshotter)
			n := node.New(t, state)
			n.Import(t, node.Busybox, snapshotter)
			startOnFullDisk(t, n, dir, snapshotter)
		})
	}
}

// startOnFullDisk starts a container before, while and after the disk that a node has below dir is full.
func startOnFullDisk(t *testing.T, n *node.Node, dir, snapshotter string) {
	t.Helper()
	run := func(id string) node.Result {
		t.Helper()
		return n.Ctr(t, n.RunArgs(node.Busybox, id, []string{"--rm", "--snapshotter", snapshotter}, "echo", "hello")...)
	}
	run(n.ID(t)).WantOutput(t, "hello\n")
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, int64(st.Bavail)*st.Bsize), 0o600); err != nil {
		t.Fatal(err)
	}
	id := n.ID(t)
	run(id).WantError(t, "space left on device")
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	n.Remove(id)
	run(n.ID(t)).WantOutput(t, "hello\n")
}

// ctr is killed at different moments of a start. Whatever is there then can be removed, and nothing is left.
func TestCtrKilled(t *testing.T) {
	n := node.For(t)
	begin := time.Now()
	n.MustRun(t, nil, "true")
	whole := time.Since(begin)
	for _, part := range []int{10, 30, 50, 70, 90, 110} {
		t.Run(fmt.Sprint("after ", part, " percent"), func(t *testing.T) {
			n := node.For(t)
			id := n.ID(t)
			ctx, cancel := context.WithTimeout(t.Context(), whole*time.Duration(part)/100)
			defer cancel()
			// CommandContext kills with SIGKILL. The FIFOs are ctr's: they stay if it is killed before it removes them.
			_ = n.Command(ctx, n.RunArgs(node.Busybox, id, []string{"--rm", "--fifo-dir", t.TempDir()}, "sleep", "1000")...).Run()
			// containerd may be at work on the task yet: it is gone when both removals find nothing.
			node.Until(t, "the container is removed", func() bool {
				n.Remove(id)
				task := n.Ctr(t, "tasks", "ls", "-q").Stdout
				container := n.Ctr(t, "containers", "ls", "-q").Stdout
				return !strings.Contains(task, id) && !strings.Contains(container, id)
			})
			// A snapshot can be there without its container.
			_ = n.Ctr(t, "snapshots", "rm", id)
		})
	}
}
