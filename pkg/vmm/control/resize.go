package control

import (
	"context"
	"encoding/json"
	"fmt"
)

const methodResize = "resize"

// Size is that of a machine.
type Size struct {
	// VCPUs are those that the guest can start. There are never less than there
	// have once been.
	VCPUs int `json:"vcpus"`
	// MemoryBytes is the memory that the guest has, whether it uses it or not.
	MemoryBytes uint64 `json:"memory_bytes"`
}

// Resize makes vCPUs up to size.VCPUs for the guest to start, and asks the guest
// to plug or unplug memory until it has size.MemoryBytes. The guest takes its
// time, and may do less: the answer is what there is now.
func (v *VMM) Resize(ctx context.Context, size Size) (Size, error) {
	answer, err := v.order(ctx, methodResize, size)
	if err != nil {
		return Size{}, fmt.Errorf("resize the machine: %w", err)
	}
	var now Size
	if err := json.Unmarshal(answer, &now); err != nil {
		return Size{}, fmt.Errorf("resize the machine: %w", err)
	}
	return now, nil
}
