//go:build e2e

package crivm

import (
	"fmt"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// A pod that limits itself gets no more through its disk and its network than that, and all of it in the end.
func TestRateLimits(t *testing.T) {
	const (
		rate = 1 << 20 // bytes per second, and at once
		size = 8 << 20
	)
	n := pods.For(t)
	other := n.Pod(t)
	server := other.Run(t, pods.Shell("tcpsvd 0.0.0.0 7002 sh -c 'cat >/dev/null; echo all of it' & tcpsvd 0.0.0.0 7003 head -c "+fmt.Sprint(size)+" /dev/zero"))
	server.Listening(t, "tcp", 7002)
	server.Listening(t, "tcp", 7003)
	address, _ := other.IPs(t)
	c := n.Pod(t, func(c *cri.PodSandboxConfig) {
		limit := fmt.Sprint(rate)
		c.Annotations = map[string]string{
			"io.microvm.disk-bytes-per-second":             limit,
			"io.microvm.network-receive-bytes-per-second":  limit,
			"io.microvm.network-transmit-bytes-per-second": limit,
		}
	}).Run(t)
	for _, test := range []struct{ name, script, want string }{
		{"write", fmt.Sprintf("dd if=/dev/zero of=/tmp/file bs=64k count=%d conv=fsync 2>/dev/null; wc -c </tmp/file", size>>16), fmt.Sprint(size)},
		{"transmit", fmt.Sprintf("head -c %d /dev/zero | nc %s 7002", size, address), "all of it"},
		{"receive", fmt.Sprintf("nc %s 7003 </dev/null | wc -c", address), fmt.Sprint(size)},
	} {
		t.Run(test.name, func(t *testing.T) {
			begin := time.Now()
			if got := c.Get(t, test.script); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
			// However fast or slow the machine is. A limit has no upper one.
			if took := time.Since(begin); took < (size-rate)/rate*time.Second {
				t.Errorf("%d bytes took %v at %d bytes per second", size, took, rate)
			}
		})
	}
}
