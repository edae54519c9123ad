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
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// A taskAPI is containerd's own API of tasks, for the steps that neither CRI nor ctr stop at.
type taskAPI struct {
	tasks.TasksClient
	node *pods.Node
	conn *grpc.ClientConn
}

func newTaskAPI(t *testing.T, n *pods.Node) *taskAPI {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+n.Path("containerd.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &taskAPI{tasks.NewTasksClient(conn), n, conn}
}

// context is one for a single call.
func (a *taskAPI) context(t *testing.T) context.Context {
	return metadata.AppendToOutgoingContext(a.node.Context(t), "containerd-namespace", node.PodNamespace)
}

// create makes a container and its task, without streams, which would be ctr's to remove.
func (a *taskAPI) create(t *testing.T) (id string) {
	t.Helper()
	n := a.node
	id = n.ID(t)
	n.RemoveAtEnd(t, id)
	n.MustCtr(t, "containers", "create", "--runtime", n.Runtime, "--snapshotter", "overlayfs", node.Box, id, "echo", "hello")
	rootfs, err := snapshots.NewSnapshotsClient(a.conn).Mounts(a.context(t), &snapshots.MountsRequest{Snapshotter: "overlayfs", Key: id})
	if err != nil {
		t.Fatalf("mounts: %v", err)
	}
	if _, err := a.Create(a.context(t), &tasks.CreateTaskRequest{ContainerID: id, Rootfs: rootfs.Mounts}); err != nil {
		t.Fatalf("create the task: %v", err)
	}
	return id
}

// again removes what is left of a container whose task has ended, and runs one of the same name.
func (a *taskAPI) again(t *testing.T, id string) {
	t.Helper()
	n := a.node
	if n.Status(t, id) != "" {
		n.MustCtr(t, "tasks", "rm", id)
	}
	n.MustCtr(t, "containers", "rm", id)
	n.Ctr(t, n.RunArgs(node.Box, id, []string{"--rm"}, "echo", "hello")...).WantOutput(t, "hello\n")
}

func taskCreated(t *testing.T, c *trial) string {
	n := c.node
	c.config = nil
	api := newTaskAPI(t, n)
	id := api.create(t)
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
		if _, err := api.Start(api.context(t), &tasks.StartRequest{ContainerID: id}); err != nil {
			t.Errorf("start after containerd's restart: %v", err)
		}
		seen = "created, started after that"
	}
	node.Until(t, "the task has ended", func() bool { s := n.Status(t, id); return s == "STOPPED" || s == "" })
	seen += fmt.Sprintf(", task %q", strings.ToLower(n.Status(t, id)))
	if _, err := api.Start(api.context(t), &tasks.StartRequest{ContainerID: id}); err == nil {
		t.Error("a task that has ended could be started")
	} else if c.victim != killContainerd {
		seen += ", Start: " + short(err)
	}
	api.again(t, id)
	return seen
}

func taskDeleting(t *testing.T, c *trial) string {
	n := c.node
	c.config = nil
	api := newTaskAPI(t, n)
	id := api.create(t)
	if _, err := api.Start(api.context(t), &tasks.StartRequest{ContainerID: id}); err != nil {
		t.Fatalf("start: %v", err)
	}
	node.Until(t, "the task has ended", func() bool { return n.Status(t, id) == "STOPPED" })
	var r *tasks.DeleteResponse
	err := c.during(t, func() (err error) {
		r, err = api.Delete(api.context(t), &tasks.DeleteTaskRequest{ContainerID: id})
		return err
	})
	seen := "Delete: " + short(err)
	if err == nil && r.ExitStatus != 0 {
		t.Errorf("Delete says that a task that had ended with 0 has ended with %d", r.ExitStatus)
	}
	node.Until(t, "the task is gone, or there to be deleted", func() bool {
		s := n.Status(t, id)
		return s == "" || s == "STOPPED" && err != nil
	})
	if s := n.Status(t, id); s != "" {
		seen += fmt.Sprintf(", task %q", strings.ToLower(s))
		if r, err = api.Delete(api.context(t), &tasks.DeleteTaskRequest{ContainerID: id}); err != nil || r.ExitStatus != 0 {
			t.Errorf("Delete again: %v, %v", r, err)
		}
	}
	api.again(t, id)
	return seen + ", task gone"
}
