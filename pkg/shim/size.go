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
}

// limitsOf are those of the pod if the annotations name any, or else the
// container's.
func limitsOf(spec *specs.Spec) limits {
	var l limits
	if spec.Linux != nil && spec.Linux.Resources != nil {
		r := spec.Linux.Resources
		if r.CPU != nil && r.CPU.Quota != nil && r.CPU.Period != nil {
			l.quota, l.period = *r.CPU.Quota, *r.CPU.Period
		}
		if r.Memory != nil && r.Memory.Limit != nil {
			l.memory = *r.Memory.Limit
		}
	}
	number := func(key string) int64 {
		n, err := strconv.ParseInt(spec.Annotations[key], 10, 64)
		if err != nil {
			return 0
		}
		return n
	}
	if quota, period := number(annotationCPUQuota), number(annotationCPUPeriod); quota > 0 && period > 0 {
		l.quota, l.period = quota, uint64(period)
	}
	if memory := number(annotationMemory); memory > 0 {
		l.memory = memory
	}
	return l
}

// machineSize says how large a sandbox's machine has to be: at least the
// configured default, more if its containers are limited to more. Memory that
// the guest does not touch costs nothing, and the containers' limits are
// enforced in the guest; so a small limit makes no small machine, which further
// containers might not fit into. There is no use in more CPUs than the host
// has, nor in more memory.
func machineSize(c *config.Config, l limits, hostCPUs int, hostMemory uint64) size {
	s := size{vcpus: c.DefaultVCPUs, memory: c.DefaultMemory}
	if l.quota > 0 && l.period > 0 {
		vcpus := (uint64(l.quota)-1)/l.period + 1
		s.vcpus = max(s.vcpus, int(min(vcpus, config.MaxVCPUs)))
	}
	s.vcpus = min(s.vcpus, max(hostCPUs, 1))
	if l.memory > 0 {
		s.memory = max(s.memory, min(uint64(l.memory), hostMemory)+guestOverhead)
	}
	s.memory = min(s.memory, max(hostMemory, config.MinMemory))
	const unit = 2 << 20 // a huge page of the host
	s.memory = s.memory / unit * unit
	return s
}
