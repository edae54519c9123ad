package shim

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/errdefs"
)

// containerd's CRI plugin tells of a pod that was resized in an extension of the
// sandbox (internal/cri/server/podsandbox/helpers.go), which is JSON.
const (
	updatedResourcesKey  = "updated-resources"
	updatedResourcesType = "io.containerd.cri.v1/UpdatedResources"
)

// UpdateSandbox changes how much the pod as a whole may use, and the machine with
// it. Other changes of a sandbox mean nothing to the machine.
func (s *service) UpdateSandbox(ctx context.Context, r *sandboxapi.UpdateSandboxRequest) (*sandboxapi.UpdateSandboxResponse, error) {
	machine, err := s.livePod(r.GetSandboxID())
	if err != nil {
		return nil, err
	}
	l, changed, err := updatedLimits(r)
	if err == nil && changed {
		err = machine.resizer.setPod(ctx, l.usage())
	}
	if err != nil {
		return nil, fmt.Errorf("sandbox %s: %w", r.GetSandboxID(), err)
	}
	return &sandboxapi.UpdateSandboxResponse{}, nil
}

// updatedLimits are the pod's new ones, if the request changes them.
func updatedLimits(r *sandboxapi.UpdateSandboxRequest) (l limits, changed bool, err error) {
	if r.GetSandbox() == nil {
		return limits{}, false, fmt.Errorf("update without the sandbox's metadata: %w", errdefs.ErrInvalidArgument)
	}
	if fields := r.GetFields(); len(fields) > 0 && !slices.Contains(fields, "extensions") && !slices.Contains(fields, "extensions."+updatedResourcesKey) {
		return limits{}, false, nil
	}
	extension := r.GetSandbox().GetExtensions()[updatedResourcesKey]
	if extension == nil {
		return limits{}, false, nil
	}
	if extension.GetTypeUrl() != updatedResourcesType {
		// containerd puts up with this error only.
		return limits{}, false, fmt.Errorf("resources of the type %q are not known: %w", extension.GetTypeUrl(), errdefs.ErrNotImplemented)
	}
	// Of the CRI's LinuxContainerResources what counts for a machine. The overhead
	// is not the guest's.
	var updated struct {
		Resources *struct {
			CPUPeriod   int64 `json:"cpu_period"`
			CPUQuota    int64 `json:"cpu_quota"`
			MemoryBytes int64 `json:"memory_limit_in_bytes"`
		}
	}
	if err := json.Unmarshal(extension.GetValue(), &updated); err != nil {
		return limits{}, false, fmt.Errorf("resources: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if updated.Resources == nil {
		return limits{}, false, nil
	}
	return limits{
		quota:  updated.Resources.CPUQuota,
		period: uint64(max(updated.Resources.CPUPeriod, 0)),
		memory: updated.Resources.MemoryBytes,
	}, true, nil
}
