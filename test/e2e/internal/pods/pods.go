// Package pods is what the tests of pods share: pods and containers through the CRI API of a node of their own, and crictl
// where it is crictl that a user would see.
package pods

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	leases "github.com/containerd/containerd/api/services/leases/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

// A Node is one for pods, see node.MainPods.
type Node struct {
	*node.Node
	// Handler is the runtime handler under test, from E2E_RUNTIME_HANDLER.
	Handler string
	// CRI is the whole API. Calls through it take the context of Context.
	CRI cri.RuntimeServiceClient

	// Images is the other half of the API.
	Images cri.ImageServiceClient

	snapshotter string // of all containers
	conn        *grpc.ClientConn
}

var (
	mu     sync.Mutex
	shared *Node
)

// For returns the package's node, and fails the test at its end if the host is not the way it was.
func For(t *testing.T) *Node {
	t.Helper()
	below := node.For(t)
	mu.Lock()
	defer mu.Unlock()
	if shared == nil {
		shared = connect(t, below, "overlayfs")
		shared.prepare(t)
	}
	n := shared
	t.Cleanup(func() { n.Collect(t) })
	return n
}

// New returns a node of the test's own, see node.New.
func New(t *testing.T, dir string) *Node {
	t.Helper()
	return start(t, dir, "overlayfs")
}

// WithDisks returns a node of the test's own where all containers have file systems of their own, see node.WithDisks.
func WithDisks(t *testing.T, snapshotter string) *Node {
	t.Helper()
	dir := node.DiskState(t, snapshotter)
	if err := os.WriteFile(filepath.Join(dir, "snapshotter"), []byte(snapshotter), 0o644); err != nil {
		t.Fatal(err)
	}
	return start(t, dir, snapshotter)
}

func start(t *testing.T, dir, snapshotter string) *Node {
	t.Helper()
	n := connect(t, node.New(t, dir), snapshotter)
	t.Cleanup(func() {
		n.Collect(t)
		n.conn.Close()
	})
	n.prepare(t)
	return n
}

func connect(t *testing.T, below *node.Node, snapshotter string) *Node {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+below.Path("containerd.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	n := &Node{
		Node: below, Handler: os.Getenv("E2E_RUNTIME_HANDLER"),
		CRI: cri.NewRuntimeServiceClient(conn), Images: cri.NewImageServiceClient(conn), snapshotter: snapshotter, conn: conn,
	}
	if n.Handler == "" {
		n.Handler = "microvm"
	}
	return n
}

// prepare imports the images and runs one pod, which leaves behind what a node has once it had a pod: the bridge, the
// portmap plugin's tables, directories. All that is not a trace of a test.
func (n *Node) prepare(t *testing.T) {
	t.Helper()
	n.Provide(t, node.Pause)
	n.Provide(t, node.Box)
	p := n.Pod(t, HostPort(cri.Protocol_TCP, 80, 18099), HostPort(cri.Protocol_UDP, 80, 18099))
	p.Run(t, Command("true"))
	p.Remove(t)
	n.Collect(t)
	n.SetBaseline(t)
}

// Provide makes sure that CRI has an image. As with Import, no pod may exist yet in this test.
func (n *Node) Provide(t *testing.T, image string) {
	t.Helper()
	n.Import(t, image, n.snapshotter)
	node.Until(t, "CRI knows the image "+image, func() bool {
		r, err := n.Images.ImageStatus(n.Context(t), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: image}})
		return err == nil && r.Image != nil
	})
}

// Collect makes containerd collect its garbage, removed containers' snapshots, which it would do some time later: the end of
// a lease can be waited for with the collection after it.
func (n *Node) Collect(t *testing.T) {
	t.Helper()
	ctx := metadata.AppendToOutgoingContext(n.Context(t), "containerd-namespace", node.PodNamespace)
	client := leases.NewLeasesClient(n.conn)
	const id = "collect"
	_, err := client.Create(ctx, &leases.CreateRequest{ID: id})
	if err == nil {
		_, err = client.Delete(ctx, &leases.DeleteRequest{ID: id, Sync: true})
	}
	if err != nil {
		t.Errorf("collect containerd's garbage: %v", err)
	}
}

// Context is one for a single call: whatever takes longer hangs.
func (n *Node) Context(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(30+30*node.Slow())*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// A Pod that a test has started.
type Pod struct {
	ID string

	node       *Node
	config     *cri.PodSandboxConfig
	containers int
}

// A PodOption changes the configuration of a pod before it is run.
type PodOption func(*cri.PodSandboxConfig)

// PodConfig is that of a pod as the kubelet would make it, named after the test.
func (n *Node) PodConfig(t *testing.T, options ...PodOption) *cri.PodSandboxConfig {
	t.Helper()
	name := n.ID(t)
	c := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Namespace: "e2e", Uid: name},
		Hostname:     "pod",
		LogDirectory: t.TempDir(),
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent: "/" + node.PodNamespace,
			SecurityContext: &cri.LinuxSandboxSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER},
				Seccomp:          &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault},
			},
		},
	}
	for _, o := range options {
		o(c)
	}
	return c
}

// Pod runs a pod; the test's end removes it.
func (n *Node) Pod(t *testing.T, options ...PodOption) *Pod {
	t.Helper()
	p, err := n.TryPod(t, n.PodConfig(t, options...))
	if err != nil {
		t.Fatalf("run a pod: %v", err)
	}
	return p
}

// TryPod is Pod for what may fail.
func (n *Node) TryPod(t *testing.T, config *cri.PodSandboxConfig) (*Pod, error) {
	t.Helper()
	r, err := n.CRI.RunPodSandbox(n.Context(t), &cri.RunPodSandboxRequest{Config: config, RuntimeHandler: n.Handler})
	if err != nil {
		return nil, err
	}
	p := &Pod{ID: r.PodSandboxId, node: n, config: config}
	t.Cleanup(func() { p.Remove(t) })
	return p, nil
}

// HostPort maps a port of the pod to one of the host.
func HostPort(protocol cri.Protocol, pod, host int32) PodOption {
	return func(c *cri.PodSandboxConfig) {
		c.PortMappings = append(c.PortMappings, &cri.PortMapping{Protocol: protocol, ContainerPort: pod, HostPort: host})
	}
}

// SharedPIDs is shareProcessNamespace.
func SharedPIDs(c *cri.PodSandboxConfig) {
	c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_POD
}

// PrivilegedPod allows privileged containers in the pod.
func PrivilegedPod(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true }

// Config is what the pod was made of.
func (p *Pod) Config() *cri.PodSandboxConfig { return p.config }

// Status is what CRI says of the pod.
func (p *Pod) Status(t *testing.T) *cri.PodSandboxStatus {
	t.Helper()
	status, err := p.TryStatus(t)
	if err != nil {
		t.Fatalf("status of the pod: %v", err)
	}
	return status
}

// TryStatus is Status, where containerd may not know.
func (p *Pod) TryStatus(t *testing.T) (*cri.PodSandboxStatus, error) {
	t.Helper()
	r, err := p.node.CRI.PodSandboxStatus(p.node.Context(t), &cri.PodSandboxStatusRequest{PodSandboxId: p.ID})
	return r.GetStatus(), err
}

// IPs are the pod's addresses, the IPv4 one first.
func (p *Pod) IPs(t *testing.T) (v4, v6 string) {
	t.Helper()
	network := p.Status(t).Network
	if len(network.GetAdditionalIps()) != 1 {
		t.Fatalf("want two addresses: %v", network)
	}
	return network.Ip, network.AdditionalIps[0].Ip
}

// Stop stops the pod.
func (p *Pod) Stop(t *testing.T) {
	t.Helper()
	if _, err := p.node.CRI.StopPodSandbox(p.node.Context(t), &cri.StopPodSandboxRequest{PodSandboxId: p.ID}); err != nil {
		t.Errorf("stop the pod: %v", err)
	}
}

// Remove stops and removes the pod and all in it. It may be gone.
func (p *Pod) Remove(t *testing.T) {
	t.Helper()
	p.Stop(t)
	if _, err := p.node.CRI.RemovePodSandbox(p.node.Context(t), &cri.RemovePodSandboxRequest{PodSandboxId: p.ID}); err != nil {
		t.Errorf("remove the pod: %v", err)
	}
}

// A Container of a pod.
type Container struct {
	ID  string
	Log string // path of its log file

	pod *Pod
}

// A ContainerOption changes the configuration of a container before it is made.
type ContainerOption func(*cri.ContainerConfig)

// Command is what the container runs.
func Command(args ...string) ContainerOption {
	return func(c *cri.ContainerConfig) { c.Command = args }
}

// Image is the container's, with the command that it has.
func Image(reference string) ContainerOption {
	return func(c *cri.ContainerConfig) {
		c.Image = &cri.ImageSpec{Image: reference}
		c.Command = nil
	}
}

// Shell is a Command of busybox's shell.
func Shell(script string) ContainerOption { return Command("sh", "-c", script) }

// Mount bind-mounts a path of the host; options change its details.
func Mount(host, container string, options ...func(*cri.Mount)) ContainerOption {
	m := &cri.Mount{HostPath: host, ContainerPath: container}
	for _, o := range options {
		o(m)
	}
	return func(c *cri.ContainerConfig) { c.Mounts = append(c.Mounts, m) }
}

// ReadOnly is for Mount.
func ReadOnly(m *cri.Mount) { m.Readonly = true }

// Device gives the container a device of the host, as the kubelet does with a block volume; permissions are of r, w and m.
func Device(host, container, permissions string) ContainerOption {
	return func(c *cri.ContainerConfig) {
		c.Devices = append(c.Devices, &cri.Device{HostPath: host, ContainerPath: container, Permissions: permissions})
	}
}

// Security changes the container's security context.
func Security(change func(*cri.LinuxContainerSecurityContext)) ContainerOption {
	return func(c *cri.ContainerConfig) { change(c.Linux.SecurityContext) }
}

// Privileged makes the container so, in a pod of PrivilegedPod: whatever else its security context has does not apply then.
func Privileged(c *cri.ContainerConfig) {
	c.Linux.SecurityContext = &cri.LinuxContainerSecurityContext{
		NamespaceOptions: c.Linux.SecurityContext.NamespaceOptions, Privileged: true,
	}
}

// Resources are the container's limits.
func Resources(r *cri.LinuxContainerResources) ContainerOption {
	return func(c *cri.ContainerConfig) { c.Linux.Resources = r }
}

// Create makes a container. Unless an option says otherwise it sleeps until it is told to end.
func (p *Pod) Create(t *testing.T, options ...ContainerOption) *Container {
	t.Helper()
	c, err := p.TryCreate(t, options...)
	if err != nil {
		t.Fatalf("create a container: %v", err)
	}
	return c
}

// TryCreate is Create for what may fail.
func (p *Pod) TryCreate(t *testing.T, options ...ContainerOption) (*Container, error) {
	t.Helper()
	p.containers++
	name := fmt.Sprint("c", p.containers)
	config := &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: name},
		Image:    &cri.ImageSpec{Image: node.Box},
		Command:  []string{"sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1000 & wait; done"},
		LogPath:  name + ".log",
		Linux: &cri.LinuxContainerConfig{
			SecurityContext: &cri.LinuxContainerSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{Pid: p.config.Linux.SecurityContext.NamespaceOptions.Pid},
				Seccomp:          &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault},
				MaskedPaths:      []string{"/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"},
				ReadonlyPaths:    []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
			},
		},
	}
	for _, o := range options {
		o(config)
	}
	r, err := p.node.CRI.CreateContainer(p.node.Context(t), &cri.CreateContainerRequest{
		PodSandboxId: p.ID, Config: config, SandboxConfig: p.config,
	})
	if err != nil {
		return nil, err
	}
	return &Container{ID: r.ContainerId, Log: filepath.Join(p.config.LogDirectory, config.LogPath), pod: p}, nil
}

// Run makes a container and starts it.
func (p *Pod) Run(t *testing.T, options ...ContainerOption) *Container {
	t.Helper()
	c := p.Create(t, options...)
	if err := c.TryStart(t); err != nil {
		t.Fatalf("start a container: %v", err)
	}
	return c
}

// TryStart starts a container.
func (c *Container) TryStart(t *testing.T) error {
	t.Helper()
	n := c.pod.node
	_, err := n.CRI.StartContainer(n.Context(t), &cri.StartContainerRequest{ContainerId: c.ID})
	return err
}

// Output runs a container to its end and returns what it has written.
func (p *Pod) Output(t *testing.T, options ...ContainerOption) node.Result {
	t.Helper()
	c := p.Run(t, options...)
	code := c.Wait(t)
	stdout, stderr := c.Output(t)
	c.Remove(t)
	return node.Result{Stdout: stdout, Stderr: stderr, Code: code}
}

// Status is what CRI says of the container.
func (c *Container) Status(t *testing.T) *cri.ContainerStatus {
	t.Helper()
	n := c.pod.node
	r, err := n.CRI.ContainerStatus(n.Context(t), &cri.ContainerStatusRequest{ContainerId: c.ID})
	if err != nil {
		t.Fatalf("status of the container: %v", err)
	}
	return r.Status
}

// Wait waits for the container's end and returns its exit code.
func (c *Container) Wait(t *testing.T) int {
	t.Helper()
	var s *cri.ContainerStatus
	node.Until(t, "the container has ended", func() bool {
		s = c.Status(t)
		return s.State == cri.ContainerState_CONTAINER_EXITED
	})
	return int(s.ExitCode)
}

// Stop stops the container, which has that many seconds to end by itself.
func (c *Container) Stop(t *testing.T, grace int64) {
	t.Helper()
	n := c.pod.node
	if _, err := n.CRI.StopContainer(n.Context(t), &cri.StopContainerRequest{ContainerId: c.ID, Timeout: grace}); err != nil {
		t.Errorf("stop the container: %v", err)
	}
}

// Remove removes the container.
func (c *Container) Remove(t *testing.T) {
	t.Helper()
	n := c.pod.node
	if _, err := n.CRI.RemoveContainer(n.Context(t), &cri.RemoveContainerRequest{ContainerId: c.ID}); err != nil {
		t.Errorf("remove the container: %v", err)
	}
}

// Exec runs a command in the container.
func (c *Container) Exec(t *testing.T, command ...string) node.Result {
	t.Helper()
	n := c.pod.node
	r, err := n.CRI.ExecSync(n.Context(t), &cri.ExecSyncRequest{ContainerId: c.ID, Cmd: command})
	if err != nil {
		t.Fatalf("exec %s: %v", strings.Join(command, " "), err)
	}
	return node.Result{Stdout: string(r.Stdout), Stderr: string(r.Stderr), Code: int(r.ExitCode)}
}

// Shell is Exec for a script.
func (c *Container) Shell(t *testing.T, script string) node.Result {
	t.Helper()
	return c.Exec(t, "sh", "-c", script)
}

// Get runs a script that has to succeed and returns what it wrote, without space around it.
func (c *Container) Get(t *testing.T, script string) string {
	t.Helper()
	r := c.Shell(t, script)
	if r.Code != 0 {
		t.Fatalf("%s: %s", script, r)
	}
	return strings.TrimSpace(r.Stdout)
}

// Listening waits until something in the container's pod listens on a port, on any address.
func (c *Container) Listening(t *testing.T, protocol string, port int) {
	t.Helper()
	node.Until(t, fmt.Sprintf("something listens on port %d", port), func() bool {
		// proc_net(5): state 0A is TCP_LISTEN, and an unconnected UDP socket has 07.
		return c.Shell(t, fmt.Sprintf("grep -q ':%04X .*:0000 0[A7]' /proc/net/%[2]s /proc/net/%[2]s6", port, protocol)).Code == 0
	})
}

// Output reads the container's log.
func (c *Container) Output(t *testing.T) (stdout, stderr string) {
	t.Helper()
	b, err := os.ReadFile(c.Log)
	if err != nil {
		t.Fatal(err)
	}
	var out, errs strings.Builder
	for line := range strings.Lines(string(b)) {
		// "TIME STREAM TAG TEXT", where tag P says that the line goes on: kubernetes/design-proposals kubelet-cri-logging.md.
		f := strings.SplitN(line, " ", 4)
		if len(f) != 4 {
			t.Fatalf("not a line of a CRI log: %q", line)
		}
		if _, err := time.Parse(time.RFC3339Nano, f[0]); err != nil {
			t.Errorf("time in the log: %v", err)
		}
		text := f[3]
		if f[2] == "P" {
			text = strings.TrimSuffix(text, "\n")
		}
		switch f[1] {
		case "stdout":
			out.WriteString(text)
		case "stderr":
			errs.WriteString(text)
		default:
			t.Errorf("stream %q in the log", f[1])
		}
	}
	return out.String(), errs.String()
}
