package main

import "testing"

func TestParseMemory(t *testing.T) {
	const smaps = `00400000-005ae000 r-xp 00000000 fe:00 5334415                            /usr/bin/microvm-vmm
Rss:                1692 kB
Private_Clean:       100 kB
Private_Dirty:         1 kB
007b5000-007ca000 rw-p 003b5000 fe:00 5334415                            /usr/bin/microvm-vmm
Private_Clean:         0 kB
Private_Dirty:        28 kB
2a7572800000-2a7573000000 rw-p 00000000 00:00 0
Private_Clean:         0 kB
Private_Dirty:      1000 kB
VmFlags: rd wr mr mw me ac nh
7f5ed7400000-7f5ed7dbe000 r--s 00000000 fe:00 5333805                    /a folder/guest.erofs
Private_Clean:      8000 kB
Private_Dirty:         0 kB
7f5ed8400000-7f5ef8400000 rw-p 00000000 00:00 0
Private_Clean:         0 kB
Private_Dirty:     45056 kB
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
Private_Clean:         0 kB
Private_Dirty:        12 kB
`
	m, err := parseMemory(smaps)
	if want := (processMemory{anonymous: 1040, program: 101, image: 8000}); err != nil || m != want {
		t.Errorf("%+v, %v", m, err)
	}
	for _, bad := range []string{"0-g r--p 0 00:00 0\n", "0-1 r--p\n", "Private_Clean: x kB\n"} {
		if m, err := parseMemory(bad); err == nil {
			t.Errorf("%q: %+v", bad, m)
		}
	}
}
