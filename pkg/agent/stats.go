package agent

import (
	"fmt"

	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"
)

// stats returns the container's metrics as containerd wants them
// (io.containerd.cgroups.v2.Metrics).
func (c *container) stats() (*anypb.Any, error) {
	m, err := cgroup2.Load(cgroupPath(c.id))
	if err != nil {
		return nil, fmt.Errorf("load the cgroup of container %q: %w", c.id, err)
	}
	metrics, err := m.Stat()
	if err != nil {
		return nil, fmt.Errorf("read the metrics of container %q: %w", c.id, err)
	}
	a, err := typeurl.MarshalAnyToProto(metrics)
	if err != nil {
		return nil, fmt.Errorf("marshal the metrics of container %q: %w", c.id, err)
	}
	return a, nil
}
