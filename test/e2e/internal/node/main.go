// Package node is what the end-to-end tests share: a containerd of their own, ctr to drive it, and a look at the host
// before and after each test.
package node

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	// The supervisor tells the test process its state folder in this variable; its own pid is the test's parent.
	stateVariable = "E2E_STATE"
	// hack/containerd.sh makes a node for pods when this is set, to a sandboxer.
	criVariable = "CRI"
)

// Main runs a package's tests below a supervisor: call it from TestMain.
//
// The supervisor is a process of its own because it is the reaper of everything the tests start: a shim or VMM whose
// parent is gone becomes its child, so that "what the tests started" is exactly its descendants. It also cleans up when the
// tests end early, by a time limit or a panic.
func Main(m *testing.M) {
	if os.Getenv(stateVariable) == "" {
		os.Exit(supervise())
	}
	runTests(m)
}

// MainPods is Main for tests of pods: the node's containerd has CRI, with the sandboxer from E2E_SANDBOXER (podsandbox), and
// supervisor, tests and node are in a network namespace of their own, so that nothing is left of its bridge and addresses.
func MainPods(m *testing.M) {
	if os.Getenv(stateVariable) != "" {
		runTests(m)
	}
	sandboxer := os.Getenv("E2E_SANDBOXER")
	if sandboxer == "" {
		sandboxer = "podsandbox"
	}
	if err := os.Setenv(criVariable, sandboxer); err != nil {
		os.Exit(report(err))
	}
	// What this thread starts is in its namespaces; supervise starts all from this goroutine.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		os.Exit(report(fmt.Errorf("a network namespace of our own: %w", err)))
	}
	os.Exit(supervise())
}

// runTests ends the process.
func runTests(m *testing.M) {
	if err := os.Setenv("PATH", filepath.Join(cache(), "tools/bin")+":"+os.Getenv("PATH")); err != nil {
		os.Exit(report(err))
	}
	code := m.Run()
	if err := shared.stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func supervise() int {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return report(fmt.Errorf("become the reaper of the tests' processes: %w", err))
	}
	// Short, for the sockets in it; /var/tmp, for it must carry overlay mounts.
	state, err := os.MkdirTemp("/var/tmp", "e2e")
	if err != nil {
		return report(err)
	}
	tests, err := start(os.Args, append(os.Environ(), stateVariable+"="+state))
	if err != nil {
		return report(err)
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGQUIT, unix.SIGHUP)
	go func() {
		for s := range signals {
			_ = unix.Kill(tests, s.(unix.Signal))
		}
	}()
	code := reap(tests)

	wipe, err := start([]string{containerdScript(), "wipe", state}, os.Environ())
	if err != nil {
		return report(err)
	}
	if reap(wipe) != 0 {
		code = max(code, 1)
	}
	for pid, process := range descendants(os.Getpid()) {
		code = max(code, report(fmt.Errorf("still running after the tests, killed: %s", process)))
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	return code
}

// start runs a program with our standard streams. It is not os/exec because the supervisor reaps all children itself.
func start(args, env []string) (pid int, err error) {
	p, err := os.StartProcess(args[0], args, &os.ProcAttr{
		Env:   env,
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
	})
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", args[0], err)
	}
	pid = p.Pid // Release forgets it
	return pid, p.Release()
}

// reap waits for one child and meanwhile for every orphan that comes our way.
func reap(child int) (code int) {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return report(fmt.Errorf("wait for %d: %w", child, err))
		case pid == child && status.Signaled():
			return 128 + int(status.Signal())
		case pid == child:
			return status.ExitStatus()
		}
	}
}

func report(err error) int {
	fmt.Fprintln(os.Stderr, "e2e supervisor:", err)
	return 1
}

// Top is the checkout: go test starts a test in its package's directory.
func Top() string {
	dir, err := os.Getwd()
	if err != nil {
		panic(err)
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
	}
	panic("not inside the checkout")
}

func containerdScript() string { return filepath.Join(Top(), "hack/containerd.sh") }

// Image is the archive of one of hack/images' images.
func Image(name string) string { return filepath.Join(cache(), "images", name+".tar") }

// cache is where hack/tools and hack/images put what they build.
func cache() string {
	if dir := os.Getenv("MICROVM_CACHE"); dir != "" {
		return dir
	}
	return filepath.Join(os.Getenv("HOME"), ".cache/microvm")
}

// Slow is how many times slower than on the host things are allowed to be: for limits that end a hang, never for
// measurements.
func Slow() int {
	if n, err := strconv.Atoi(os.Getenv("E2E_SLOW")); err == nil && n > 0 {
		return n
	}
	if os.Getenv("MICROVM_TESTBED") != "" {
		return 10
	}
	return 1
}
