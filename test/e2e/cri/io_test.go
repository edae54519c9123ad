//go:build e2e

package cri

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

func TestExec(t *testing.T) {
	n := pods.For(t)
	c := n.Pod(t).Run(t, func(c *cri.ContainerConfig) {
		c.WorkingDir = "/var/log"
		c.Envs = []*cri.KeyValue{{Key: "COLOUR", Value: []byte("blue")}}
	})
	r := c.Shell(t, "echo out; echo err >&2; exit 3")
	if r.Stdout != "out\n" || r.Stderr != "err\n" || r.Code != 3 {
		t.Errorf("exec: %s", r)
	}
	c.Shell(t, "pwd; echo $COLOUR").WantOutput(t, "/var/log\nblue\n")
	if r := c.Shell(t, "seq 1 100000 | cksum; seq 1 100000"); len(r.Stdout) < 588895 {
		t.Errorf("%d bytes of output", len(r.Stdout))
	}
	_, err := n.CRI.ExecSync(n.Context(t), &cri.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{"sleep", "1000"}, Timeout: 1})
	if err == nil || !strings.Contains(err.Error(), "exceeded") {
		t.Errorf("exec that takes too long: %v", err)
	}
	node.Until(t, "the command that took too long is gone", func() bool {
		return c.Get(t, "pgrep -f '^sleep 1000$' | wc -l") == "1" // the container's own
	})
	if _, err := n.CRI.ExecSync(n.Context(t), &cri.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{"/no/such"}}); err == nil {
		t.Error("exec of no program succeeded")
	}
}

// crictl exec through the streaming server: standard input, exit codes, a terminal and its size.
func TestExecStreaming(t *testing.T) {
	n := pods.For(t)
	c := n.Pod(t).Run(t)
	n.CrictlInput(t, "hello\n", "exec", "-i", c.ID, "cat").WantOutput(t, "hello\n")
	n.CrictlInput(t, "1\n2\n3\n", "exec", "-i", c.ID, "wc", "-l").WantOutput(t, "3\n")
	if r := n.Crictl(t, "exec", c.ID, "sh", "-c", "echo err >&2; exit 4"); r.Code == 0 || !strings.Contains(r.Stderr, "err") || !strings.Contains(r.Stderr, "4") {
		t.Errorf("exec with exit code 4: %s", r)
	}
	big := strings.Repeat("0123456789abcde\n", 1<<16)
	n.CrictlInput(t, big, "exec", "-i", c.ID, "wc", "-c").WantOutput(t, fmt.Sprintln(len(big)))

	term := n.CrictlTerminal(t, 91, 33, "exec", "-i", "-t", c.ID, "sh")
	term.Type("tty; stty size\n")
	term.Expect("/dev/pts/")
	term.ResizeUntil(101, 44, "")
	term.Type("until [ \"$(stty size)\" = '44 101' ]; do sleep 0.1; done; echo si\"\"zed\n")
	term.Expect("sized")
	term.Type("exit 0\n")
	term.Wait().WantExit(t, 0)
}

// What is typed into an attached container arrives, and its output does, and in the log.
func TestAttach(t *testing.T) {
	n := pods.For(t)
	c := n.Pod(t).Run(t, pods.Shell("read line; echo got $line; read rest; sleep 1000"), func(c *cri.ContainerConfig) { c.Stdin = true })
	ctx, cancel := context.WithCancel(n.Context(t))
	defer cancel()
	attach := n.CrictlCommand(ctx, "attach", "-i", c.ID)
	stdin, err := attach.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := attach.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := attach.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(stdin, "hello\n"); err != nil {
		t.Error(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil || line != "got hello\n" {
		t.Errorf("attached: %q, %v", line, err)
	}
	cancel()
	_ = attach.Wait()
	node.Until(t, "the log has it too", func() bool { out, _ := c.Output(t); return out == "got hello\n" })
}

// StdinOnce: the container's standard input ends with the first attached session.
func TestAttachOnce(t *testing.T) {
	n := pods.For(t)
	c := n.Pod(t).Run(t, pods.Shell("cat; echo end of input"), func(c *cri.ContainerConfig) { c.Stdin, c.StdinOnce = true, true })
	n.CrictlInput(t, "one line\n", "attach", "-i", c.ID)
	if code := c.Wait(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if out, _ := c.Output(t); out != "one line\nend of input\n" {
		t.Errorf("output %q", out)
	}
}

// A container with a terminal of its own.
func TestContainerTerminal(t *testing.T) {
	n := pods.For(t)
	r := n.Pod(t).Output(t, pods.Shell("tty; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo terminal"),
		func(c *cri.ContainerConfig) { c.Tty, c.Stdin = true, true })
	if !strings.HasPrefix(r.Stdout, "/dev/pts/0") && !strings.HasPrefix(r.Stdout, "/dev/console") || !strings.Contains(r.Stdout, "terminal") {
		t.Errorf("output: %s", r)
	}
}

// The log has both streams, whole, also of long lines and at the end of a container; it can be rotated.
func TestLogs(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	r := p.Output(t, pods.Shell("echo out; echo err >&2; head -c 100000 /dev/zero | tr '\\0' x; echo; printf 'no newline'"))
	if want := "out\n" + strings.Repeat("x", 100000) + "\nno newline"; strings.TrimSuffix(r.Stdout, "\n") != want || r.Stderr != "err\n" {
		t.Errorf("%d bytes of stdout, want %d; stderr %q", len(r.Stdout), len(want), r.Stderr)
	}
	many := p.Output(t, pods.Shell("seq 1 20000"))
	if lines := strings.Count(many.Stdout, "\n"); lines != 20000 || !strings.HasSuffix(many.Stdout, "\n20000\n") {
		t.Errorf("%d lines in the log", lines)
	}

	c := p.Run(t, pods.Shell("i=0; while :; do i=$((i+1)); echo line $i; sleep 0.1; done"))
	node.Until(t, "the log has a line", func() bool { out, _ := c.Output(t); return strings.Contains(out, "\n") })
	if out := n.MustCrictl(t, "logs", "--tail", "1", c.ID).Stdout; !strings.HasPrefix(out, "line ") {
		t.Errorf("crictl logs: %q", out)
	}
	if err := os.Rename(c.Log, c.Log+".1"); err != nil {
		t.Fatal(err)
	}
	if _, err := n.CRI.ReopenContainerLog(n.Context(t), &cri.ReopenContainerLogRequest{ContainerId: c.ID}); err != nil {
		t.Fatal(err)
	}
	node.Until(t, "the new log file is written to", func() bool { out, _ := c.Output(t); return strings.Count(out, "\n") > 1 })
}

// port-forward reaches a port whatever address it is bound to.
func TestPortForward(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	for i, address := range []string{"0.0.0.0", "::", "127.0.0.1"} {
		t.Run(address, func(t *testing.T) {
			port := 8080 + i
			c := p.Run(t, pods.Command("tcpsvd", address, fmt.Sprint(port), "sh", "-c", "echo you said $(head -n 1)"))
			c.Listening(t, "tcp", port)
			for _, said := range []string{"hello", "again"} {
				got := throughPortForward(t, n, p, port, said+"\n")
				if got != "you said "+said+"\n" {
					t.Errorf("answer %q", got)
				}
			}
			c.Stop(t, 0)
		})
	}
}

// throughPortForward runs crictl port-forward for one connection.
func throughPortForward(t *testing.T, n *pods.Node, p *pods.Pod, port int, text string) string {
	t.Helper()
	forward := n.CrictlCommand(n.Context(t), "port-forward", p.ID, fmt.Sprint(":", port))
	stdout, err := forward.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := forward.Start(); err != nil {
		t.Fatal(err)
	}
	defer stop(forward)
	// "Forwarding from 127.0.0.1:35973 -> 8080"
	line, err := bufio.NewReader(stdout).ReadString('\n')
	address := regexp.MustCompile(`127\.0\.0\.1:\d+`).FindString(line)
	if err != nil || address == "" {
		t.Fatalf("crictl port-forward says %q, %v", line, err)
	}
	return talk(t, "tcp", address, text)
}

func stop(c *exec.Cmd) {
	_ = c.Process.Kill()
	_ = c.Wait()
}

// talk sends a line and returns the answer.
func talk(t *testing.T, network, address, text string) string {
	t.Helper()
	line, err := ask(network, address, text, time.Duration(10*node.Slow())*time.Second)
	if err != nil {
		t.Errorf("%s: %v", address, err)
	}
	return line
}

// ask is talk for what may fail.
func ask(network, address, text string, limit time.Duration) (string, error) {
	conn, err := net.DialTimeout(network, address, limit)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(conn, text); err != nil {
		return "", err
	}
	return bufio.NewReader(conn).ReadString('\n')
}
