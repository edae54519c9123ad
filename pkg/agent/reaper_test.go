//go:build !agentkernel

// Not among the tests in a machine of their own: there a reaper is at work, and
// there is no shell.

package agent

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestReaper makes the test process the parent of orphans, as the first process
// of a guest is, and has other children at the same time.
func TestReaper(t *testing.T) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) })
	r := NewReaper()
	done := make(chan struct{})
	go func() {
		r.Run()
		close(done)
	}()
	t.Cleanup(func() {
		close(r.wake)
		<-done
	})

	// start starts a shell, which prints the id of an orphan it makes.
	start := func(script string) (*exec.Cmd, *bufio.Reader) {
		begun, err := r.Begin()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("/bin/sh", "-c", script)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		begun.Done(cmd.Process.Pid)
		return cmd, bufio.NewReader(out)
	}

	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			cmd, out := start(fmt.Sprintf("(true & echo $!); exit %d", i))
			line, err := out.ReadString('\n')
			if err != nil {
				t.Errorf("read the orphan's id: %v", err)
			}
			orphan := strings.TrimSpace(line)
			for range 100 {
				r.Wake() // as the orphan's SIGCHLD would
			}
			if err := cmd.Wait(); cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != i {
				t.Errorf("exit code %d lost: %v, %v", i, cmd.ProcessState, err)
			}
			r.Release(cmd.Process.Pid)
			for {
				if _, err := os.Stat("/proc/" + orphan); os.IsNotExist(err) {
					break
				}
				r.Wake()
				time.Sleep(time.Millisecond)
			}
		})
	}
	wg.Wait()
}

func TestReaperLeavesOthers(t *testing.T) {
	r := NewReaper()
	cmd := exec.Command("/bin/sh", "-c", "exit 3")
	begun, err := r.Begin()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// Until the zombie is there.
	if err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	r.reap() // may be one of the intermediate processes of a start
	begun.Done(cmd.Process.Pid)
	r.reap() // is someone's
	if err := cmd.Wait(); cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != 3 {
		t.Errorf("exit status lost: %v, %v", cmd.ProcessState, err)
	}
	if r.isOrphan(cmd.Process.Pid) {
		t.Error("is an orphan before its release")
	}
	r.Release(cmd.Process.Pid)
	if !r.isOrphan(cmd.Process.Pid) {
		t.Error("is no orphan after its release")
	}
}

// TestReaperOlder: what was there before a start cannot be one of its processes.
func TestReaperOlder(t *testing.T) {
	r := NewReaper()
	begun, err := r.Begin()
	if err != nil {
		t.Fatal(err)
	}
	if !r.isOrphan(os.Getppid()) {
		t.Error("an older process is not recognized")
	}
	begun.ticks = 0
	if r.isOrphan(os.Getpid()) {
		t.Error("a younger process is taken for an orphan")
	}
	if !r.isOrphan(1 << 30) {
		t.Error("a process that is gone is waited for")
	}
}
