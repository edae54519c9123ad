package node

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/containerd/console"
)

// A Terminal is a ctr or crictl command on a pseudo-terminal that the test types into and reads from.
type Terminal struct {
	t       *testing.T
	master  console.Console
	command *exec.Cmd
	cancel  context.CancelFunc
	done    chan struct{}
	once    sync.Once

	mu     sync.Mutex
	output strings.Builder
}

// RunTerminal runs a busybox container on a terminal and removes it.
func (n *Node) RunTerminal(t *testing.T, width, height uint16, flags []string, command ...string) *Terminal {
	t.Helper()
	id := n.ID(t)
	n.RemoveIfFailed(t, id)
	return n.Terminal(t, width, height, n.RunArgs(Busybox, id, append([]string{"--rm", "-t"}, flags...), command...)...)
}

// Terminal starts ctr on a pseudo-terminal of a given size.
func (n *Node) Terminal(t *testing.T, width, height uint16, args ...string) *Terminal {
	t.Helper()
	return onTerminal(t, width, height, n.Command, args...)
}

// CrictlTerminal is Terminal for crictl.
func (n *Node) CrictlTerminal(t *testing.T, width, height uint16, args ...string) *Terminal {
	t.Helper()
	return onTerminal(t, width, height, n.CrictlCommand, args...)
}

func onTerminal(t *testing.T, width, height uint16, command func(context.Context, ...string) *exec.Cmd, args ...string) *Terminal {
	t.Helper()
	master, path, err := console.NewPty()
	if err != nil {
		t.Fatal(err)
	}
	if err := master.Resize(console.WinSize{Width: width, Height: height}); err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	ctx, cancel := context.WithTimeout(t.Context(), commandLimit())
	c := command(ctx, args...)
	c.Stdin, c.Stdout, c.Stderr = slave, slave, slave
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	term := &Terminal{t: t, master: master, command: c, cancel: cancel, done: make(chan struct{})}
	go term.read()
	t.Cleanup(func() { term.Wait() }) // returns at once, or by the test's context
	return term
}

func (term *Terminal) read() {
	defer close(term.done)
	buf := make([]byte, 4096)
	for {
		n, err := term.master.Read(buf)
		term.mu.Lock()
		term.output.Write(buf[:n])
		term.mu.Unlock()
		if err != nil {
			return // EIO once the last slave is closed
		}
	}
}

// Output is what has appeared so far.
func (term *Terminal) Output() string {
	term.mu.Lock()
	defer term.mu.Unlock()
	return term.output.String()
}

// Type writes to the terminal as a user's keyboard would.
func (term *Terminal) Type(s string) {
	term.t.Helper()
	if _, err := term.master.Write([]byte(s)); err != nil {
		term.t.Fatal(err)
	}
}

// Expect waits until a text has appeared.
func (term *Terminal) Expect(text string) {
	term.t.Helper()
	term.expect(text, func() {})
}

// ResizeUntil changes the size until a text has appeared. The kernel tells ctr with SIGWINCH, for which ctr listens only some
// time after it has passed on the first size; only a change makes another signal.
func (term *Terminal) ResizeUntil(width, height uint16, text string) {
	term.t.Helper()
	term.expect(text, func() {
		for _, w := range []uint16{width - 1, width} {
			if err := term.master.Resize(console.WinSize{Width: w, Height: height}); err != nil {
				term.t.Error(err)
			}
		}
	})
}

func (term *Terminal) expect(text string, meanwhile func()) {
	term.t.Helper()
	if !Wait(func() bool { meanwhile(); return strings.Contains(term.Output(), text) }) {
		term.t.Fatalf("the terminal does not show %q but:\n%s", text, term.Output())
	}
}

// Wait waits for ctr's end and returns its exit code and everything that appeared.
func (term *Terminal) Wait() Result {
	term.t.Helper()
	term.once.Do(func() {
		_ = term.command.Wait()
		<-term.done
		term.cancel()
		_ = term.master.Close()
	})
	return Result{Stdout: term.Output(), Code: term.command.ProcessState.ExitCode()}
}
