package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/control"
	"github.com/microvm-runtime/microvm/pkg/vmm/jail"
)

// agentPort is the host's vsock port that the agent connects to when it is
// ready, see pkg/agentproto.
const agentPort = 1024

// runByHand boots a machine whose console is standard output, without a shim.
func runByHand(log *slog.Logger, args []string) error {
	flags := flag.NewFlagSet("microvm-vmm run", flag.ExitOnError)
	kernel := flags.String("kernel", "bin/vmlinux", "uncompressed Linux kernel")
	image := flags.String("image", "bin/guest.erofs", "root file system of the guest (EROFS)")
	cpus := flags.Int("cpus", 1, "number of vCPUs")
	memory := flags.Uint64("memory", 512, "memory in MiB")
	share := flags.String("share", "", "directory to share as virtio-fs tag \"shared\"")
	disk := flags.String("disk", "", "file or block device to attach as /dev/vda, read-only")
	tap := flags.String("tap", "", "tap interface, made if need be, to attach as eth0")
	appendix := flags.String("append", "", "kernel parameters to add")
	debug := flags.Bool("debug", false, "serial debug console with all kernel messages")
	jailed := flags.Bool("jail", false, "run in a jail, with filters, as the shim does")
	phases := flags.Bool("phases", false, "print when each phase of the start was reached")
	flags.Parse(args)
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}

	files := map[string]*os.File{control.FileConsole: os.Stdout}
	open := func(role, path string, mode int) error {
		open := unix.Open
		if *jailed && role != fileShared {
			open = lend
		}
		fd, err := open(path, mode|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		files[role] = os.NewFile(uintptr(fd), path)
		return nil
	}
	config := control.Config{
		VCPUs:        *cpus,
		MemoryBytes:  *memory << 20,
		CommandLine:  *appendix,
		DebugConsole: *debug,
		ListenPorts:  []uint32{agentPort},
	}
	err := errors.Join(
		open(control.FileKVM, "/dev/kvm", unix.O_RDWR),
		open(control.FileKernel, *kernel, unix.O_RDONLY),
		open(control.FileImage, *image, unix.O_RDONLY))
	if *share != "" {
		config.SharedTag = "shared"
		err = errors.Join(err, open(fileShared, *share, unix.O_PATH|unix.O_DIRECTORY))
	}
	if *disk != "" {
		config.Disks = []control.Disk{{ReadOnly: true}}
		err = errors.Join(err, open(control.FileDisk(0), *disk, unix.O_RDONLY))
	}
	if *tap != "" {
		config.NICs = []control.NIC{{MAC: "02:00:00:00:00:01", QueuePairs: 1}}
		err = errors.Join(err, open(control.FileTap(0, 0), "/dev/net/tun", unix.O_RDWR), setInterface(files[control.FileTap(0, 0)], *tap))
	}
	if err != nil {
		return err
	}
	if *jailed {
		return runJailed(config, files, *phases)
	}
	log.Warn("the machine is not jailed: a guest that takes over this process has all its rights; --jail changes that")
	begin := time.Now()
	phase := func(name string) {
		if *phases {
			fmt.Fprintf(os.Stderr, "%10.3f ms  %s\n", float64(time.Since(begin).Microseconds())/1000, name)
		}
	}
	var silent []*os.File
	var machine *machine
	machine, err = assemble(config, files, log, hooks{
		phase: phase,
		// The agent finds somebody to connect to, who says nothing.
		accept: func(port uint32) (*os.File, error) {
			ours, theirs, err := control.Socketpair()
			silent = append(silent, theirs)
			phase(fmt.Sprintf("guest connects to port %d", port))
			if stats, err := machine.stats(); err == nil && *phases {
				fmt.Fprintf(os.Stderr, "%13s exits to the VMM so far: %v\n", "", stats.Exits)
			}
			return ours, err
		},
		running: func() {},
	})
	if err != nil {
		return err
	}
	return ended(machine.run())
}

// lend opens a file, which is not written, for a VMM in a jail.
func lend(path string, flags int, _ uint32) (fd int, err error) {
	handle, err := jail.Isolate(path)
	if err != nil {
		return -1, err
	}
	defer unix.Close(handle)
	if fd, err = jail.Reopen(handle, flags); err != nil {
		return -1, err
	}
	if err := jail.Protect(handle); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// byHandID is the user and group id of a VMM that is run by hand in a jail, below
// those that shims use.
const byHandID = 1999999999

// runJailed does what a shim does: it starts this program again.
func runJailed(config control.Config, files map[string]*os.File, phases bool) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	shared := files[fileShared]
	if shared == nil { // then it is empty
		dir, err := os.MkdirTemp("", "microvm")
		if err != nil {
			return err
		}
		defer os.Remove(dir)
		if shared, err = os.Open(dir); err != nil {
			return err
		}
	}
	root, err := jail.Detached(fmt.Sprintf("/proc/self/fd/%d", shared.Fd()))
	if err != nil {
		return err
	}
	begin, options := time.Now(), control.Options{
		Binary: self, ID: byHandID, Root: root, Config: config, Log: os.Stderr,
		KVM: files[control.FileKVM], Kernel: files[control.FileKernel], Image: files[control.FileImage], Console: files[control.FileConsole],
	}
	if disk := files[control.FileDisk(0)]; disk != nil {
		options.Disks = []*os.File{disk}
	}
	if tap := files[control.FileTap(0, 0)]; tap != nil {
		options.Taps = [][]*os.File{{tap}}
	}
	vmm, err := control.Launch(context.Background(), options)
	if err != nil {
		return err
	}
	if phases {
		fmt.Fprintf(os.Stderr, "%10.3f ms  vCPUs run, in process %d\n", float64(time.Since(begin).Microseconds())/1000, vmm.Pid())
	}
	// The agent finds somebody to connect to, who says nothing.
	go func() {
		for {
			if _, err := vmm.Accept(context.Background(), agentPort); err != nil {
				return
			}
		}
	}()
	return ended(vmm.Exit())
}

// ended says how a machine ended, and fails unless it powered itself off.
func ended(exit control.Exit) error {
	fmt.Fprintf(os.Stderr, "machine ended: %s\n", exit)
	if exit.Reason != control.ReasonPowerOff {
		os.Exit(2)
	}
	return nil
}

// setInterface makes /dev/net/tun, opened as file, the tap interface.
func setInterface(file *os.File, name string) error {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return fmt.Errorf("tap %q: %w", name, err)
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(int(file.Fd()), unix.TUNSETIFF, ifr); err != nil {
		return fmt.Errorf("tap %q: %w", name, err)
	}
	return nil
}
