package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
	"github.com/microvm-runtime/microvm/pkg/vmm/control"
	"github.com/microvm-runtime/microvm/pkg/vmm/jail"
)

// One machine of each kind: a vCPU and 512 MiB, our kernel and guest image,
// from the start of the process until the agent answers.
const (
	machineMemory = 512 << 20
	agentPort     = 1024
	startTimeout  = 2 * time.Minute
)

// start is what one start of a machine took.
type start struct {
	phases []phase
	// KVM's own counters when /sbin/init ran, and when the agent answered.
	initExits, exits map[string]float64
	memory           processMemory // of the VMM
	guest            *agentproto.InfoResponse
}

// phase is a step and when it was reached, since the start of the process.
type phase struct {
	name string
	at   time.Duration
}

func (b *bench) machines() error {
	if out, err := exec.Command("mount", "-t", "debugfs", "none", "/sys/kernel/debug").CombinedOutput(); err != nil {
		if _, err := os.Stat("/sys/kernel/debug/kvm"); err != nil {
			b.missing("VM exits: debugfs: %s", strings.TrimSpace(string(out)))
		}
	}
	subjects := map[string]func() (*start, error){"microvm": b.startOurs}
	order := []string{"microvm"}
	if err := b.qemuReady(); err != nil {
		b.missing("QEMU microvm: %v", err)
	} else {
		subjects["qemu-microvm"] = b.startQEMU
		order = append(order, "qemu-microvm")
	}
	// Alternate, so that what else the machine does falls on both.
	starts := map[string][]*start{}
	for range b.runs {
		for _, subject := range order {
			s, err := subjects[subject]()
			if err != nil {
				return fmt.Errorf("%s: %w", subject, err)
			}
			starts[subject] = append(starts[subject], s)
		}
	}
	for _, subject := range order {
		b.addStarts(subject, starts[subject])
	}
	return nil
}

func (b *bench) addStarts(subject string, starts []*start) {
	for i, p := range starts[0].phases {
		b.add("start", "to "+p.name, subject, "ms", collect(starts, func(s *start) float64 {
			return float64(s.phases[i].at.Microseconds()) / 1000
		})...)
	}
	for _, name := range slices.Sorted(maps.Keys(starts[0].exits)) {
		b.add("exits to /sbin/init", name, subject, "", collect(starts, func(s *start) float64 { return s.initExits[name] })...)
		b.add("exits from there to agent ready", name, subject, "", collect(starts, func(s *start) float64 { return s.exits[name] - s.initExits[name] })...)
	}
	b.addMemory("VMM", subject, collect(starts, func(s *start) processMemory { return s.memory })...)
	b.add("memory", "guest memory missing from MemTotal", subject, "MiB", collect(starts, func(s *start) float64 {
		return float64(machineMemory-s.guest.MemoryTotalBytes) / (1 << 20)
	})...)
}

func collect[T any](starts []*start, f func(*start) T) []T {
	samples := make([]T, len(starts))
	for i, s := range starts {
		samples[i] = f(s)
	}
	return samples
}

func (b *bench) bin(name string) string { return filepath.Join(b.top, "bin", name) }

// vmmID is the user id of the VMMs, which run one after another.
const vmmID = 1999999997

func (b *bench) startOurs() (*start, error) {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	options := control.Options{
		Binary: b.bin("microvm-vmm"),
		Config: control.Config{VCPUs: 1, MemoryBytes: machineMemory, ListenPorts: []uint32{agentPort}},
	}
	for path, file := range map[string]**os.File{
		"/dev/kvm": &options.KVM, b.bin("vmlinux"): &options.Kernel, b.bin("guest.erofs"): &options.Image,
	} {
		flag := os.O_RDONLY
		if path == "/dev/kvm" {
			flag = os.O_RDWR
		}
		f, err := os.OpenFile(path, flag, 0)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		*file = f
	}
	console, err := os.Create(filepath.Join(b.state, "console"))
	if err != nil {
		return nil, err
	}
	defer console.Close()
	options.Console, options.Log = console, console

	options.ID = vmmID
	if options.Root, err = jail.Detached(b.state); err != nil {
		return nil, err
	}
	defer options.Root.Close()

	begin, beginMonotonic := time.Now(), monotonic()
	v, err := control.Launch(ctx, options)
	if err != nil {
		return nil, err
	}
	defer func() { v.Kill(); <-v.Done() }()
	conn, err := v.Accept(ctx, agentPort)
	if err != nil {
		return nil, err
	}
	s := &start{}
	for _, p := range v.Phases() {
		s.phases = append(s.phases, phase{p.Name, time.Duration(p.Monotonic - beginMonotonic)})
	}
	if err := s.finish(ctx, conn, begin, v.Pid()); err != nil {
		return nil, err
	}
	if e := v.Exit(); e.Reason != control.ReasonPowerOff {
		return nil, fmt.Errorf("the machine ended with %s", e)
	}
	return s, nil
}

func monotonic() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0
	}
	return ts.Nano()
}

func (b *bench) qemuReady() error {
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		return err
	}
	exec.Command("modprobe", "vhost_vsock").Run() // the next line says whether it helped
	if _, err := os.Stat("/dev/vhost-vsock"); err != nil {
		return fmt.Errorf("the agent needs a vsock: %w", err)
	}
	return nil
}

// startQEMU boots the same kernel and image in QEMU's microvm machine. Its
// root is virtio-blk: the microvm machine has no device memory for
// virtio-pmem.
func (b *bench) startQEMU() (*start, error) {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	listener, err := vsock.Listen(agentPort, nil)
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	log, err := os.Create(filepath.Join(b.state, "qemu"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-M", "microvm,acpi=on,pcie=on,rtc=off,pit=off,pic=off,isa-serial=off", "-accel", "kvm", "-cpu", "host",
		"-smp", "1", "-m", strconv.Itoa(machineMemory>>20),
		"-nodefaults", "-no-user-config", "-nographic", "-no-reboot",
		"-kernel", b.bin("vmlinux"),
		"-append", "console=hvc0 quiet root=/dev/vda rootfstype=erofs ro init=/sbin/init panic=-1 reboot=t random.trust_cpu=on",
		"-drive", "id=root,if=none,format=raw,readonly=on,file="+b.bin("guest.erofs"), "-device", "virtio-blk-pci,drive=root",
		"-device", "virtio-rng-pci", "-device", "vhost-vsock-pci,guest-cid=42",
		"-chardev", "stdio,id=console", "-device", "virtio-serial-pci", "-device", "virtconsole,chardev=console")
	cmd.Stdout, cmd.Stderr = log, log
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ended := make(chan struct{})
	go func() { cmd.Wait(); listener.Close(); close(ended) }()
	defer func() { cmd.Process.Kill(); <-ended }()
	conn, err := listener.Accept()
	if err != nil {
		text, _ := os.ReadFile(log.Name())
		return nil, fmt.Errorf("QEMU ended before the agent called: %s", text)
	}
	s := &start{}
	if err := s.finish(ctx, conn, begin, cmd.Process.Pid); err != nil {
		return nil, err
	}
	return s, nil
}

// finish takes the measures of a machine whose agent has just called, which is
// the first thing it does, and powers it off.
func (s *start) finish(ctx context.Context, conn net.Conn, begin time.Time, pid int) (err error) {
	s.phases = append(s.phases, phase{"/sbin/init", time.Since(begin)})
	if s.initExits, err = kvmCounters(pid); err != nil {
		return err
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	agent := agentproto.NewAgentClient(client)
	info, err := agent.Info(ctx, &agentproto.InfoRequest{})
	if err != nil {
		return err
	}
	s.phases = append(s.phases, phase{"agent ready", time.Since(begin)})
	s.guest = info
	if s.exits, err = kvmCounters(pid); err != nil {
		return err
	}
	if s.memory, err = memoryOf(pid); err != nil {
		return err
	}
	_, err = agent.Shutdown(ctx, &emptypb.Empty{})
	if err != nil && !errors.Is(err, ttrpc.ErrClosed) && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

// kvmCounters reads what KVM itself counts for the process's machine.
func kvmCounters(pid int) (map[string]float64, error) {
	// The directory has the number of the thread that made the machine, and any
	// of a Go program's may have.
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, t := range threads {
		found, err := filepath.Glob("/sys/kernel/debug/kvm/" + t.Name() + "-*")
		if err != nil {
			return nil, err
		}
		dirs = append(dirs, found...)
	}
	if len(dirs) == 0 {
		return nil, nil
	}
	counters := map[string]float64{}
	for _, name := range []string{"exits", "io_exits", "mmio_exits", "halt_exits", "irq_exits", "insn_emulation", "signal_exits", "fpu_reload", "pf_fixed"} {
		text, err := os.ReadFile(filepath.Join(dirs[0], name))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if counters[name], err = strconv.ParseFloat(strings.TrimSpace(string(text)), 64); err != nil {
			return nil, fmt.Errorf("KVM counter %s: %w", name, err)
		}
	}
	return counters, nil
}
