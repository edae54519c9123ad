package guestspec

import (
	"path/filepath"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Annotations of containerd's CRI plugin
// (internal/cri/annotations/annotations.go).
const (
	containerType        = "io.kubernetes.cri.container-type"
	containerTypeSandbox = "sandbox"
)

// IsSandbox says whether a specification is that of a pod's sandbox: a
// container that does nothing but to keep what the pod's containers share.
func IsSandbox(spec *specs.Spec) bool {
	return spec.Annotations[containerType] == containerTypeSandbox
}

// Shm is a pod's /dev/shm on the host.
type Shm struct {
	// Path is empty when there is none.
	Path  string
	Bytes uint64
}

// Sandbox is what the specification of a pod's sandbox says about the guest.
type Sandbox struct {
	Sysctls map[string]string
	Shm     Shm
	// HostHooks run on the host, by the shim.
	HostHooks specs.Hooks
}

// ReadSandbox reads the specification of a pod's sandbox. Errors are as those
// of Rewrite.
func ReadSandbox(spec *specs.Spec) (*Sandbox, error) {
	if spec.Linux == nil {
		return nil, invalid("the specification has no linux section")
	}
	if err := checkNamespaces("the pod", spec.Linux.Namespaces); err != nil {
		return nil, err
	}
	if hasNamespace(spec.Linux.Namespaces, specs.UserNamespace) {
		if err := CheckIDMappings("the pod", spec.Linux.UIDMappings, spec.Linux.GIDMappings); err != nil {
			return nil, err
		}
	}
	r := &Result{Spec: spec}
	if err := hooks(r, Input{ID: "of the pod"}); err != nil {
		return nil, err
	}
	sysctls, err := withDomainname(spec)
	if err != nil {
		return nil, err
	}
	s := &Sandbox{Sysctls: sysctls, HostHooks: r.HostHooks}
	for _, m := range spec.Mounts {
		if m.Destination == shmPath && isBind(&m) {
			s.Shm = shmAt(m.Source)
		}
	}
	return s, nil
}

const shmPath = "/dev/shm"

// shmAt describes a memory file system of the host's; it is empty for a
// directory of another one.
func shmAt(path string) Shm {
	target, err := filepath.EvalSymlinks(path)
	if err != nil {
		return Shm{}
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(target, &fs); err != nil || fs.Type != unix.TMPFS_MAGIC {
		return Shm{}
	}
	return Shm{Path: target, Bytes: fs.Blocks * uint64(fs.Bsize)}
}
