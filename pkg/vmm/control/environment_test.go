package control

import "testing"

func TestMaxProcs(t *testing.T) {
	for _, tc := range []struct{ vcpus, hostCPUs, want int }{
		{1, 64, 3},
		{32, 64, 34},
		{2, 2, 2},
		{4, 1, 1},
	} {
		if n := maxProcs(tc.vcpus, tc.hostCPUs); n != tc.want {
			t.Errorf("%d vCPUs on %d CPUs: %d, want %d", tc.vcpus, tc.hostCPUs, n, tc.want)
		}
	}
}
