package agent

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// PauseName is the name, argv[0], under which the agent's program runs Pause.
// Processes of a pod that shares its pids find it as their first one, where
// they find the pause image's elsewhere.
const PauseName = "/pause"

// Pause is the first process of the namespaces that a pod's containers share:
// it adopts orphans. It does not return, and no signal of the pod's ends it.
func Pause() {
	// SIGCHLD among them: the kernel itself reaps for a parent who ignores it,
	// see wait(2).
	signal.Ignore()
	for {
		unix.Pause()
	}
}

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
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{PauseName}
	cmd.Env = []string{"GOMAXPROCS=1"}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}
	if len(uids) > 0 {
		// The ipc namespace has to belong to the user namespace, or root in
		// there could not mount its message queues.
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER | unix.CLONE_NEWIPC
		cmd.SysProcAttr.UidMappings, cmd.SysProcAttr.GidMappings = processMappings(uids), processMappings(gids)
		cmd.SysProcAttr.GidMappingsEnableSetgroups = true
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uids[0].ContainerID, Gid: gids[0].ContainerID}
	}
	making, err := p.reaper.Begin()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		making.Done(0)
		return 0, fmt.Errorf("make the pod's namespaces: %w", err)
	}
	p.process, p.uids, p.gids = cmd.Process, slices.Clone(uids), slices.Clone(gids)
	making.Done(cmd.Process.Pid)
	go p.wait(cmd)
	return cmd.Process.Pid, nil
}

func (p *podInit) wait(cmd *exec.Cmd) {
	err := cmd.Wait()
	p.reaper.Release(cmd.Process.Pid)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.process = nil
	p.log.Warn("the first process of the pod's namespaces has ended", "error", err)
}

// kill ends the process, and with it all in its pid namespace.
func (p *podInit) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.process != nil {
		p.process.Kill()
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
