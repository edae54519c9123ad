package guestspec

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Resources takes out limits that name parts of the host. It is for the limits
// of an update as well.
func Resources(res *specs.LinuxResources) (remarks []string) {
	if cpu := res.CPU; cpu != nil {
		if cpu.Cpus != "" || cpu.Mems != "" {
			remarks = append(remarks, fmt.Sprintf("cpuset (CPUs %q, memory nodes %q) left out: the numbers are the host's", cpu.Cpus, cpu.Mems))
			cpu.Cpus, cpu.Mems = "", ""
		}
		if cpu.RealtimePeriod != nil || cpu.RealtimeRuntime != nil {
			remarks = append(remarks, "real-time limits left out: they are of cgroup version 1")
			cpu.RealtimePeriod, cpu.RealtimeRuntime = nil, nil
		}
	}
	if b := res.BlockIO; b != nil {
		if n := len(b.WeightDevice) + len(b.ThrottleReadBpsDevice) + len(b.ThrottleWriteBpsDevice) +
			len(b.ThrottleReadIOPSDevice) + len(b.ThrottleWriteIOPSDevice); n > 0 {
			remarks = append(remarks, fmt.Sprintf("%d limits of block devices left out: the devices are the host's", n))
		}
		res.BlockIO = &specs.LinuxBlockIO{Weight: b.Weight, LeafWeight: b.LeafWeight}
	}
	if len(res.Rdma) > 0 {
		remarks = append(remarks, "RDMA limits left out: the devices are the host's")
		res.Rdma = nil
	}
	return append(remarks, unified(res.Unified)...)
}

// unified takes out what a cgroup's files would have in them of the host: its
// processors and memory nodes by number, its devices by number or by name.
func unified(files map[string]string) (remarks []string) {
	for _, name := range slices.Sorted(maps.Keys(files)) {
		var left []string
		switch controller, _, _ := strings.Cut(name, "."); controller {
		case "cpuset", "rdma", "misc", "dmem":
		case "io":
			// A line with a colon is about one device; io.weight also has one
			// for the others (block/blk-iocost.c, ioc_weight_write).
			lines := strings.Split(files[name], "\n")
			left = slices.DeleteFunc(slices.Clone(lines), func(line string) bool { return strings.Contains(line, ":") })
			if len(left) == len(lines) {
				continue
			}
		default:
			continue
		}
		remarks = append(remarks, fmt.Sprintf("unified: %s %q left out: the numbers and names are the host's", name, files[name]))
		if files[name] = strings.Join(left, "\n"); strings.TrimSpace(files[name]) == "" {
			delete(files, name)
		}
	}
	return remarks
}
