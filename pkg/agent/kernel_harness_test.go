//go:build agentkernel

package agent

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/agent/guest"
	"github.com/microvm-runtime/microvm/pkg/agentproto"
	"github.com/microvm-runtime/microvm/pkg/internal/socktest"
)

// waitTimeout is for what takes a moment. The machine is emulated, and the host
// may be busy.
const waitTimeout = 5 * time.Minute

// sandbox is an agent with a client, as the shim is one.
type sandbox struct {
	t       *testing.T
	agent   *Agent
	client  agentproto.AgentClient
	streams string // path of the stream listener
	nextID  atomic.Uint64
	served  chan error
	control net.Conn
}

func newSandbox(t *testing.T) *sandbox {
	t.Helper()
	s := &sandbox{t: t, streams: filepath.Join(t.TempDir(), "streams"), served: make(chan error, 1)}
	l, err := net.Listen("unix", s.streams)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	s.agent, err = New(Config{
		Streams:   l,
		AllowPeer: func(net.Addr) bool { return true },
		Reaper:    testReaper,
		Root:      "/run/microvm",
		Begun:     guest.BootTime(),
		Log:       slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	theirs, ours := socktest.Pair(t)
	s.control = ours
	go func() { s.served <- s.agent.Serve(theirs) }()
	c := ttrpc.NewClient(ours)
	t.Cleanup(func() { c.Close() })
	s.client = agentproto.NewAgentClient(c)
	return s
}

// stream opens a stream as the shim does.
func (s *sandbox) stream() (uint64, *net.UnixConn) {
	s.t.Helper()
	conn, err := net.Dial("unix", s.streams)
	if err != nil {
		s.t.Fatal(err)
	}
	id := s.nextID.Add(1)
	if err := binary.Write(conn, binary.BigEndian, id); err != nil {
		s.t.Fatal(err)
	}
	return id, conn.(*net.UnixConn)
}

// testProcess is a process with its streams.
type testProcess struct {
	s          *sandbox
	ref        *agentproto.ProcessRequest
	stdin      *net.UnixConn
	stdoutConn *net.UnixConn
	wg         sync.WaitGroup
	mu         sync.Mutex
	stdout     strings.Builder
	stderr     strings.Builder
}

func (s *sandbox) newProcess(id, execID string, tty bool) (*testProcess, *agentproto.Streams) {
	p := &testProcess{s: s, ref: &agentproto.ProcessRequest{ContainerId: id, ExecId: execID}}
	ids := new(agentproto.Streams)
	var out, err *net.UnixConn
	ids.Stdin, p.stdin = s.stream()
	ids.Stdout, out = s.stream()
	p.stdoutConn = out
	p.collect(out, &p.stdout)
	if !tty {
		ids.Stderr, err = s.stream()
		p.collect(err, &p.stderr)
	}
	return p, ids
}

func (p *testProcess) collect(conn *net.UnixConn, to *strings.Builder) {
	p.wg.Go(func() {
		buf := make([]byte, 64<<10)
		for {
			n, err := conn.Read(buf)
			p.mu.Lock()
			to.Write(buf[:n])
			p.mu.Unlock()
			if err != nil {
				conn.Close()
				return
			}
		}
	})
}

// out returns what has arrived so far.
func (p *testProcess) out() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stdout.String()
}

// awaitOut waits for output that contains want.
func (p *testProcess) awaitOut(want string) {
	p.s.t.Helper()
	p.s.eventually(fmt.Sprintf("output %q", want), func() bool { return strings.Contains(p.out(), want) })
}

func (s *sandbox) eventually(what string, cond func() bool) {
	s.t.Helper()
	for deadline := time.Now().Add(waitTimeout); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.t.Fatalf("did not happen: %s", what)
		}
	}
}

// create makes a container that is not started.
func (s *sandbox) create(id string, spec *specs.Spec) (*testProcess, error) {
	p, ids := s.newProcess(id, "", spec.Process.Terminal)
	data, err := json.Marshal(spec)
	if err != nil {
		s.t.Fatal(err)
	}
	_, err = s.client.CreateContainer(context.Background(), &agentproto.CreateContainerRequest{Id: id, Spec: data, Streams: ids})
	if err == nil {
		s.t.Cleanup(func() { s.remove(id) })
	}
	return p, err
}

// run makes a container and starts it.
func (s *sandbox) run(id string, spec *specs.Spec) *testProcess {
	s.t.Helper()
	p, err := s.create(id, spec)
	if err != nil {
		s.t.Fatal(err)
	}
	p.start()
	return p
}

func (p *testProcess) start() {
	p.s.t.Helper()
	if _, err := p.s.client.StartProcess(context.Background(), p.ref); err != nil {
		p.s.t.Fatal(err)
	}
}

// wait returns the exit status when the process has ended and its streams have.
func (p *testProcess) wait() uint32 {
	p.s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), waitTimeout)
	defer cancel()
	r, err := p.s.client.WaitProcess(ctx, p.ref)
	if err != nil {
		p.s.t.Fatalf("wait: %v; stdout %d bytes, last of them %q", err, len(p.out()), lastOf(p.out()))
	}
	p.wg.Wait()
	return r.ExitStatus
}

func (p *testProcess) signal(sig unix.Signal, all bool) {
	p.s.t.Helper()
	if _, err := p.s.client.SignalProcess(context.Background(), &agentproto.SignalProcessRequest{
		ContainerId: p.ref.ContainerId, ExecId: p.ref.ExecId, Signal: uint32(sig), All: all,
	}); err != nil {
		p.s.t.Fatal(err)
	}
}

func (p *testProcess) delete() {
	p.s.t.Helper()
	if _, err := p.s.client.DeleteProcess(context.Background(), p.ref); err != nil {
		p.s.t.Fatal(err)
	}
}

// exec makes an exec that is not started.
func (s *sandbox) exec(id, execID string, process *specs.Process) *testProcess {
	s.t.Helper()
	p, ids := s.newProcess(id, execID, process.Terminal)
	data, err := json.Marshal(process)
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := s.client.CreateExec(context.Background(), &agentproto.CreateExecRequest{
		ContainerId: id, ExecId: execID, Process: data, Streams: ids,
	}); err != nil {
		s.t.Fatal(err)
	}
	return p
}

// remove kills and deletes a container, and checks that nothing is left of it.
func (s *sandbox) remove(id string) {
	ref := &agentproto.ProcessRequest{ContainerId: id}
	if _, err := s.client.SignalProcess(context.Background(), &agentproto.SignalProcessRequest{ContainerId: id, Signal: 9}); err != nil {
		s.t.Log(err) // it has ended, most likely
	}
	if _, err := s.client.WaitProcess(context.Background(), ref); err != nil {
		s.t.Log(err) // it was deleted
	}
	if _, err := s.client.DeleteProcess(context.Background(), ref); err != nil {
		s.t.Log(err)
	}
	s.checkGone(id)
}

// checkGone checks that nothing is left of a container.
func (s *sandbox) checkGone(id string) {
	s.t.Helper()
	for _, path := range []string{cgroupMount + cgroupPath(id), filepath.Join("/run/microvm/containers", id)} {
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			s.t.Errorf("%s is left: %v", path, err)
		}
	}
}

// rootfs makes a writable copy of /rootfs.
func rootfs(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/run", "rootfs")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	merged := filepath.Join(dir, "merged")
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("overlay", merged, "overlay", 0, fmt.Sprintf("lowerdir=/rootfs,upperdir=%s/upper,workdir=%s/work", dir, dir)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Not busy: the container's mount namespace is gone by now.
		if err := unix.Unmount(merged, 0); err != nil {
			t.Errorf("unmount the root file system: %v", err)
		}
		os.RemoveAll(dir)
	})
	return merged
}

var testCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
	"CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

func shell(script string) *specs.Process {
	return &specs.Process{
		Args: []string{"/bin/sh", "-c", script},
		Env:  []string{"PATH=/bin:/sbin"},
		Cwd:  "/",
		Capabilities: &specs.LinuxCapabilities{
			Bounding: testCaps, Effective: testCaps, Permitted: testCaps,
		},
		NoNewPrivileges: true,
		Rlimits:         []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 1024, Soft: 1024}},
	}
}

// testSpec is what containerd makes of an image, after the shim's rewriting.
func testSpec(t *testing.T, script string) *specs.Spec {
	t.Helper()
	return &specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: rootfs(t)},
		Process: shell(script),
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro", "nosuid", "noexec", "nodev"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: "/default/somewhere",
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.CgroupNamespace}, {Type: specs.NetworkNamespace},
			},
			Resources: &specs.LinuxResources{
				Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}},
			},
			MaskedPaths:   []string{"/proc/interrupts", "/proc/kcore", "/proc/timer_list", "/sys/firmware"},
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"},
		},
	}
}

// output runs a shell script in a container of its own.
func (s *sandbox) output(id string, spec *specs.Spec) (stdout, stderr string, status uint32) {
	s.t.Helper()
	p := s.run(id, spec)
	status = p.wait()
	return p.stdout.String(), p.stderr.String(), status
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(data))
}

func writeAll(t *testing.T, w io.Writer, text string) {
	t.Helper()
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatal(err)
	}
}

// lastOf keeps a lot of output off the console, which is slow.
func lastOf(output string) string {
	return output[max(0, len(output)-200):]
}
