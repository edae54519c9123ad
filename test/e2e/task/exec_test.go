//go:build e2e

package task

import (
	"strings"
	"testing"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

func TestExec(t *testing.T) {
	n := node.For(t)
	id := n.Detach(t, []string{"--env", "FOO=bar"}, "sleep", "1000")
	t.Run("output", func(t *testing.T) {
		r := n.Exec(t, id, nil, "sh", "-c", "echo out; echo err >&2; exit 7")
		if r.Stdout != "out\n" || r.Stderr != "err\n" || r.Code != 7 {
			t.Errorf("stdout and stderr must be apart and the exit code 7: %s", r)
		}
	})
	t.Run("stdin", func(t *testing.T) {
		in := strings.Repeat("line\n", 20000)
		out := n.CtrInput(t, in, n.ExecArgs(t, id, nil, "cat")...)
		if out.Code != 0 || out.Stdout != in {
			t.Errorf("cat of %d bytes returned %d, exit code %d", len(in), len(out.Stdout), out.Code)
		}
	})
	t.Run("process", func(t *testing.T) {
		r := n.Exec(t, id, []string{"--cwd", "/var/log", "--user", "33:8"}, "sh", "-c", `pwd; id -u; id -g; echo "$FOO"`)
		r.WantOutput(t, "/var/log\n33\n8\nbar\n")
	})
	t.Run("terminal", func(t *testing.T) {
		useTerminal(t, n.Terminal(t, 81, 23, n.ExecArgs(t, id, []string{"-t"}, "sh", "-c", terminalScript)...))
	})
	t.Run("detached", func(t *testing.T) {
		n.MustExec(t, id, []string{"-d", "--fifo-dir", t.TempDir()}, "sh", "-c", "echo detached >/tmp/detached; sleep 1000")
		node.Until(t, "the detached process has run", func() bool {
			return n.Exec(t, id, nil, "cat", "/tmp/detached").Stdout == "detached\n"
		})
	})
	t.Run("missing program", func(t *testing.T) {
		n.Exec(t, id, nil, "no-such-program").WantError(t, "no-such-program")
	})
	t.Run("the container lives on", func(t *testing.T) {
		if s := n.Status(t, id); s != "RUNNING" {
			t.Errorf("status %s", s)
		}
	})
}

func TestExecOfNoContainer(t *testing.T) {
	n := node.For(t)
	n.Exec(t, "no-such-container", nil, "true").WantError(t, "no-such-container", "not found")
}

// Each exec of a process that ends by itself, and each signal to one, has the exit code a shell would show.
func TestExitCodes(t *testing.T) {
	n := node.For(t)
	id := n.Detach(t, nil, "sleep", "1000")
	for script, want := range map[string]int{
		"exit 0":        0,
		"exit 1":        1,
		"exit 126":      126,
		"exit 255":      255,
		"kill -HUP $$":  128 + 1,
		"kill -KILL $$": 128 + 9,
		"kill -SEGV $$": 128 + 11,
		"kill -TERM $$": 128 + 15,
	} {
		n.Exec(t, id, nil, "sh", "-c", script).WantExit(t, want)
	}
}

func TestKillExec(t *testing.T) {
	n := node.For(t)
	id := n.Detach(t, nil, "sleep", "1000")
	n.MustCtr(t, "tasks", "exec", "-d", "--fifo-dir", t.TempDir(), "--exec-id", "victim", id,
		"sh", "-c", "trap 'touch /tmp/trapped; exit 3' USR1; touch /tmp/ready; while :; do sleep 0.1; done")
	exists := func(file string) func() bool {
		return func() bool { return n.Exec(t, id, nil, "ls", file).Code == 0 }
	}
	node.Until(t, "the process is ready", exists("/tmp/ready"))
	n.MustCtr(t, "tasks", "kill", "-s", "SIGUSR1", "--exec-id", "victim", id)
	node.Until(t, "the process got the signal", exists("/tmp/trapped"))
	if s := n.Status(t, id); s != "RUNNING" {
		t.Errorf("the container must not get the signal; status %s", s)
	}
}
