package agent

import (
	"fmt"

	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"
)

// cgroupStats returns the metrics of a cgroup as containerd wants them
// (io.containerd.cgroups.v2.Metrics).
func cgroupStats(path string) (*anypb.Any, error) {
	m, err := cgroup2.Load(path)
	if err != nil {
		return nil, fmt.Errorf("load the cgroup: %w", err)
	}
	metrics, err := m.Stat()
	if err != nil {
		return nil, fmt.Errorf("read the cgroup: %w", err)
	}
	a, err := typeurl.MarshalAnyToProto(metrics)
	if err != nil {
		return nil, fmt.Errorf("marshal the metrics: %w", err)
	}
	return a, nil
}
