package agent

import (
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// mergeResources returns what a container's resources are after an update,
// given as the JSON of an OCI LinuxResources: what the update does not name
// stays as it is. current is not changed.
func mergeResources(current *specs.LinuxResources, update []byte) (*specs.LinuxResources, error) {
	merged := new(specs.LinuxResources)
	if current != nil {
		data, err := json.Marshal(current)
		if err != nil {
			return nil, fmt.Errorf("copy the container's resources: %w", err)
		}
		if err := json.Unmarshal(data, merged); err != nil {
			return nil, fmt.Errorf("copy the container's resources: %w", err)
		}
	}
	// Decoding into a value that is there already leaves alone what the JSON
	// does not have, at every depth.
	if err := json.Unmarshal(update, merged); err != nil {
		return nil, fmt.Errorf("parse the resources: %w: %w", err, errdefs.ErrInvalidArgument)
	}

	var named specs.LinuxResources
	if err := json.Unmarshal(update, &named); err != nil {
		return nil, fmt.Errorf("parse the resources: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	// A new memory limit makes the old limit of memory and swap together
	// meaningless, and often invalid.
	if m := named.Memory; m != nil && m.Limit != nil && m.Swap == nil {
		merged.Memory.Swap = nil
	}
	// An idle group takes no weight (kernel/sched/fair.c, sched_group_set_shares),
	// so the old one would fail the update. runc leaves it out too.
	if c := named.CPU; c != nil && c.Idle != nil && c.Shares == nil {
		merged.CPU.Shares = nil
	}
	return merged, nil
}

// cgroupResources converts OCI resources to libcontainer's. devices are the
// container's device rules: an update does not change them, and without them
// the container would be cut off from /dev/null too.
func cgroupResources(r *specs.LinuxResources, id string, current *cgroups.Resources) (*cgroups.Resources, error) {
	update := *r
	update.Devices = nil
	c, err := specconv.CreateCgroupConfig(&specconv.CreateOpts{
		CgroupName: id,
		Spec:       &specs.Spec{Linux: &specs.Linux{Resources: &update}},
	}, nil)
	if err != nil {
		return nil, fmt.Errorf("convert the resources: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	c.Resources.Devices = current.Devices
	c.Resources.Freezer = current.Freezer
	return c.Resources, nil
}
