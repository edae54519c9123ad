package shim

import (
	"context"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/microvm-runtime/microvm/pkg/shim/agentclient"
)

// clockInterval is how often the guest's clock is compared with the host's. What
// the host's is disciplined by is tens of ppm, which are a few milliseconds in
// that time; more often would wake an idle pod.
const clockInterval = time.Minute

// keepTime has the guest's wall clock follow the host's until the connection to
// the agent is lost. An agent that does not answer is asked nothing else until it
// does, and that it does something else than compare is said once.
func keepTime(agent *agentclient.Client) {
	ticker := time.NewTicker(clockInterval)
	defer ticker.Stop()
	for said := false; ; {
		err := agent.CompareTime(context.Background())
		if err != nil && !said && !errdefs.IsUnavailable(err) {
			said = true
			log.L.WithError(err).Warn("the guest's clock may not follow the host's")
		}
		select {
		case <-ticker.C:
		case <-agent.Done():
			return
		}
	}
}
