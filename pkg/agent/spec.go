package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// parseSpec reads an OCI runtime specification and makes it one of this guest.
// The shim has taken out what is the host's; what is left of it is taken out or
// refused here. It returns the sysctls which are not the container's own but
// of namespaces that it shares with the guest, and remarks on what it left out.
func parseSpec(data []byte, id string) (spec *specs.Spec, sysctls map[string]string, remarks []string, err error) {
	spec = new(specs.Spec)
	if err := json.Unmarshal(data, spec); err != nil {
		return nil, nil, nil, fmt.Errorf("parse the specification: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if err := checkSpec(spec); err != nil {
		return nil, nil, nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	remark := func(format string, args ...any) {
		remarks = append(remarks, fmt.Sprintf(format, args...))
	}

	linux := spec.Linux
	linux.CgroupsPath = cgroupPath(id)
	// The network is the guest's own, of which there is one.
	linux.Namespaces = without(linux.Namespaces, func(n specs.LinuxNamespace) bool {
		return n.Type == specs.NetworkNamespace
	})
	linux.NetDevices = nil
	// A virtual machine has no cache or bandwidth classes of its own.
	linux.IntelRdt = nil
	if !hasNamespace(spec, specs.UTSNamespace) {
		// ConfigureSandbox has set the one, and a sysctl sets the other.
		spec.Hostname, spec.Domainname = "", ""
	}
	linux.Sysctl, sysctls = splitSysctls(spec)

	if linux.MountLabel != "" {
		remark("mount label %q ignored: this kernel has no SELinux", linux.MountLabel)
		linux.MountLabel = ""
	}
	remarks = append(remarks, dropLabels(spec.Process)...)
	if spec.Hooks != nil {
		// Hooks that run outside of the container are programs of the host.
		spec.Hooks = &specs.Hooks{StartContainer: spec.Hooks.StartContainer}
	}
	if linux.Resources != nil {
		remarks = append(remarks, fitResources(linux.Resources, cgroups.HugePageSizes())...)
	}
	return spec, sysctls, remarks, nil
}

// checkSpec refuses what this guest cannot do or libcontainer takes for granted.
func checkSpec(spec *specs.Spec) error {
	if spec.Root == nil || !filepath.IsAbs(spec.Root.Path) {
		return errors.New("root.path is not an absolute path of the guest")
	}
	if err := checkProcess(spec.Process); err != nil {
		return err
	}
	if spec.Linux == nil {
		return errors.New("linux is missing")
	}
	for _, ns := range spec.Linux.Namespaces {
		if ns.Path != "" {
			return fmt.Errorf("namespace %s has the path %q, but the guest has no namespaces to join", ns.Type, ns.Path)
		}
	}
	if !hasNamespace(spec, specs.MountNamespace) {
		return errors.New("a container needs a mount namespace of its own")
	}
	if s := spec.Linux.Seccomp; s != nil && (s.ListenerPath != "" || s.ListenerMetadata != "") {
		return errors.New("seccomp.listenerPath: a seccomp agent on the host cannot serve a guest")
	}
	return nil
}

// parseProcess reads the OCI process object of an exec.
func parseProcess(data []byte) (p *specs.Process, remarks []string, err error) {
	p = new(specs.Process)
	if err := json.Unmarshal(data, p); err != nil {
		return nil, nil, fmt.Errorf("parse the process: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if err := checkProcess(p); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return p, dropLabels(p), nil
}

// checkProcess asks of a process what runc asks of it (validateProcessSpec).
func checkProcess(p *specs.Process) error {
	switch {
	case p == nil:
		return errors.New("process is missing")
	case len(p.Args) == 0:
		return errors.New("process.args is empty")
	case p.Cwd == "":
		return errors.New("process.cwd is empty")
	case !filepath.IsAbs(p.Cwd):
		return errors.New("process.cwd is not an absolute path")
	}
	return nil
}

// dropLabels takes out what belongs to security modules that the guest kernel
// does not have. They protect a host from its containers.
func dropLabels(p *specs.Process) (remarks []string) {
	if p.ApparmorProfile != "" {
		remarks = append(remarks, fmt.Sprintf("AppArmor profile %q ignored: this kernel has no AppArmor", p.ApparmorProfile))
		p.ApparmorProfile = ""
	}
	if p.SelinuxLabel != "" {
		remarks = append(remarks, fmt.Sprintf("SELinux label %q ignored: this kernel has no SELinux", p.SelinuxLabel))
		p.SelinuxLabel = ""
	}
	return remarks
}

// fitResources takes out limits of what the guest does not have.
func fitResources(r *specs.LinuxResources, pageSizes []string) (remarks []string) {
	// net_cls and net_prio are cgroup v1.
	r.Network = nil
	have := make(map[string]bool)
	for _, size := range pageSizes {
		have[size] = true
	}
	r.HugepageLimits = without(r.HugepageLimits, func(l specs.LinuxHugepageLimit) bool {
		if have[l.Pagesize] {
			return false
		}
		// containerd's CRI sets a limit of 0 for all sizes the host has.
		if l.Limit != 0 {
			remarks = append(remarks, fmt.Sprintf("limit of %s pages ignored: the guest has none", l.Pagesize))
		}
		return true
	})
	return remarks
}

// splitSysctls divides the sysctls into those of the container's own namespaces,
// which libcontainer sets in there, and those of the guest. On a node the latter
// would be refused, as they would change the node. Here they change the pod's
// own kernel.
func splitSysctls(spec *specs.Spec) (own, guest map[string]string) {
	own, guest = make(map[string]string), make(map[string]string)
	for name, value := range spec.Linux.Sysctl {
		if ns := sysctlNamespace(name); ns != "" && hasNamespace(spec, ns) {
			own[name] = value
		} else {
			guest[name] = value
		}
	}
	return own, guest
}

// sysctlNamespace returns the namespace that a sysctl belongs to, as far as
// libcontainer knows it (configs/validate), or nothing.
func sysctlNamespace(name string) specs.LinuxNamespaceType {
	name = strings.ReplaceAll(name, "/", ".")
	switch {
	case strings.HasPrefix(name, "fs.mqueue."):
		return specs.IPCNamespace
	case strings.HasPrefix(name, "user."):
		return specs.UserNamespace
	}
	switch name {
	case "kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem",
		"kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced":
		return specs.IPCNamespace
	case "kernel.domainname", "kernel.hostname":
		return specs.UTSNamespace
	}
	return ""
}

func hasNamespace(spec *specs.Spec, t specs.LinuxNamespaceType) bool {
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type == t {
			return true
		}
	}
	return false
}

// without returns the elements which drop does not want dropped.
func without[T any](list []T, drop func(T) bool) []T {
	var kept []T
	for _, e := range list {
		if !drop(e) {
			kept = append(kept, e)
		}
	}
	return kept
}

// libcontainerConfig converts a specification that parseSpec returned.
func libcontainerConfig(spec *specs.Spec, id string) (*configs.Config, error) {
	if _, err := os.Stat(spec.Root.Path); err != nil {
		return nil, fmt.Errorf("root file system: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{CgroupName: id, Spec: spec})
	if err != nil {
		return nil, fmt.Errorf("convert the specification: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return config, nil
}

// libcontainerProcess converts an OCI process. Its streams are not set.
func libcontainerProcess(p *specs.Process) (*libcontainer.Process, error) {
	lp := &libcontainer.Process{
		Args:            p.Args,
		Env:             p.Env,
		UID:             int(p.User.UID),
		GID:             int(p.User.GID),
		Cwd:             p.Cwd,
		NoNewPrivileges: &p.NoNewPrivileges,
		Scheduler:       p.Scheduler,
		IOPriority:      p.IOPriority,
	}
	if p.ConsoleSize != nil {
		lp.ConsoleWidth, lp.ConsoleHeight = clampSize(p.ConsoleSize.Width), clampSize(p.ConsoleSize.Height)
	}
	if c := p.Capabilities; c != nil {
		lp.Capabilities = &configs.Capabilities{
			Bounding:    c.Bounding,
			Effective:   c.Effective,
			Inheritable: c.Inheritable,
			Permitted:   c.Permitted,
			Ambient:     c.Ambient,
		}
	}
	for _, gid := range p.User.AdditionalGids {
		lp.AdditionalGroups = append(lp.AdditionalGroups, int(gid))
	}
	for _, l := range p.Rlimits {
		t, ok := rlimitTypes[l.Type]
		if !ok {
			return nil, fmt.Errorf("process.rlimits: unknown type %q: %w", l.Type, errdefs.ErrInvalidArgument)
		}
		lp.Rlimits = append(lp.Rlimits, configs.Rlimit{Type: t, Hard: l.Hard, Soft: l.Soft})
	}
	affinity, err := configs.ConvertCPUAffinity(p.ExecCPUAffinity)
	if err != nil {
		return nil, fmt.Errorf("process.execCPUAffinity: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	lp.CPUAffinity = affinity
	return lp, nil
}

// clampSize fits a terminal's width or height into what the kernel has for it.
func clampSize(n uint) uint16 {
	return uint16(min(n, 0xffff))
}

var rlimitTypes = map[string]int{
	"RLIMIT_AS":         unix.RLIMIT_AS,
	"RLIMIT_CORE":       unix.RLIMIT_CORE,
	"RLIMIT_CPU":        unix.RLIMIT_CPU,
	"RLIMIT_DATA":       unix.RLIMIT_DATA,
	"RLIMIT_FSIZE":      unix.RLIMIT_FSIZE,
	"RLIMIT_LOCKS":      unix.RLIMIT_LOCKS,
	"RLIMIT_MEMLOCK":    unix.RLIMIT_MEMLOCK,
	"RLIMIT_MSGQUEUE":   unix.RLIMIT_MSGQUEUE,
	"RLIMIT_NICE":       unix.RLIMIT_NICE,
	"RLIMIT_NOFILE":     unix.RLIMIT_NOFILE,
	"RLIMIT_NPROC":      unix.RLIMIT_NPROC,
	"RLIMIT_RSS":        unix.RLIMIT_RSS,
	"RLIMIT_RTPRIO":     unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME":     unix.RLIMIT_RTTIME,
	"RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING,
	"RLIMIT_STACK":      unix.RLIMIT_STACK,
}
