package shim

import (
	"strconv"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/microvm-runtime/microvm/pkg/shim/config"
)

// guestOverhead is the memory, in bytes, that a machine gets above what its
// containers may use: the guest's kernel, its page tables and the agent.
const guestOverhead = 128 << 20

// Annotations by which the CRI plugin tells the size of a pod: the sums of its
// containers' limits, zero where one has none.
const (
	annotationCPUPeriod = "io.kubernetes.cri.sandbox-cpu-period"
	annotationCPUQuota  = "io.kubernetes.cri.sandbox-cpu-quota"
	annotationMemory    = "io.kubernetes.cri.sandbox-memory"
)

// size is that of a machine.
type size struct {
	vcpus  int
	memory uint64 // bytes
}

// limits are what a pod or a container may use; zero is no limit.
type limits struct {
	quota  int64  // of CPU time, in microseconds
	period uint64 // that the quota is for
	memory int64  // bytes
	// container says that they are a container's own, not those of a pod with
	// all that is going to be in it.
	container bool
}

// limitsOf are those of the pod if the annotations name any, or else the
// container's.
func limitsOf(spec *specs.Spec) limits {
	l := containerLimits(spec)
	number := func(key string) int64 {
		n, err := strconv.ParseInt(spec.Annotations[key], 10, 64)
		if err != nil {
			return 0
		}
		return n
	}
	if quota, period := number(annotationCPUQuota), number(annotationCPUPeriod); quota > 0 && period > 0 {
		l.quota, l.period, l.container = quota, uint64(period), false
	}
	if memory := number(annotationMemory); memory > 0 {
		l.memory, l.container = memory, false
	}
	return l
}

// containerLimits are a container's own.
func containerLimits(spec *specs.Spec) limits {
	l := limits{container: true}
	if spec.Linux != nil && spec.Linux.Resources != nil {
		l.update(spec.Linux.Resources)
	}
	return l
}

// update changes what the resources name.
func (l *limits) update(r *specs.LinuxResources) {
	if r.CPU != nil && r.CPU.Quota != nil {
		l.quota = *r.CPU.Quota
	}
	if r.CPU != nil && r.CPU.Period != nil {
		l.period = *r.CPU.Period
	}
	if r.Memory != nil && r.Memory.Limit != nil {
		l.memory = *r.Memory.Limit
	}
}

// defaultPeriod is the kernel's for a quota that comes without one, in
// microseconds (kernel/sched/fair.c, default_cfs_period).
const defaultPeriod = 100000

// usage is the same in units that can be added up.
func (l limits) usage() usage {
	var u usage
	if l.quota > 0 {
		period := l.period
		if period == 0 {
			period = defaultPeriod
		}
		// A larger quota is more than any host has, and would wrap around.
		u.milliCPU = min(int64((uint64(min(l.quota, 1<<50))*1000-1)/period)+1, 1<<50)
	}
	if l.memory > 0 {
		u.memory = min(l.memory, 1<<50)
	}
	return u
}

// usage is what containers may use; what has no limit does not count.
type usage struct {
	milliCPU int64
	memory   int64 // bytes
}

func (u usage) add(v usage) usage { return usage{u.milliCPU + v.milliCPU, u.memory + v.memory} }

func (u usage) sub(v usage) usage {
	return usage{max(u.milliCPU-v.milliCPU, 0), max(u.memory-v.memory, 0)}
}

func (u usage) max(v usage) usage {
	return usage{max(u.milliCPU, v.milliCPU), max(u.memory, v.memory)}
}

// machineSize says how large a sandbox's machine has to be: at least the
// configured default, more if its containers are limited to more. Memory that
// the guest does not touch costs nothing, and the containers' limits are
// enforced in the guest; so a small limit makes no small machine, which further
// containers might not fit into, and a container with a limit of CPU time alone
// has the default memory.
func machineSize(c *config.Config, l limits, hostCPUs int, hostMemory uint64) size {
	return sizeFor(c, l.usage(), hostCPUs, hostMemory)
}

func sizeFor(c *config.Config, u usage, hostCPUs int, hostMemory uint64) size {
	s := size{vcpus: c.DefaultVCPUs, memory: c.DefaultMemory}
	if u.milliCPU > 0 {
		s.vcpus = max(s.vcpus, int(min((u.milliCPU+999)/1000, config.MaxVCPUs)))
	}
	if u.memory > 0 {
		s.memory = max(s.memory, min(uint64(u.memory), hostMemory)+guestOverhead)
	}
	limit := sizeLimit(c, hostCPUs, hostMemory)
	return size{vcpus: min(s.vcpus, limit.vcpus), memory: min(s.memory, limit.memory) / sizeUnit * sizeUnit}
}

// sizeUnit is a huge page of the host's.
const sizeUnit = 2 << 20

// sizeLimit is up to where a machine can grow. There is no use in more CPUs than
// the host has, nor in more memory.
func sizeLimit(c *config.Config, hostCPUs int, hostMemory uint64) size {
	s := size{vcpus: config.MaxVCPUs, memory: hostMemory}
	if c.MaxVCPUs > 0 {
		s.vcpus = min(s.vcpus, c.MaxVCPUs)
	}
	if c.MaxMemory > 0 {
		s.memory = min(s.memory, c.MaxMemory)
	}
	s.vcpus = min(s.vcpus, max(hostCPUs, 1))
	s.memory = max(s.memory, config.MinMemory) / sizeUnit * sizeUnit
	return s
}
