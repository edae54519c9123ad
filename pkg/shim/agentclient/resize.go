package agentclient

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// maxCPUs is more processors than any guest has.
const maxCPUs = 1 << 12

// ResizeSandbox brings processors on and off line and waits for the guest's
// kernel to have plugged bytes of memory beyond those it has booted with, or not
// to get there. The answer is the agent's word for how many processors there
// are; how much memory there is, the VMM knows better.
func (c *Client) ResizeSandbox(ctx context.Context, cpus int, plugged uint64) (online int, err error) {
	ctx, cancel := context.WithTimeout(ctx, long)
	defer cancel()
	r, err := c.rpc.ResizeSandbox(ctx, &agentproto.ResizeSandboxRequest{Cpus: uint32(cpus), PluggedBytes: plugged})
	if err != nil {
		return 0, err
	}
	if n := r.GetCpus(); n == 0 || n > maxCPUs {
		return 0, fmt.Errorf("agent: %d is no number of processors: %w", n, errdefs.ErrDataLoss)
	}
	return int(r.GetCpus()), nil
}
