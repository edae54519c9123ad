package agent

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	devices "github.com/opencontainers/cgroups/devices/config"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// pauseCgroup is the cgroup of the process that runs Pause. It is not among the
// containers', whose metrics are the sandbox's.
const pauseCgroup = cgroupMount + "/pause"

// pauseOOMScoreAdj is what the kubelet gives its pause containers
// (pkg/kubelet/qos/policy.go): all processes of the pod would end with it.
const pauseOOMScoreAdj = "-998"

// podInit is the process that runs Pause. There is none until a container needs
// it: most pods share no namespaces but those which are the guest's own.
type podInit struct {
	reaper *Reaper
	log    *slog.Logger

	mu         sync.Mutex
	process    *os.Process // nil while there is none
	uids, gids []specs.LinuxIDMapping
}

// join returns the process's id, which is in a user namespace with these
// mappings, or in the guest's if there are none.
func (p *podInit) join(uids, gids []specs.LinuxIDMapping) (pid int, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.process != nil {
		if !slices.Equal(p.uids, uids) || !slices.Equal(p.gids, gids) {
			return 0, fmt.Errorf("the containers of a sandbox have one user namespace, this one would have another: %w", errdefs.ErrFailedPrecondition)
		}
		return p.process.Pid, nil
	}
	cmd, err := pauseCommand(uids, gids)
	if err != nil {
		return 0, err
	}
	making, err := p.reaper.Begin()
	if err != nil {
		return 0, err
	}
	if err := startPause(cmd); err != nil {
		making.Done(0)
		return 0, fmt.Errorf("make the pod's namespaces: %w", err)
	}
	p.process, p.uids, p.gids = cmd.Process, slices.Clone(uids), slices.Clone(gids)
	making.Done(cmd.Process.Pid)
	go p.wait(cmd)
	return cmd.Process.Pid, nil
}

// pauseCommand is what makes the process, in namespaces of its own.
func pauseCommand(uids, gids []specs.LinuxIDMapping) (*exec.Cmd, error) {
	// Not by /proc/self/exe, which leads to the agent's mount namespace.
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(program)
	cmd.Args = []string{PauseName, pauseBegin}
	cmd.Env = []string{"GOMAXPROCS=1"}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS}
	if len(uids) > 0 {
		// The ipc namespace has to belong to the user namespace, or root in
		// there could not mount its message queues.
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER | unix.CLONE_NEWIPC
		cmd.SysProcAttr.UidMappings, cmd.SysProcAttr.GidMappings = processMappings(uids), processMappings(gids)
		cmd.SysProcAttr.GidMappingsEnableSetgroups = true
		// Root, which libcontainer asks of a user namespace too.
		cmd.SysProcAttr.Credential = new(syscall.Credential)
	}
	return cmd, nil
}

// startPause returns when the process has nothing any more that a container
// could get at.
func startPause(cmd *exec.Cmd) error {
	cgroup, err := makePauseCgroup()
	if err != nil {
		return err
	}
	defer cgroup.Close()
	cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(cgroup.Fd())
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd.Stdout, cmd.Stderr = w, w
	err = cmd.Start()
	w.Close()
	if err != nil {
		return err
	}
	said, err := io.ReadAll(r)
	if err == nil && string(said) != pauseReady {
		err = fmt.Errorf("%s: %q", PauseName, said)
	}
	if err == nil {
		err = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", cmd.Process.Pid), []byte(pauseOOMScoreAdj), 0)
	}
	if err != nil {
		cmd.Process.Kill()
		return errors.Join(err, cmd.Wait())
	}
	return nil
}

// makePauseCgroup makes the cgroup, in which no device may be opened.
func makePauseCgroup() (*os.File, error) {
	if err := os.Mkdir(pauseCgroup, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("make a cgroup: %w", err)
	}
	none := []*devices.Rule{{Type: devices.WildcardDevice, Major: devices.Wildcard, Minor: devices.Wildcard, Permissions: "rwm"}}
	if err := cgroups.DevicesSetV2(pauseCgroup, &cgroups.Resources{Devices: none}); err != nil {
		return nil, fmt.Errorf("deny devices: %w", err)
	}
	return os.Open(pauseCgroup)
}

func (p *podInit) wait(cmd *exec.Cmd) {
	err := cmd.Wait()
	p.reaper.Release(cmd.Process.Pid)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.process == cmd.Process {
		p.process = nil
		p.log.Warn("the first process of the pod's namespaces has ended", "error", err)
	}
}

// kill ends the process, and with it all in its pid namespace.
func (p *podInit) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.process != nil {
		p.process.Kill()
		p.process = nil
	}
}

func processMappings(list []specs.LinuxIDMapping) []syscall.SysProcIDMap {
	var mappings []syscall.SysProcIDMap
	for _, m := range list {
		mappings = append(mappings, syscall.SysProcIDMap{ContainerID: int(m.ContainerID), HostID: int(m.HostID), Size: int(m.Size)})
	}
	return mappings
}

// joinNamespaces adds the namespaces to a specification that its container
// shares with others.
func (a *Agent) joinNamespaces(spec *specs.Spec, pids *agentproto.PIDNamespace) error {
	join := func(kind specs.LinuxNamespaceType, pid int, file string) {
		spec.Linux.Namespaces = append(without(spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == kind }),
			specs.LinuxNamespace{Type: kind, Path: fmt.Sprintf("/proc/%d/ns/%s", pid, file)})
	}
	uids, gids := spec.Linux.UIDMappings, spec.Linux.GIDMappings
	if hasNamespace(spec, specs.UserNamespace) {
		if len(uids) == 0 || len(gids) == 0 {
			return fmt.Errorf("linux: a user namespace has no mappings: %w", errdefs.ErrInvalidArgument)
		}
		pid, err := a.podInit.join(uids, gids)
		if err != nil {
			return err
		}
		join(specs.UserNamespace, pid, "user")
		// libcontainer reads them from the namespace, and wants one or the other.
		spec.Linux.UIDMappings, spec.Linux.GIDMappings = nil, nil
		if !hasNamespace(spec, specs.IPCNamespace) {
			join(specs.IPCNamespace, pid, "ipc")
			a.addIPCSysctls(spec)
		}
		bindSysfs(spec)
	}
	if pids == nil {
		return nil
	}
	if id := pids.GetContainerId(); id != "" {
		c, err := a.container(id)
		if err != nil {
			return err
		}
		if c.init.ended() {
			return fmt.Errorf("container %q, whose processes are to be shared, has ended: %w", id, errdefs.ErrFailedPrecondition)
		}
		join(specs.PIDNamespace, int(c.init.pid.Load()), "pid")
		return nil
	}
	pid, err := a.podInit.join(uids, gids)
	if err != nil {
		return err
	}
	join(specs.PIDNamespace, pid, "pid")
	return nil
}

// addIPCSysctls sets what ConfigureSandbox has set in the guest's ipc namespace
// in the pod's as well.
func (a *Agent) addIPCSysctls(spec *specs.Spec) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for name, value := range a.sysctls {
		if _, own := spec.Linux.Sysctl[name]; !own && sysctlNamespace(name) == specs.IPCNamespace {
			if spec.Linux.Sysctl == nil {
				spec.Linux.Sysctl = make(map[string]string)
			}
			spec.Linux.Sysctl[name] = value
		}
	}
}

// bindSysfs takes the guest's own sysfs instead of a new one. The network is the
// guest's, and who has no right over that may not mount its sysfs
// (fs/sysfs/mount.c, kobj_ns_current_may_mount).
func bindSysfs(spec *specs.Spec) {
	for i := range spec.Mounts {
		m := &spec.Mounts[i]
		if m.Type == "sysfs" {
			m.Type, m.Source = "bind", "/sys"
			m.Options = append([]string{"rbind"}, m.Options...)
		}
	}
}
