//go:build privileged

package shim

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	taskv2 "github.com/containerd/containerd/api/runtime/task/v2"
	taskv3 "github.com/containerd/containerd/api/runtime/task/v3"
	ttrpcevents "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/microvm-runtime/microvm/pkg/shim/agenttest"
	"github.com/microvm-runtime/microvm/pkg/shim/state"
)

// In these tests the shim is this very program, with a machine that is fake:
// all else is real. TestMain runs it when this variable names a state root.
const shimVariable = "SHIM_TEST_STATE_ROOT"

func init() {
	root := os.Getenv(shimVariable)
	if root == "" {
		return
	}
	p := &Program{stateRoot: root, launch: func(_ context.Context, r launchRequest) (machine, error) {
		r.console.Close()
		r.log.Close()
		agent := agenttest.New()
		agent.Ports = map[uint32]func(*net.UnixConn){7: func(c *net.UnixConn) {
			io.Copy(c, c)
			c.Close()
		}}
		m := newFakeMachine(agent)
		m.pid = startIdle(m)
		return m, nil
	}}
	os.Exit(p.Run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// startIdle starts a process that does nothing, in a network namespace of its
// own as a VMM has. It ends with its machine, or with us.
func startIdle(m *fakeMachine) (pid int) {
	started := make(chan int)
	go func() {
		runtime.LockOSThread() // the parent whose death counts is a thread
		cmd := exec.Command("sleep", "infinity")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			panic(err)
		}
		started <- cmd.Process.Pid
		<-m.done
		cmd.Process.Kill()
		cmd.Wait()
	}()
	return <-started
}

// node is a host with a containerd.
type node struct {
	t                *testing.T
	dir, root, socks string
	ttrpc            string
	mu               sync.Mutex
	topics           []string
}

func newNode(t *testing.T) *node {
	t.Helper()
	dir, err := os.MkdirTemp("", "shim") // a short name, for sockets
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, dir: dir, root: filepath.Join(dir, "run"), socks: filepath.Join(dir, "s"), ttrpc: filepath.Join(dir, "c.ttrpc")}
	l, err := net.Listen("unix", n.ttrpc)
	if err != nil {
		t.Fatal(err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	ttrpcevents.RegisterTTRPCEventsService(server, n)
	go server.Serve(context.Background(), l)
	t.Cleanup(func() {
		server.Close()
		// Nothing may be left: no sandbox, no socket, no mount, no process.
		if _, err := os.Stat(n.root); !errors.Is(err, fs.ErrNotExist) {
			out, _ := exec.Command("find", n.root).CombinedOutput()
			t.Errorf("left of the state: %v\n%s", err, out)
		}
		if left, _ := filepath.Glob(n.socks + "/*"); len(left) > 0 {
			t.Errorf("sockets left: %v", left)
		}
		if mounts, _ := os.ReadFile("/proc/self/mountinfo"); strings.Contains(string(mounts), dir) {
			t.Error("mounts left")
		}
		for _, pid := range n.shims() {
			t.Errorf("shim left: %d", pid)
			syscall.Kill(pid, syscall.SIGKILL)
		}
		os.RemoveAll(dir)
	})
	return n
}

func (n *node) Forward(_ context.Context, r *ttrpcevents.ForwardRequest) (*emptypb.Empty, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.topics = append(n.topics, r.Envelope.Topic)
	return &emptypb.Empty{}, nil
}

// address is containerd's, by which the shims of a node are known.
func (n *node) address() string { return filepath.Join(n.dir, "c.sock") }

func (n *node) shims() (pids []int) {
	list, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range list {
		if line, err := os.ReadFile(path); err == nil && strings.Contains(string(line), n.address()) {
			var pid int
			fmt.Sscanf(path, "/proc/%d/", &pid)
			pids = append(pids, pid)
		}
	}
	return pids
}

func (n *node) bundle(id string, annotations map[string]string) string {
	n.t.Helper()
	dir := filepath.Join(n.dir, "bundles", id)
	if err := os.MkdirAll(filepath.Join(dir, "rootfs"), 0o755); err != nil {
		n.t.Fatal(err)
	}
	data, err := json.Marshal(specs.Spec{
		Process:     &specs.Process{Args: []string{"sleep"}, Cwd: "/"},
		Root:        &specs.Root{Path: "rootfs"},
		Annotations: annotations,
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
			{Type: specs.MountNamespace}, {Type: specs.NetworkNamespace},
		}},
	})
	if err != nil {
		n.t.Fatal(err)
	}
	writeConfig(n.t, dir, data)
	return dir
}

// shim runs the program as containerd does: in the bundle, with both outputs
// together for start.
func (n *node) shim(bundle string, stdin []byte, args ...string) ([]byte, error) {
	self, err := os.Executable()
	if err != nil {
		n.t.Fatal(err)
	}
	cmd := exec.Command(self, args...)
	cmd.Dir = bundle
	cmd.Env = append(os.Environ(), shimVariable+"="+n.root, "TTRPC_ADDRESS="+n.ttrpc,
		"GRPC_ADDRESS="+n.address(), "NAMESPACE=ns", "MAX_SHIM_VERSION=2", "GOMAXPROCS=2")
	cmd.Stdin = bytes.NewReader(stdin)
	if args[len(args)-1] == "start" {
		return cmd.CombinedOutput()
	}
	out, err := cmd.Output()
	var failed *exec.ExitError
	if errors.As(err, &failed) {
		err = fmt.Errorf("%w: %s", err, failed.Stderr)
	}
	return out, err
}

func (n *node) args(id, action string) []string {
	return []string{"-namespace", "ns", "-address", n.address(), "-publish-binary", "/containerd", "-id", id, action}
}

func (n *node) params(id string) []byte {
	n.t.Helper()
	data, err := proto.Marshal(&bootapi.BootstrapParams{
		InstanceID: id, Namespace: "ns", SocketDir: &n.socks,
		ContainerdGrpcAddress: n.address(), ContainerdTtrpcAddress: n.ttrpc, ContainerdVersion: "2.4.2",
	})
	if err != nil {
		n.t.Fatal(err)
	}
	return data
}

// start is containerd 2.3's and later.
func (n *node) start(id, bundle string) string {
	n.t.Helper()
	out, err := n.shim(bundle, n.params(id), n.args(id, "start")...)
	if err != nil {
		n.t.Fatalf("start: %v: %s", err, out)
	}
	var result bootapi.BootstrapResult
	if err := proto.Unmarshal(out, &result); err != nil || result.Version != 3 || result.Protocol != "ttrpc" {
		n.t.Fatalf("start answered %q: %v", out, err)
	}
	return result.Address
}

func (n *node) delete(id, bundle string) *taskv3.DeleteResponse {
	n.t.Helper()
	args := append(n.args(id, "delete")[:8:8], "-bundle", bundle, "delete")
	out, err := n.shim(bundle, nil, args...)
	if err != nil {
		n.t.Fatalf("delete: %v", err)
	}
	var r taskv3.DeleteResponse
	if err := proto.Unmarshal(out, &r); err != nil {
		n.t.Fatalf("delete answered %q: %v", out, err)
	}
	return &r
}

func dial(t *testing.T, address string) *ttrpc.Client {
	t.Helper()
	conn, err := net.Dial("unix", strings.TrimPrefix(address, "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	c := ttrpc.NewClient(conn)
	t.Cleanup(func() { c.Close() })
	return c
}

func run(t *testing.T, task taskv3.TTRPCTaskService, id, bundle string) {
	t.Helper()
	ctx := context.Background()
	if _, err := task.Create(ctx, &taskv3.CreateTaskRequest{ID: id, Bundle: bundle}); err != nil {
		t.Fatal(err)
	}
	if _, err := task.Start(ctx, &taskv3.StartRequest{ID: id}); err != nil {
		t.Fatal(err)
	}
}

func TestBootstrapGeneration(t *testing.T) {
	n := newNode(t)
	bundle := n.bundle("c1", nil)
	client := dial(t, n.start("c1", bundle))
	task := taskv3.NewTTRPCTaskClient(client)
	ctx := context.Background()
	run(t, task, "c1", bundle)
	task.Kill(ctx, &taskv3.KillRequest{ID: "c1", Signal: 9})
	if r, err := task.Wait(ctx, &taskv3.WaitRequest{ID: "c1"}); err != nil || r.ExitStatus != 137 {
		t.Errorf("wait: %v, %v", r, err)
	}
	if _, err := task.Delete(ctx, &taskv3.DeleteRequest{ID: "c1"}); err != nil {
		t.Error(err)
	}
	if _, err := task.Shutdown(ctx, &taskv3.ShutdownRequest{ID: "c1"}); err != nil && !errors.Is(err, ttrpc.ErrClosed) {
		t.Error(err)
	}
	client.Close()
	n.delete("c1", bundle) // containerd does so after each end
	n.mu.Lock()
	defer n.mu.Unlock()
	if got := strings.Join(n.topics, " "); got != "/tasks/create /tasks/start /tasks/exit /tasks/delete" {
		t.Errorf("events %s", got)
	}
}

// containerd up to 2.2, CRI-O and Docker read an address and speak version 2.
func TestLegacyGeneration(t *testing.T) {
	n := newNode(t)
	bundle := n.bundle("c1", nil)
	out, err := n.shim(bundle, nil, n.args("c1", "start")...)
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	address := string(out)
	if !strings.HasPrefix(address, "unix:///run/containerd/s/") {
		t.Fatalf("answered %q", out)
	}
	if kept, err := os.ReadFile(filepath.Join(bundle, "address")); err != nil || string(kept) != address {
		t.Errorf("in the bundle: %q, %v", kept, err)
	}
	task := taskv2.NewTTRPCTaskClient(dial(t, address))
	ctx := context.Background()
	if _, err := task.Create(ctx, &taskv2.CreateTaskRequest{ID: "c1", Bundle: bundle}); err != nil {
		t.Fatal(err)
	}
	if r, err := task.State(ctx, &taskv2.StateRequest{ID: "c1"}); err != nil || r.Bundle != bundle {
		t.Errorf("state %v, %v", r, err)
	}
	if _, err := task.Delete(ctx, &taskv2.DeleteRequest{ID: "c1"}); err != nil {
		t.Error(err)
	}
	// containerd does not mind that either.
	if _, err := task.Shutdown(ctx, &taskv2.ShutdownRequest{ID: "c1"}); err != nil && !errors.Is(err, ttrpc.ErrClosed) {
		t.Error(err)
	}
	n.delete("c1", bundle)
	if _, err := os.Stat(strings.TrimPrefix(address, "unix://")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

// Containers of a sandbox find its shim, also when they all come at once.
func TestGrouping(t *testing.T) {
	for _, annotation := range groupAnnotations {
		n := newNode(t)
		const containers = 4
		addresses := make([]string, containers)
		bundles := make([]string, containers)
		var wg sync.WaitGroup
		for i := range containers {
			id := fmt.Sprintf("c%d", i)
			bundles[i] = n.bundle(id, map[string]string{annotation: "pod1"})
			wg.Go(func() { addresses[i] = n.start(id, bundles[i]) })
		}
		wg.Wait()
		for _, a := range addresses {
			if a != addresses[0] {
				t.Errorf("%s: addresses %q", annotation, addresses)
			}
		}
		if pids := n.shims(); len(pids) != 1 {
			t.Errorf("%s: shims %v", annotation, pids)
		}
		task := taskv3.NewTTRPCTaskClient(dial(t, addresses[0]))
		run(t, task, "c0", bundles[0])
		run(t, task, "c1", bundles[1])
		// containerd has lost a container, but the shim lives.
		if r := n.delete("c0", bundles[0]); r.ExitStatus != 137 {
			t.Errorf("%s: delete answered %v", annotation, r)
		}
		if r, err := task.State(context.Background(), &taskv3.StateRequest{ID: "c1"}); err != nil || r.Status.String() != "RUNNING" {
			t.Errorf("%s: the other container: %v, %v", annotation, r, err)
		}
		n.delete("c1", bundles[1])
	}
}

// killShim is kill -9.
func (n *node) killShim() {
	n.t.Helper()
	pids := n.shims()
	if len(pids) != 1 {
		n.t.Fatalf("shims %v", pids)
	}
	p, err := state.Identify(pids[0])
	if err != nil {
		n.t.Fatal(err)
	}
	if err := p.Kill(context.Background()); err != nil {
		n.t.Fatal(err)
	}
}

func TestDeleteAfterKill(t *testing.T) {
	n := newNode(t)
	bundle := n.bundle("c1", nil)
	task := taskv3.NewTTRPCTaskClient(dial(t, n.start("c1", bundle)))
	run(t, task, "c1", bundle)
	n.killShim()
	if r := n.delete("c1", bundle); r.ExitStatus != 137 || r.Pid == 0 || time.Since(r.ExitedAt.AsTime()) > time.Hour {
		t.Errorf("delete answered %v", r)
	}
	if r := n.delete("c1", bundle); r.ExitStatus != 137 {
		t.Errorf("and again: %v", r)
	}
}

// The exit of a container that ended before its shim was killed is not lost.
func TestDeleteKnowsTheExit(t *testing.T) {
	n := newNode(t)
	bundle := n.bundle("c1", nil)
	task := taskv3.NewTTRPCTaskClient(dial(t, n.start("c1", bundle)))
	ctx := context.Background()
	run(t, task, "c1", bundle)
	task.Kill(ctx, &taskv3.KillRequest{ID: "c1", Signal: 9})
	want, err := task.Wait(ctx, &taskv3.WaitRequest{ID: "c1"})
	if err != nil {
		t.Fatal(err)
	}
	n.killShim()
	if r := n.delete("c1", bundle); r.ExitStatus != want.ExitStatus || !r.ExitedAt.AsTime().Equal(want.ExitedAt.AsTime()) {
		t.Errorf("delete answered %v, want %v", r, want)
	}
}

// What a killed shim has left does not keep the next one from starting.
func TestStartAfterKill(t *testing.T) {
	n := newNode(t)
	bundle := n.bundle("c1", nil)
	task := taskv3.NewTTRPCTaskClient(dial(t, n.start("c1", bundle)))
	run(t, task, "c1", bundle)
	n.killShim()
	task = taskv3.NewTTRPCTaskClient(dial(t, n.start("c1", bundle)))
	run(t, task, "c1", bundle)
	n.delete("c1", bundle)
}

// What a delete has left, because it was killed, the next one removes, of
// whichever container.
func TestDeleteOfOthers(t *testing.T) {
	n := newNode(t)
	dead := n.bundle("c1", nil)
	task := taskv3.NewTTRPCTaskClient(dial(t, n.start("c1", dead)))
	run(t, task, "c1", dead)
	n.killShim()
	bundle := n.bundle("c2", nil)
	task = taskv3.NewTTRPCTaskClient(dial(t, n.start("c2", bundle)))
	run(t, task, "c2", bundle)
	third := n.bundle("c3", nil)
	n.start("c3", third)
	n.delete("c3", third)
	if _, err := os.Stat(n.root + "/ns/c1"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the dead sandbox is left: %v", err)
	}
	if r, err := task.State(context.Background(), &taskv3.StateRequest{ID: "c2"}); err != nil || r.Status.String() != "RUNNING" {
		t.Errorf("the one that lives: %v, %v", r, err)
	}
	n.delete("c2", bundle)
}

// A shim that does not answer is killed in the end.
func TestDeleteOfAShimThatHangs(t *testing.T) {
	n := newNode(t)
	bundle := n.bundle("c1", nil)
	task := taskv3.NewTTRPCTaskClient(dial(t, n.start("c1", bundle)))
	run(t, task, "c1", bundle)
	syscall.Kill(n.shims()[0], syscall.SIGSTOP)
	n.delete("c1", bundle)
}

func TestTermination(t *testing.T) {
	n := newNode(t)
	bundle := n.bundle("c1", nil)
	task := taskv3.NewTTRPCTaskClient(dial(t, n.start("c1", bundle)))
	run(t, task, "c1", bundle)
	syscall.Kill(n.shims()[0], syscall.SIGTERM)
	n.delete("c1", bundle) // waits for the end
	n.mu.Lock()
	defer n.mu.Unlock()
	if got := strings.Join(n.topics, " "); got != "/tasks/create /tasks/start /tasks/exit" {
		t.Errorf("events %s", got)
	}
}

// The shim has a mount namespace of its own and no capability that is not in the
// list, does not ignore what its programs should not, its log goes to the fifo, with a report when it is asked for one, its heap
// refuses huge pages, and ps shows whose it is.
func TestSurroundings(t *testing.T) {
	n := newNode(t)
	bundle := n.bundle("c1", map[string]string{"io.kubernetes.cri.sandbox-namespace": "default", "io.kubernetes.cri.sandbox-name": "web"})
	logPath := filepath.Join(bundle, "log")
	if err := unix.Mkfifo(logPath, 0o700); err != nil {
		t.Fatal(err)
	}
	logFile, err := os.OpenFile(logPath, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer logFile.Close()
	task := taskv3.NewTTRPCTaskClient(dial(t, n.start("c1", bundle)))
	run(t, task, "c1", bundle)
	pid := n.shims()[0]
	ours, err1 := os.Readlink("/proc/self/ns/mnt")
	theirs, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	if err1 != nil || err2 != nil || ours == theirs {
		t.Errorf("mount namespaces %s and %s", ours, theirs)
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !strings.Contains(string(line), "\x00-id\x00c1\x00") || !strings.Contains(string(line), "\x00-pod\x00default/web\x00") {
		t.Errorf("ps shows %q, %v", line, err)
	}
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil || !strings.Contains(string(mounts), n.root+"/ns/c1/shared/tree/c1/rootfs") {
		t.Errorf("the container's root is not mounted: %v", err)
	}
	if _, err := os.Stat("/sys/kernel/mm/transparent_hugepage"); err == nil {
		smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
		if err != nil || !strings.Contains(string(smaps), " nh ") { // VM_NOHUGEPAGE, proc(5)
			t.Errorf("no part of the shim's memory refuses huge pages: %v", err)
		}
	}
	checkCapabilities(t, pid)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	_, ignored, _ := strings.Cut(string(status), "SigIgn:\t")
	mask, parseErr := strconv.ParseUint(ignored[:min(16, len(ignored))], 16, 64)
	if err != nil || parseErr != nil || mask&(1<<(unix.SIGHUP-1)|1<<(unix.SIGPIPE-1)) != 0 {
		t.Errorf("hooks and logging programs would ignore %#x as the shim does: %v, %v", mask, err, parseErr)
	}
	line = make([]byte, 4096)
	k, err := logFile.Read(line)
	if err != nil || !strings.Contains(string(line[:k]), "virtual machine is up") || !strings.Contains(string(line[:k]), "sandbox=c1") {
		t.Errorf("log %q, %v", line[:k], err)
	}
	syscall.Kill(pid, syscall.SIGUSR1)
	k, err = logFile.Read(line)
	if err != nil || !strings.Contains(string(line[:k]), " goroutines=") || !strings.Contains(string(line[:k]), " vmm_goroutines=17") {
		t.Errorf("report %q, %v", line[:k], err)
	}
	n.delete("c1", bundle)
}

// checkCapabilities looks at all threads of a shim, of which one stands for a
// container.
func checkCapabilities(t *testing.T, pid int) {
	t.Helper()
	var mask uint64
	for _, c := range shimCapabilities {
		mask |= 1 << c
	}
	all := fmt.Sprintf("%016x", mask)
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if len(tasks) < 2 {
		t.Errorf("threads %v", tasks)
	}
	for _, path := range tasks {
		status, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		for name, want := range map[string]string{"CapInh": "0000000000000000", "CapPrm": all, "CapEff": all, "CapBnd": all, "CapAmb": "0000000000000000"} {
			if !strings.Contains(string(status), name+":\t"+want+"\n") {
				t.Errorf("%s: %s is not %s:\n%s", path, name, want, status)
			}
		}
	}
}

func TestBadStart(t *testing.T) {
	n := newNode(t)
	bundle := n.bundle("c1", nil)
	long := "/" + strings.Repeat("x", 80)
	params, err := proto.Marshal(&bootapi.BootstrapParams{InstanceID: "c1", Namespace: "ns", SocketDir: &long})
	if err != nil {
		t.Fatal(err)
	}
	badGroup := n.bundle("c2", map[string]string{groupAnnotations[0]: "../../etc"})
	badSpec := n.bundle("c3", nil)
	writeConfig(t, badSpec, []byte("{"))
	for _, test := range []struct {
		name, bundle string
		stdin        []byte
		args         []string
		want         string
	}{
		{"socket directory too long", bundle, params, n.args("c1", "start"), "socket_dir"},
		{"bad group", badGroup, n.params("c2"), n.args("c2", "start"), groupAnnotations[0]},
		{"bad specification", badSpec, n.params("c3"), n.args("c3", "start"), "config.json"},
		{"bad id", bundle, nil, n.args("..", "start"), `".."`},
		{"unknown action", bundle, nil, n.args("c1", "dance"), "dance"},
		{"serve by hand", bundle, nil, n.args("c1", "start")[:8], "for start to call"},
	} {
		out, err := n.shim(test.bundle, test.stdin, test.args...)
		if text := fmt.Sprint(string(out), err); err == nil || !strings.Contains(text, test.want) {
			t.Errorf("%s: %q does not say %q", test.name, text, test.want)
		}
	}
	// A start that was refused leaves nothing, and delete is content.
	n.delete("c2", badGroup)
	n.delete("c3", badSpec)
}
