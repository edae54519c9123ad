//go:build e2e

package cri

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// The states of a pod and its container from start to removal, and that what CRI says of them is true.
func TestPodLifecycle(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t, func(c *cri.PodSandboxConfig) {
		c.Labels = map[string]string{"app": "test"}
		c.Annotations = map[string]string{"example.com/note": "kept"}
	})
	s := p.Status(t)
	if s.State != cri.PodSandboxState_SANDBOX_READY || s.RuntimeHandler != n.Handler || s.CreatedAt == 0 ||
		s.Labels["app"] != "test" || s.Annotations["example.com/note"] != "kept" {
		t.Errorf("status of a new pod: %v", s)
	}
	c := p.Create(t, pods.Shell("sleep 0.2; exit 7"))
	if s := c.Status(t); s.State != cri.ContainerState_CONTAINER_CREATED || s.CreatedAt < p.Status(t).CreatedAt || s.StartedAt != 0 {
		t.Errorf("status of a new container: %v", s)
	}
	if err := c.TryStart(t); err != nil {
		t.Fatal(err)
	}
	if code := c.Wait(t); code != 7 {
		t.Errorf("exit code %d", code)
	}
	if s := c.Status(t); s.StartedAt < s.CreatedAt || s.FinishedAt <= s.StartedAt || s.Reason != "Error" {
		t.Errorf("status of an ended container: %v", s)
	}
	if err := c.TryStart(t); err == nil {
		t.Error("a container that has ended was started again")
	}
	p.Stop(t)
	p.Stop(t) // allowed any number of times
	if s := p.Status(t).State; s != cri.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("state of a stopped pod: %v", s)
	}
	if _, err := p.TryCreate(t); err == nil {
		t.Error("a container was made in a stopped pod")
	}
	p.Remove(t)
	p.Remove(t)
	_, err := n.CRI.PodSandboxStatus(n.Context(t), &cri.PodSandboxStatusRequest{PodSandboxId: p.ID})
	if status.Code(err) != codes.NotFound {
		t.Errorf("status of a removed pod: %v", err)
	}
}

// What a user sees with crictl alone.
func TestCrictl(t *testing.T) {
	n := pods.For(t)
	dir := t.TempDir()
	podFile, containerFile := filepath.Join(dir, "pod.json"), filepath.Join(dir, "container.json")
	write(t, podFile, `{"metadata": {"name": "crictl", "namespace": "e2e", "uid": "crictl"}, "log_directory": "`+dir+`",
		"linux": {"cgroup_parent": "/`+node.PodNamespace+`"}}`)
	write(t, containerFile, `{"metadata": {"name": "main"}, "image": {"image": "`+node.Box+`"}, "log_path": "main.log",
		"command": ["sh", "-c", "echo started; trap 'exit 0' TERM; while :; do sleep 0.1; done"], "linux": {}}`)
	line := func(args ...string) string {
		t.Helper()
		return strings.TrimSpace(n.MustCrictl(t, args...).Stdout)
	}
	pod := line("runp", "--runtime", n.Handler, podFile)
	t.Cleanup(func() { _ = n.CrictlCommand(n.Context(t), "rmp", "-f", pod).Run() })
	container := line("create", pod, containerFile, podFile)
	line("start", container)
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"pods", "-q"}, pod},
		{[]string{"pods", "--state", "ready", "-q"}, pod},
		{[]string{"ps", "-q"}, container},
		{[]string{"inspectp", "-o", "go-template", "--template", "{{.status.state}} {{.status.metadata.name}} {{.status.runtimeHandler}}", pod},
			"SANDBOX_READY crictl " + n.Handler},
		{[]string{"inspect", "-o", "go-template", "--template", "{{.status.state}} {{.status.metadata.name}}", container},
			"CONTAINER_RUNNING main"},
		{[]string{"exec", container, "echo", "hello"}, "hello"},
		{[]string{"exec", "--sync", container, "echo", "hello"}, "hello"},
	} {
		if got := line(c.args...); got != c.want {
			t.Errorf("crictl %s: %q, want %q", strings.Join(c.args, " "), got, c.want)
		}
	}
	node.Until(t, "crictl logs shows the first line", func() bool { return line("logs", container) == "started" })
	line("stats", container)
	line("statsp", pod)
	line("update", "--memory", "100000000", container)
	line("stop", "--timeout", "60", container)
	if got := line("inspect", "-o", "go-template", "--template", "{{.status.state}} {{.status.exitCode}}", container); got != "CONTAINER_EXITED 0" {
		t.Errorf("after stop: %s", got)
	}
	line("rm", container)
	line("stopp", pod)
	line("rmp", pod)
	if got := line("pods", "-q"); got != "" {
		t.Errorf("pods left: %s", got)
	}
}

// crictl inspect and inspectp say what was asked for and what is: mounts, paths, the image, a process that lives.
func TestInspect(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	dir := t.TempDir()
	c := p.Run(t, pods.Mount(dir, "/rw"), pods.Mount(dir, "/ro", pods.ReadOnly), func(c *cri.ContainerConfig) {
		c.Labels = map[string]string{"part": "main"}
	})
	var container struct {
		Status struct {
			LogPath  string
			ImageRef string
			Labels   map[string]string
			Mounts   []struct {
				ContainerPath, HostPath string
				Readonly                bool
			}
		}
		Info struct {
			Pid       int
			SandboxID string
		}
	}
	inspect := func(into any, args ...string) {
		t.Helper()
		out := n.MustCrictl(t, args...).Stdout
		if err := json.Unmarshal([]byte(out), into); err != nil {
			t.Fatalf("crictl %s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
	inspect(&container, "inspect", c.ID)
	if s := container.Status; s.LogPath != c.Log || s.Labels["part"] != "main" || s.ImageRef == "" {
		t.Errorf("status: %+v", s)
	}
	readonly := map[string]bool{}
	for _, m := range container.Status.Mounts {
		if m.HostPath != dir {
			t.Errorf("mount: %+v", m)
		}
		readonly[m.ContainerPath] = m.Readonly
	}
	if len(readonly) != 2 || readonly["/rw"] || !readonly["/ro"] {
		t.Errorf("mounts: %+v", container.Status.Mounts)
	}
	if i := container.Info; i.SandboxID != p.ID || i.Pid <= 1 || unix.Kill(i.Pid, 0) != nil {
		t.Errorf("info: %+v", i)
	}
	var pod struct {
		Status struct {
			RuntimeHandler string
			Network        struct{ IP string }
		}
	}
	inspect(&pod, "inspectp", p.ID)
	if v4, _ := p.IPs(t); pod.Status.RuntimeHandler != n.Handler || pod.Status.Network.IP != v4 {
		t.Errorf("status of the pod: %+v", pod.Status)
	}
}

func TestPodWithoutContainer(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	p.Stop(t)
	p.Remove(t)
}

// Containers that run to their end one after the other, then the one that stays: each sees what those before it wrote.
func TestInitSequence(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	volume := pods.Mount(t.TempDir(), "/work")
	for _, step := range []string{"one", "two", "three"} {
		p.Output(t, volume, pods.Shell("echo "+step+" >>/work/steps")).WantExit(t, 0)
	}
	main := p.Run(t, volume)
	main.Exec(t, "cat", "/work/steps").WantOutput(t, "one\ntwo\nthree\n")
}

// Containers of a pod share its network, its host name and its IPC; each has its own files and processes.
func TestSeveralContainers(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	a, b, c := p.Run(t), p.Run(t), p.Run(t)
	a.Get(t, "echo a >/mine; echo shared >/dev/shm/file; nc -lk -p 9000 -e echo reached >/dev/null 2>&1 &")
	b.Shell(t, "cat /mine").WantExit(t, 1)
	if got := c.Get(t, "cat /dev/shm/file"); got != "shared" {
		t.Errorf("/dev/shm of another container: %q", got)
	}
	node.Until(t, "one container is reached by another over loopback", func() bool {
		return strings.TrimSpace(b.Shell(t, "nc 127.0.0.1 9000 </dev/null").Stdout) == "reached"
	})
	for _, x := range []*pods.Container{a, b, c} {
		if got := x.Get(t, "hostname; ps -o pid,args | grep -c '[t]rap'"); got != "pod\n1" {
			t.Errorf("host name and number of first processes: %q", got)
		}
	}
	b.Stop(t, 10)
	b.Remove(t)
	a.Get(t, "true")
	c.Get(t, "true")
}

// Containers of a pod with a shared process namespace see each other, and the pod's own first process reaps orphans.
func TestSharedProcessNamespace(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t, pods.SharedPIDs)
	a := p.Run(t, pods.Command("sleep", "12345"))
	b := p.Run(t)
	if got := b.Get(t, "pgrep -f '[s]leep 12345' | wc -l"); got != "1" {
		t.Errorf("processes of the other container: %s", got)
	}
	if got := b.Get(t, "readlink /proc/1/exe || echo other"); strings.Contains(got, "busybox") {
		t.Errorf("the first process is the container's own: %s", got)
	}
	b.Get(t, "(sleep 0.1 & exit 0); sleep 0.5; ! ps -o stat | grep -q Z")
	b.Get(t, "kill $(pgrep -f '[s]leep 12345')")
	if code := a.Wait(t); code != 143 {
		t.Errorf("exit code %d of a container that another one ended", code)
	}
}

// An ephemeral container as `kubectl debug --target` makes it sees the processes of one container.
func TestTargetProcessNamespace(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	target := p.Run(t, pods.Command("sleep", "12346"))
	debug := p.Run(t, func(c *cri.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions = &cri.NamespaceOption{Pid: cri.NamespaceMode_TARGET, TargetId: target.ID}
	})
	if got := debug.Get(t, "tr '\\0' ' ' </proc/1/cmdline"); got != "sleep 12346" {
		t.Errorf("the first process seen: %q", got)
	}
}

// A container that ends is followed by its next attempt in the same pod, as the kubelet does it.
func TestContainerRestart(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	ip, _ := p.IPs(t)
	other := p.Run(t)
	attempt := func(i uint32) *pods.Container {
		return p.Run(t, pods.Shell("echo attempt $ATTEMPT; exit 3"), func(c *cri.ContainerConfig) {
			c.Metadata.Name, c.Metadata.Attempt = "main", i
			c.Envs = []*cri.KeyValue{{Key: "ATTEMPT", Value: fmt.Appendf(nil, "%d", i)}}
		})
	}
	first := attempt(0)
	if code := first.Wait(t); code != 3 {
		t.Errorf("exit code %d", code)
	}
	second := attempt(1)
	second.Wait(t)
	for i, c := range []*pods.Container{first, second} {
		if out, _ := c.Output(t); out != fmt.Sprintf("attempt %d\n", i) {
			t.Errorf("log of attempt %d: %q", i, out)
		}
	}
	first.Remove(t)
	if s := second.Status(t); s.Metadata.Attempt != 1 || s.ExitCode != 3 {
		t.Errorf("status of the second attempt: %v", s)
	}
	if now, _ := p.IPs(t); now != ip {
		t.Errorf("the pod's address changed from %s to %s", ip, now)
	}
	other.Get(t, "true")
}

// SIGTERM comes once; who does not end within the grace period is killed.
func TestTerminationGrace(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	graceful := p.Run(t, pods.Shell("trap 'echo TERM; sleep 0.5; exit 5' TERM; echo ready; while :; do sleep 0.1; done"))
	deaf := p.Run(t, pods.Shell("trap 'echo TERM' TERM; echo ready; while :; do sleep 0.1; done"))
	for _, c := range []*pods.Container{graceful, deaf} {
		node.Until(t, "the container is ready", func() bool { out, _ := c.Output(t); return out == "ready\n" })
	}
	graceful.Stop(t, 60)
	deaf.Stop(t, 1)
	for c, code := range map[*pods.Container]int{graceful: 5, deaf: 137} {
		if got := c.Wait(t); got != code {
			t.Errorf("exit code %d, want %d", got, code)
		}
		if out, _ := c.Output(t); out != "ready\nTERM\n" {
			t.Errorf("output %q", out)
		}
	}
	graceful.Stop(t, 0) // a container that has ended may be stopped
}

// The image's or the kubelet's stop signal comes instead of SIGTERM.
func TestStopSignal(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	c := p.Run(t, pods.Shell("trap 'exit 9' USR1; echo ready; while :; do sleep 0.1; done"), func(c *cri.ContainerConfig) {
		c.StopSignal = cri.Signal_SIGNAL_SIGUSR1
	})
	node.Until(t, "the container is ready", func() bool { out, _ := c.Output(t); return out == "ready\n" })
	c.Stop(t, 60)
	if code := c.Wait(t); code != 9 {
		t.Errorf("exit code %d", code)
	}
}

// A container over its memory limit is killed, and CRI says why.
func TestOutOfMemory(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	other := p.Run(t)
	c := p.Run(t, pods.Shell("exec tail /dev/zero"), pods.Resources(&cri.LinuxContainerResources{MemoryLimitInBytes: 32 << 20}))
	if code := c.Wait(t); code != 137 {
		t.Errorf("exit code %d", code)
	}
	node.Until(t, "the reason is OOMKilled", func() bool { return c.Status(t).Reason == "OOMKilled" })
	other.Get(t, "true")
}

// What cannot be started says why, and can be removed.
func TestStartFails(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	for name, c := range map[string]struct {
		options []pods.ContainerOption
		want    string
	}{
		"no such program":   {[]pods.ContainerOption{pods.Command("/no/such/program")}, "/no/such/program"},
		"not a program":     {[]pods.ContainerOption{pods.Command("/etc/passwd")}, "/etc/passwd"},
		"no such directory": {[]pods.ContainerOption{func(c *cri.ContainerConfig) { c.WorkingDir = "/etc/passwd" }}, "/etc/passwd"},
		"no such user": {[]pods.ContainerOption{pods.Security(func(s *cri.LinuxContainerSecurityContext) {
			s.RunAsUsername = "nosuchuser"
		})}, "no users found"},
		"no such volume": {[]pods.ContainerOption{func(c *cri.ContainerConfig) {
			// An image volume whose image is not there.
			c.Mounts = append(c.Mounts, &cri.Mount{ContainerPath: "/v", Image: &cri.ImageSpec{Image: "docker.io/microvm/nosuchimage:latest"}})
		}}, "nosuchimage"},
	} {
		t.Run(name, func(t *testing.T) {
			container, err := p.TryCreate(t, c.options...)
			if err == nil {
				err = container.TryStart(t)
				defer container.Remove(t)
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("want an error about %s: %v", c.want, err)
			}
		})
	}
	p.Run(t).Get(t, "true")
}

func write(t *testing.T, path, contents string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(contents), 0o644); err != nil {
		t.Fatal(err)
	}
}
