//go:build e2e

package chaos

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// The guest's root is the attacker's: a privileged container of a pod makes an attack of test/hostile. The host stays within
// bounds, another pod goes on, and the pod can be removed.
func TestHostileContainer(t *testing.T) {
	n := nodeFor(t)
	if !isVM(n) {
		return
	}
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, 16<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	disk := node.LoopDevice(t, file)
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("the host's"), 0o644); err != nil {
		t.Fatal(err)
	}
	other := newBystander(t, n)
	n.Collect(t)
	host := n.Snapshot(t)
	for _, row := range []struct {
		name        string
		command     string
		until       string // what the attacker's log has when it has done enough
		ends        bool   // it may end the guest at any time, of which it takes memory, and what comes after all does
		execs       int    // made meanwhile, that end together with the attacker
		descriptors int    // of shim and VMM, at most, where there is reason for more than usual
	}{
		{name: "registers", command: "exec /hostile registers", until: "the end", ends: true},
		{name: "vsock", command: "exec /hostile vsock", until: "round 2", descriptors: 1024 + usualDescriptors},
		{name: "console", command: "exec /hostile console", until: "round 3"},
		{name: "files", command: "exec /hostile files /share " + secret, until: "round 8", descriptors: 1 << 16},
		{name: "frames", command: "exec /hostile frames eth0", until: "round 3"},
		{name: "output", command: `
			L=$(seq 500 | tr '\n' ' ')
			yes $L | head -c 4000000 & yes $L | head -c 4000000 >&2
			wait; echo; echo much
			exec sleep 10000`, until: "much", execs: 10},
	} {
		t.Run(row.name, func(t *testing.T) {
			var seen []string
			defer func() { promise(t, seen...) }()
			toll := newToll(t, n, max(row.descriptors, usualDescriptors))
			share := t.TempDir()
			p := n.Pod(t, pods.PrivilegedPod)
			if row.ends { // there are requests in flight on whatever is attacked
				p.Run(t, pods.Device(disk, "/dev/disk", "rw"), pods.Mount(share, "/share"), pods.Shell(`
					while :; do dd if=/dev/zero of=/dev/disk bs=64k count=16 conv=fsync,notrunc; done 2>/dev/null &
					while :; do dd if=/dev/zero of=/share/file bs=64k count=16 conv=fsync; done 2>/dev/null &
					while :; do head -c 100000 /dev/zero | nc -u -w 1 10.88.0.1 9; done`))
			}
			attacker := p.Run(t, pods.Privileged, pods.Mount(share, "/share"), pods.Shell(row.command),
				pods.Mount(filepath.Join(node.Top(), "bin/hostile"), "/hostile", pods.ReadOnly))
			whole := attackUntil(t, attacker, row.until, toll)
			data, err := os.ReadFile(attacker.Log)
			if err != nil {
				t.Fatal(err)
			}
			if !whole {
				t.Logf("the attack has ended; its log begins with:\n%.3000s", data)
			}
			switch {
			case !whole && !(row.ends && strings.Contains(string(data), " F prepared: ")):
				t.Fatalf("the attack does not go on: %s", tail(data))
			case row.execs > 0:
				wait := manyExecs(t, n, attacker, row.execs)
				attacker.Stop(t, 0)
				wait()
				seen = append(seen, fmt.Sprintf("%d bytes of log, %d commands ended at once", len(data), row.execs))
			default:
				seen = append(seen, tail(data))
			}
			if row.ends {
				// Everything is attacked now, until the machine ends; it may also stand still.
				end := "stands still"
				for range 50 {
					toll.take(t)
					if len(parts(n).without(toll.before).vmms) == 0 {
						end = "has ended"
						break
					}
					moment()
				}
				seen = append(seen, "the machine "+end)
			}
			seen = append(seen, toll.within(t))
			if !row.ends {
				attacker.Stop(t, 100) // without SIGKILL, after which a guest that takes long is ended
				p.Run(t).Exec(t, "echo", "hello").WantOutput(t, "hello\n")
				seen = append(seen, "a further container of the pod runs")
			}
			removeByName(t, n, p.Config())
			seen = append(seen, other.works(t))
			n.Collect(t)
			host = n.WantHost(t, host)
		})
	}
}

// attackUntil waits for a line of the attacker's, which goes on writing others. It returns false if the attack comes to an end before.
func attackUntil(t *testing.T, attacker *pods.Container, line string, toll *toll) bool {
	t.Helper()
	var log []byte
	for !strings.Contains(string(log), " F "+line+"\n") {
		before, ended := len(log), false
		goesOn := node.Wait(func() bool {
			toll.take(t)
			ended = attacker.Status(t).State == cri.ContainerState_CONTAINER_EXITED
			log, _ = os.ReadFile(attacker.Log) // not there before the start
			return ended || len(log) > before
		})
		if !goesOn || ended {
			return false
		}
	}
	return true
}

// manyExecs makes commands in a container, and returns how to wait until they have all been killed.
func manyExecs(t *testing.T, n *pods.Node, c *pods.Container, count int) (wait func()) {
	t.Helper()
	ends := make(chan error, count)
	for range count {
		ctx := n.Context(t)
		go func() {
			r, err := n.CRI.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{"sleep", "1000"}})
			if err == nil && r.ExitCode != 137 {
				err = fmt.Errorf("exit code %d", r.ExitCode)
			}
			ends <- err
		}()
	}
	node.Until(t, "the commands run", func() bool { return c.Get(t, "pgrep -f '^sleep 1000$' | wc -l") == fmt.Sprint(count) })
	return func() {
		for range count {
			if err := <-ends; err != nil {
				t.Errorf("a command that was killed: %v", err)
			}
		}
	}
}

// works is goesOn, and a command in the bystander besides.
func (b *bystander) works(t *testing.T) string {
	t.Helper()
	b.container.Exec(t, "echo", "hello").WantOutput(t, "hello\n")
	return b.goesOn(t, true) + ", exec works"
}

// tail is the end of a container's log, for a line of a report.
func tail(log []byte) string {
	var lines []string
	for line := range strings.Lines(string(log)) {
		if _, text, ok := strings.Cut(line, " F "); ok {
			lines = append(lines, strings.TrimSpace(text))
		}
	}
	return fmt.Sprintf("%.300q", strings.Join(lines[max(0, len(lines)-3):], ", "))
}

// What a sandbox may cost the host however hostile its guest is. Of memory there is the guest's besides, which is the default.
const (
	usualDescriptors = 200
	mostThreads      = 192 // 64 that serve files, as many for what needs a umask or a path, and the rest
	mostLines        = 500 // of the log, the shim's burst: pkg/shim/logging.go
	shimKiB          = 64 << 10
	machineKiB       = (512 + 64) << 10
)

// A toll is the most that the shim and the VMM of a sandbox have cost at any time it was taken.
type toll struct {
	node        *pods.Node
	before      sandboxParts
	from        int64 // of the log
	descriptors int   // at most
	shim, vmm   usage
}

// newToll is for the sandbox that comes next. If the test fails, the log's end goes with it.
func newToll(t *testing.T, n *pods.Node, descriptors int) *toll {
	t.Helper()
	c := &toll{node: n, before: parts(n), from: n.LogSize(), descriptors: descriptors}
	t.Cleanup(func() {
		if log := n.Log(c.from); t.Failed() {
			const most = 8 << 10
			t.Logf("the log of this row ends with:\n%s", log[max(0, len(log)-most):])
		}
	})
	return c
}

// take looks at them now, if they are there.
func (c *toll) take(t *testing.T) {
	t.Helper()
	now := parts(c.node).without(c.before)
	for _, p := range []struct {
		pids map[int]string
		most *usage
	}{{now.shims, &c.shim}, {now.vmms, &c.vmm}} {
		for pid := range p.pids {
			if u, err := usageNow(pid); err == nil {
				p.most.pssKiB = max(p.most.pssKiB, u.pssKiB)
				p.most.descriptors = max(p.most.descriptors, u.descriptors)
				p.most.threads = max(p.most.threads, u.threads)
			}
		}
	}
}

// within fails the test unless the bounds have held, and returns the toll.
func (c *toll) within(t *testing.T) string {
	t.Helper()
	c.take(t)
	var seen []string
	for _, p := range []struct {
		name   string
		most   usage
		pssKiB int
	}{{"shim", c.shim, shimKiB}, {"VMM", c.vmm, machineKiB}} {
		if p.most.threads > mostThreads || p.most.descriptors > c.descriptors || p.most.pssKiB > p.pssKiB {
			t.Errorf("the %s had %d threads (at most %d), %d descriptors (%d), %d KiB (%d)", p.name,
				p.most.threads, mostThreads, p.most.descriptors, c.descriptors, p.most.pssKiB, p.pssKiB)
		}
		seen = append(seen, fmt.Sprintf("%s: %d threads, %d descriptors, %d KiB", p.name, p.most.threads, p.most.descriptors, p.most.pssKiB))
	}
	lines := strings.Count(c.node.Log(c.from), "\n")
	if lines > mostLines {
		t.Errorf("%d lines of log, at most %d", lines, mostLines)
	}
	return strings.Join(append(seen, fmt.Sprintf("%d lines of log", lines)), ", ")
}

// The agent is the attacker's: the guest image has an agent of test/hostile. Whoever waits for it is told so, the host stays
// within bounds, another pod goes on, and the pod can be removed.
func TestHostileAgent(t *testing.T) {
	n := nodeFor(t)
	if !isVM(n) {
		return
	}
	other := newBystander(t, n)
	n.Collect(t)
	host := n.Snapshot(t)
	for _, row := range []struct {
		lie    string
		says   string // what the pod's start fails with; empty: it does not
		config string
	}{
		{lie: "none", says: "did not start within", config: "boot_timeout = '30s'\n"},
		{lie: "silent", says: "does not answer"},
		{lie: "garbage", says: "the connection to the agent is lost"},
		{lie: "huge", says: "the connection to the agent is lost"},
		{lie: "unasked", says: "the connection to the agent is lost"},
		{lie: "liar"},
	} {
		t.Run(row.lie, func(t *testing.T) {
			var seen []string
			defer func() { promise(t, seen...) }()
			n.Configure(t, fmt.Sprintf("%simage = '%s'\nkernel_params = 'HOSTILE_AGENT=%s'\n",
				row.config, filepath.Join(node.Top(), "bin/hostile.erofs"), row.lie))
			toll := newToll(t, n, usualDescriptors)
			config := n.PodConfig(t)
			var p *pods.Pod
			err := toll.during(t, func() (err error) {
				p, err = n.TryPod(t, config)
				return err
			})
			seen = append(seen, "RunPodSandbox: "+short(err))
			if row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says)) || row.says == "" && err != nil {
				t.Errorf("want an error that says %q, got %v", row.says, err)
			}
			if err == nil {
				seen = append(seen, callsOf(t, n, p, toll)...)
			} else if size := len(err.Error()); size > 32<<10 {
				t.Errorf("an error of %d bytes", size)
			}
			seen = append(seen, toll.within(t))
			removeByName(t, n, config)
			seen = append(seen, other.works(t))
			n.Collect(t)
			host = n.WantHost(t, host)
		})
	}
}

// callsOf makes calls that an agent answers, each of which has to end. What it ends with may be a lie.
func callsOf(t *testing.T, n *pods.Node, p *pods.Pod, toll *toll) (seen []string) {
	t.Helper()
	var c *pods.Container
	for _, call := range []struct {
		name string
		make func(ctx context.Context) error
	}{
		{"CreateContainer", func(context.Context) (err error) { c, err = p.TryCreate(t); return err }},
		{"StartContainer", func(context.Context) error { return c.TryStart(t) }},
		{"ExecSync", func(ctx context.Context) error {
			_, err := n.CRI.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{"true"}})
			return err
		}},
		{"ContainerStats", func(ctx context.Context) error {
			_, err := n.CRI.ContainerStats(ctx, &cri.ContainerStatsRequest{ContainerId: c.ID})
			return err
		}},
		{"StopContainer", func(ctx context.Context) error {
			_, err := n.CRI.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: c.ID, Timeout: 1})
			return err
		}},
	} {
		ctx := n.Context(t)
		err := toll.during(t, func() error { return call.make(ctx) })
		if ctx.Err() != nil {
			t.Errorf("%s has no limit of its own", call.name)
		}
		seen = append(seen, call.name+": "+short(err))
		if c == nil {
			return seen
		}
	}
	return seen
}

// during takes the toll while a call goes on, which has a limit of its own.
func (c *toll) during(t *testing.T, call func() error) error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- call() }()
	for {
		select {
		case err := <-done:
			return err
		default:
			c.take(t)
			moment()
		}
	}
}
