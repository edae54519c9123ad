// Package vmm is the virtual machine: guest memory, processors, the PCI bus
// with its devices, and what Linux needs to boot on them directly.
package vmm

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/kvm"
	"github.com/microvm-runtime/microvm/pkg/vmm/eventfd"
	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/pci"
	"github.com/microvm-runtime/microvm/pkg/vmm/seccomp"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiopci"
)

// MaxVCPUs is the greatest number of processors a machine can have.
const MaxVCPUs = 32

// Config describes a machine. The files and devices stay the caller's, and must
// last as long as the machine.
type Config struct {
	// KVM is /dev/kvm, open for reading and writing. It is used by New only.
	KVM *os.File
	// Kernel is an uncompressed vmlinux. It is read by New only.
	Kernel *os.File
	// Initrd is an initial RAM disk, nil for none. It is read by New only.
	Initrd *os.File
	// CommandLine is the kernel's.
	CommandLine string
	// MemoryBytes is the guest's RAM: a multiple of 1 MiB, 32 MiB at least. What
	// the guest does not touch costs nothing.
	MemoryBytes uint64
	// MaxMemoryBytes is what ResizeMemory can let the guest have at most. A
	// processor with few address bits, or an old kernel, may make it less. Zero,
	// or no more than MemoryBytes: the guest keeps what it has.
	MaxMemoryBytes uint64
	// VCPUs is the number of processors, 1 to MaxVCPUs.
	VCPUs int
	// MaxVCPUs is up to how many StartVCPUs can add, 0: none. The guest is told of
	// all of them; tell its kernel by maxcpus= to start with VCPUs.
	MaxVCPUs int
	// Pmem are files the guest has as /dev/pmem0 and so on.
	Pmem []PmemConfig
	// Devices are put on the PCI bus in this order, after Pmem.
	Devices []virtio.Device
	// DebugConsole takes what the kernel writes to the debug UART (ttyS0); nil:
	// there is no such UART. A slow writer holds up the guest.
	DebugConsole io.Writer
	// Log takes the machine's messages; what a guest can cause is limited in
	// rate.
	Log *slog.Logger
	// VCPUFilter is put on each vCPU's thread before it runs the guest; nil: there
	// is none. See VCPUSyscalls.
	VCPUFilter seccomp.Filter
	// Phase is called when the machine reaches "kernel-loaded" and
	// "vcpus-running", once each. It may be nil.
	Phase func(name string)
}

// What the vCPUs are to do.
type want int

const (
	wantRunning want = iota
	wantPaused
	wantEnded
)

// Machine is a virtual machine. New makes it, Run runs it and takes it apart
// again; the other methods may be called from any goroutine.
type Machine struct {
	log   *slog.Logger
	phase func(string)

	vm       *kvm.VM
	physBits int
	memory   *memory.Memory
	mappings []*mapping
	nextSlot uint32
	highEnd  memory.GuestAddress // first address above everything that has memory
	ram      uint64              // that the guest booted with, in bytes
	hot      *hotMemory          // nil: there is none
	pmem     []*pmemWindow       // changed with plug held

	pci  *pci.Bus
	uart *uart

	newVCPU    func(id int) (*vcpu, error)
	halfMade   *vcpu // that newVCPU goes on with, or nil; changed with plug held
	maxVCPU    int
	vcpuFilter seccomp.Filter

	ended chan struct{} // closed when exit is set
	acks  chan struct{} // a vCPU parked or ended

	plug  sync.Mutex // serialises Attach, the ends of Detach, the making of vCPUs, and close
	users int        // of what release gives back; changed with plug held

	mu       sync.Mutex                           // protects what follows and the vCPUs' tid and parked
	devices  map[pci.Address]*virtiopci.Transport // changed with plug held, too
	vcpus    []*vcpu
	running  sync.WaitGroup // the vCPUs' goroutines
	resumed  *sync.Cond     // want changed
	want     want
	started  bool // Run was called
	launched bool // the vCPUs' goroutines run
	exit     Exit
}

// New makes a machine that is ready to run. Run must follow: it gives back what
// New took.
func New(c Config) (_ *Machine, err error) {
	if c.VCPUs < 1 || max(c.VCPUs, c.MaxVCPUs) > MaxVCPUs {
		return nil, fmt.Errorf("%d vCPUs: a machine has 1 to %d", max(c.VCPUs, c.MaxVCPUs), MaxVCPUs)
	}
	c.MaxVCPUs = max(c.VCPUs, c.MaxVCPUs)
	m := &Machine{
		log:     slog.New(limitRate(c.Log.Handler())),
		phase:   c.Phase,
		memory:  &memory.Memory{},
		devices: make(map[pci.Address]*virtiopci.Transport),
		ended:   make(chan struct{}),
		acks:    make(chan struct{}, 1),
		users:   1,
	}
	m.resumed = sync.NewCond(&m.mu)
	defer func() {
		if err != nil {
			err = errors.Join(err, m.close())
		}
	}()
	system, err := kvm.NewSystem(c.KVM)
	if err != nil {
		return nil, err
	}
	if err := m.createVM(system); err != nil {
		return nil, err
	}
	cpuid, err := system.GetSupportedCPUID()
	if err != nil {
		return nil, err
	}
	m.physBits = physicalAddressBits(cpuid)
	if err := m.addMemory(c.MemoryBytes); err != nil {
		return nil, err
	}
	entry, err := m.load(c)
	if err != nil {
		return nil, err
	}
	m.reached("kernel-loaded")
	if err := m.addBus(); err != nil {
		return nil, err
	}
	if err := m.addDevices(c); err != nil {
		return nil, err
	}
	if err := m.addHotMemory(system, c.MaxMemoryBytes); err != nil {
		return nil, err
	}
	deadline, err := system.CheckExtension(kvm.CapTSCDeadlineTimer)
	if err != nil {
		return nil, err
	}
	m.maxVCPU, m.vcpuFilter = c.MaxVCPUs, c.VCPUFilter
	m.newVCPU = func(id int) (*vcpu, error) {
		return m.createVCPU(id, guestCPUID(cpuid, id, c.MaxVCPUs, deadline > 0), entry)
	}
	if err := m.StartVCPUs(c.VCPUs); err != nil {
		return nil, err
	}
	if c.DebugConsole != nil {
		m.uart = &uart{out: c.DebugConsole}
	}
	return m, nil
}

// neededCaps is what a machine cannot do without, with what to call it.
var neededCaps = []struct {
	capability int
	name       string
}{
	{kvm.CapUserMemory, "user memory"},
	{kvm.CapReadonlyMem, "read-only memory slots"},
	{kvm.CapSplitIRQChip, "split interrupt controller"},
	{kvm.CapSignalMSI, "message-signalled interrupts"},
	{kvm.CapIOEventFD, "ioeventfd"},
	{kvm.CapIOEventFDAnyLength, "ioeventfd of any length"},
	{kvm.CapImmediateExit, "immediate exit"},
}

// createVM makes the virtual machine and the part of its interrupt controller
// that is not in the vCPUs: none. With the split controller KVM emulates only
// the local APICs; an I/O APIC would be ours, and as every interrupt is a
// message, the machine has none.
func (m *Machine) createVM(system *kvm.System) error {
	for _, c := range neededCaps {
		n, err := system.CheckExtension(c.capability)
		if err != nil {
			return err
		}
		if n <= 0 {
			return fmt.Errorf("this kernel's KVM has no %s (capability %d)", c.name, c.capability)
		}
	}
	var err error
	if m.vm, err = system.CreateVM(); err != nil {
		return err
	}
	if err := m.vm.SetIdentityMapAddr(kvmIdentityMapAddr); err != nil {
		return err
	}
	if err := m.vm.SetTSSAddr(kvmTSSAddr); err != nil {
		return err
	}
	const ioapicRoutes = 0
	return m.vm.EnableCap(kvm.CapSplitIRQChip, ioapicRoutes)
}

// addBus makes the PCI bus. Its configuration space is memory that the guest
// reads without an exit; a write to the read-only slot is an MMIO exit.
func (m *Machine) addBus() error {
	ecam, err := reserve(pci.ECAMSize)
	if err != nil {
		return fmt.Errorf("PCI configuration space: %w", err)
	}
	m.mappings = append(m.mappings, ecam)
	if err := ecam.anonymous(0, pci.ECAMSize, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		return fmt.Errorf("PCI configuration space: %w", err)
	}
	m.pci, err = pci.NewBus(pci.Window{Start: pciWindowAddr, Size: pciWindowSize}, ecam.bytes())
	if err != nil {
		return err
	}
	return m.addSlot(ecamAddr, ecam.bytes(), ecam.address(), kvm.MemReadonly)
}

// addDevices fills the PCI bus.
func (m *Machine) addDevices(c Config) error {
	var devices []virtio.Device
	for _, p := range c.Pmem {
		d, err := m.addPmem(p)
		if err != nil {
			return err
		}
		devices = append(devices, d)
	}
	for _, d := range append(devices, c.Devices...) {
		if _, err := m.addDevice(d); err != nil {
			return err
		}
	}
	f, err := newPVPanic(func() { m.finish(Exit{Reason: ExitPanic}) })
	if err != nil {
		return err
	}
	_, err = m.pci.Add(f)
	return err
}

// addDevice puts a virtio device on the bus.
func (m *Machine) addDevice(d virtio.Device) (pci.Address, error) {
	t, err := virtiopci.New(virtiopci.Config{
		Device:           d,
		Memory:           m.memory,
		SendMSI:          m.sendMSI,
		AssignDoorbell:   m.assignDoorbell,
		DeassignDoorbell: m.deassignDoorbell,
		Log:              m.log.With("virtio-type", d.Type()),
	})
	if err != nil {
		return pci.Address{}, err
	}
	addr, err := m.pci.Add(t.Function())
	if err != nil {
		return pci.Address{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.devices[addr] = t
	return addr, nil
}

// Attach puts a device on the PCI bus of a running machine and returns its
// address. The guest finds it when it looks at the bus again, which Linux does at
// a write to /sys/bus/pci/rescan. The device must last as long as the machine, or
// until Detach has returned.
func (m *Machine) Attach(d virtio.Device) (address string, err error) {
	m.plug.Lock()
	defer m.plug.Unlock()
	if m.hasEnded() {
		return "", errEnded
	}
	addr, err := m.addDevice(d)
	if err != nil {
		return "", err
	}
	return addr.String(), nil
}

// Detach takes a device of Config.Devices, or an attached one, off the bus, and
// what AttachPmem has mapped out of the guest's memory. The
// guest should have let go of it before: to one that has not it is a device that
// answers with ones. It waits for what the device has under way on the host, as
// long as that lasts; nothing else does, not even the end of the machine. When Detach
// returns, nothing of the machine uses the device any more; its address will be
// another's.
func (m *Machine) Detach(address string) error {
	addr, t, err := m.leave(address)
	if err != nil {
		return err
	}
	// The doorbells go with the BAR. A vCPU may be on its way to the device; the
	// transport stops it there. Both wait for a vCPU that resets the device, too.
	err = m.pci.Remove(addr)
	t.Remove()
	m.plug.Lock()
	defer m.plug.Unlock()
	m.pci.Free(addr)
	for _, w := range m.pmem {
		if w.device != nil && t.Device == virtio.Device(w.device) {
			err = errors.Join(err, m.emptyPmem(w))
		}
	}
	return errors.Join(err, m.release())
}

// leave is the first part of Detach: the device is the caller's, with its place on
// the bus and its memory.
func (m *Machine) leave(address string) (pci.Address, *virtiopci.Transport, error) {
	m.plug.Lock()
	defer m.plug.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.want == wantEnded {
		return pci.Address{}, nil, errEnded
	}
	for addr, t := range m.devices {
		if addr.String() == address {
			delete(m.devices, addr)
			m.users++
			return addr, t, nil
		}
	}
	return pci.Address{}, nil, fmt.Errorf("there is no virtio device at %q", address)
}

func (m *Machine) hasEnded() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.want == wantEnded
}

// sendMSI delivers an interrupt message. The ioctl does at once what an irqfd
// does, without a descriptor and a route for each vector, whose table KVM
// replaces as a whole, and slowly, for each change.
func (m *Machine) sendMSI(addr uint64, data uint32) {
	_, err := m.vm.SignalMSI(kvm.MSI{AddressLo: uint32(addr), AddressHi: uint32(addr >> 32), Data: data})
	if err != nil {
		m.log.Warn("guest asked for an interrupt message that cannot be sent", "address", addr, "data", data, "error", err)
	}
}

func (m *Machine) assignDoorbell(addr uint64, kick *eventfd.EventFD) error {
	return m.vm.IOEventFD(kvm.IOEventFD{Addr: addr, FD: int32(kick.FD())})
}

func (m *Machine) deassignDoorbell(addr uint64, kick *eventfd.EventFD) error {
	return m.vm.IOEventFD(kvm.IOEventFD{Addr: addr, FD: int32(kick.FD()), Flags: kvm.IOEventFDDeassign})
}

// PCIAddress is where the guest finds a device: "0000:00:03.0"; "" for one that
// is not on the bus.
func (m *Machine) PCIAddress(d virtio.Device) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	for addr, t := range m.devices {
		if t.Device == d {
			return addr.String()
		}
	}
	return ""
}

func (m *Machine) reached(phase string) {
	if m.phase != nil {
		m.phase(phase)
	}
}

// Run runs the machine until it ends and takes it apart, but for what a Detach
// still waits for, which does the rest. The error is not nil
// exactly when the reason is ExitError. Run is called once.
func (m *Machine) Run() (Exit, error) {
	m.mu.Lock()
	if m.started {
		m.mu.Unlock()
		return Exit{ExitError, "Run was called twice"}, errors.New("machine: Run was called twice")
	}
	m.started = true
	m.mu.Unlock()
	m.reached("vcpus-running")
	m.mu.Lock()
	for _, v := range m.vcpus {
		m.running.Go(v.run)
	}
	m.launched = true
	m.mu.Unlock()

	<-m.ended
	m.kick(wantEnded)
	m.running.Wait()
	where := m.where()
	closeErr := m.close()

	m.mu.Lock()
	defer m.mu.Unlock()
	if m.exit.Reason == ExitStopped {
		m.exit.Detail = where // a guest that hangs is stopped in the end
	}
	if m.exit.Reason == ExitError {
		return m.exit, fmt.Errorf("machine: %s", m.exit.Detail)
	}
	if closeErr != nil {
		m.log.Error("machine was not taken apart cleanly", "error", closeErr)
	}
	return m.exit, nil
}

// where says where the vCPUs that the guest has started are.
func (m *Machine) where() string {
	m.mu.Lock()
	vcpus := m.vcpus
	m.mu.Unlock()
	var s []string
	for _, v := range vcpus {
		switch state, err := v.kvm.GetMPState(); {
		case err != nil || state == kvm.MPStateUninitialized:
		case state == kvm.MPStateHalted:
			s = append(s, fmt.Sprintf("vCPU %d halted%s", v.id, v.where()))
		default:
			s = append(s, fmt.Sprintf("vCPU %d%s", v.id, v.where()))
		}
	}
	return strings.Join(s, ", ")
}

// Stop ends the machine with ExitStopped, unless it has ended already. It does
// not wait.
func (m *Machine) Stop() { m.finish(Exit{Reason: ExitStopped}) }

// finish ends the machine. The first reason counts.
func (m *Machine) finish(e Exit) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.want == wantEnded {
		return
	}
	m.want = wantEnded
	m.exit = e
	m.resumed.Broadcast()
	close(m.ended)
}

// errEnded is what Pause and Resume say about a machine that has ended.
var errEnded = errors.New("machine has ended")

// Pause takes the vCPUs out of the guest and returns when all are out, with
// every access of theirs complete. Devices finish what they have. Pausing a
// paused machine does nothing.
func (m *Machine) Pause() error {
	m.mu.Lock()
	if m.want == wantEnded {
		m.mu.Unlock()
		return errEnded
	}
	m.want = wantPaused
	m.mu.Unlock()
	m.kick(wantPaused)
	return nil
}

// Resume lets the vCPUs run again.
func (m *Machine) Resume() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.want == wantEnded {
		return errEnded
	}
	m.want = wantRunning
	m.resumed.Broadcast()
	return nil
}

// kick takes every vCPU out of the guest and returns when all have answered, or
// when the machine is wanted in another state than w. A vCPU's thread may be
// anywhere: immediate_exit catches it before KVM_RUN, the signal inside. As a
// signal may come in between, it is sent again until it is answered.
func (m *Machine) kick(w want) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for m.want == w {
		waiting := false
		for _, v := range m.vcpus {
			if v.tid == 0 || v.parked {
				continue
			}
			waiting = true
			v.kvm.SetImmediateExit(true)
			if err := unix.Tgkill(unix.Getpid(), v.tid, kickSignal); err != nil {
				m.log.Error("vCPU cannot be kicked", "vcpu", v.id, "error", err)
			}
		}
		if !waiting {
			return
		}
		m.mu.Unlock()
		select {
		case <-m.acks:
		case <-time.After(time.Millisecond):
		}
		m.mu.Lock()
	}
}

// ack tells kick that a vCPU has left the guest. Called with m.mu held.
func (m *Machine) ack() {
	select {
	case m.acks <- struct{}{}:
	default:
	}
}

// VCPUStats returns the statistics of each vCPU.
func (m *Machine) VCPUStats() ([]VCPUStats, error) {
	m.mu.Lock()
	vcpus := m.vcpus
	m.mu.Unlock()
	stats := make([]VCPUStats, len(vcpus))
	var errs error
	for i, v := range vcpus {
		var err error
		if stats[i], err = v.readStats(); err != nil {
			errs = errors.Join(errs, fmt.Errorf("vCPU %d: %w", i, err))
		}
	}
	return stats, errs
}

// close gives back what New took. Nothing of the machine runs any more, but for
// devices that are being detached.
func (m *Machine) close() error {
	// Who holds it still uses all of it.
	m.plug.Lock()
	defer m.plug.Unlock()
	var errs []error
	for _, t := range m.devices {
		t.Reset()
	}
	for _, v := range m.vcpus {
		errs = append(errs, v.close())
	}
	if m.halfMade != nil {
		errs = append(errs, m.halfMade.close())
	}
	if m.uart != nil {
		m.uart.flush()
	}
	return errors.Join(append(errs, m.release())...)
}

// release gives back what devices use, when the last one has left: the virtual
// machine and its memory. Called with plug held.
func (m *Machine) release() error {
	if m.users--; m.users > 0 {
		return nil
	}
	var errs []error
	if m.vm != nil {
		errs = append(errs, m.vm.Close())
	}
	for _, p := range m.mappings {
		errs = append(errs, p.unmap())
	}
	return errors.Join(errs...)
}
