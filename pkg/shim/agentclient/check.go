package agentclient

import (
	"fmt"
	"path"

	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// checkPid accepts what can be a process id in the guest.
func checkPid(pid uint32) (uint32, error) {
	if pid == 0 || pid >= maxPid {
		return 0, fmt.Errorf("agent: %d is no process id: %w", pid, errdefs.ErrDataLoss)
	}
	return pid, nil
}

// checkStatus accepts what a shell could tell of a process: an exit code or
// 128 plus a signal.
func checkStatus(exitStatus uint32) (uint32, error) {
	if exitStatus > 255 {
		return 0, fmt.Errorf("agent: %d is no exit status: %w", exitStatus, errdefs.ErrDataLoss)
	}
	return exitStatus, nil
}

func checkProcesses(r *agentproto.ListProcessesResponse) ([]Process, error) {
	list := make([]Process, 0, len(r.GetProcesses()))
	for _, p := range r.GetProcesses() {
		pid, err := checkPid(p.GetPid())
		if err != nil {
			return nil, err
		}
		list = append(list, Process{Pid: pid, ExecID: p.GetExecId()})
	}
	return list, nil
}

// checkStats parses the metrics: what is passed on is what we could read, not
// bytes of the guest's choosing under a type that others trust.
func checkStats(r *agentproto.ContainerStatsResponse) (*cgroup2.Metrics, error) {
	any := r.GetMetrics()
	if name := path.Base(any.GetTypeUrl()); name != "io.containerd.cgroups.v2.Metrics" {
		return nil, fmt.Errorf("agent: metrics of type %.64q: %w", name, errdefs.ErrDataLoss)
	}
	var metrics cgroup2.Metrics
	if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(any.GetValue(), &metrics); err != nil {
		return nil, fmt.Errorf("agent: metrics: %w: %w", err, errdefs.ErrDataLoss)
	}
	return &metrics, nil
}
