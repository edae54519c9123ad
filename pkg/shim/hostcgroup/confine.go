package hostcgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// machine is the cgroup of the VMM, below its sandbox's. It is of version 2 and has
// no controllers, so that the sandbox's limits go for both as they are.
const machine = "microvm-vmm"

// ErrNoDeviceControl is that this host cannot keep a process from opening devices.
var ErrNoDeviceControl = errors.New("device control of cgroup v2 (CONFIG_CGROUP_BPF)")

// Confine makes a cgroup below the sandbox's for a process that is to open no
// device, and returns its directory, for the process to be started in
// (CLONE_INTO_CGROUP). The caller closes it. The cgroup is one of those of Owned.
//
// Its program stays as long as it does. Version 2 is enough, also where the
// controllers are version 1's: device programs are none of them.
func (g *Group) Confine() (_ *os.File, err error) {
	if g.unified == "" {
		return nil, fmt.Errorf("%w: cgroup v2 is not mounted", ErrNoDeviceControl)
	}
	path := filepath.Join(g.unified, g.path, machine)
	defer func() {
		if err != nil {
			err = fmt.Errorf("cgroup %s: %w", path, err)
		}
	}()
	if err := makeAll(steps(g.unified, filepath.Join(g.path, machine))); errors.Is(err, unix.EROFS) {
		return nil, fmt.Errorf("%w: %w", ErrNoDeviceControl, err)
	} else if err != nil {
		return nil, err
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if err := denyDevices(dir); err != nil {
		dir.Close()
		if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL) {
			return nil, fmt.Errorf("%w: %w", ErrNoDeviceControl, err)
		}
		return nil, err
	}
	return dir, nil
}

// denyDevices has the kernel ask a program about each device that a process of the
// cgroup opens or makes a node of.
func denyDevices(cgroup *os.File) error {
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name:         "microvm_devices",
		Type:         ebpf.CGroupDevice,
		AttachType:   ebpf.AttachCGroupDevice,
		License:      "Apache-2.0", // it has no helpers
		Instructions: deviceProgram(),
	})
	if err != nil {
		return fmt.Errorf("device program: %w", err)
	}
	defer program.Close()
	err = link.RawAttachProgram(link.RawAttachProgramOptions{
		Target:  int(cgroup.Fd()),
		Program: program,
		Attach:  ebpf.AttachCGroupDevice,
		// Once more replaces it, where sandboxes share a cgroup. Those above with
		// BPF_F_ALLOW_MULTI, as systemd's and runc's, are asked as well.
		Flags: unix.BPF_F_ALLOW_OVERRIDE,
	})
	if err != nil {
		return fmt.Errorf("attach device program: %w", err)
	}
	return nil
}

// deviceProgram allows to make a device node, as the file server does for a guest
// that unpacks an image, and neither to read nor to write a device. The context is
// struct bpf_cgroup_dev_ctx of include/uapi/linux/bpf.h.
func deviceProgram() asm.Instructions {
	const (
		fieldAccessType = 0 // the access in the upper half, the type in the lower
		accessShift     = 16
		readOrWrite     = 2 | 4 // BPF_DEVCG_ACC_READ, BPF_DEVCG_ACC_WRITE
	)
	return asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, fieldAccessType, asm.Word),
		asm.RSh.Imm(asm.R2, accessShift),
		asm.And.Imm(asm.R2, readOrWrite),
		asm.Mov.Imm(asm.R0, 0), // EPERM
		asm.JNE.Imm(asm.R2, 0, "deny"),
		asm.Mov.Imm(asm.R0, 1),
		asm.Return().WithSymbol("deny"),
	}
}
