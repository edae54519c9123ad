//go:build e2e

package crivm

import (
	"regexp"
	"strings"
	"testing"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

var macAddress = regexp.MustCompile(`link/ether ([0-9a-f:]{17})`)

// mac finds a link's address in what ip says of it.
func mac(t *testing.T, said string) string {
	t.Helper()
	m := macAddress.FindStringSubmatch(said)
	if m == nil {
		t.Fatalf("no address: %s", said)
	}
	return m[1]
}

// A link that appears in the pod's network namespace appears in the guest too, as it is, and goes with it.
func TestLateLink(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	c := p.Run(t)
	namespace := inspect(t, n, p).networkNamespace(t)
	host := func(command string) string {
		t.Helper()
		return node.Tool(t, strings.Fields(command)...)
	}
	inside := func(command string) string {
		t.Helper()
		return host("nsenter --net=" + namespace + " " + command)
	}
	if got, want := mac(t, c.Get(t, "ip link show eth0")), mac(t, inside("ip link show eth0")); got != want {
		t.Errorf("eth0 is %s, and on the host %s", got, want)
	}

	host("ip link add late0 mtu 1420 type veth peer name eth1 mtu 1420 netns " + namespace)
	gone := false
	t.Cleanup(func() {
		if !gone {
			host("ip link delete late0")
		}
	})
	host("ip addr add 10.77.0.1/24 dev late0")
	host("ip addr add fd77::1/64 dev late0 nodad")
	host("ip link set late0 up")
	inside("ip addr add 10.77.0.2/24 dev eth1")
	inside("ip addr add fd77::2/64 dev eth1 nodad")
	inside("ip link set eth1 up")
	inside("ip route add 10.78.0.0/16 via 10.77.0.1 dev eth1")
	inside("ip neigh add 10.77.0.9 lladdr 02:00:00:00:00:09 nud permanent dev eth1")

	want := map[string][]string{
		"ip addr show dev eth1":  {"link/ether " + mac(t, inside("ip link show eth1")), "mtu 1420", "10.77.0.2/24", "fd77::2/64", ",UP"},
		"ip route":               {"10.78.0.0/16 via 10.77.0.1 dev eth1", "10.77.0.0/24 dev eth1", "default via"},
		"ip -6 route":            {"fd77::/64 dev eth1"},
		"ip neigh show dev eth1": {"10.77.0.9 lladdr 02:00:00:00:00:09", "PERMANENT"},
	}
	lacking := ""
	t.Cleanup(func() {
		if t.Failed() && lacking != "" {
			t.Log(lacking)
		}
	})
	node.Until(t, "the link is there, as it is on the host", func() bool {
		lacking = ""
		for command, all := range want {
			said := c.Shell(t, command)
			for _, w := range all {
				if !strings.Contains(strings.Join(strings.Fields(said.Stdout), " "), w) {
					lacking += command + " lacks " + w + ": " + said.String() + "\n"
				}
			}
		}
		return lacking == ""
	})
	for _, address := range []string{"10.77.0.1", "fd77::1"} {
		c.Shell(t, "ping -c 1 -W 20 "+address).WantExit(t, 0)
	}
	host("ip link delete late0")
	gone = true
	node.Until(t, "the link is gone", func() bool { return c.Shell(t, "[ -e /sys/class/net/eth1 ]").Code != 0 })
	c.Shell(t, "ping -c 1 -W 20 10.88.0.1").WantExit(t, 0)
}
