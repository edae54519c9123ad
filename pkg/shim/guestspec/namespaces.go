package guestspec

import (
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// namespacePath is how a caller names a namespace of a task's.
var namespacePath = regexp.MustCompile(`^/proc/([0-9]{1,10})/ns/[a-z_]+$`)

// taskOf returns the task that a path is about. named is false for a path that
// is not of a process, as of a namespace that a caller keeps by a mount.
func (in Input) taskOf(path string) (id string, known, named bool) {
	match := namespacePath.FindStringSubmatch(path)
	if match == nil {
		return "", false, false
	}
	pid, err := strconv.ParseUint(match[1], 10, 32)
	if err != nil {
		return "", false, true
	}
	id, known = in.Tasks[uint32(pid)]
	return id, known, true
}

// namespaces: a namespace with a path is one that the container shares with
// its sandbox, and most of these are the guest's own. One that is missing would
// be shared with the host.
func namespaces(r *Result, in Input) error {
	spec := r.Spec
	var kept []specs.LinuxNamespace
	for _, ns := range spec.Linux.Namespaces {
		id, known, named := in.taskOf(ns.Path)
		stranger := unsupported("container %s is to join the %s namespace %s, which is not of its sandbox: containers of a virtual machine cannot",
			in.ID, ns.Type, ns.Path)
		switch ns.Type {
		case specs.NetworkNamespace:
			continue // the guest has one
		case specs.IPCNamespace, specs.UTSNamespace:
			if named && !known {
				return stranger
			}
			if ns.Path != "" || in.First {
				continue
			}
		case specs.PIDNamespace:
			if ns.Path != "" {
				if !known {
					return stranger
				}
				r.PIDs = &id
				continue
			}
		case specs.UserNamespace:
			// The sandbox has one with these mappings, which its containers
			// share.
			if err := CheckIDMappings("container "+in.ID, spec.Linux.UIDMappings, spec.Linux.GIDMappings); err != nil {
				return err
			}
			ns.Path = ""
		default:
			if ns.Path != "" {
				return stranger
			}
		}
		kept = append(kept, ns)
	}
	if err := checkNamespaces("container "+in.ID, spec.Linux.Namespaces); err != nil {
		return err
	}
	// On a host with cgroup version 1 callers ask for none, but show the
	// container its own cgroup. The guest has version 2.
	if !hasNamespace(kept, specs.CgroupNamespace) && !allDevicesAllowed(spec.Linux.Resources) {
		kept = append(kept, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	spec.Linux.Namespaces = kept
	if !hasNamespace(kept, specs.UTSNamespace) {
		sysctls, err := withDomainname(spec)
		if err != nil {
			return err
		}
		spec.Linux.Sysctl = sysctls
		spec.Hostname, spec.Domainname = "", ""
	}
	return nil
}

// withDomainname returns the sysctls of a specification and one for its domain
// name, for a container in the guest's uts namespace. As with runc, whoever
// shares a namespace sets the name for all in there, and a sysctl that is given
// counts more.
func withDomainname(spec *specs.Spec) (map[string]string, error) {
	const key = "kernel.domainname"
	sysctls := maps.Clone(spec.Linux.Sysctl)
	_, given := sysctls[key]
	if !given {
		_, given = sysctls["kernel/domainname"]
	}
	if spec.Domainname == "" || given {
		return sysctls, nil
	}
	// The kernel would cut it off (kernel/utsname_sysctl.c, proc_dostring).
	if len(spec.Domainname) > maxDomainname || strings.ContainsAny(spec.Domainname, "\n\x00") {
		return nil, invalid("domain name %q: it can have %d bytes, of one line", spec.Domainname, maxDomainname)
	}
	if sysctls == nil {
		sysctls = make(map[string]string)
	}
	sysctls[key] = spec.Domainname
	return sysctls, nil
}

// maxDomainname is __NEW_UTS_LEN of Linux.
const maxDomainname = 64

// checkNamespaces refuses to share what is the host's.
func checkNamespaces(who string, list []specs.LinuxNamespace) error {
	for _, needed := range []struct {
		kind specs.LinuxNamespaceType
		name string
	}{
		{specs.NetworkNamespace, "network (--net-host, hostNetwork)"},
		{specs.PIDNamespace, "pid (hostPID)"},
		{specs.IPCNamespace, "ipc (hostIPC)"},
		{specs.UTSNamespace, "uts"},
		{specs.MountNamespace, "mount"},
	} {
		if !hasNamespace(list, needed.kind) {
			return unsupported("%s is to share the host's %s namespace: a virtual machine cannot", who, needed.name)
		}
	}
	return nil
}

// CheckIDMappings refuses what a user namespace cannot be made with: who sets up
// the container is root in there.
func CheckIDMappings(who string, uids, gids []specs.LinuxIDMapping) error {
	for _, ids := range []struct {
		kind     string
		mappings []specs.LinuxIDMapping
	}{{"user", uids}, {"group", gids}} {
		if len(ids.mappings) == 0 {
			return invalid("%s is to have a user namespace, but there is nothing about how %s ids are mapped", who, ids.kind)
		}
		if !slices.ContainsFunc(ids.mappings, func(m specs.LinuxIDMapping) bool { return m.ContainerID == 0 && m.Size > 0 }) {
			return invalid("%s is to have a user namespace whose %s id 0 is mapped to none", who, ids.kind)
		}
	}
	return nil
}

func hasNamespace(list []specs.LinuxNamespace, kind specs.LinuxNamespaceType) bool {
	return slices.ContainsFunc(list, func(ns specs.LinuxNamespace) bool { return ns.Type == kind })
}
