package agenttest

import (
	"context"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// ResizeSandbox does all that it is asked for.
func (a *Agent) ResizeSandbox(_ context.Context, r *agentproto.ResizeSandboxRequest) (*agentproto.ResizeSandboxResponse, error) {
	if reply, err := enter[agentproto.ResizeSandboxResponse](a, "ResizeSandbox", r); reply != nil || err != nil {
		return reply, err
	}
	return &agentproto.ResizeSandboxResponse{Cpus: r.GetCpus(), PluggedBytes: r.GetPluggedBytes()}, nil
}
