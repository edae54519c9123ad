package vmm

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/microvm-runtime/microvm/pkg/kvm"
	"github.com/microvm-runtime/microvm/pkg/vmm/acpi"
	"github.com/microvm-runtime/microvm/pkg/vmm/boot"
	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/pci"
)

// load puts the kernel and all it needs into guest memory and returns its entry
// point.
func (m *Machine) load(c Config) (memory.GuestAddress, error) {
	if len(c.CommandLine) > boot.MaxCommandLine || strings.ContainsRune(c.CommandLine, 0) {
		return 0, fmt.Errorf("kernel command line of %d bytes: at most %d, none of them zero", len(c.CommandLine), boot.MaxCommandLine)
	}
	kernel, err := boot.LoadKernel(c.Kernel, m.memory, kernelLowest)
	if err != nil {
		return 0, fmt.Errorf("kernel %s: %w", c.Kernel.Name(), err)
	}
	params := boot.Params{
		CommandLine:     commandLineAddr,
		CommandLineSize: len(c.CommandLine),
		RSDP:            acpiAddr,
		E820:            e820(c.MemoryBytes),
	}
	if c.Initrd != nil {
		params.Initrd, params.InitrdSize, err = m.loadInitrd(c.Initrd, kernel.End, min(c.MemoryBytes, uint64(lowMemoryEnd)))
		if err != nil {
			return 0, fmt.Errorf("initrd %s: %w", c.Initrd.Name(), err)
		}
	}
	tables, err := acpi.Build(acpi.Config{
		Base: uint64(acpiAddr), CPUs: c.MaxVCPUs, LocalAPIC: localAPICAddr,
		ECAM: ecamAddr, ECAMSize: pci.ECAMSize, MMIO: pciWindowAddr, MMIOSize: pciWindowSize,
		SleepControlPort: sleepControlPort, SleepStatusPort: sleepStatusPort,
		ResetPort: resetPort, ResetValue: resetValue,
	})
	if err != nil {
		return 0, err
	}
	if len(tables) > int(acpiEnd-acpiAddr) {
		return 0, fmt.Errorf("ACPI tables of %d bytes do not fit", len(tables))
	}
	for _, part := range []struct {
		addr  memory.GuestAddress
		size  uint64
		write func([]byte) error
	}{
		{gdtAddr, boot.GDTSize, boot.WriteGDT},
		{bootParamsAddr, boot.ParamsSize, func(b []byte) error { return boot.WriteParams(b, params) }},
		{pageTablesAddr, boot.PageTablesSize, func(b []byte) error { return boot.WritePageTables(b, pageTablesAddr) }},
		{commandLineAddr, uint64(len(c.CommandLine)), func(b []byte) error { copy(b, c.CommandLine); return nil }},
		{acpiAddr, uint64(len(tables)), func(b []byte) error { copy(b, tables); return nil }},
	} {
		b, err := m.memory.Slice(part.addr, part.size)
		if err != nil {
			return 0, err
		}
		if err := part.write(b); err != nil {
			return 0, err
		}
	}
	return kernel.Entry, nil
}

// loadInitrd reads the file to the end of low memory, above the kernel.
func (m *Machine) loadInitrd(file *os.File, lowest memory.GuestAddress, highest uint64) (memory.GuestAddress, uint64, error) {
	info, err := file.Stat()
	if err != nil {
		return 0, 0, err
	}
	size := uint64(info.Size())
	if !info.Mode().IsRegular() || size == 0 {
		return 0, 0, errors.New("not a regular file with contents")
	}
	const page = 4096
	if size > highest || (highest-size)&^(page-1) < uint64(lowest) {
		return 0, 0, fmt.Errorf("%d bytes do not fit between the kernel and the end of low memory", size)
	}
	start := memory.GuestAddress((highest - size) &^ (page - 1))
	b, err := m.memory.Slice(start, size)
	if err != nil {
		return 0, 0, err
	}
	if _, err := io.ReadFull(io.NewSectionReader(file, 0, int64(size)), b); err != nil {
		return 0, 0, err
	}
	return start, size, nil
}

// createVCPU makes a processor in the state of the kernel's entry; all but the
// first wait for their start-up IPI, which replaces it. If that fails half way, the
// next call is to be for the same one and goes on with it: KVM makes no second one
// with its id. Called with plug held.
func (m *Machine) createVCPU(id int, cpuid []kvm.CPUIDEntry, entry memory.GuestAddress) (*vcpu, error) {
	if m.halfMade == nil {
		k, err := m.vm.CreateVCPU(id)
		if err != nil {
			return nil, err
		}
		m.halfMade = &vcpu{m: m, id: id, kvm: k}
		// The kernel may have no statistics; they only inform.
		m.halfMade.stats, _ = k.GetStatsFD()
	}
	v := m.halfMade
	if err := prepareVCPU(v.kvm, cpuid, entry); err != nil {
		return nil, fmt.Errorf("vCPU %d: %w", id, err)
	}
	m.halfMade = nil
	return v, nil
}

func prepareVCPU(k *kvm.VCPU, cpuid []kvm.CPUIDEntry, entry memory.GuestAddress) error {
	if err := k.MapRun(); err != nil {
		return err
	}
	// CPUID first: KVM refuses state that it does not allow for.
	if err := k.SetCPUID2(cpuid); err != nil {
		return err
	}
	if err := k.SetMSRs(entryMSRs); err != nil {
		return err
	}
	sregs, err := k.GetSregs()
	if err != nil {
		return err
	}
	boot.SetLongMode(&sregs, gdtAddr, pageTablesAddr)
	if err := k.SetSregs(sregs); err != nil {
		return err
	}
	if err := k.SetRegs(boot.EntryRegs(entry, bootParamsAddr)); err != nil {
		return err
	}
	// KVM finds the receiver of an IPI in a map that it makes anew when an APIC
	// changes. KVM_CREATE_VCPU does that before the new vCPU counts
	// (arch/x86/kvm/lapic.c, kvm_recalculate_apic_map): in a guest that runs, the
	// start-up IPI would not find it.
	lapic, err := k.GetLAPIC()
	if err != nil {
		return err
	}
	return k.SetLAPIC(lapic)
}

// entryMSRs are what firmware would have set.
var entryMSRs = []kvm.MSREntry{
	// IA32_MISC_ENABLE: fast strings. Without the bit Linux turns off the string
	// instructions' fast paths (arch/x86/kernel/cpu/intel.c).
	{Index: 0x1a0, Data: 1},
	// IA32_MTRR_DEF_TYPE: enabled, write-back by default.
	{Index: 0x2ff, Data: 1<<11 | 6},
}
