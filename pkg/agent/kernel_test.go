//go:build agentkernel

package agent

import (
	"context"
	"fmt"
	"hash/crc32"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

var background = context.Background()

func ptr[T any](v T) *T { return &v }

func TestGuest(t *testing.T) {
	for file, want := range map[string]string{
		"/proc/sys/kernel/panic":                        "-1",
		"/proc/sys/kernel/pid_max":                      "4194304",
		"/proc/sys/fs/nr_open":                          "1073741816",
		"/proc/sys/vm/max_map_count":                    "1048576",
		"/proc/sys/kernel/threads-max":                  "4194304",
		"/proc/sys/fs/file-max":                         "9223372036854775807",
		"/proc/sys/fs/epoll/max_user_watches":           "4194304",
		"/proc/sys/net/netfilter/nf_conntrack_max":      "65536",
		"/proc/sys/fs/protected_regular":                "2",
		"/proc/sys/fs/protected_fifos":                  "1",
		"/proc/sys/fs/protected_symlinks":               "1",
		"/proc/sys/fs/protected_hardlinks":              "1",
		"/proc/sys/net/ipv4/ip_unprivileged_port_start": "1024",
		"/sys/class/net/lo/flags":                       "0x9", // IFF_UP|IFF_LOOPBACK
	} {
		if got := readFile(t, file); got != want {
			t.Errorf("%s is %q, want %q", file, got, want)
		}
	}
	have := strings.Fields(readFile(t, "/sys/fs/cgroup/cgroup.subtree_control"))
	for _, c := range []string{"cpu", "cpuset", "io", "memory", "pids", "hugetlb"} {
		if !strings.Contains(" "+strings.Join(have, " ")+" ", " "+c+" ") {
			t.Errorf("controller %s is not enabled: %q", c, have)
		}
	}
	if got, want := strings.Join(have, " "), readFile(t, "/sys/fs/cgroup/cgroup.controllers"); len(have) != len(strings.Fields(want)) {
		t.Errorf("enabled %q of the controllers %q", got, want)
	}
	for _, path := range []string{"/dev/ptmx", "/dev/pts/ptmx", "/dev/shm", "/dev/mqueue", "/run", "/dev/null"} {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
}

func TestRun(t *testing.T) {
	s := newSandbox(t)
	stdout, stderr, status := s.output("c", testSpec(t, "echo out; echo err >&2; exit 3"))
	if stdout != "out\n" || stderr != "err\n" || status != 3 {
		t.Errorf("got %q, %q, status %d", stdout, stderr, status)
	}
	info, err := s.client.Info(background, &agentproto.InfoRequest{})
	if err != nil || info.Protocol != 1 || info.CpusOnline == 0 || info.MemoryTotalBytes == 0 || info.KernelRelease == "" {
		t.Errorf("info %v, %v", info, err)
	}
}

// TestCannotRun: what is wrong is said, and nothing is left.
func TestCannotRun(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*specs.Spec)
		want   string
	}{
		"missing program": {func(s *specs.Spec) { s.Process.Args = []string{"nonesuch", "-x"} }, `exec: "nonesuch": executable file not found in $PATH`},
		"missing path":    {func(s *specs.Spec) { s.Process.Args = []string{"/bin/nonesuch"} }, "/bin/nonesuch"},
		"not executable":  {func(s *specs.Spec) { s.Process.Args = []string{"/etc/passwd"} }, "/etc/passwd"},
		"directory":       {func(s *specs.Spec) { s.Process.Args = []string{"/etc"} }, "/etc"},
		"missing mount": {func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/x", Source: "/nonesuch", Type: "bind", Options: []string{"bind"}})
		}, "/nonesuch"},
		"missing root":        {func(s *specs.Spec) { s.Root.Path = "/nonesuch" }, "/nonesuch"},
		"bad cgroup value":    {func(s *specs.Spec) { s.Linux.Resources.CPU = &specs.LinuxCPU{Cpus: "900"} }, "cpuset"},
		"bad sysctl":          {func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"net.nonesuch": "1"} }, "net.nonesuch"},
		"joined namespace":    {func(s *specs.Spec) { s.Linux.Namespaces[0].Path = "/proc/1/ns/pid" }, "pid"},
		"no mount namespace":  {func(s *specs.Spec) { s.Linux.Namespaces = nil }, "mount namespace"},
		"bad rlimit":          {func(s *specs.Spec) { s.Process.Rlimits[0].Type = "RLIMIT_X" }, "RLIMIT_X"},
		"unmapped user":       {func(s *specs.Spec) { s.Process.User.UID = 1 << 31 }, ""},
		"limit below program": {func(s *specs.Spec) { s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: ptr(int64(4096))} }, "OOM-killed"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSandbox(t)
			spec := testSpec(t, "true")
			test.change(spec)
			p, err := s.create("c", spec)
			if test.want == "" {
				if err != nil {
					t.Log(err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q in it", err, test.want)
			}
			p.wg.Wait() // the streams have ended
			s.checkGone("c")
			if _, err := s.client.WaitProcess(background, p.ref); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
				t.Errorf("wait: %v", err)
			}
		})
	}
}

func TestStdin(t *testing.T) {
	s := newSandbox(t)
	p := s.run("c", testSpec(t, "cat; echo end"))
	writeAll(t, p.stdin, "hello\n")
	p.awaitOut("hello\n")
	if err := p.stdin.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if status := p.wait(); status != 0 || p.out() != "hello\nend\n" {
		t.Errorf("status %d, output %q", status, p.out())
	}
}

// TestNoStreams: streams that are not connected are /dev/null.
func TestNoStreams(t *testing.T) {
	s := newSandbox(t)
	spec := testSpec(t, `[ "$(readlink /proc/self/fd/0)" = /dev/null ] && echo lost && cat && exit 7`)
	p := s.run("c", spec)
	p.stdin.Close()
	p.wait()
	e := s.run("d", testSpec(t, "sleep 1000"))
	data := `{"args":["/bin/sh","-c","[ $(readlink /proc/$$/fd/0) = /dev/null ] && [ $(readlink /proc/$$/fd/1) = /dev/null ] && cat && exit 7"],"cwd":"/","env":["PATH=/bin"]}`
	ref := &agentproto.ProcessRequest{ContainerId: "d", ExecId: "e"}
	if _, err := s.client.CreateExec(background, &agentproto.CreateExecRequest{ContainerId: "d", ExecId: "e", Process: []byte(data)}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.client.StartProcess(background, ref); err != nil {
		t.Fatal(err)
	}
	r, err := s.client.WaitProcess(background, ref)
	if err != nil || r.ExitStatus != 7 {
		t.Errorf("%v, %v", r, err)
	}
	e.signal(unix.SIGKILL, false)
}

// TestDrain: what was written just before the end arrives, whole.
func TestDrain(t *testing.T) {
	const size = 8 << 20
	line := []byte("0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde\n")
	crc := crc32.NewIEEE()
	for range size / len(line) {
		crc.Write(line)
	}
	s := newSandbox(t)
	c := s.run("c", testSpec(t, "sleep 1000"))
	script := fmt.Sprintf("yes %s | head -c %d", strings.TrimSpace(string(line)), size)
	for i := range 3 {
		p := s.exec("c", fmt.Sprint("e", i), shell(script))
		p.start()
		if status := p.wait(); status != 0 {
			t.Fatalf("status %d, %q", status, p.stderr.String())
		}
		got := p.stdout.String()
		if len(got) != size || crc32.ChecksumIEEE([]byte(got)) != crc.Sum32() {
			t.Fatalf("%d bytes, checksum %x; want %d, %x", len(got), crc32.ChecksumIEEE([]byte(got)), size, crc.Sum32())
		}
		p.delete()
	}
	// The same as init, which takes its whole pid namespace with it.
	stdout, _, _ := s.output("d", testSpec(t, script))
	if len(stdout) != size || crc32.ChecksumIEEE([]byte(stdout)) != crc.Sum32() {
		t.Errorf("%d bytes from init", len(stdout))
	}
	c.signal(unix.SIGKILL, false)
}

func TestExec(t *testing.T) {
	s := newSandbox(t)
	c := s.run("c", testSpec(t, "echo up; sleep 1000"))
	c.awaitOut("up")

	p := s.exec("c", "one", shell("echo hi; exit 42"))
	p.start()
	if status := p.wait(); status != 42 || p.out() != "hi\n" {
		t.Errorf("status %d, output %q", status, p.out())
	}
	if _, err := s.client.StartProcess(background, p.ref); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("second start: %v", err)
	}
	p.delete()
	if _, err := s.client.WaitProcess(background, p.ref); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("wait for a deleted exec: %v", err)
	}

	missing := s.exec("c", "missing", &specs.Process{Args: []string{"nonesuch"}, Cwd: "/"})
	_, err := s.client.StartProcess(background, missing.ref)
	if err == nil || !strings.Contains(err.Error(), `exec: "nonesuch": executable file not found in $PATH`) {
		t.Errorf("missing program: %v", err)
	}
	missing.wg.Wait()
	missing.delete()

	never := s.exec("c", "never", shell("true"))
	if _, err := s.client.CreateExec(background, &agentproto.CreateExecRequest{
		ContainerId: "c", ExecId: "never", Process: []byte(`{"args":["x"],"cwd":"/"}`),
	}); !errdefs.IsAlreadyExists(errgrpc.ToNative(err)) {
		t.Errorf("second exec of that id: %v", err)
	}
	never.delete()
	never.wg.Wait()

	// A process in the background keeps the output but not the exit.
	bg := s.exec("c", "bg", shell("(sleep 1000; echo late) & echo early"))
	bg.start()
	if status := bg.wait(); status != 0 || bg.out() != "early\n" {
		t.Errorf("status %d, output %q", status, bg.out())
	}
	// One that writes without an end neither.
	bg = s.exec("c", "bg2", shell("yes & echo $! >/tmp/pid"))
	bg.start()
	bg.wait()

	list, err := s.client.ListProcesses(background, &agentproto.ContainerRequest{ContainerId: "c"})
	if err != nil || len(list.Processes) < 3 {
		t.Errorf("processes %v, %v", list, err)
	}
	long := s.exec("c", "long", shell("exec sleep 1000"))
	long.start()
	list, err = s.client.ListProcesses(background, &agentproto.ContainerRequest{ContainerId: "c"})
	if err != nil || !strings.Contains(fmt.Sprint(list), `exec_id:"long"`) {
		t.Errorf("processes %v, %v", list, err)
	}
	if _, err := s.client.DeleteProcess(background, long.ref); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("delete of a running exec: %v", err)
	}
	if _, err := s.client.DeleteProcess(background, c.ref); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("delete of a running container: %v", err)
	}
	// Init takes all with it.
	c.signal(unix.SIGKILL, false)
	if status := c.wait(); status != 137 {
		t.Errorf("status of init %d", status)
	}
	if status := long.wait(); status != 137 {
		t.Errorf("status of exec %d", status)
	}
	c.delete()
	s.checkGone("c")
}

// TestManyExecs: no exit status is lost while the reaper is at work.
func TestManyExecs(t *testing.T) {
	s := newSandbox(t)
	spec := testSpec(t, "echo up; sleep 1000")
	spec.Linux.Namespaces = spec.Linux.Namespaces[1:] // the guest's pids: orphans are the agent's
	c := s.run("c", spec)
	c.awaitOut("up")
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for j := range 5 {
				want := uint32(i*16 + j + 1)
				p := s.exec("c", fmt.Sprintf("e%d.%d", i, j), shell(fmt.Sprintf("(true &) ; (true &) ; echo %d; exit %d", want, want)))
				p.start()
				if got := p.wait(); got != want || p.out() != fmt.Sprintln(want) {
					t.Errorf("status %d, output %q, want %d", got, p.out(), want)
				}
				p.delete()
			}
		})
	}
	wg.Wait()
	s.eventually("no zombies", func() bool {
		stats, err := filepath.Glob("/proc/[0-9]*/stat")
		if err != nil {
			t.Fatal(err)
		}
		for _, stat := range stats {
			data, err := os.ReadFile(stat)
			if err == nil && strings.Contains(string(data), ") Z ") {
				return false
			}
		}
		return true
	})
	c.signal(unix.SIGKILL, false)
}

func TestTerminal(t *testing.T) {
	s := newSandbox(t)
	spec := testSpec(t, "tty; stty size; read x; stty size; echo got $x; exit 5")
	spec.Process.Terminal = true
	spec.Process.ConsoleSize = &specs.Box{Width: 101, Height: 37}
	c := s.run("c", spec)
	c.awaitOut("37 101\r\n")
	if !strings.HasPrefix(c.out(), "/dev/console\r\n") && !strings.HasPrefix(c.out(), "/dev/pts/0\r\n") {
		t.Errorf("output %q", c.out())
	}
	if _, err := s.client.ResizePty(background, &agentproto.ResizePtyRequest{ContainerId: "c", Width: 90, Height: 20}); err != nil {
		t.Fatal(err)
	}
	writeAll(t, c.stdin, "hello\n")
	if status := c.wait(); status != 5 || !strings.HasSuffix(c.out(), "hello\r\n20 90\r\ngot hello\r\n") {
		t.Errorf("status %d, output %q", status, c.out())
	}

	d := s.run("d", testSpec(t, "echo up; sleep 1000"))
	d.awaitOut("up")
	process := shell("stty size; cat")
	process.Terminal = true
	p := s.exec("d", "tty", process)
	if _, err := s.client.ResizePty(background, &agentproto.ResizePtyRequest{ContainerId: "d", ExecId: "tty", Width: 66, Height: 44}); err != nil {
		t.Fatal(err)
	}
	p.start()
	p.awaitOut("44 66\r\n")
	// The end of stdin leaves the terminal as it is; ^D is what ends cat.
	writeAll(t, p.stdin, "some\n\x04")
	if err := p.stdin.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if status := p.wait(); status != 0 || !strings.Contains(p.out(), "some\r\nsome\r\n") {
		t.Errorf("status %d, output %q", status, p.out())
	}
	if _, err := s.client.ResizePty(background, &agentproto.ResizePtyRequest{ContainerId: "d", Width: 1, Height: 1}); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("resize without terminal: %v", err)
	}
	d.signal(unix.SIGKILL, false)
}

// TestTerminalOutput: also a terminal's last output arrives.
func TestTerminalOutput(t *testing.T) {
	s := newSandbox(t)
	spec := testSpec(t, "yes 0123456 | head -c 262144; echo last")
	spec.Process.Terminal = true
	stdout, _, _ := s.output("c", spec)
	if want := 262144*9/8 + len("last\r\n"); len(stdout) != want || !strings.HasSuffix(stdout, "last\r\n") {
		t.Errorf("%d bytes, want %d", len(stdout), want)
	}
}

func TestSignals(t *testing.T) {
	s := newSandbox(t)
	c := s.run("c", testSpec(t, "trap 'echo caught; exit 9' TERM; echo up; while :; do sleep 0.1; done"))
	c.awaitOut("up")
	c.signal(unix.SIGTERM, false)
	if status := c.wait(); status != 9 || !strings.Contains(c.out(), "caught") {
		t.Errorf("status %d, output %q", status, c.out())
	}
	if _, err := s.client.SignalProcess(background, &agentproto.SignalProcessRequest{ContainerId: "c", Signal: 15}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("signal after the end: %v", err)
	}

	d := s.run("d", testSpec(t, "echo up; sleep 1000 & wait"))
	d.awaitOut("up")
	p := s.exec("d", "e", shell("exec sleep 1000"))
	p.start()
	p.signal(unix.SIGUSR1, false)
	if status := p.wait(); status != 128+uint32(unix.SIGUSR1) {
		t.Errorf("status %d", status)
	}
	d.signal(unix.SIGKILL, true)
	if status := d.wait(); status != 137 {
		t.Errorf("status %d", status)
	}

	// Created, killed and never started.
	e, err := s.create("e", testSpec(t, "true"))
	if err != nil {
		t.Fatal(err)
	}
	e.signal(unix.SIGKILL, false)
	if status := e.wait(); status != 137 {
		t.Errorf("status %d", status)
	}
	if _, err := s.client.StartProcess(background, e.ref); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("start after the end: %v", err)
	}
	// Created and deleted.
	f, err := s.create("f", testSpec(t, "true"))
	if err != nil {
		t.Fatal(err)
	}
	f.delete()
	s.checkGone("f")
}

// TestSharedPIDs: without a pid namespace of its own a container's processes
// end with its init nevertheless.
func TestSharedPIDs(t *testing.T) {
	s := newSandbox(t)
	spec := testSpec(t, "sleep 1234 & sleep 1234 & echo up; read x")
	spec.Linux.Namespaces = spec.Linux.Namespaces[1:]
	c := s.run("c", spec)
	c.awaitOut("up")
	c.stdin.CloseWrite()
	c.wait()
	c.delete()
	s.checkGone("c")

	d := s.run("d", specWithoutPIDs(t, "sleep 1234 & echo up; wait"))
	d.awaitOut("up")
	d.signal(unix.SIGKILL, false)
	if status := d.wait(); status != 137 {
		t.Errorf("status %d", status)
	}
}

func specWithoutPIDs(t *testing.T, script string) *specs.Spec {
	spec := testSpec(t, script)
	spec.Linux.Namespaces = spec.Linux.Namespaces[1:]
	return spec
}

func TestPause(t *testing.T) {
	s := newSandbox(t)
	c := s.run("c", testSpec(t, "while :; do echo tick; sleep 0.02; done"))
	c.awaitOut("tick")
	ref := &agentproto.ContainerRequest{ContainerId: "c"}
	if _, err := s.client.PauseContainer(background, ref); err != nil {
		t.Fatal(err)
	}
	if got := readFile(t, cgroupMount+cgroupPath("c")+"/cgroup.events"); !strings.Contains(got, "frozen 1") {
		t.Errorf("cgroup.events %q", got)
	}
	p := s.exec("c", "e", shell("true"))
	if _, err := s.client.StartProcess(background, p.ref); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("exec while paused: %v", err)
	}
	if _, err := s.client.ResumeContainer(background, ref); err != nil {
		t.Fatal(err)
	}
	n := strings.Count(c.out(), "tick")
	s.eventually("it goes on", func() bool { return strings.Count(c.out(), "tick") > n })
	p.start() // now it can
	p.wait()
	if _, err := s.client.ResumeContainer(background, ref); !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("second resume: %v", err)
	}
	// A paused container can be killed and deleted.
	if _, err := s.client.PauseContainer(background, ref); err != nil {
		t.Fatal(err)
	}
	c.signal(unix.SIGKILL, false)
	if status := c.wait(); status != 137 {
		t.Errorf("status %d", status)
	}
	c.delete()
	s.checkGone("c")
}

func TestResources(t *testing.T) {
	s := newSandbox(t)
	spec := testSpec(t, "echo up; while :; do :; done")
	spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: ptr(int64(64 << 20)), Swap: ptr(int64(64 << 20))}
	spec.Linux.Resources.CPU = &specs.LinuxCPU{Quota: ptr(int64(50000)), Period: ptr(uint64(100000)), Shares: ptr(uint64(512))}
	spec.Linux.Resources.Pids = &specs.LinuxPids{Limit: ptr(int64(50))}
	spec.Linux.Resources.HugepageLimits = []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 0}, {Pagesize: "7MB", Limit: 0}}
	c := s.run("c", spec)
	c.awaitOut("up")
	dir := cgroupMount + cgroupPath("c")
	check := func(want map[string]string) {
		t.Helper()
		for file, value := range want {
			if got := readFile(t, filepath.Join(dir, file)); got != value {
				t.Errorf("%s is %q, want %q", file, got, value)
			}
		}
	}
	check(map[string]string{"memory.max": "67108864", "cpu.max": "50000 100000", "pids.max": "50"})
	weight := readFile(t, dir+"/cpu.weight")

	if _, err := s.client.UpdateContainer(background, &agentproto.UpdateContainerRequest{
		ContainerId: "c", Resources: []byte(`{"memory":{"limit":134217728},"cpu":{"quota":20000}}`),
	}); err != nil {
		t.Fatal(err)
	}
	check(map[string]string{"memory.max": "134217728", "cpu.max": "20000 100000", "pids.max": "50", "cpu.weight": weight})
	// Devices work still.
	p := s.exec("c", "e", shell("echo x >/dev/null && head -c1 /dev/zero | wc -c"))
	p.start()
	if status := p.wait(); status != 0 {
		t.Errorf("devices after an update: %q", p.stderr.String())
	}
	for _, bad := range []string{"", "{", `{"memory":{"limit":"x"}}`, `{"cpu":{"cpus":"999"}}`} {
		if _, err := s.client.UpdateContainer(background, &agentproto.UpdateContainerRequest{ContainerId: "c", Resources: []byte(bad)}); err == nil {
			t.Errorf("update with %q succeeded", bad)
		}
	}
	check(map[string]string{"memory.max": "134217728"})
	if _, err := s.client.UpdateContainer(background, &agentproto.UpdateContainerRequest{ContainerId: "c", Resources: []byte(`{"cpu":{"idle":1}}`)}); err != nil {
		t.Errorf("an idle container: %v", err)
	}
	check(map[string]string{"cpu.idle": "1", "cpu.max": "20000 100000"})

	r, err := s.client.ContainerStats(background, &agentproto.ContainerRequest{ContainerId: "c"})
	if err != nil {
		t.Fatal(err)
	}
	var m stats.Metrics
	if err := r.Metrics.UnmarshalTo(&m); err != nil {
		t.Fatal(err)
	}
	if r.Metrics.TypeUrl != "io.containerd.cgroups.v2.Metrics" || m.CPU.UserUsec == 0 || m.CPU.UsageUsec < m.CPU.UserUsec ||
		m.Memory.Usage == 0 || m.Memory.UsageLimit != 134217728 || m.Pids.Current == 0 || m.Pids.Limit != 50 {
		t.Errorf("metrics %q: %v", r.Metrics.TypeUrl, &m)
	}
}

func TestPIDLimit(t *testing.T) {
	s := newSandbox(t)
	spec := testSpec(t, "for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done; echo unreachable")
	spec.Linux.Resources.Pids = &specs.LinuxPids{Limit: ptr(int64(5))}
	_, stderr, status := s.output("c", spec)
	if status == 0 || !strings.Contains(stderr, "fork") {
		t.Errorf("status %d, %q", status, stderr)
	}
}

// TestOutOfMemory: the event arrives before the exit, and once.
func TestOutOfMemory(t *testing.T) {
	s := newSandbox(t)
	ctx, cancel := context.WithCancel(background)
	defer cancel()
	events, err := s.client.Events(ctx, &agentproto.EventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var got []string
	go func() {
		for {
			e, err := events.Recv()
			if err != nil {
				return
			}
			mu.Lock()
			got = append(got, e.GetOomKill().GetContainerId())
			mu.Unlock()
		}
	}()
	spec := testSpec(t, "echo up; exec tail /dev/zero")
	spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: ptr(int64(32 << 20))}
	_, _, status := s.output("c", spec)
	if status != 137 {
		t.Errorf("status %d", status)
	}
	// The client library hands over events in a goroutine of its own.
	s.eventually("an event", func() bool { mu.Lock(); defer mu.Unlock(); return len(got) > 0 })

	spec = testSpec(t, "echo up; sleep 1000")
	spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: ptr(int64(32 << 20))}
	d := s.run("d", spec)
	d.awaitOut("up")
	p := s.exec("d", "e", shell("tail /dev/zero; echo survived $?"))
	p.start()
	p.wait()
	if p.out() != "survived 137\n" {
		t.Errorf("output %q", p.out())
	}
	s.eventually("a second event", func() bool { mu.Lock(); defer mu.Unlock(); return len(got) > 1 })
	d.signal(unix.SIGKILL, false)
	d.wait()
	mu.Lock()
	defer mu.Unlock()
	if strings.Join(got, " ") != "c d" {
		t.Errorf("events of %q", got)
	}
}

func TestShutdown(t *testing.T) {
	s := newSandbox(t)
	c, err := s.create("c", testSpec(t, "sleep 1000"))
	if err != nil {
		t.Fatal(err)
	}
	c.start()
	if _, err := s.client.Shutdown(background, &emptypb.Empty{}); err != nil {
		t.Fatal(err)
	}
	if err := <-s.served; err != nil {
		t.Errorf("served: %v", err)
	}
	if pids, err := s.agent.containers["c"].lc.Processes(); err != nil || len(pids) > 0 {
		t.Errorf("processes %v, %v", pids, err)
	}
	if err := s.agent.containers["c"].destroy(background); err != nil {
		t.Error(err)
	}
}

func TestShimGone(t *testing.T) {
	s := newSandbox(t)
	c := s.run("c", testSpec(t, "echo up; sleep 1000"))
	c.awaitOut("up")
	s.control.(*net.UnixConn).Close()
	if err := <-s.served; err == nil {
		t.Error("serving ended without an error")
	}
	if err := s.agent.containers["c"].destroy(background); err != nil {
		t.Error(err)
	}
}
