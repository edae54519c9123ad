package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Pods through CRI, as a kubelet makes them: microvm beside runc and gVisor.
const (
	box   = "docker.io/microvm/box:latest"
	pause = "docker.io/microvm/pause:latest"
	web   = "docker.io/microvm/web:latest"

	idlePods = 20
	webPort  = 18080 // on the host

	// The bridge's own address, hack/containerd.sh.
	hostAddress = "10.88.0.1"
)

var handlers = []string{"microvm", "runc", "runsc"}

// node is containerd with CRI.
type node struct {
	ctr
	runtime cri.RuntimeServiceClient
	logs    string // directory
	pods    int    // so far, for their names
}

func (b *bench) pods() (failed error) {
	state := filepath.Join(b.state, "p")
	stop, err := b.startContainerd(state, "CRI=podsandbox")
	if err != nil {
		return err
	}
	defer func() { failed = stop(failed) }()
	conn, err := grpc.NewClient("unix://"+filepath.Join(state, "containerd.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	n := &node{
		ctr:     ctr{socket: filepath.Join(state, "containerd.sock"), namespace: "k8s.io"},
		runtime: cri.NewRuntimeServiceClient(conn),
		logs:    filepath.Join(b.state, "logs"),
	}
	if err := n.importImages(pause, box, web, debian); err != nil {
		return err
	}

	var able []string
	for _, h := range handlers {
		if _, err := n.firstOutput(h); err != nil {
			b.missing("pods with %s: %v", h, err)
			continue
		}
		able = append(able, h)
	}
	if b.wants("pod", "start") {
		if err := b.podStarts(n, able); err != nil {
			return err
		}
	}
	for _, part := range []struct {
		name    string
		measure func(*node, string) error
	}{
		{"memory", b.podMemory}, {"network", b.podNetwork}, {"nginx", b.podWeb}, {"files", b.podFiles},
	} {
		if !b.wants("pod", part.name) {
			continue
		}
		for _, h := range able {
			err := part.measure(n, h)
			switch {
			case err != nil && h == "runsc": // has no block volumes, and no raw sockets by default
				b.missing("the rest of the %s of pods with %s: %v", part.name, h, err)
			case err != nil:
				failed = errors.Join(failed, fmt.Errorf("%s of pods with %s: %w", part.name, h, err))
			}
		}
	}
	return failed
}

// podStarts measures the handlers in turn, so that what else the machine does meets
// them alike.
func (b *bench) podStarts(n *node, handlers []string) error {
	starts := map[string][]float64{}
	for range b.runs {
		for _, h := range handlers {
			took, err := n.firstOutput(h)
			if err != nil {
				return fmt.Errorf("%s: %w", h, err)
			}
			starts[h] = append(starts[h], milliseconds(took))
		}
	}
	for _, h := range handlers {
		b.add("pod", "RunPodSandbox to a container's first output", h, "ms", starts[h]...)
	}
	return nil
}

// pod is one that runs.
type pod struct {
	node   *node
	id     string
	config *cri.PodSandboxConfig
}

func (n *node) context() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), commandLimit)
}

// run starts a pod, which remove ends.
func (n *node) run(handler string, ports ...*cri.PortMapping) (*pod, error) {
	n.pods++
	name := fmt.Sprint("bench", n.pods)
	p := &pod{node: n, config: &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Namespace: "bench", Uid: name},
		Hostname:     name,
		LogDirectory: filepath.Join(n.logs, name),
		PortMappings: ports,
		Linux:        &cri.LinuxPodSandboxConfig{CgroupParent: "/bench"},
	}}
	ctx, cancel := n.context()
	defer cancel()
	r, err := n.runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: p.config, RuntimeHandler: handler})
	if err != nil {
		return nil, err
	}
	p.id = r.PodSandboxId
	return p, nil
}

func (p *pod) remove() error {
	ctx, cancel := p.node.context()
	defer cancel()
	if _, err := p.node.runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		return err
	}
	_, err := p.node.runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.id})
	return err
}

func (p *pod) address() (string, error) {
	ctx, cancel := p.node.context()
	defer cancel()
	r, err := p.node.runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: p.id})
	if err != nil {
		return "", err
	}
	return r.Status.GetNetwork().GetIp(), nil
}

// start makes a container and starts it; its id is of use to execute.
func (p *pod) start(image, name string, config *cri.ContainerConfig) (string, error) {
	config.Metadata = &cri.ContainerMetadata{Name: name}
	config.Image = &cri.ImageSpec{Image: image}
	config.LogPath = name
	config.Linux = &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
		NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER},
	}}
	ctx, cancel := p.node.context()
	defer cancel()
	r, err := p.node.runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: p.id, Config: config, SandboxConfig: p.config})
	if err != nil {
		return "", err
	}
	_, err = p.node.runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: r.ContainerId})
	return r.ContainerId, err
}

// execute returns what a command in a container wrote to its stdout.
func (n *node) execute(container string, argv ...string) (string, error) {
	ctx, cancel := n.context()
	defer cancel()
	r, err := n.runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: container, Cmd: argv})
	if err != nil {
		return "", fmt.Errorf("%s: %w", argv[0], err)
	}
	if r.ExitCode != 0 {
		return "", fmt.Errorf("%s: exit code %d: %s%s", argv[0], r.ExitCode, r.Stdout, r.Stderr)
	}
	return string(r.Stdout), nil
}

// firstOutput is how long a pod takes from the request until a line of its
// container is in the log.
func (n *node) firstOutput(handler string) (took time.Duration, err error) {
	begin := time.Now()
	p, err := n.run(handler)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, p.remove()) }()
	if _, err := p.start(box, "c", &cri.ContainerConfig{Command: []string{"echo", "x"}}); err != nil {
		return 0, err
	}
	for log := filepath.Join(p.config.LogDirectory, "c"); time.Since(begin) < startTimeout; time.Sleep(time.Millisecond) {
		if info, err := os.Stat(log); err == nil && info.Size() > 0 {
			return time.Since(begin), nil
		}
	}
	return 0, errors.New("no output")
}

// podMemory measures what an idle pod costs: the memory of all processes that
// came with it, each shared page divided by those who share it, and what the
// kernel has less. It takes a machine that does nothing else.
func (b *bench) podMemory(n *node, handler string) (err error) {
	before, err := processes()
	if err != nil {
		return err
	}
	available, err := memAvailable()
	if err != nil {
		return err
	}
	var pods []*pod
	defer func() {
		for _, p := range pods {
			err = errors.Join(err, p.remove())
		}
	}()
	for len(pods) < idlePods {
		p, err := n.run(handler)
		if err != nil {
			return err
		}
		pods = append(pods, p)
		if _, err := p.start(box, "c", &cri.ContainerConfig{Command: []string{"sleep", "1000000"}}); err != nil {
			return err
		}
		if len(pods) > 1 && len(pods) < idlePods {
			continue
		}
		time.Sleep(settle)
		now, err := processes()
		if err != nil {
			return err
		}
		var pss float64
		for pid := range now {
			if _, old := before[pid]; old {
				continue
			}
			size, err := proportional(pid)
			if errors.Is(err, os.ErrNotExist) {
				continue // gone meanwhile
			}
			if err != nil {
				return err
			}
			pss += size
		}
		left, err := memAvailable()
		if err != nil {
			return err
		}
		of := fmt.Sprintf("idle pod, one of %d: ", len(pods))
		b.add("pod memory", of+"PSS of all its processes", handler, "MiB", pss/float64(len(pods)))
		b.add("pod memory", of+"less of MemAvailable", handler, "MiB", (available-left)/float64(len(pods)))
	}
	return nil
}

// settle is how long a pod gets to become idle: a guest reports its free pages
// a few seconds late.
const settle = 20 * time.Second

// podFiles measures the root file system, an emptyDir on the host's disk, and
// a block volume.
func (b *bench) podFiles(n *node, handler string) (err error) {
	emptyDir := filepath.Join(b.state, "emptyDir")
	if err := os.Mkdir(emptyDir, 0o777); err != nil {
		return err
	}
	defer os.RemoveAll(emptyDir)
	disk, detach, err := loopDisk(filepath.Join(b.state, "disk"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, detach()) }()
	p, err := n.run(handler)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.remove()) }()
	c, err := p.start(debian, "c", &cri.ContainerConfig{
		Command: []string{"sleep", "1000000"},
		Mounts:  []*cri.Mount{{HostPath: emptyDir, ContainerPath: "/emptyDir"}},
		Devices: []*cri.Device{{HostPath: disk, ContainerPath: "/dev/disk", Permissions: "rwm"}},
	})
	if err != nil {
		return err
	}
	for _, volume := range []struct{ name, file string }{
		{"root file system", "/fio"}, {"emptyDir", "/emptyDir/fio"}, {"block volume", "/dev/disk"},
	} {
		err := b.fio("pod: "+volume.name, handler, volume.file, func(argv ...string) (string, error) { return n.execute(c, argv...) })
		if err != nil {
			return fmt.Errorf("%s: %w", volume.name, err)
		}
	}
	return nil
}

// loopDisk makes a block device of a file.
func loopDisk(file string) (device string, detach func() error, err error) {
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return "", nil, err
	}
	if err := os.Truncate(file, 256<<20); err != nil {
		return "", nil, err
	}
	out, err := exec.Command("losetup", "--find", "--show", file).CombinedOutput()
	if err != nil {
		return "", nil, fmt.Errorf("losetup: %w: %s", err, out)
	}
	device = strings.TrimSpace(string(out))
	return device, func() error {
		out, err := exec.Command("losetup", "--detach", device).CombinedOutput()
		if err != nil {
			return fmt.Errorf("losetup: %w: %s", err, out)
		}
		return os.Remove(file)
	}, nil
}

// processes are the programs of those that there are, but for the kernel's.
func processes() (map[int]string, error) {
	exes, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		return nil, err
	}
	programs := map[int]string{}
	for _, link := range exes {
		program, err := os.Readlink(link)
		if err != nil {
			continue // gone, or the kernel's
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(link)))
		if err != nil {
			return nil, err
		}
		programs[pid] = program
	}
	return programs, nil
}

// proportional is the PSS of a process, in MiB. A VMM's has the guest's memory in it.
func proportional(pid int) (float64, error) {
	return kilobytes(fmt.Sprintf("/proc/%d/smaps_rollup", pid), "Pss:")
}

// memAvailable is in MiB.
func memAvailable() (float64, error) { return kilobytes("/proc/meminfo", "MemAvailable:") }

// kilobytes reads a line of the form "key: value kB", in MiB.
func kilobytes(file, key string) (float64, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == key {
			kb, err := strconv.ParseFloat(f[1], 64)
			return kb / 1024, err
		}
	}
	return 0, fmt.Errorf("%s has no line %s", file, key)
}
