//go:build privileged

package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	taskv3 "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// A shim that gets no descriptor any more ends its sandbox as any other does, and
// leaves nothing behind: nor its cgroup, of which nobody knows once it is gone.
func TestEndWithoutDescriptors(t *testing.T) {
	n := newNode(t)
	bundle := n.bundle("c1", nil)
	group := fmt.Sprintf("microvm-test-%d", os.Getpid())
	editSpec(t, bundle, func(spec *specs.Spec) { spec.Linux.CgroupsPath = "/" + group + "/c1" })
	client := dial(t, n.start("c1", bundle))
	task := taskv3.NewTTRPCTaskClient(client)
	run(t, task, "c1", bundle)
	pid := n.shims()[0]
	inside, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil || !strings.Contains(string(inside), group+"/c1\n") {
		t.Fatalf("the shim is in %s, %v", inside, err)
	}
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: 3}, nil); err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	if _, err := task.Kill(ctx, &taskv3.KillRequest{ID: "c1", Signal: 9}); err != nil {
		t.Error(err)
	}
	if r, err := task.Wait(ctx, &taskv3.WaitRequest{ID: "c1"}); err != nil || r.ExitStatus != 137 {
		t.Errorf("wait: %v, %v", r, err)
	}
	if r, err := task.Delete(ctx, &taskv3.DeleteRequest{ID: "c1"}); err != nil || r.ExitStatus != 137 {
		t.Errorf("delete: %v, %v", r, err)
	}
	if _, err := task.Shutdown(ctx, &taskv3.ShutdownRequest{ID: "c1"}); err != nil && !errors.Is(err, ttrpc.ErrClosed) {
		t.Error(err)
	}
	client.Close()
	n.delete("c1", bundle)
	for len(n.shims()) > 0 { // it goes shortly after its directory
		time.Sleep(10 * time.Millisecond)
	}

	// Of version 2, and of version 1.
	for _, pattern := range []string{"/sys/fs/cgroup/" + group, "/sys/fs/cgroup/*/" + group} {
		left, err := filepath.Glob(pattern)
		if err != nil || len(left) > 0 {
			t.Errorf("cgroups are left: %v, %v", left, err)
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if got := strings.Join(n.topics, " "); got != "/tasks/create /tasks/start /tasks/exit /tasks/delete" {
		t.Errorf("events %s", got)
	}
}

func editSpec(t *testing.T, bundle string, edit func(*specs.Spec)) {
	t.Helper()
	spec, err := readSpec(bundle)
	if err != nil {
		t.Fatal(err)
	}
	edit(spec)
	data, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	writeConfig(t, bundle, data)
}
