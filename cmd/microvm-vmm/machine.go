package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/microvm-runtime/microvm/pkg/vmm"
	"github.com/microvm-runtime/microvm/pkg/vmm/control"
	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/balloon"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/console"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/rng"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/vsock"
)

// phaseRunning is the phase at which the guest has begun.
const phaseRunning = "vcpus-running"

// Roles of files that do not come with the boot request, but from where the
// machine is run.
const (
	fileShared     = "shared"       // O_PATH: the directory to share
	fileProcSelfFD = "proc-self-fd" // /proc/self/fd, if that path cannot be opened
)

// guestCID is the guest's vsock address. Each guest has its own host, so they
// all have the first one that is free for guests.
const guestCID = 3

// machine is a vmm.Machine and the devices that the outside talks to.
type machine struct {
	*vmm.Machine
	vsock    *vsock.Device
	console  *console.Device
	limiters limiters
	log      *slog.Logger

	mu      sync.Mutex
	plugged map[string]plugged // by PCI address; protected by mu
}

// hooks are what a machine tells whoever runs it.
type hooks struct {
	phase func(name string)
	// accept makes the connection for a guest that connects to a host port of
	// Config.ListenPorts, and returns the VMM's end.
	accept func(port uint32) (*os.File, error)
	// running is called when the vCPUs run.
	running func()
	// confined says that the vCPUs' threads get their filter.
	confined bool
}

// assemble makes the machine that config describes from the files that came
// with it. The files belong to the machine from here on.
func assemble(config control.Config, files map[string]*os.File, log *slog.Logger, h hooks) (*machine, error) {
	image := files[control.FileImage]
	if info, err := image.Stat(); err != nil {
		return nil, fmt.Errorf("guest image: %w", err)
	} else if info.Size() == 0 {
		return nil, errors.New("guest image is empty; build it again with: make image")
	}
	limiters, err := newLimiters(config.RateLimits, ratelimit.SystemClock)
	if err != nil {
		return nil, err
	}
	m := &machine{
		limiters: limiters,
		log:      log,
		vsock: vsock.New(vsock.Config{
			GuestCID: guestCID,
			Accept: func(port uint32) (*os.File, error) {
				if !slices.Contains(config.ListenPorts, port) {
					return nil, fmt.Errorf("nobody listens on host port %d", port)
				}
				return h.accept(port)
			},
			Log: log,
		}),
		console: console.New(files[control.FileConsole]),
		plugged: make(map[string]plugged),
	}
	devices := []virtio.Device{
		m.console,
		rng.New(rng.Kernel),
		balloon.New(log),
		m.vsock,
	}
	if config.SharedTag != "" {
		share, err := limiters.newShare(config.SharedTag, files[fileShared], files[fileProcSelfFD], log)
		if err != nil {
			return nil, err
		}
		devices = append(devices, share)
	}
	removable, err := limiters.bootDevices(config, files, log)
	if err != nil {
		return nil, err
	}
	for _, p := range removable {
		devices = append(devices, p.device)
	}

	vc := vmm.Config{
		KVM:            files[control.FileKVM],
		Kernel:         files[control.FileKernel],
		CommandLine:    commandLine(config),
		MemoryBytes:    config.MemoryBytes,
		MaxMemoryBytes: config.MaxMemoryBytes,
		VCPUs:          config.VCPUs,
		MaxVCPUs:       config.MaxVCPUs,
		Pmem:           []vmm.PmemConfig{{File: image, ReadOnly: true}},
		Devices:        devices,
		Log:            log,
		Phase: func(name string) {
			h.phase(name)
			if name == phaseRunning {
				h.running()
			}
		},
	}
	if h.confined {
		if vc.VCPUFilter, err = vcpuFilter(); err != nil {
			return nil, err
		}
	}
	if config.DebugConsole {
		vc.DebugConsole = files[control.FileConsole]
	}
	if m.Machine, err = vmm.New(vc); err != nil {
		return nil, err
	}
	for _, p := range removable {
		m.plugged[m.PCIAddress(p.device)] = p
	}
	// The virtual machine is made, the kernel is read and the image is mapped. To
	// who takes over this process they would be ways to the host's files.
	for _, role := range []string{control.FileKVM, control.FileKernel, control.FileImage} {
		files[role].Close()
	}
	return m, nil
}

func (l limiters) newShare(tag string, root, procSelfFD *os.File, log *slog.Logger) (*fs.Device, error) {
	if root == nil {
		return nil, fmt.Errorf("share %q has no directory", tag)
	}
	share, err := fs.New(fs.Config{Tag: tag, Root: root, ProcSelfFD: procSelfFD, Limit: l.disk, Log: log})
	if err != nil {
		return nil, fmt.Errorf("share %q: %w", tag, err)
	}
	return share, nil
}

// commandLine is what the guest's kernel needs to find its root file system and
// to start fast, then what the caller adds, which may override it.
func commandLine(c control.Config) string {
	parameters := []string{
		"console=hvc0",
		"root=/dev/pmem0", "rootfstype=erofs", "rootflags=dax=always", "ro", "init=/sbin/init",
		// A panic ends the machine at once: pvpanic has told us by then.
		"panic=-1",
		// Warnings and worse only: every line costs exits.
		"quiet",
		"random.trust_cpu=on",
		// There is no firmware, no interrupt controller before the APIC and one
		// PCI bus: nothing to probe for.
		"no_timer_check", "pci=lastbus=0,noearly",
		// A pod has the kernel's first network namespace, and in it the links
		// that its plugins have made: none that drivers make by themselves.
		"dummy.numdummies=0", "fb_tunnels=none",
	}
	if c.MaxVCPUs > c.VCPUs {
		// The others are brought on line by the agent, when they are wanted.
		parameters = append(parameters, fmt.Sprintf("maxcpus=%d", c.VCPUs))
	}
	if c.MaxMemoryBytes > c.MemoryBytes {
		// Plugged memory is put to use at once: as movable, which can always be
		// unplugged, up to three times what the kernel has for itself (that is
		// auto_movable_ratio), and the rest for everything. All of it movable
		// would leave a guest that has grown far without memory for its kernel.
		parameters = append(parameters, "memhp_default_state=online", "memory_hotplug.online_policy=auto-movable")
	}
	if c.DebugConsole {
		parameters = slices.DeleteFunc(parameters, func(p string) bool { return p == "quiet" })
		parameters = append(parameters, "earlyprintk=serial,ttyS0", "loglevel=7")
	}
	if c.CommandLine != "" {
		parameters = append(parameters, c.CommandLine)
	}
	return strings.Join(parameters, " ")
}

// consoleDrain is how long the reader of the console has for the guest's last
// words.
const consoleDrain = time.Second

// run runs the machine to its end.
func (m *machine) run() control.Exit {
	exit, err := m.Run()
	ctx, cancel := context.WithTimeout(context.Background(), consoleDrain)
	defer cancel()
	if err := m.console.Close(ctx); err != nil {
		m.log.Warn("the end of the console's output is lost", "error", err)
	}
	if err != nil {
		return control.Exit{Reason: control.ReasonError, Detail: err.Error()}
	}
	return control.Exit{Reason: exitReasons[exit.Reason], Detail: exit.Detail}
}

// stats adds the vCPUs' counters up, and has those of the NICs.
func (m *machine) stats() (control.Stats, error) {
	vcpus, err := m.VCPUStats()
	if err != nil {
		return control.Stats{}, err
	}
	s := control.Stats{
		Exits: map[string]uint64{}, KVM: map[string]uint64{}, NICs: m.traffic(), Size: m.size(len(vcpus)), Goroutines: runtime.NumGoroutine(),
	}
	for _, v := range vcpus {
		for reason, n := range v.Exits {
			s.Exits[reason] += n
		}
		for name, n := range v.KVM {
			s.KVM[name] += n
		}
	}
	return s, nil
}

// resize asks for a size and says which one there is.
func (m *machine) resize(want control.Size) (control.Size, error) {
	if err := m.StartVCPUs(want.VCPUs); err != nil {
		return control.Size{}, err
	}
	if err := m.ResizeMemory(want.MemoryBytes); err != nil {
		return control.Size{}, err
	}
	vcpus, err := m.VCPUStats()
	if err != nil {
		return control.Size{}, err
	}
	if n := control.MaxProcs(len(vcpus)); n > runtime.GOMAXPROCS(0) {
		runtime.GOMAXPROCS(n)
	}
	return m.size(len(vcpus)), nil
}

func (m *machine) size(vcpus int) control.Size {
	memory, _ := m.MemoryBytes()
	return control.Size{VCPUs: vcpus, MemoryBytes: memory}
}
