package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/shim/agentclient"
	"github.com/microvm-runtime/microvm/pkg/shim/config"
	"github.com/microvm-runtime/microvm/pkg/shim/network"
	"github.com/microvm-runtime/microvm/pkg/vmm/control"
)

// sharedTag names the virtio-fs device that carries the shared directory.
const sharedTag = "shared"

// machine is a running virtual machine: *control.VMM, or what stands for it in
// tests.
type machine interface {
	Pid() int
	Dial(ctx context.Context, port uint32) (*net.UnixConn, error)
	Accept(ctx context.Context, port uint32) (*net.UnixConn, error)
	Stop(ctx context.Context) error
	AttachNIC(ctx context.Context, nic control.NIC, taps []*os.File) (pciAddress string, err error)
	AttachDisk(ctx context.Context, disk control.Disk, file *os.File) (pciAddress string, err error)
	Detach(ctx context.Context, pciAddress string) error
	Resize(ctx context.Context, size control.Size) (control.Size, error)
	Stats(ctx context.Context) (control.Stats, error)
	Kill() error
	Done() <-chan struct{}
	Exit() control.Exit
}

// launchRequest is what a machine is made from.
type launchRequest struct {
	name   []string // as in control.Options
	config *config.Config
	size   size
	limit  size // up to where it can grow
	rates  control.RateLimits
	shared *os.File // from tree.Open; stays the caller's
	// id is the VMM's user and group id.
	id uint32
	// devices are the machine's network cards; their files stay the caller's.
	devices []network.Device
	// console and log get what the guest and the VMM write, and are closed.
	console, log *os.File
	// cgroup is as in control.Options.
	cgroup *os.File
}

// launch starts a VMM and boots its machine.
func launch(ctx context.Context, r launchRequest) (_ machine, err error) {
	defer r.console.Close()
	defer r.log.Close()
	kvm, err := openKVM()
	if err != nil {
		return nil, err
	}
	defer kvm.Close()
	kernel, err := openFile("kernel", r.config.Kernel, 0, "\x7fELF", "an uncompressed vmlinux (ELF)")
	if err != nil {
		return nil, err
	}
	defer kernel.Close()
	// The superblock is at 1024 and begins with EROFS_SUPER_MAGIC_V1,
	// include/uapi/linux/magic.h.
	image, err := openFile("image", r.config.Image, 1024, "\xe2\xe1\xf5\xe0", "an EROFS file system")
	if err != nil {
		return nil, err
	}
	defer image.Close()
	if info, err := os.Stat(r.config.VMM); err != nil {
		return nil, fmt.Errorf("vmm program: %w (configuration key vmm)", err)
	} else if info.Mode()&0o111 == 0 || !info.Mode().IsRegular() {
		return nil, fmt.Errorf("vmm program %s is not executable (configuration key vmm)", r.config.VMM)
	}
	var nics []control.NIC
	var taps [][]*os.File
	for _, d := range r.devices {
		nics, taps = append(nics, d.NIC), append(taps, d.Files)
	}
	vmm, err := control.Launch(ctx, control.Options{
		Binary:  r.config.VMM,
		Name:    r.name,
		KVM:     kvm,
		Kernel:  kernel,
		Image:   image,
		Root:    r.shared,
		ID:      r.id,
		Taps:    taps,
		Console: r.console,
		Log:     r.log,
		Cgroup:  r.cgroup,
		Config: control.Config{
			VCPUs:          r.size.vcpus,
			MaxVCPUs:       r.limit.vcpus,
			MemoryBytes:    r.size.memory,
			MaxMemoryBytes: r.limit.memory,
			CommandLine:    r.config.KernelParams,
			SharedTag:      sharedTag,
			NICs:           nics,
			RateLimits:     r.rates,
			ListenPorts:    []uint32{agentclient.ControlPort},
			DebugConsole:   r.config.Debug,
		},
	})
	if err != nil {
		return nil, fmt.Errorf("start VMM: %w", err)
	}
	return vmm, nil
}

func openKVM() (*os.File, error) {
	const device = "/dev/kvm"
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return nil, fmt.Errorf("%w: this host cannot run virtual machines: load the module kvm_intel or kvm_amd, and turn on virtualization in the firmware, or nested virtualization in the hypervisor that this host runs on", err)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%w: containerd needs the right to open it: let it run as root, and where it runs in a container, give that the device", err)
	case err != nil:
		return nil, err
	}
	// KVM_MINOR of include/linux/miscdevice.h, below MISC_MAJOR.
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(10, 232) {
		f.Close()
		return nil, fmt.Errorf("%s is not KVM's device, which is the character device 10:232: make it again by loading the module kvm, or with mknod", device)
	}
	return f, nil
}

// openFile opens a configured file, and looks at its first bytes to tell a
// wrong file from one that a guest fails with.
func openFile(key, path string, offset int64, magic, what string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("guest %s: %w (configuration key %s)", key, err, key)
	}
	start := make([]byte, len(magic))
	_, err = f.ReadAt(start, offset)
	if err != nil && !errors.Is(err, io.EOF) || string(start) != magic {
		f.Close()
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("guest %s: %w (configuration key %s)", key, err, key)
		}
		return nil, fmt.Errorf("guest %s %s is not %s (configuration key %s)", key, path, what, key)
	}
	return f, nil
}

// machineLogs are the pipes of a machine and what was last read from them.
type machineLogs struct {
	console, vmm *lineLog
}

// openLogs makes the pipes for a machine; the files are the ends to write to.
func openLogs(debug bool) (_ *machineLogs, console, vmm *os.File, err error) {
	consoleR, console, err := os.Pipe()
	if err != nil {
		return nil, nil, nil, fmt.Errorf("console pipe: %w", err)
	}
	vmmR, vmm, err := os.Pipe()
	if err != nil {
		consoleR.Close()
		console.Close()
		return nil, nil, nil, fmt.Errorf("log pipe: %w", err)
	}
	l := &machineLogs{
		console: readLines(consoleR, func(line string) {
			if debug {
				log.L.Debugf("guest console: %s", line)
			}
		}),
		vmm: readLines(vmmR, func(line string) { log.L.Infof("vmm: %s", line) }),
	}
	return l, console, vmm, nil
}

// describeLines of the console go into an error: of a panic the first line is
// what matters, and a call trace follows it.
const describeLines = 24

// describe adds to an error what the guest and the VMM said last.
func (l *machineLogs) describe(err error) error {
	var parts []string
	if lines := l.vmm.last(4); len(lines) > 0 {
		parts = append(parts, "the VMM's last words: "+strings.Join(lines, " | "))
	}
	if lines := l.console.last(describeLines); len(lines) > 0 {
		parts = append(parts, "the guest console's last lines: "+strings.Join(lines, " | "))
	} else {
		parts = append(parts, "the guest wrote nothing to its console")
	}
	return fmt.Errorf("%w; %s", err, strings.Join(parts, "; "))
}
