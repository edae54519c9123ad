package kvm

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/eventfd"
)

// The guests of these tests are a few real-mode instructions at codeAddr. They
// end with an OUT to donePort: with an in-kernel local APIC a HLT does not come
// back to us.
const (
	codeAddr = 0x1000
	mmioAddr = 0x8000 // no memory there, and reachable with a real-mode offset
	donePort = 0x99
)

type guest struct {
	vm   *VM
	vcpu *VCPU
	mem  []byte
}

func newGuest(t testing.TB, code ...byte) *guest {
	t.Helper()
	runtime.LockOSThread() // for the whole test: the vCPU belongs to a thread
	file, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	system, err := NewSystem(file)
	if err != nil {
		t.Fatal(err)
	}
	vm, err := system.CreateVM()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { vm.Close() })
	if err := vm.EnableCap(CapSplitIRQChip, 0); err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(-1, 0, 0x8000, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	copy(mem[codeAddr:], code)
	region := UserMemoryRegion{MemorySize: uint64(len(mem)), UserspaceAddr: addressOf(mem)}
	if err := vm.SetUserMemoryRegion(region); err != nil {
		t.Fatal(err)
	}
	vcpu, err := vm.CreateVCPU(0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { vcpu.Close() })
	for range 2 { // the second time does nothing
		if err := vcpu.MapRun(); err != nil {
			t.Fatal(err)
		}
	}
	cpuid, err := system.GetSupportedCPUID()
	if err != nil {
		t.Fatal(err)
	}
	if err := vcpu.SetCPUID2(cpuid); err != nil {
		t.Fatal(err)
	}
	sregs, err := vcpu.GetSregs()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*Segment{&sregs.CS, &sregs.DS, &sregs.ES, &sregs.SS} {
		s.Base, s.Selector = 0, 0
	}
	if err := vcpu.SetSregs(sregs); err != nil {
		t.Fatal(err)
	}
	if err := vcpu.SetRegs(Regs{RIP: codeAddr, RSP: 0x800, RFLAGS: 2}); err != nil {
		t.Fatal(err)
	}
	return &guest{vm: vm, vcpu: vcpu, mem: mem}
}

// run enters the guest until it exits for the given reason, which is the next
// one but for signals.
func (g *guest) run(t testing.TB, reason uint32) {
	t.Helper()
	for {
		err := g.vcpu.Run()
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		break
	}
	if got := g.vcpu.ExitReason(); got != reason {
		sub, data := g.vcpu.InternalError()
		t.Fatalf("exit reason %d (%d, %#x), want %d", got, sub, data, reason)
	}
}

func TestPortAccess(t *testing.T) {
	g := newGuest(t,
		0xba, 0xf8, 0x03, // mov dx, 0x3f8
		0xb0, 'x', // mov al, 'x'
		0xee,       // out dx, al
		0x66, 0xed, // in eax, dx
		0x66, 0xe7, donePort, // out donePort, eax
	)
	g.run(t, ExitIO)
	io := g.vcpu.IO()
	if !io.Write || io.Size != 1 || io.Port != 0x3f8 || string(io.Data) != "x" {
		t.Fatalf("first access: %+v", io)
	}
	g.run(t, ExitIO)
	io = g.vcpu.IO()
	if io.Write || io.Size != 4 || io.Port != 0x3f8 || len(io.Data) != 4 {
		t.Fatalf("second access: %+v", io)
	}
	binary.LittleEndian.PutUint32(io.Data, 0xcafebabe)
	g.run(t, ExitIO)
	io = g.vcpu.IO()
	if !io.Write || io.Port != donePort || binary.LittleEndian.Uint32(io.Data) != 0xcafebabe {
		t.Fatalf("third access: %+v", io)
	}
}

func TestStringPortAccess(t *testing.T) {
	g := newGuest(t,
		0xbe, 0x00, 0x20, // mov si, 0x2000
		0xb9, 0x05, 0x00, // mov cx, 5
		0xba, 0xf8, 0x03, // mov dx, 0x3f8
		0xf3, 0x6e, // rep outsb
		0xe6, donePort, // out donePort, al
	)
	copy(g.mem[0x2000:], "hello")
	var got []byte
	for {
		g.run(t, ExitIO)
		io := g.vcpu.IO()
		if io.Port == donePort {
			break
		}
		got = append(got, io.Data...) // one exit or one for each byte: KVM chooses
	}
	if string(got) != "hello" {
		t.Fatalf("got %q", got)
	}
}

func TestMMIO(t *testing.T) {
	g := newGuest(t,
		0xb8, 0x34, 0x12, // mov ax, 0x1234
		0xa3, 0x00, 0x80, // mov [0x8000], ax
		0xa1, 0x02, 0x80, // mov ax, [0x8002]
		0xe7, donePort, // out donePort, ax
	)
	g.run(t, ExitMMIO)
	m := g.vcpu.MMIO()
	if !m.Write || m.Addr != mmioAddr || len(m.Data) != 2 || binary.LittleEndian.Uint16(m.Data) != 0x1234 {
		t.Fatalf("store: %+v", m)
	}
	g.run(t, ExitMMIO)
	m = g.vcpu.MMIO()
	if m.Write || m.Addr != mmioAddr+2 || len(m.Data) != 2 {
		t.Fatalf("load: %+v", m)
	}
	binary.LittleEndian.PutUint16(m.Data, 0x5678)
	g.run(t, ExitIO)
	if io := g.vcpu.IO(); binary.LittleEndian.Uint16(io.Data) != 0x5678 {
		t.Fatalf("the guest read %#x", io.Data)
	}
}

func TestReadonlyMemory(t *testing.T) {
	g := newGuest(t,
		0xa0, 0x04, 0x80, // mov al, [0x8004]
		0xa2, 0x05, 0x80, // mov [0x8005], al
	)
	page, err := unix.Mmap(-1, 0, 0x1000, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(page) })
	page[4] = 0x77
	if err := g.vm.SetUserMemoryRegion(UserMemoryRegion{
		Slot: 1, Flags: MemReadonly, GuestPhysAddr: mmioAddr, MemorySize: 0x1000, UserspaceAddr: addressOf(page),
	}); err != nil {
		t.Fatal(err)
	}
	g.run(t, ExitMMIO) // loads come from the page, a store exits
	if m := g.vcpu.MMIO(); !m.Write || m.Addr != mmioAddr+5 || m.Data[0] != 0x77 {
		t.Fatalf("store: %+v", m)
	}
}

func TestIOEventFD(t *testing.T) {
	g := newGuest(t,
		0xa3, 0x00, 0x80, // mov [0x8000], ax: the doorbell
		0xa3, 0x04, 0x80, // mov [0x8004], ax: not the doorbell
	)
	e, err := eventfd.New()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	arg := IOEventFD{Addr: mmioAddr, FD: int32(e.FD())}
	if err := g.vm.IOEventFD(arg); err != nil {
		t.Fatal(err)
	}
	g.run(t, ExitMMIO)
	if m := g.vcpu.MMIO(); m.Addr != mmioAddr+4 {
		t.Fatalf("the doorbell came as an exit: %+v", m)
	}
	if err := e.Wait(); err != nil {
		t.Fatal(err)
	}
	arg.Flags = IOEventFDDeassign
	if err := g.vm.IOEventFD(arg); err != nil {
		t.Fatal(err)
	}
}

// TestMSI has messages set bits in the local APIC's request register, which
// KVM_GET_LAPIC shows without the guest running: once by KVM_SIGNAL_MSI, once
// through an irqfd with a route.
func TestMSI(t *testing.T) {
	g := newGuest(t, 0xe6, donePort)
	// MSIs reach only an APIC that is enabled: bit 8 of the spurious interrupt
	// vector register (0xf0).
	lapic, err := g.vcpu.GetLAPIC()
	if err != nil {
		t.Fatal(err)
	}
	binary.LittleEndian.PutUint32(lapic.Regs[0xf0:], 0x1ff)
	if err := g.vcpu.SetLAPIC(lapic); err != nil {
		t.Fatal(err)
	}
	requested := func(vector int) bool {
		lapic, err := g.vcpu.GetLAPIC()
		if err != nil {
			t.Fatal(err)
		}
		irr := binary.LittleEndian.Uint32(lapic.Regs[0x200+0x10*(vector/32):])
		return irr&(1<<(vector%32)) != 0
	}

	const signalled, routed = 0x41, 0x82
	delivered, err := g.vm.SignalMSI(MSI{AddressLo: 0xfee00000, Data: signalled})
	if err != nil || !delivered {
		t.Fatalf("SignalMSI: %v, %v", delivered, err)
	}
	if !requested(signalled) || requested(routed) {
		t.Fatal("KVM_SIGNAL_MSI did not raise its vector alone")
	}

	e, err := eventfd.New()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if err := g.vm.SetGSIRouting([]IRQRoutingEntry{
		{GSI: 5, Type: IRQRoutingMSI, AddressLo: 0xfee00000, Data: routed},
	}); err != nil {
		t.Fatal(err)
	}
	if err := g.vm.IRQFD(IRQFD{FD: uint32(e.FD()), GSI: 5}); err != nil {
		t.Fatal(err)
	}
	if err := e.Signal(); err != nil {
		t.Fatal(err)
	}
	if !waitFor(func() bool { return requested(routed) }) {
		t.Fatal("the irqfd did not raise its vector")
	}
	if err := g.vm.IRQFD(IRQFD{FD: uint32(e.FD()), GSI: 5, Flags: IRQFDDeassign}); err != nil {
		t.Fatal(err)
	}
}

// waitFor polls until done says so; the limit only ends a test that fails.
func waitFor(done func() bool) bool {
	for range 10000 {
		if done() {
			return true
		}
		time.Sleep(time.Millisecond)
	}
	return false
}

func TestImmediateExit(t *testing.T) {
	g := newGuest(t, 0xe6, donePort)
	g.vcpu.SetImmediateExit(true)
	if err := g.vcpu.Run(); !errors.Is(err, unix.EINTR) {
		t.Fatalf("Run with immediate_exit: %v", err)
	}
	g.vcpu.SetImmediateExit(false)
	g.run(t, ExitIO)
}

// TestKick takes a vCPU out of a guest that loops for ever, the way the VMM
// does: immediate_exit, then a signal until the thread has answered.
func TestKick(t *testing.T) {
	g := newGuest(t, 0xeb, 0xfe) // jmp .
	tid := unix.Gettid()
	left := make(chan struct{})
	kicked := make(chan struct{})
	go func() {
		defer close(kicked)
		g.vcpu.SetImmediateExit(true)
		for {
			// 36: above those the C library and the Go runtime keep for themselves.
			if err := unix.Tgkill(unix.Getpid(), tid, unix.Signal(36)); err != nil {
				t.Error(err)
			}
			select {
			case <-left:
				return
			case <-time.After(time.Millisecond):
			}
		}
	}()
	err := g.vcpu.Run()
	close(left)
	if !errors.Is(err, unix.EINTR) {
		t.Errorf("Run: %v, exit reason %d", err, g.vcpu.ExitReason())
	}
	if regs, err := g.vcpu.GetRegs(); err != nil || regs.RIP != codeAddr {
		t.Errorf("registers: %+v, %v", regs, err)
	}
	<-kicked
}

func TestState(t *testing.T) {
	g := newGuest(t, 0xe6, donePort)
	if state, err := g.vcpu.GetMPState(); err != nil || state != MPStateRunnable {
		t.Errorf("GetMPState: %d, %v", state, err)
	}
	const lstar = 0xc0000082
	if err := g.vcpu.SetMSRs([]MSREntry{{Index: lstar, Data: 0x1234}}); err != nil {
		t.Error(err)
	}
	if got, err := g.vcpu.GetMSRs(lstar); err != nil || got[0].Data != 0x1234 {
		t.Errorf("GetMSRs: %+v, %v", got, err)
	}
	err := g.vcpu.SetMSRs([]MSREntry{{Index: lstar}, {Index: 0x12345678, Data: 1}})
	if err == nil || !strings.Contains(err.Error(), "0x12345678") {
		t.Errorf("SetMSRs of an MSR that does not exist: %v", err)
	}
	// Without kvmclock in the guest there is nothing to tell.
	if err := g.vcpu.KVMClockCtrl(); !errors.Is(err, unix.EINVAL) {
		t.Errorf("KVMClockCtrl: %v", err)
	}
}

func TestStats(t *testing.T) {
	g := newGuest(t, 0xe6, donePort, 0xe6, donePort)
	stats, err := g.vcpu.GetStatsFD()
	if err != nil {
		t.Fatal(err)
	}
	defer stats.Close()
	g.run(t, ExitIO)
	before, err := stats.Read()
	if err != nil {
		t.Fatal(err)
	}
	g.run(t, ExitIO)
	after, err := stats.Read()
	if err != nil {
		t.Fatal(err)
	}
	if after["exits"] <= before["exits"] {
		t.Errorf("exits: %d, then %d", before["exits"], after["exits"])
	}
	vmStats, err := g.vm.GetStatsFD()
	if err != nil {
		t.Fatal(err)
	}
	vmStats.Close()
}

func TestNotKVM(t *testing.T) {
	file, err := os.Create(filepath.Join(t.TempDir(), "kvm"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := NewSystem(file); !errors.Is(err, unix.ENOTTY) {
		t.Fatalf("NewSystem of an ordinary file: %v", err)
	}
}
