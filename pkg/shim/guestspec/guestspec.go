// Package guestspec turns the OCI specification that a container has on the
// host into the one that the agent gets: without what is the host's, and with
// paths of the guest. What a container asks of the host and a virtual machine
// cannot give is refused: running without it would be a surprise.
package guestspec

import (
	"fmt"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Where the guest sees the sandbox's shared directory, and where file systems on
// disks and in memory are mounted.
const (
	SharedRoot  = "/run/microvm/shared"
	StorageRoot = "/run/microvm/storage"
)

// Names in a container's part of the shared directory.
const (
	RootfsName = "rootfs"
	MountsName = "mounts"
)

// Input is a container as containerd hands it over.
type Input struct {
	ID     string
	Bundle string
	// First container of the sandbox, whose ipc and uts namespaces are those
	// of the guest.
	First    bool
	Terminal bool
	// Root is the path of the root file system in the guest, if that is not in
	// the shared directory.
	Root string
	// Pod says that the containers of the sandbox share /dev/shm.
	Pod bool
	// Shm is the host's directory in whose place the guest's /dev/shm is.
	Shm string
	// Tasks are the sandbox's tasks by the process ids that callers know them
	// by: a path in /proc is how they name a namespace. The sandbox itself has
	// the empty id.
	Tasks map[uint32]string
}

// Result is what Rewrite makes of a specification.
type Result struct {
	Spec *specs.Spec
	// Mounts are to be made in the shared directory: the n-th of them at
	// mounts/n.
	Mounts []Mount
	// Memory are to be mounted in the guest.
	Memory []MemoryVolume
	// HostHooks run on the host, by the shim.
	HostHooks specs.Hooks
	// PIDs says whose pid namespace the container joins, by the id that
	// Input.Tasks has; nil for one of its own.
	PIDs *string
	// Disks are the block devices of the host that the container has. The
	// specification names them by the host's numbers.
	Disks []Disk
	// AllDevices says that the container gets all devices of the guest.
	AllDevices bool
	// Shm is what the first container has as the sandbox's /dev/shm.
	Shm Shm
	// Remarks are about what was left out, for the log.
	Remarks []string

	bound []specs.LinuxDevice // block devices that were to be bind mounts
}

// Rewrite changes spec. Errors are about what the specification asks for and
// carry an errdefs kind.
func Rewrite(spec *specs.Spec, in Input) (*Result, error) {
	switch {
	case spec.Process == nil:
		return nil, invalid("the specification has no process")
	case spec.Linux == nil:
		return nil, invalid("the specification has no linux section")
	case spec.Root == nil:
		return nil, invalid("the specification has no root")
	}
	r := &Result{Spec: spec}
	spec.Root = &specs.Root{
		Path:     filepath.Join(SharedRoot, in.ID, RootfsName),
		Readonly: spec.Root.Readonly,
	}
	if in.Root != "" {
		spec.Root.Path = in.Root
	}
	spec.Process.Terminal = in.Terminal
	linux := spec.Linux
	// The agent has a place of its own for it. The path given is where the
	// VMM is put.
	linux.CgroupsPath = ""
	for _, step := range []func(*Result, Input) error{namespaces, mounts, devices, hooks} {
		if err := step(r, in); err != nil {
			return nil, err
		}
	}
	if spec.Hooks == nil {
		// They are for the hooks' state. Clients keep in there what is the
		// host's, paths among it.
		spec.Annotations = nil
	}
	if linux.Resources != nil {
		r.Remarks = append(r.Remarks, Resources(linux.Resources)...)
	}
	if linux.IntelRdt != nil {
		r.Remarks = append(r.Remarks, "intelRdt left out: the classes of cache and memory bandwidth are the host's")
		linux.IntelRdt = nil
	}
	if len(linux.NetDevices) > 0 {
		return nil, unsupported("network devices of the host cannot be moved into a virtual machine (linux.netDevices)")
	}
	if s := linux.Seccomp; s != nil && s.ListenerPath != "" {
		return nil, unsupported("a seccomp agent on the host cannot serve a virtual machine (linux.seccomp.listenerPath)")
	}
	return r, nil
}

// hooks divides them into those of the host's and those of the container.
func hooks(r *Result, in Input) error {
	h := r.Spec.Hooks
	if h == nil {
		return nil
	}
	if len(h.CreateContainer) > 0 {
		return unsupported("container %s has createContainer hooks: these are programs of the host that run in the container's namespaces, which are in a virtual machine", in.ID)
	}
	r.HostHooks = specs.Hooks{
		//lint:ignore SA1019 deprecated, but in use
		Prestart:      h.Prestart,
		CreateRuntime: h.CreateRuntime,
		Poststart:     h.Poststart,
		Poststop:      h.Poststop,
	}
	r.Spec.Hooks = nil
	if len(h.StartContainer) > 0 {
		r.Spec.Hooks = &specs.Hooks{StartContainer: h.StartContainer}
	}
	return nil
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

func unsupported(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrNotImplemented)...)
}
