//go:build e2e

package chaos

import (
	"context"
	"fmt"
	"strings"
	"testing"

	snapshots "github.com/containerd/containerd/api/services/snapshots/v1"
	tasks "github.com/containerd/containerd/api/services/tasks/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

// Between Create and Start of a task there is a step that neither CRI nor ctr stop at, so it is containerd's API's.
func taskCreated(t *testing.T, c *trial) string {
	n := c.node
	c.config = nil
	id := n.ID(t)
	n.RemoveAtEnd(t, id)
	n.MustCtr(t, "containers", "create", "--runtime", n.Runtime, "--snapshotter", "overlayfs", node.Box, id, "echo", "hello")
	conn, err := grpc.NewClient("unix://"+n.Path("containerd.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	call := func() context.Context {
		return metadata.AppendToOutgoingContext(n.Context(t), "containerd-namespace", node.PodNamespace)
	}
	api := tasks.NewTasksClient(conn)
	rootfs, err := snapshots.NewSnapshotsClient(conn).Mounts(call(), &snapshots.MountsRequest{Snapshotter: "overlayfs", Key: id})
	if err != nil {
		t.Fatalf("mounts: %v", err)
	}
	if _, err := api.Create(call(), &tasks.CreateTaskRequest{ContainerID: id, Rootfs: rootfs.Mounts}); err != nil {
		t.Fatalf("create the task: %v", err)
	}
	if c.victim == killInit {
		n.MustCtr(t, "tasks", "kill", "--signal", "SIGKILL", id)
	} else {
		c.kill(t)
	}
	seen := "created"
	if c.victim == killContainerd {
		if s := n.Status(t, id); s != "CREATED" {
			t.Errorf("status %q of a task that was created before containerd's restart", s)
		}
		if _, err := api.Start(call(), &tasks.StartRequest{ContainerID: id}); err != nil {
			t.Errorf("start after containerd's restart: %v", err)
		}
		seen = "created, started after that"
	}
	node.Until(t, "the task has ended", func() bool { s := n.Status(t, id); return s == "STOPPED" || s == "" })
	seen += fmt.Sprintf(", task %q", strings.ToLower(n.Status(t, id)))
	if _, err := api.Start(call(), &tasks.StartRequest{ContainerID: id}); err == nil {
		t.Error("a task that has ended could be started")
	} else if c.victim != killContainerd {
		seen += ", Start: " + short(err)
	}
	if n.Status(t, id) != "" {
		n.MustCtr(t, "tasks", "rm", id)
	}
	n.MustCtr(t, "containers", "rm", id)
	n.Ctr(t, n.RunArgs(node.Box, id, []string{"--rm"}, "echo", "hello")...).WantOutput(t, "hello\n")
	return seen
}
