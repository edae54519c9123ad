package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// Namespace is the containerd namespace of the tests.
	Namespace = "e2e"
	// PodNamespace is that of CRI.
	PodNamespace = "k8s.io"
	// Busybox and Debian are the images made by hack/images; Box, Pause and Web, which is nginx, are for pods.
	Busybox = "docker.io/microvm/busybox:latest"
	Debian  = "docker.io/microvm/debian:bookworm"
	Box     = "docker.io/microvm/box:latest"
	Pause   = "docker.io/microvm/pause:latest"
	Web     = "docker.io/microvm/web:latest"
)

// A Node is a containerd with everything it keeps below one state folder.
type Node struct {
	// Runtime is the one under test, from E2E_RUNTIME.
	Runtime string

	dir     string
	pods    bool     // a node for pods, see MainPods
	wrapper []string // put before the command that starts containerd

	mu       sync.Mutex
	imported map[string]bool
	ids      int
	baseline Snapshot // with nothing but containerd and images
}

var shared sharedNode

type sharedNode struct {
	once sync.Once
	node *Node
	err  error
}

func (s *sharedNode) stop() error {
	if s.node == nil {
		return nil
	}
	return s.node.script("wipe")
}

// For returns the package's node, started by the first test that asks, and fails the test at its end if the host is not
// the way it was.
func For(t *testing.T) *Node {
	t.Helper()
	shared.once.Do(func() {
		shared.node = newNode(os.Getenv(stateVariable))
		shared.err = shared.node.script("start")
	})
	if shared.err != nil {
		t.Fatalf("start containerd: %v", shared.err)
	}
	shared.node.watch(t, shared.node.LogSize())
	return shared.node
}

// New returns a node of the test's own in a directory it has prepared, started by a command in front of the usual one.
func New(t *testing.T, dir string, wrapper ...string) *Node {
	t.Helper()
	n := newNode(dir)
	n.wrapper = wrapper
	t.Cleanup(func() {
		if err := n.script("wipe"); err != nil {
			t.Errorf("stop containerd: %v", err)
		}
	})
	if err := n.script("start"); err != nil {
		t.Fatalf("start containerd: %v", err)
	}
	n.watch(t, 0)
	return n
}

func newNode(dir string) *Node {
	n := &Node{Runtime: os.Getenv("E2E_RUNTIME"), dir: dir, pods: os.Getenv(criVariable) != "", imported: map[string]bool{}}
	if n.Runtime == "" {
		n.Runtime = "io.containerd.microvm.v2"
	}
	return n
}

// watch compares the host after the test with what it is without any container, and logs what containerd has said since an offset
// of its log if it failed.
func (n *Node) watch(t *testing.T, from int64) {
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("containerd's log of this test, warnings and the end:\n%s", n.logEnd(from))
		}
	})
	if !n.pods {
		n.Import(t, Busybox, "overlayfs")
	}
	t.Cleanup(func() { n.sameHost(t) })
}

// Path is that of something in the node's state folder.
func (n *Node) Path(name string) string { return n.path(name) }

func (n *Node) path(name string) string { return filepath.Join(n.dir, name) }

// Configure changes the configuration of the shims that start during the test, by a drop-in file.
func (n *Node) Configure(t *testing.T, toml string) {
	t.Helper()
	dir := n.path("config.d")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "test.toml")
	if err := os.WriteFile(file, []byte(toml), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(file); err != nil {
			t.Error(err)
		}
	})
}

// script runs hack/containerd.sh. containerd inherits the script's environment but not its streams.
func (n *Node) script(verb string) error {
	args := []string{containerdScript(), verb, n.dir}
	if verb == "start" {
		args = append(append([]string{}, n.wrapper...), args...)
	}
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit())
	defer cancel()
	out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("hack/containerd.sh %s: %w: %s", verb, err, out)
	}
	return nil
}

// KillContainerd ends containerd with SIGKILL and nothing else: its shims and containers live on.
func (n *Node) KillContainerd(t *testing.T) {
	t.Helper()
	Kill(t, n.ContainerdPid(t))
}

// ContainerdPid is the process id of containerd.
func (n *Node) ContainerdPid(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile(n.path("containerd.pid"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// StartContainerd starts it again over the same state.
func (n *Node) StartContainerd(t *testing.T) {
	t.Helper()
	if err := n.script("start"); err != nil {
		t.Fatal(err)
	}
}

// Import makes sure that an image is in containerd's store and unpacked for a snapshotter. No container may exist yet in
// this test: what the import adds to the host becomes part of what it normally is.
func (n *Node) Import(t *testing.T, image, snapshotter string) {
	t.Helper()
	key := image + " " + snapshotter
	if n.imported[key] {
		return
	}
	name, _, _ := strings.Cut(filepath.Base(image), ":")
	// Without --local, containerd unpacks for its configured snapshotters only.
	n.MustCtr(t, "images", "import", "--local", "--snapshotter", snapshotter, Image(name))
	n.imported[key] = true
	n.SetBaseline(t)
}

// SetBaseline makes the host as it is now what it has to be at the end of a test.
func (n *Node) SetBaseline(t *testing.T) {
	t.Helper()
	n.baseline = n.Snapshot(t)
}

// Log returns what containerd and its shims have logged since an offset that LogSize gave.
func (n *Node) Log(from int64) string {
	b, err := os.ReadFile(n.path("containerd.log"))
	if err != nil || int64(len(b)) < from {
		return fmt.Sprintf("(no log: %v)", err)
	}
	return string(b[from:])
}

// logEnd is the last lines of Log, after the warnings and errors before them.
func (n *Node) logEnd(from int64) string {
	const most = 50
	lines := strings.Split(strings.TrimSpace(n.Log(from)), "\n")
	end := max(0, len(lines)-most)
	var list []string
	for _, l := range lines[:end] {
		if strings.Contains(l, " level=") && !strings.Contains(l, " level=info ") && !strings.Contains(l, " level=debug ") {
			list = append(list, l)
		}
	}
	return strings.Join(append(list[max(0, len(list)-most):], lines[end:]...), "\n")
}

// LogSize is the log's present end.
func (n *Node) LogSize() int64 {
	info, err := os.Stat(n.path("containerd.log"))
	if err != nil {
		return 0
	}
	return info.Size()
}

// Kill sends SIGKILL and waits until the process is gone.
func Kill(t *testing.T, pid int) {
	t.Helper()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatalf("kill %d: %v", pid, err)
	}
	gone(t, pid)
}

// KillIfThere is Kill for a process that may end by itself meanwhile.
func KillIfThere(t *testing.T, pid int) {
	t.Helper()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil && err != unix.ESRCH {
		t.Fatalf("kill %d: %v", pid, err)
	}
	gone(t, pid)
}

func gone(t *testing.T, pid int) {
	t.Helper()
	Until(t, fmt.Sprintf("process %d is gone", pid), func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return errors.Is(err, os.ErrNotExist) || bytes.Contains(stat, []byte(") Z "))
	})
}

// Until waits for a condition and fails the test if it does not come true within a generous limit.
func Until(t *testing.T, what string, condition func() bool) {
	t.Helper()
	if !Wait(condition) {
		t.Fatalf("did not happen: %s", what)
	}
}

// Exists says whether a file is there: containers make them in volumes to tell how far they are.
func Exists(path ...string) bool {
	_, err := os.Stat(filepath.Join(path...))
	return err == nil
}

// Wait waits for a condition and returns whether it came true within a generous limit.
func Wait(condition func() bool) bool {
	for deadline := time.Now().Add(time.Duration(20*Slow()) * time.Second); !condition(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

// commandLimit bounds every command: whoever exceeds it hangs.
func commandLimit() time.Duration { return time.Duration(30+30*Slow()) * time.Second }
