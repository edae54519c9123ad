package kvm

// APIVersion is the only version KVM_GET_API_VERSION ever returned to a stable
// user; api.rst tells applications to refuse any other.
const APIVersion = 12

// Request numbers of the ioctls.
const (
	reqGetAPIVersion       = 0xae00
	reqCreateVM            = 0xae01
	reqCheckExtension      = 0xae03
	reqGetVCPUMmapSize     = 0xae04
	reqGetSupportedCPUID   = 0xc008ae05
	reqEnableCap           = 0x4068aea3
	reqGetStatsFD          = 0xaece
	reqCreateVCPU          = 0xae41
	reqSetUserMemoryRegion = 0x4020ae46
	reqSetTSSAddr          = 0xae47
	reqSetIdentityMapAddr  = 0x4008ae48
	reqSetGSIRouting       = 0x4008ae6a
	reqIRQFD               = 0x4020ae76
	reqIOEventFD           = 0x4040ae79
	reqSignalMSI           = 0x4020aea5
	reqRun                 = 0xae80
	reqGetRegs             = 0x8090ae81
	reqSetRegs             = 0x4090ae82
	reqGetSregs            = 0x8138ae83
	reqSetSregs            = 0x4138ae84
	reqGetMSRs             = 0xc008ae88
	reqSetMSRs             = 0x4008ae89
	reqGetLAPIC            = 0x8400ae8e
	reqSetLAPIC            = 0x4400ae8f
	reqSetCPUID2           = 0x4008ae90
	reqGetMPState          = 0x8004ae98
	reqKVMClockCtrl        = 0xaead
)

// Capabilities, for CheckExtension.
const (
	CapUserMemory         = 3
	CapNRMemslots         = 10
	CapIOEventFD          = 36
	CapTSCDeadlineTimer   = 72
	CapSignalMSI          = 77
	CapReadonlyMem        = 81
	CapSplitIRQChip       = 121
	CapIOEventFDAnyLength = 122
	CapImmediateExit      = 136
)

// Exit reasons, struct kvm_run's exit_reason.
const (
	ExitIO            = 2
	ExitMMIO          = 6
	ExitShutdown      = 8
	ExitFailEntry     = 9
	ExitIntr          = 10
	ExitInternalError = 17
)

// MemReadonly in UserMemoryRegion.Flags has the guest's writes exit.
const MemReadonly = 1 << 1

// IOEventFDDeassign in IOEventFD.Flags takes an ioeventfd away.
const IOEventFDDeassign = 1 << 2

// IRQFDDeassign in IRQFD.Flags takes an irqfd away.
const IRQFDDeassign = 1 << 0

// IRQRoutingMSI in IRQRoutingEntry.Type makes the route a message.
const IRQRoutingMSI = 2

// Multiprocessing states, KVM_GET_MP_STATE.
const (
	MPStateRunnable      = 0
	MPStateUninitialized = 1
	MPStateHalted        = 3
)

// CPUIDSignificantIndex in CPUIDEntry.Flags says that Index takes part in the
// look-up.
const CPUIDSignificantIndex = 1 << 0
