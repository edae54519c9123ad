package shim

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
	"github.com/microvm-runtime/microvm/pkg/shim/guestspec"
	"github.com/microvm-runtime/microvm/pkg/shim/share"
)

// maxSpec bounds a specification: it goes to the agent in one message, of at
// most 4 MiB.
const maxSpec = 3 << 20

// plan is what a container is made from.
type plan struct {
	// pause says that it is the sandbox itself, and not in the guest.
	pause bool
	// request is the agent's, but for the streams; with rootfs and mounts it is
	// for a container in the guest.
	request *agentproto.CreateContainerRequest
	rootfs  share.Rootfs
	limits  limits
	mounts  []guestspec.Mount
	// disks are the container's devices, storages its root file system where
	// the guest mounts that.
	disks    []guestspec.Disk
	storages []storage
	// abandoned says that the guest may make the container after all.
	abandoned bool

	hooks       specs.Hooks
	version     string
	annotations map[string]string
	remarks     []string
	// sandbox is for the first container, which brings the machine.
	sandbox sandboxConfig
}

// plan reads a container's specification. The caller holds slot.
func (s *service) plan(r *taskapi.CreateTaskRequest, first bool) (*plan, error) {
	pod := s.currentPod()
	if pod != nil && first {
		return nil, fmt.Errorf("container %s: sandbox %s does not run: %w", r.GetID(), pod.id, errdefs.ErrFailedPrecondition)
	}
	spec, err := readSpec(r.GetBundle())
	if err != nil {
		return nil, err
	}
	p := &plan{
		version:     spec.Version,
		annotations: spec.Annotations,
		limits:      containerLimits(spec),
		sandbox: sandboxConfig{
			name:   machineName(podName(spec.Annotations), s.namespace, r.GetID()),
			limits: limitsOf(spec), hostname: spec.Hostname, network: networkNamespace(spec), annotations: spec.Annotations, onOOM: s.oom,
			cgroupsPath: "/" + r.GetID(), // as runc's, if the specification names none
		},
	}
	if spec.Linux != nil && spec.Linux.CgroupsPath != "" {
		p.sandbox.cgroupsPath = spec.Linux.CgroupsPath
	}
	if guestspec.IsSandbox(spec) {
		return p, s.planPause(p, r.GetID(), spec, first)
	}
	p.rootfs = rootfsOf(r, spec)
	in := guestspec.Input{
		ID: r.GetID(), Bundle: r.GetBundle(), First: first, Terminal: r.GetTerminal(), Tasks: s.tasks(),
	}
	inGuest, err := planGuestRootfs(r.GetID(), p.rootfs.Mounts)
	if err != nil {
		return nil, err
	}
	if inGuest != nil {
		p.rootfs = share.Rootfs{InGuest: true}
		p.storages, in.Root = inGuest.storages, inGuest.path
	}
	// The first container's mounts were there when this process got its mount
	// namespace.
	onHost := func(f func() error) error { return f() }
	if !first {
		in.Shm = s.sandbox.shm
		onHost = s.sandbox.tree.OnHost
	}
	if pod != nil {
		in.Pod = true
		pod.addMounts(spec)
	}
	var rewritten *guestspec.Result
	if err := onHost(func() (err error) {
		rewritten, err = guestspec.Rewrite(spec, in)
		return err
	}); err != nil {
		return nil, err
	}
	data, err := json.Marshal(rewritten.Spec)
	if err != nil {
		return nil, fmt.Errorf("container %s: specification: %w", r.GetID(), err)
	}
	p.request = &agentproto.CreateContainerRequest{Id: r.GetID(), Spec: data, AllDevices: rewritten.AllDevices}
	if rewritten.PIDs != nil {
		p.request.PidNamespace = &agentproto.PIDNamespace{ContainerId: *rewritten.PIDs}
	}
	for _, v := range rewritten.Memory {
		p.request.Storages = append(p.request.Storages, memoryStorage(v))
	}
	p.disks = rewritten.Disks
	p.mounts, p.hooks, p.remarks = rewritten.Mounts, rewritten.HostHooks, rewritten.Remarks
	p.sandbox.shm = rewritten.Shm
	return p, nil
}

// planPause is for the container that is a pod's sandbox.
func (s *service) planPause(p *plan, id string, spec *specs.Spec, first bool) error {
	if !first {
		return fmt.Errorf("container %s is a pod's sandbox, but this one runs already: %w", id, errdefs.ErrAlreadyExists)
	}
	sandbox, err := guestspec.ReadSandbox(spec)
	if err != nil {
		return err
	}
	p.pause = true
	p.hooks = sandbox.HostHooks
	p.sandbox.sysctls, p.sandbox.shm = sandbox.Sysctls, sandbox.Shm
	return nil
}

// tasks are the sandbox's tasks by process id, for guestspec.
func (s *service) tasks() map[uint32]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	tasks := map[uint32]string{}
	for id, c := range s.containers {
		if c.isPause() {
			id = ""
		}
		tasks[c.pid] = id
	}
	if s.pod.runs() {
		tasks[s.pod.pid()] = ""
	}
	return tasks
}

// readSpec reads a bundle's specification.
func readSpec(bundle string) (*specs.Spec, error) {
	var spec specs.Spec
	if err := readConfig(bundle, &spec); err != nil {
		return nil, err
	}
	return &spec, nil
}

// readConfig reads what v names of a bundle's config.json.
func readConfig(bundle string, v any) error {
	f, err := os.Open(filepath.Join(bundle, "config.json"))
	if err != nil {
		return fmt.Errorf("bundle: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxSpec+1))
	if err != nil {
		return fmt.Errorf("bundle: %w", err)
	}
	if len(data) > maxSpec {
		return fmt.Errorf("bundle: %s has more than %d bytes: %w", f.Name(), maxSpec, errdefs.ErrInvalidArgument)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("bundle: %s: %w: %w", f.Name(), err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// rootfsOf says where the root file system is: in the mounts of the request
// or, where a caller has mounted it, at the path that the specification names.
func rootfsOf(r *taskapi.CreateTaskRequest, spec *specs.Spec) share.Rootfs {
	if len(r.GetRootfs()) > 0 {
		return share.Rootfs{Mounts: mount.FromProto(r.GetRootfs())}
	}
	path := "rootfs"
	if spec.Root != nil {
		path = spec.Root.Path
	}
	if !filepath.IsAbs(path) {
		path = filepath.Join(r.GetBundle(), path)
	}
	return share.Rootfs{Path: path}
}
