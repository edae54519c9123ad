package kvm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// TestKernelHeaders compares every number and layout of the package with
// <linux/kvm.h>: a C program made from the tables below prints the kernel's.
func TestKernelHeaders(t *testing.T) {
	numbers := map[string]uint64{
		"KVM_API_VERSION":     APIVersion,
		"KVM_GET_API_VERSION": reqGetAPIVersion, "KVM_CREATE_VM": reqCreateVM,
		"KVM_CHECK_EXTENSION": reqCheckExtension, "KVM_GET_VCPU_MMAP_SIZE": reqGetVCPUMmapSize,
		"KVM_GET_SUPPORTED_CPUID": reqGetSupportedCPUID, "KVM_ENABLE_CAP": reqEnableCap,
		"KVM_GET_STATS_FD": reqGetStatsFD, "KVM_CREATE_VCPU": reqCreateVCPU,
		"KVM_SET_USER_MEMORY_REGION": reqSetUserMemoryRegion, "KVM_SET_TSS_ADDR": reqSetTSSAddr,
		"KVM_SET_IDENTITY_MAP_ADDR": reqSetIdentityMapAddr, "KVM_SET_GSI_ROUTING": reqSetGSIRouting,
		"KVM_IRQFD": reqIRQFD, "KVM_IOEVENTFD": reqIOEventFD, "KVM_SIGNAL_MSI": reqSignalMSI,
		"KVM_RUN": reqRun, "KVM_GET_REGS": reqGetRegs, "KVM_SET_REGS": reqSetRegs,
		"KVM_GET_SREGS": reqGetSregs, "KVM_SET_SREGS": reqSetSregs, "KVM_GET_MSRS": reqGetMSRs,
		"KVM_SET_MSRS": reqSetMSRs, "KVM_GET_LAPIC": reqGetLAPIC,
		"KVM_SET_LAPIC": reqSetLAPIC, "KVM_SET_CPUID2": reqSetCPUID2, "KVM_GET_MP_STATE": reqGetMPState,
		"KVM_KVMCLOCK_CTRL": reqKVMClockCtrl,

		"KVM_CAP_USER_MEMORY": CapUserMemory, "KVM_CAP_IOEVENTFD": CapIOEventFD,
		"KVM_CAP_TSC_DEADLINE_TIMER": CapTSCDeadlineTimer, "KVM_CAP_SIGNAL_MSI": CapSignalMSI, "KVM_CAP_READONLY_MEM": CapReadonlyMem,
		"KVM_CAP_NR_MEMSLOTS":          CapNRMemslots,
		"KVM_CAP_SPLIT_IRQCHIP":        CapSplitIRQChip,
		"KVM_CAP_IOEVENTFD_ANY_LENGTH": CapIOEventFDAnyLength, "KVM_CAP_IMMEDIATE_EXIT": CapImmediateExit,
		"KVM_EXIT_IO": ExitIO, "KVM_EXIT_MMIO": ExitMMIO,
		"KVM_EXIT_SHUTDOWN":   ExitShutdown,
		"KVM_EXIT_FAIL_ENTRY": ExitFailEntry, "KVM_EXIT_INTR": ExitIntr,
		"KVM_EXIT_INTERNAL_ERROR":     ExitInternalError,
		"KVM_MEM_READONLY":            MemReadonly,
		"KVM_IOEVENTFD_FLAG_DEASSIGN": IOEventFDDeassign, "KVM_IRQFD_FLAG_DEASSIGN": IRQFDDeassign,
		"KVM_IRQ_ROUTING_MSI":   IRQRoutingMSI,
		"KVM_MP_STATE_RUNNABLE": MPStateRunnable, "KVM_MP_STATE_UNINITIALIZED": MPStateUninitialized,
		"KVM_MP_STATE_HALTED":             MPStateHalted,
		"KVM_CPUID_FLAG_SIGNIFCANT_INDEX": CPUIDSignificantIndex, // the kernel's spelling
		"KVM_STATS_TYPE_PEAK":             statPeak,

		"offsetof(struct kvm_run, immediate_exit)":                           runImmediateExit,
		"offsetof(struct kvm_run, exit_reason)":                              runExitReason,
		"offsetof(struct kvm_run, io)":                                       runUnion,
		"offsetof(struct kvm_run, io.direction)":                             runUnion,
		"offsetof(struct kvm_run, io.size)":                                  runUnion + 1,
		"offsetof(struct kvm_run, io.port)":                                  runUnion + 2,
		"offsetof(struct kvm_run, io.count)":                                 runUnion + 4,
		"offsetof(struct kvm_run, io.data_offset)":                           runUnion + 8,
		"offsetof(struct kvm_run, mmio.phys_addr)":                           runUnion,
		"offsetof(struct kvm_run, mmio.data)":                                runMMIOData,
		"offsetof(struct kvm_run, mmio.len)":                                 runMMIOLen,
		"offsetof(struct kvm_run, mmio.is_write)":                            runMMIOIsWrite,
		"offsetof(struct kvm_run, internal.suberror)":                        runUnion,
		"offsetof(struct kvm_run, internal.ndata)":                           runUnion + 4,
		"offsetof(struct kvm_run, internal.data)":                            runUnion + 8,
		"offsetof(struct kvm_run, fail_entry.hardware_entry_failure_reason)": runUnion,
		"KVM_EXIT_IO_OUT":                                                    1,
		"sizeof(struct kvm_stats_header)":                                    24,
		"offsetof(struct kvm_stats_header, name_size)":                       4,
		"offsetof(struct kvm_stats_header, num_desc)":                        8,
		"offsetof(struct kvm_stats_header, desc_offset)":                     16,
		"offsetof(struct kvm_stats_header, data_offset)":                     20,
		"sizeof(struct kvm_stats_desc)":                                      16,
		"offsetof(struct kvm_stats_desc, size)":                              6,
		"offsetof(struct kvm_stats_desc, offset)":                            8,
	}
	// Each Go structure with its C name and its C fields in the Go order; "_" is
	// padding that C may name or not.
	structs := []struct {
		value any
		c     string
		names string
	}{
		{Regs{}, "kvm_regs", "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags"},
		{Segment{}, "kvm_segment", "base limit selector type present dpl db s l g avl unusable _"},
		{DTable{}, "kvm_dtable", "base limit _"},
		{Sregs{}, "kvm_sregs", "cs ds es fs gs ss tr ldt gdt idt cr0 cr2 cr3 cr4 cr8 efer apic_base interrupt_bitmap"},
		{LAPICState{}, "kvm_lapic_state", "regs"},
		{CPUIDEntry{}, "kvm_cpuid_entry2", "function index flags eax ebx ecx edx _"},
		{MSREntry{}, "kvm_msr_entry", "index _ data"},
		{UserMemoryRegion{}, "kvm_userspace_memory_region", "slot flags guest_phys_addr memory_size userspace_addr"},
		{IRQFD{}, "kvm_irqfd", "fd gsi flags resamplefd _"},
		{IOEventFD{}, "kvm_ioeventfd", "datamatch addr len fd flags _"},
		{IRQRoutingEntry{}, "kvm_irq_routing_entry", "gsi type flags _ u.msi.address_lo u.msi.address_hi u.msi.data _"},
		{MSI{}, "kvm_msi", "address_lo address_hi data flags devid _"},
		{enableCap{}, "kvm_enable_cap", "cap flags args _"},
	}
	for _, s := range structs {
		typ := reflect.TypeOf(s.value)
		names := strings.Fields(s.names)
		if len(names) != typ.NumField() {
			t.Fatalf("%s: %d names for %d fields", s.c, len(names), typ.NumField())
		}
		numbers[fmt.Sprintf("sizeof(struct %s)", s.c)] = uint64(typ.Size())
		for i, name := range names {
			if name == "_" {
				continue
			}
			field := typ.Field(i)
			numbers[fmt.Sprintf("offsetof(struct %s, %s)", s.c, name)] = uint64(field.Offset)
			numbers[fmt.Sprintf("sizeof(((struct %s *)0)->%s)", s.c, name)] = uint64(field.Type.Size())
		}
	}

	var src strings.Builder
	src.WriteString("#include <linux/kvm.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {\n")
	for name := range numbers {
		fmt.Fprintf(&src, "printf(\"%s=%%llu\\n\", (unsigned long long)(unsigned int)(%s));\n", name, name)
	}
	src.WriteString("}\n")
	dir := t.TempDir()
	file, program := filepath.Join(dir, "kvm.c"), filepath.Join(dir, "kvm")
	if err := os.WriteFile(file, []byte(src.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("gcc", "-o", program, file).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	out, err := exec.Command(program).Output()
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for line := range strings.Lines(string(out)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		if got := fmt.Sprint(numbers[name]); got != value {
			t.Errorf("%s is %s, we have %s", name, value, got)
		}
		seen++
	}
	if seen != len(numbers) {
		t.Errorf("compared %d of %d numbers", seen, len(numbers))
	}
}
