package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

// ctr says this with every command on hosts with cgroup v1.
var cgroupWarning = regexp.MustCompile(`(?m)^time=.*level=warning msg="DEPRECATION: The support for cgroup v1.*\n`)

// Command prepares ctr against this node.
func (n *Node) Command(ctx context.Context, args ...string) *exec.Cmd {
	namespace := Namespace
	if n.pods {
		namespace = PodNamespace
	}
	c := exec.CommandContext(ctx, "ctr", append([]string{"-a", n.path("containerd.sock"), "-n", namespace}, args...)...)
	c.Dir = "/"
	return c
}

// CrictlCommand prepares crictl against this node.
func (n *Node) CrictlCommand(ctx context.Context, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, "crictl", append([]string{"-c", n.path("crictl.yaml")}, args...)...)
	c.Dir = "/"
	return c
}

// Crictl runs crictl to its end.
func (n *Node) Crictl(t *testing.T, args ...string) Result {
	t.Helper()
	return n.CrictlInput(t, "", args...)
}

// CrictlInput runs crictl with something on its standard input.
func (n *Node) CrictlInput(t *testing.T, stdin string, args ...string) Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), commandLimit())
	defer cancel()
	return finish(t, ctx, n.CrictlCommand(ctx, args...), stdin)
}

// MustCrictl fails the test unless crictl succeeds.
func (n *Node) MustCrictl(t *testing.T, args ...string) Result {
	t.Helper()
	r := n.Crictl(t, args...)
	if r.Code != 0 {
		t.Fatalf("crictl %s: %s", strings.Join(args, " "), r)
	}
	return r
}

// Ctr runs ctr to its end.
func (n *Node) Ctr(t *testing.T, args ...string) Result {
	t.Helper()
	return n.CtrInput(t, "", args...)
}

// CtrInput runs ctr with something on its standard input.
func (n *Node) CtrInput(t *testing.T, stdin string, args ...string) Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), commandLimit())
	defer cancel()
	return finish(t, ctx, n.Command(ctx, args...), stdin)
}

func finish(t *testing.T, ctx context.Context, c *exec.Cmd, stdin string) Result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	c.Stdin, c.Stdout, c.Stderr = strings.NewReader(stdin), &stdout, &stderr
	err := c.Run()
	r := Result{stdout.String(), cgroupWarning.ReplaceAllString(stderr.String(), ""), c.ProcessState.ExitCode()}
	var exit *exec.ExitError
	if ctx.Err() != nil {
		t.Fatalf("%s hangs, killed; %s", c, r)
	}
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", c, err)
	}
	return r
}

// Metrics reads what ctr says of a task's into a variable for JSON, and returns it as text.
func (n *Node) Metrics(t *testing.T, id string, into any) string {
	t.Helper()
	out := n.MustCtr(t, "tasks", "metrics", "--format", "json", id).Stdout
	if err := json.Unmarshal([]byte(out), into); err != nil {
		t.Fatalf("metrics: %v: %s", err, out)
	}
	return out
}

// MustCtr fails the test unless ctr succeeds.
func (n *Node) MustCtr(t *testing.T, args ...string) Result {
	t.Helper()
	r := n.Ctr(t, args...)
	if r.Code != 0 {
		t.Fatalf("ctr %s: %s", strings.Join(args, " "), r)
	}
	return r
}

// ID makes a container id that is used once and says which test's it is.
func (n *Node) ID(t *testing.T) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ids++
	name := regexp.MustCompile(`[^a-z0-9]+`).ReplaceAllString(strings.ToLower(strings.TrimPrefix(t.Name(), "Test")), "-")
	return fmt.Sprintf("%.40s-%d", strings.Trim(name, "-"), n.ids)
}

// RunArgs are ctr's arguments for running a container of an image. Flags are ctr's own.
func (n *Node) RunArgs(image, id string, flags []string, command ...string) []string {
	args := []string{"run", "--runtime", n.Runtime, "--fifo-dir", n.path("fifo")}
	if n.Runc() {
		args = append(args, "--runc-root", n.path("runc"))
	}
	args = append(args, flags...)
	return append(append(args, image, id), command...)
}

// Runc says that the suite itself is being tested, against runc.
func (n *Node) Runc() bool { return n.Runtime == "io.containerd.runc.v2" }

// Run runs a busybox container in the foreground and removes it.
func (n *Node) Run(t *testing.T, flags []string, command ...string) Result {
	t.Helper()
	return n.RunInput(t, "", flags, command...)
}

// RunInput is Run with something on the standard input.
func (n *Node) RunInput(t *testing.T, stdin string, flags []string, command ...string) Result {
	t.Helper()
	id := n.ID(t)
	n.RemoveIfFailed(t, id)
	return n.CtrInput(t, stdin, n.RunArgs(Busybox, id, append([]string{"--rm"}, flags...), command...)...)
}

// MustRun is Run for what must end with exit code 0.
func (n *Node) MustRun(t *testing.T, flags []string, command ...string) Result {
	t.Helper()
	r := n.Run(t, flags, command...)
	if r.Code != 0 {
		t.Fatalf("ctr run %s %s: %s", strings.Join(flags, " "), strings.Join(command, " "), r)
	}
	return r
}

// Detach starts a busybox container in the background; the test's end removes it.
func (n *Node) Detach(t *testing.T, flags []string, command ...string) (id string) {
	t.Helper()
	return n.DetachImage(t, Busybox, flags, command...)
}

// DetachImage is Detach for another image.
func (n *Node) DetachImage(t *testing.T, image string, flags []string, command ...string) (id string) {
	t.Helper()
	id = n.ID(t)
	n.RemoveAtEnd(t, id)
	n.MustCtr(t, n.RunArgs(image, id, append([]string{"-d"}, flags...), command...)...)
	return id
}

// RemoveAtEnd removes what is left of a container at the end of the test.
func (n *Node) RemoveAtEnd(t *testing.T, id string) {
	t.Cleanup(func() { n.Remove(id) })
}

// RemoveIfFailed is for containers which the test itself or ctr removes if all goes well.
func (n *Node) RemoveIfFailed(t *testing.T, id string) {
	t.Cleanup(func() {
		if t.Failed() {
			n.Remove(id)
		}
	})
}

// Remove removes what is there of a container; it may be gone.
func (n *Node) Remove(id string) {
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit())
	defer cancel()
	_ = n.Command(ctx, "tasks", "rm", "-f", id).Run()
	_ = n.Command(ctx, "containers", "rm", id).Run()
}

// ExecArgs are ctr's arguments for one more process in a container.
func (n *Node) ExecArgs(t *testing.T, id string, flags []string, command ...string) []string {
	args := append([]string{"tasks", "exec", "--exec-id", n.ID(t), "--fifo-dir", n.path("fifo")}, flags...)
	return append(append(args, id), command...)
}

// Exec runs one more process in a container.
func (n *Node) Exec(t *testing.T, id string, flags []string, command ...string) Result {
	t.Helper()
	return n.Ctr(t, n.ExecArgs(t, id, flags, command...)...)
}

// MustExec is Exec for what must end with exit code 0.
func (n *Node) MustExec(t *testing.T, id string, flags []string, command ...string) Result {
	t.Helper()
	r := n.Exec(t, id, flags, command...)
	if r.Code != 0 {
		t.Fatalf("ctr tasks exec %s: %s", strings.Join(command, " "), r)
	}
	return r
}

// Status is the state ctr shows of a task: RUNNING, STOPPED, PAUSED; empty if there is none.
func (n *Node) Status(t *testing.T, id string) string {
	t.Helper()
	for _, l := range strings.Split(n.MustCtr(t, "tasks", "ls").Stdout, "\n") {
		if f := strings.Fields(l); len(f) == 3 && f[0] == id {
			return f[2]
		}
	}
	return ""
}
