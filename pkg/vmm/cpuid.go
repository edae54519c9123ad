package vmm

import (
	"math/bits"

	"github.com/microvm-runtime/microvm/pkg/kvm"
)

// Registers of CPUID leaves that guestCPUID changes. The leaves are described
// in Intel SDM 2A, "CPUID", and AMD APM 3, appendix E.
const (
	leafVendor       = 0x0
	leafFeatures     = 0x1
	leafCaches       = 0x4 // Intel
	leafMonitor      = 0x5
	leafPower        = 0x6
	leafExtFeatures  = 0x7
	leafPerfMon      = 0xa
	leafTopology     = 0xb
	leafXSAVE        = 0xd
	leafSGX          = 0x12
	leafTrace        = 0x14
	leafTiles        = 0x1d
	leafTileMul      = 0x1e
	leafTopologyV2   = 0x1f
	leafAMDFeatures  = 0x80000001
	leafAMDSizes     = 0x80000008
	leafAMDSVM       = 0x8000000a
	leafAMDCaches    = 0x8000001d
	leafAMDTopology  = 0x8000001e
	leafAMDSEV       = 0x8000001f
	leafAMDPerfMon   = 0x80000022
	leafAMDTopology2 = 0x80000026
)

// Feature bits, by leaf and register.
const (
	// 1, ECX
	featVMX         = 1 << 5
	featFMA         = 1 << 12
	featPDCM        = 1 << 15
	featX2APIC      = 1 << 21
	featTSCDeadline = 1 << 24
	featXSAVE       = 1 << 26
	featOSXSAVE     = 1 << 27
	featAVX         = 1 << 28
	featF16C        = 1 << 29
	featHypervisor  = 1 << 31
	// 1, EDX
	featHTT = 1 << 28

	// 6, EAX
	featARAT = 1 << 2

	// 7, EBX: what needs XSAVE is AVX2, MPX and AVX-512
	featSGX     = 1 << 2
	featTrace   = 1 << 25
	xsaveIn7EBX = 1<<5 | 1<<14 | 1<<16 | 1<<17 | 1<<21 | 1<<26 | 1<<27 | 1<<28 | 1<<30 | 1<<31
	// 7, ECX: AVX-512, protection keys, VAES, VPCLMULQDQ
	featWaitPkg = 1 << 5
	featOSPKE   = 1 << 4
	featSGXLC   = 1 << 30
	xsaveIn7ECX = 1<<1 | 1<<3 | 1<<6 | 1<<9 | 1<<10 | 1<<11 | 1<<12 | 1<<14
	// 7, EDX: AVX-512, AMX
	featArchCapabilities = 1 << 29
	xsaveIn7EDX          = 1<<2 | 1<<3 | 1<<8 | 1<<22 | 1<<23 | 1<<24 | 1<<25

	// 80000001, ECX
	featCmpLegacy = 1 << 1
	featTopoExt   = 1 << 22
	// SVM, IBS, SKINIT, watchdog timer, node id MSR, performance counters
	hiddenInAMDECX = 1<<2 | 1<<10 | 1<<12 | 1<<13 | 1<<19 | 1<<23 | 1<<24 | 1<<28
	xsaveInAMDECX  = 1<<11 | 1<<16 // XOP, FMA4
)

// guestCPUID turns what KVM supports into what processor id of count sees: its
// own APIC id and the topology (one package, each processor a core of its own
// with its own caches but the last level), and none of the features that we do
// not give to guests: nested virtualisation, performance counters, SGX, tracing.
// Where the host has no XSAVE, nothing that needs it is left either.
func guestCPUID(supported []kvm.CPUIDEntry, id, count int, tscDeadline bool) []kvm.CPUIDEntry {
	var amd, xsave bool
	for _, e := range supported {
		switch e.Function {
		case leafVendor:
			// "AuthenticAMD" and "HygonGenuine": the second letter group tells.
			amd = e.EDX == 0x69746e65 || e.EDX == 0x6e65476e
		case leafFeatures:
			xsave = e.ECX&featXSAVE != 0
		}
	}
	// The APIC ids of the package take up this many bits.
	idBits := bits.Len(uint(count - 1))
	lastID := uint32(1)<<idBits - 1

	var out []kvm.CPUIDEntry
	for _, e := range supported {
		switch e.Function {
		case leafVendor:
			e.EAX = max(e.EAX, leafTopology)
			if e.EAX >= leafTopologyV2 {
				out = append(out, topology(leafTopologyV2, id, count, idBits)...)
			}
			out = append(out, topology(leafTopology, id, count, idBits)...)
		case leafTopology, leafTopologyV2:
			continue
		case leafFeatures:
			e.EBX = e.EBX&0xffff | (lastID+1)<<16 | uint32(id)<<24
			e.ECX &^= featVMX | featPDCM | featOSXSAVE
			e.ECX |= featHypervisor | featX2APIC
			if tscDeadline {
				e.ECX |= featTSCDeadline
			}
			if !xsave {
				e.ECX &^= featAVX | featF16C | featFMA
			}
			e.EDX &^= featHTT
			if count > 1 {
				e.EDX |= featHTT
			}
		case leafCaches:
			if e.EAX&0x1f != 0 {
				e.EAX = cacheSharing(e.EAX, lastID)&0x03ffffff | min(lastID, 63)<<26
			}
		case leafPower:
			e.EAX, e.EBX, e.ECX, e.EDX = e.EAX&featARAT, 0, 0, 0
		case leafExtFeatures:
			hideExtFeatures(&e, amd, xsave)
		case leafXSAVE, leafTiles, leafTileMul:
			if !xsave {
				zero(&e)
			}
		case leafMonitor, leafPerfMon, leafSGX, leafTrace, leafAMDSVM, leafAMDSEV, leafAMDPerfMon, leafAMDTopology2:
			zero(&e)
		case leafAMDFeatures:
			e.ECX &^= hiddenInAMDECX | featCmpLegacy
			if !xsave {
				e.ECX &^= xsaveInAMDECX
			}
			if amd {
				e.ECX |= featTopoExt
				if count > 1 {
					e.ECX |= featCmpLegacy
				}
			}
		case leafAMDSizes:
			if amd {
				e.ECX = uint32(idBits)<<12 | uint32(count-1)
			}
		case leafAMDCaches:
			if e.EAX&0x1f != 0 {
				e.EAX = cacheSharing(e.EAX, lastID)
			}
		case leafAMDTopology:
			// Extended APIC id; core id and one thread to a core; one node.
			e.EAX, e.EBX, e.ECX, e.EDX = uint32(id), uint32(id), 0, 0
		}
		out = append(out, e)
	}
	return out
}

// topology is leaf 0xb or 0x1f: a level of one thread, a level of cores, and
// the end.
func topology(leaf uint32, id, count, idBits int) []kvm.CPUIDEntry {
	const levelSMT, levelCore = 1 << 8, 2 << 8
	entry := func(index, eax, ebx, ecx uint32) kvm.CPUIDEntry {
		return kvm.CPUIDEntry{
			Function: leaf, Index: index, Flags: kvm.CPUIDSignificantIndex,
			EAX: eax, EBX: ebx, ECX: ecx | index, EDX: uint32(id),
		}
	}
	return []kvm.CPUIDEntry{
		entry(0, 0, 1, levelSMT),
		entry(1, uint32(idBits), uint32(count), levelCore),
		entry(2, 0, 0, 0),
	}
}

// cacheSharing sets how many APIC ids share the cache that eax of leaf 4 or
// 8000001d describes: all from the third level on, none below.
func cacheSharing(eax, lastID uint32) uint32 {
	const mask = 0xfff << 14
	eax &^= mask
	if eax>>5&7 >= 3 {
		eax |= lastID << 14
	}
	return eax
}

func hideExtFeatures(e *kvm.CPUIDEntry, amd, xsave bool) {
	if e.Index == 0 {
		e.EBX &^= featSGX | featTrace
		e.ECX &^= featWaitPkg | featOSPKE | featSGXLC
		if amd {
			// Its MSR is Intel's; KVM would emulate it.
			e.EDX &^= featArchCapabilities
		}
		if !xsave {
			e.EBX &^= xsaveIn7EBX
			e.ECX &^= xsaveIn7ECX
			e.EDX &^= xsaveIn7EDX
		}
	} else if !xsave {
		zero(e) // nearly all of the further features are AVX's
	}
}

func zero(e *kvm.CPUIDEntry) { e.EAX, e.EBX, e.ECX, e.EDX = 0, 0, 0, 0 }

// physicalAddressBits is the width of the guest's physical addresses.
func physicalAddressBits(supported []kvm.CPUIDEntry) int {
	for _, e := range supported {
		if e.Function == leafAMDSizes {
			return int(e.EAX & 0xff)
		}
	}
	return 36 // what a processor without the leaf has
}
