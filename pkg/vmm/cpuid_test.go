package vmm

import (
	"testing"

	"github.com/microvm-runtime/microvm/pkg/kvm"
)

type cpuidKey struct{ function, index uint32 }

func byLeaf(entries []kvm.CPUIDEntry) map[cpuidKey]kvm.CPUIDEntry {
	m := map[cpuidKey]kvm.CPUIDEntry{}
	for _, e := range entries {
		m[cpuidKey{e.Function, e.Index}] = e
	}
	return m
}

// allOnes is a KVM that supports everything, of a vendor.
func allOnes(amd, xsave bool) []kvm.CPUIDEntry {
	const ones = 0xffffffff
	vendor := kvm.CPUIDEntry{EAX: 0x1f, EBX: 0x756e6547, EDX: 0x49656e69, ECX: 0x6c65746e} // GenuineIntel
	if amd {
		vendor = kvm.CPUIDEntry{EAX: 0x10, EBX: 0x68747541, EDX: 0x69746e65, ECX: 0x444d4163} // AuthenticAMD
	}
	entries := []kvm.CPUIDEntry{vendor}
	for _, function := range []uint32{1, 5, 6, 0xa, 0x12, 0x14, 0x1d, 0x80000001, 0x80000008, 0x8000000a, 0x8000001e, 0x8000001f, 0x80000022, 0x80000026} {
		entries = append(entries, kvm.CPUIDEntry{Function: function, EAX: ones, EBX: ones, ECX: ones, EDX: ones})
	}
	for _, function := range []uint32{7, 0xd} {
		for index := range uint32(2) {
			entries = append(entries, kvm.CPUIDEntry{Function: function, Index: index, Flags: 1, EAX: ones, EBX: ones, ECX: ones, EDX: ones})
		}
	}
	for _, function := range []uint32{4, 0x8000001d} {
		for index, eax := range []uint32{0xfffffc21, 0xfffffc43, 0xfffffc63, 0xfffffc00} { // level 1, 2, 3, none
			entries = append(entries, kvm.CPUIDEntry{Function: function, Index: uint32(index), Flags: 1, EAX: eax})
		}
	}
	// Stale topology of the host.
	entries = append(entries, kvm.CPUIDEntry{Function: 0xb, Flags: 1, EDX: 77}, kvm.CPUIDEntry{Function: 0x1f, Flags: 1, EDX: 77})
	if !xsave {
		for i := range entries {
			if entries[i].Function == 1 {
				entries[i].ECX &^= featXSAVE
			}
		}
	}
	return entries
}

func TestTopology(t *testing.T) {
	for _, tc := range []struct{ count, idBits int }{{1, 0}, {2, 1}, {3, 2}, {4, 2}, {32, 5}} {
		ids := map[uint32]bool{}
		for id := range tc.count {
			for _, amd := range []bool{false, true} {
				c := byLeaf(guestCPUID(allOnes(amd, true), id, tc.count, true))
				leaf := c[cpuidKey{1, 0}]
				ids[leaf.EBX>>24] = true
				if leaf.EBX>>24 != uint32(id) || leaf.EBX>>16&0xff != 1<<tc.idBits || leaf.EBX&0xffff != 0xffff || (leaf.EDX&featHTT != 0) != (tc.count > 1) {
					t.Errorf("%d of %d: leaf 1 is %+v", id, tc.count, leaf)
				}
				leaves := []uint32{0xb}
				if !amd {
					leaves = append(leaves, 0x1f)
				}
				for _, function := range leaves {
					smt, core, end := c[cpuidKey{function, 0}], c[cpuidKey{function, 1}], c[cpuidKey{function, 2}]
					if smt.EAX != 0 || smt.EBX != 1 || smt.ECX != 0x100 || core.EAX != uint32(tc.idBits) || core.EBX != uint32(tc.count) || core.ECX != 0x201 || end.EBX != 0 || end.ECX != 2 {
						t.Errorf("%d of %d: leaf %#x is %+v, %+v, %+v", id, tc.count, function, smt, core, end)
					}
					if smt.EDX != uint32(id) || core.EDX != uint32(id) || end.EDX != uint32(id) {
						t.Errorf("%d of %d: leaf %#x has another id", id, tc.count, function)
					}
				}
				if amd {
					sizes, ext := c[cpuidKey{0x80000008, 0}], c[cpuidKey{0x8000001e, 0}]
					if sizes.ECX != uint32(tc.idBits<<12|(tc.count-1)) || ext.EAX != uint32(id) || ext.EBX != uint32(id) || ext.ECX != 0 {
						t.Errorf("%d of %d: AMD leaves %+v, %+v", id, tc.count, sizes, ext)
					}
				}
				function := uint32(4)
				if amd {
					function = 0x8000001d
				}
				for index, want := range []uint32{0, 0, 1<<tc.idBits - 1, 0xfff & (0xfffffc00 >> 14)} {
					if got := c[cpuidKey{function, uint32(index)}].EAX >> 14 & 0xfff; got != want {
						t.Errorf("%d of %d: cache %d is shared by %d, want %d", id, tc.count, index, got, want)
					}
				}
			}
		}
		if len(ids) != tc.count {
			t.Errorf("%d processors have %d APIC ids", tc.count, len(ids))
		}
	}
}

func TestHiddenFeatures(t *testing.T) {
	for _, amd := range []bool{false, true} {
		c := byLeaf(guestCPUID(allOnes(amd, true), 0, 2, true))
		for _, function := range []uint32{5, 0xa, 0x12, 0x14, 0x8000000a, 0x8000001f, 0x80000022, 0x80000026} {
			if e := c[cpuidKey{function, 0}]; e.EAX|e.EBX|e.ECX|e.EDX != 0 {
				t.Errorf("leaf %#x is not empty", function)
			}
		}
		one := c[cpuidKey{1, 0}].ECX
		if one&(featVMX|featPDCM|featOSXSAVE) != 0 || one&(featHypervisor|featX2APIC|featTSCDeadline|featXSAVE|featAVX) != featHypervisor|featX2APIC|featTSCDeadline|featXSAVE|featAVX {
			t.Errorf("leaf 1 ECX %#x", one)
		}
		if e := c[cpuidKey{6, 0}]; e.EAX != featARAT || e.EBX|e.ECX|e.EDX != 0 {
			t.Errorf("leaf 6 %+v", e)
		}
		if e := c[cpuidKey{7, 0}]; e.EBX&(featSGX|featTrace) != 0 || e.EBX&(1<<5) == 0 || e.ECX&(featWaitPkg|featOSPKE) != 0 || (e.EDX&featArchCapabilities != 0) == amd {
			t.Errorf("leaf 7 %+v", e)
		}
		if e := c[cpuidKey{0x80000001, 0}]; e.ECX&(1<<2) != 0 || (e.ECX&featTopoExt == 0) && amd {
			t.Errorf("leaf 80000001 %+v", e)
		}
	}
	if e := byLeaf(guestCPUID(allOnes(true, true), 0, 1, false)); e[cpuidKey{1, 0}].ECX&featTSCDeadline == 0 {
		t.Error("a deadline timer that KVM offers by itself went missing")
	}
}

// TestWithoutXSAVE: a host without XSAVE may still list what needs it.
func TestWithoutXSAVE(t *testing.T) {
	c := byLeaf(guestCPUID(allOnes(true, false), 0, 1, true))
	if e := c[cpuidKey{1, 0}]; e.ECX&(featXSAVE|featOSXSAVE|featAVX|featFMA|featF16C) != 0 {
		t.Errorf("leaf 1 ECX %#x", e.ECX)
	}
	if e := c[cpuidKey{7, 0}]; e.EBX&xsaveIn7EBX|e.ECX&xsaveIn7ECX|e.EDX&xsaveIn7EDX != 0 {
		t.Errorf("leaf 7 %+v", e)
	}
	for _, k := range []cpuidKey{{7, 1}, {0xd, 0}, {0xd, 1}, {0x1d, 0}} {
		if e := c[k]; e.EAX|e.EBX|e.ECX|e.EDX != 0 {
			t.Errorf("leaf %#x.%d is not empty", k.function, k.index)
		}
	}
}

func TestMaxLeaf(t *testing.T) {
	for have, want := range map[uint32]uint32{4: 0xb, 0xd: 0xd, 0x20: 0x20} {
		c := byLeaf(guestCPUID([]kvm.CPUIDEntry{{EAX: have}}, 0, 1, true))
		if got := c[cpuidKey{0, 0}].EAX; got != want {
			t.Errorf("highest leaf %#x became %#x", have, got)
		}
		if _, ok := c[cpuidKey{0x1f, 0}]; ok != (have >= 0x1f) {
			t.Errorf("highest leaf %#x: leaf 1f there: %v", have, ok)
		}
	}
}

func TestPhysicalAddressBits(t *testing.T) {
	if got := physicalAddressBits([]kvm.CPUIDEntry{{Function: 0x80000008, EAX: 0x3028}}); got != 40 {
		t.Errorf("%d bits", got)
	}
	if got := physicalAddressBits(nil); got != 36 {
		t.Errorf("%d bits without the leaf", got)
	}
}
