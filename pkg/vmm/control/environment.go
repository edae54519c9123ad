package control

import (
	"runtime"
	"strconv"
)

// environment is all that a VMM has of one: it takes no setting from the shim's.
func environment(vcpus int) []string {
	return []string{
		// The heap has a MiB or two. Hosts that give huge pages to whoever does
		// not refuse them, as Debian's do, would make it 4 MiB.
		"GODEBUG=disablethp=1",
		"GOMAXPROCS=" + strconv.Itoa(MaxProcs(vcpus)),
	}
}

// MaxProcs is GOMAXPROCS for the VMM of a machine with so many vCPUs. Go's own
// choice, the CPU quota of the process's cgroup, is the number of the host's CPUs
// here: a pod's quota is that of a cgroup above the VMM's, and the VMM's is the
// root of its namespace, where Go does not find it. The shim has the number of
// vCPUs from the quota.
func MaxProcs(vcpus int) int { return maxProcs(vcpus, runtime.NumCPU()) }

// deviceProcs are those for the devices' goroutines. A vCPU has one of its own
// for some time after it has gone back to the guest.
const deviceProcs = 2

func maxProcs(vcpus, hostCPUs int) int { return min(vcpus+deviceProcs, hostCPUs) }
