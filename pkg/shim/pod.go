package shim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/microvm-runtime/microvm/pkg/shim/guestspec"
	"github.com/microvm-runtime/microvm/pkg/shim/podconfig"
	"github.com/microvm-runtime/microvm/pkg/shim/state"
)

type podState int

const (
	podCreated podState = iota
	podStarting
	podRunning
	podStopped
)

func (s podState) String() string {
	return [...]string{"created", "starting", "running", "stopped"}[s]
}

// pod is a sandbox that was made by the sandbox API.
type pod struct {
	id, bundle, netns string
	files             string // the directory of podFiles; set by writeFiles
	config            *podconfig.PodSandboxConfig
	created           time.Time

	// What follows is guarded by the service's mu. sandbox is set once it runs
	// and stays.
	state   podState
	sandbox *sandbox
	// cancel ends a start, started is closed when that has ended.
	cancel  context.CancelCauseFunc
	started chan struct{}
	// stopping says that the end was asked for.
	stopping bool
	code     uint32
	exited   time.Time
	stopped  chan struct{} // closed when podStopped
}

// newPod reads the options of a sandbox: the pod's configuration if the client
// is the CRI plugin, nothing for others.
func newPod(id, bundle, netns string, options *anypb.Any) (*pod, error) {
	p := &pod{
		id: id, bundle: bundle, netns: netns,
		config:  &podconfig.PodSandboxConfig{},
		created: time.Now(),
		started: make(chan struct{}),
		stopped: make(chan struct{}),
	}
	if len(options.GetTypeUrl()) > 0 {
		if name := path.Base(options.GetTypeUrl()); name != podconfig.TypeName {
			return nil, fmt.Errorf("sandbox %s: options of the type %q are not known: %w", id, name, errdefs.ErrInvalidArgument)
		}
		if err := proto.Unmarshal(options.GetValue(), p.config); err != nil {
			return nil, fmt.Errorf("sandbox %s: options: %w: %w", id, err, errdefs.ErrInvalidArgument)
		}
	}
	namespaces := p.config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	for _, n := range []struct {
		mode podconfig.NamespaceMode
		name string
	}{
		{namespaces.GetNetwork(), "network (hostNetwork)"},
		{namespaces.GetPid(), "pid (hostPID)"},
		{namespaces.GetIpc(), "ipc (hostIPC)"},
	} {
		if n.mode == podconfig.NamespaceMode_NODE {
			return nil, fmt.Errorf("the pod is to share the host's %s namespace: a virtual machine cannot: %w", n.name, errdefs.ErrNotImplemented)
		}
	}
	if err := checkUserNamespace(namespaces.GetUsernsOptions()); err != nil {
		return nil, fmt.Errorf("sandbox %s: %w", id, err)
	}
	return p, nil
}

// checkUserNamespace checks what the CRI plugin does where it makes the sandbox
// (internal/cri/server/podsandbox/sandbox_run_linux.go): the containers get
// their mappings from it.
func checkUserNamespace(o *podconfig.UserNamespace) error {
	if o == nil {
		return nil // the client knows of none
	}
	uids, gids := idMappings(o.GetUids()), idMappings(o.GetGids())
	switch o.GetMode() {
	case podconfig.NamespaceMode_NODE:
		if len(uids)+len(gids) > 0 {
			return fmt.Errorf("ids are mapped for a pod that is to have no user namespace of its own: %w", errdefs.ErrInvalidArgument)
		}
		return nil
	case podconfig.NamespaceMode_POD:
	default:
		return fmt.Errorf("a pod's user namespace cannot be of mode %s: %w", o.GetMode(), errdefs.ErrInvalidArgument)
	}
	if len(uids) > 1 || len(gids) > 1 {
		return fmt.Errorf("a pod's user namespace has one mapping of users and one of groups: %w", errdefs.ErrInvalidArgument)
	}
	return guestspec.CheckIDMappings("the pod", uids, gids)
}

func idMappings(list []*podconfig.IDMapping) []specs.LinuxIDMapping {
	var mappings []specs.LinuxIDMapping
	for _, m := range list {
		mappings = append(mappings, specs.LinuxIDMapping{ContainerID: m.GetContainerId(), HostID: m.GetHostId(), Size: m.GetLength()})
	}
	return mappings
}

func (p *pod) pid() uint32 { return uint32(p.sandbox.vm.Pid()) }

// sandboxConfig is what the pod says about its machine.
func (p *pod) sandboxConfig(namespace string) sandboxConfig {
	linux := p.config.GetLinux()
	metadata := p.config.GetMetadata()
	c := sandboxConfig{
		name:        machineName(joinPodName(metadata.GetNamespace(), metadata.GetName()), namespace, p.id),
		hostname:    p.config.GetHostname(),
		network:     p.netns,
		annotations: p.config.GetAnnotations(),
		// Where the CRI plugin's containers are that have no parent.
		cgroupsPath: path.Join("/", namespace, p.id),
		// As containerd's CRI plugin has it where it makes the sandbox, the
		// sysctls unless it is configured otherwise.
		shm: guestspec.Shm{Bytes: 64 << 20},
		sysctls: map[string]string{
			"net.ipv4.ip_unprivileged_port_start": "0",
			"net.ipv4.ping_group_range":           "0 2147483647",
		},
	}
	for name, value := range linux.GetSysctls() {
		c.sysctls[name] = value
	}
	if parent := linux.GetCgroupParent(); parent != "" {
		c.cgroupsPath = cgroupsPath(parent, p.id)
	}
	if r := linux.GetResources(); r != nil {
		c.limits = limits{quota: r.GetCpuQuota(), period: uint64(max(r.GetCpuPeriod(), 0)), memory: r.GetMemoryLimitInBytes()}
	}
	return c
}

// cgroupsPath names a cgroup below a pod's as the CRI plugin does
// (internal/cri/server/podsandbox/helpers_linux.go): systemd's form for the
// name of a slice.
func cgroupsPath(parent, id string) string {
	if base := path.Base(parent); strings.HasSuffix(base, ".slice") {
		return strings.Join([]string{base, "cri-containerd", id}, ":")
	}
	return path.Join(parent, id)
}

// podFiles are files below /etc that all containers of a pod have. Where the
// shim is the sandboxer, making them is its part.
var podFiles = []string{"hostname", "hosts", "resolv.conf"}

func (p *pod) file(name string) string { return filepath.Join(p.files, "microvm-"+name) }

// writeFiles makes the files, with the bundle, with which they go: where its link
// "work" leads (core/runtime/v2/bundle.go in containerd), which is on disk.
// Containers may write to them without a bound, and the bundle is in the memory
// below /run, which all of the host needs.
func (p *pod) writeFiles() error {
	var err error
	p.files, err = filepath.EvalSymlinks(filepath.Join(p.bundle, "work"))
	if errors.Is(err, fs.ErrNotExist) {
		p.files = p.bundle // of a client that makes none
	} else if err != nil {
		return fmt.Errorf("files of the pod: %w", err)
	}
	hostname := p.config.GetHostname()
	if hostname == "" {
		var err error
		if hostname, err = os.Hostname(); err != nil {
			return fmt.Errorf("host name: %w", err)
		}
	}
	content := map[string][]byte{"hostname": []byte(hostname + "\n")}
	if dns := p.config.GetDnsConfig(); dns != nil {
		content["resolv.conf"] = resolvConf(dns)
	}
	for _, name := range podFiles {
		data, ours := content[name]
		if !ours {
			var err error
			// A host that has none gives none.
			if data, err = os.ReadFile("/etc/" + name); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("the host's %w", err)
			}
		}
		if err := state.WriteFile(p.file(name), data); err != nil {
			return fmt.Errorf("/etc/%s of the pod: %w", name, err)
		}
		// It is for every user of the containers.
		if err := os.Chmod(p.file(name), 0o644); err != nil {
			return fmt.Errorf("/etc/%s of the pod: %w", name, err)
		}
	}
	return nil
}

// resolvConf is resolv.conf(5).
func resolvConf(dns *podconfig.DNSConfig) []byte {
	var lines []string
	if len(dns.GetSearches()) > 0 {
		lines = append(lines, "search "+strings.Join(dns.GetSearches(), " "))
	}
	for _, server := range dns.GetServers() {
		lines = append(lines, "nameserver "+server)
	}
	if len(dns.GetOptions()) > 0 {
		lines = append(lines, "options "+strings.Join(dns.GetOptions(), " "))
	}
	return []byte(strings.Join(append(lines, ""), "\n"))
}

// addMounts gives a container the pod's files, unless it has others there.
func (p *pod) addMounts(spec *specs.Spec) {
	access := "rw"
	if spec.Root != nil && spec.Root.Readonly {
		access = "ro"
	}
	for _, name := range podFiles {
		destination := "/etc/" + name
		if slices.ContainsFunc(spec.Mounts, func(m specs.Mount) bool { return filepath.Clean(m.Destination) == destination }) {
			continue
		}
		m := specs.Mount{
			Destination: destination, Type: "bind", Source: p.file(name),
			Options: []string{"rbind", "rprivate", access},
		}
		if spec.Linux != nil {
			m.UIDMappings, m.GIDMappings = spec.Linux.UIDMappings, spec.Linux.GIDMappings
		}
		spec.Mounts = append(spec.Mounts, m)
	}
}
