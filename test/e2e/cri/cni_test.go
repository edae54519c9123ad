//go:build e2e

package cri

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// The subnets of the networks of TestCNIPlugins, and what CNI makes the gateway in them.
const (
	otherV4, gatewayV4 = "10.90.0.0/24", "10.90.0.1"
	otherV6, gatewayV6 = "fd90::/64", "fd90::1"
)

// bandwidthRate is in bytes per second, and at once.
const bandwidthRate = 1 << 20

// The plugins of the CNI project, as pods' networks. (portmap is in the network that all other tests have.)
func TestCNIPlugins(t *testing.T) {
	n := pods.For(t)
	const bridge = `"type": "bridge", "bridge": "other0", "isGateway": true, "hairpinMode": true`
	both := []string{otherV4, otherV6}
	for _, c := range []struct {
		name    string
		plugins string // with %s for the address management of the first one
		subnets []string
		// before makes what the plugins need, after removes what they leave on a node for the next pod.
		before, after []string
		check         func(*testing.T, *pods.Node, *pods.Pod, *pods.Container) // of the usual things if nil
	}{
		{name: "ptp", plugins: `{"type": "ptp", %s}`, subnets: both},
		{
			name: "bridge and firewall", plugins: `{` + bridge + `, %s}, {"type": "firewall", "backend": "iptables"}`, subnets: both,
			after: []string{"ip link delete other0", "nft delete table ip filter", "nft delete table ip6 filter"},
		},
		{
			name: "bridge and bandwidth", subnets: both, after: []string{"ip link delete other0"}, check: bandwidth,
			plugins: fmt.Sprintf(`{`+bridge+`, %%s}, {"type": "bandwidth", "ingressRate": %[1]d, "ingressBurst": %[1]d, "egressRate": %[1]d, "egressBurst": %[1]d}`, bandwidthRate*8),
		},
		{
			name: "macvlan", plugins: `{"type": "macvlan", "master": "other0", "mode": "bridge", %s}`, subnets: both,
			before: []string{"ip link add other0 type veth peer name other1", "ip link set other0 up", "ip link set other1 up"},
			after:  []string{"ip link delete other0"}, check: podToPod,
		},
		{name: "IPv4 only", plugins: `{` + bridge + `, %s}`, subnets: both[:1], after: []string{"ip link delete other0"}},
		{name: "IPv6 only", plugins: `{` + bridge + `, %s}`, subnets: both[1:], after: []string{"ip link delete other0"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			host := n.Snapshot(t)
			run := func(commands []string) {
				for _, command := range commands {
					node.Tool(t, strings.Fields(command)...)
				}
			}
			run(c.before)
			network(t, n, fmt.Sprintf(c.plugins, addresses(t, c.subnets)), func() {
				run(c.after)
				n.Collect(t)
				n.WantHost(t, host)
			})
			p := podIn(t, n, c.subnets[0])
			container := p.Run(t)
			echo(t, p, "tcp", 7003)
			if c.check != nil {
				c.check(t, n, p, container)
			} else {
				for _, pod := range addressesOf(t, p) {
					bothWays(t, container, pod, map[string]string{"IPv4": gatewayV4, "IPv6": gatewayV6}[family(pod)])
				}
			}
			if got := len(addressesOf(t, p)); got != len(c.subnets) {
				t.Errorf("%d addresses", got)
			}
			p.Remove(t)
			rules, err := exec.Command("nft", "list", "ruleset").Output()
			for _, subnet := range both {
				if ip := strings.Split(subnet, "0/")[0]; err != nil || strings.Contains(string(rules), ip) {
					t.Errorf("rules for %s are left: %v: %s", ip, err, rules)
				}
			}
		})
	}
}

// addresses is the part of a plugin's configuration by which it gives out those of subnets.
func addresses(t *testing.T, subnets []string) string {
	t.Helper()
	var ranges, routes []string
	for _, subnet := range subnets {
		ranges = append(ranges, fmt.Sprintf(`[{"subnet": %q}]`, subnet))
		all := "0.0.0.0/0"
		if strings.Contains(subnet, ":") {
			all = "::/0"
		}
		routes = append(routes, fmt.Sprintf(`{"dst": %q}`, all))
	}
	return fmt.Sprintf(`"ipam": {"type": "host-local", "dataDir": %q, "ranges": [%s], "routes": [%s]}`,
		t.TempDir(), strings.Join(ranges, ", "), strings.Join(routes, ", "))
}

// network makes plugins those of new pods until the end of the test. Then, when pods have the usual network again, it calls after.
func network(t *testing.T, n *pods.Node, plugins string, after func()) {
	t.Helper()
	// The first file in the order of names is the network. containerd sees changes by itself, some time later.
	conf := filepath.Join(n.Path("cni/conf"), "10-other.conflist")
	write(t, conf, `{"cniVersion": "1.0.0", "name": "other", "plugins": [`+plugins+`]}`)
	t.Cleanup(func() {
		if err := os.Remove(conf); err != nil {
			t.Error(err)
		}
		podIn(t, n, "10.88.0.0/16").Remove(t)
		after()
	})
}

// podIn runs a pod when containerd has come to know a network.
func podIn(t *testing.T, n *pods.Node, subnet string) *pods.Pod {
	t.Helper()
	var p *pods.Pod
	node.Until(t, "a pod is in "+subnet, func() bool {
		var err error
		if p, err = n.TryPod(t, n.PodConfig(t)); err != nil {
			t.Fatalf("run a pod: %v", err)
		}
		if netip.MustParsePrefix(subnet).Contains(netip.MustParseAddr(p.Status(t).Network.Ip)) {
			return true
		}
		p.Remove(t)
		return false
	})
	return p
}

// addressesOf are a pod's, however many it has.
func addressesOf(t *testing.T, p *pods.Pod) []string {
	t.Helper()
	status := p.Status(t).Network
	all := []string{status.Ip}
	for _, ip := range status.AdditionalIps {
		all = append(all, ip.Ip)
	}
	return all
}

// podToPod is for what does not lead to the host.
func podToPod(t *testing.T, n *pods.Node, p *pods.Pod, _ *pods.Container) {
	t.Helper()
	other := podIn(t, n, otherV4)
	c := other.Run(t)
	for _, ip := range addressesOf(t, p) {
		c.Shell(t, fmt.Sprintf("echo hello | timeout 30 nc %s 7003", ip)).WantOutput(t, "you said hello\n")
		c.Shell(t, "ping -c 1 -W 20 -s 1400 "+ip).WantExit(t, 0)
	}
	other.Remove(t)
}

// bandwidth measures that a transfer takes the time that it has to, both ways. How much longer it takes is no matter.
func bandwidth(t *testing.T, n *pods.Node, p *pods.Pod, c *pods.Container) {
	t.Helper()
	const size = 4 * bandwidthRate
	took := func(what, script, want string) {
		t.Helper()
		begin := time.Now()
		if got := c.Get(t, script); got != want {
			t.Errorf("%s: got %q, want %q", what, got, want)
		}
		// One second's worth goes at once, and the burst is rounded.
		if passed := time.Since(begin); passed < (size-2*bandwidthRate)/bandwidthRate*time.Second {
			t.Errorf("%s: %d bytes took %v at %d bytes per second", what, size, passed, bandwidthRate)
		}
	}
	sink := receive(t, gatewayV4)
	took("sending", fmt.Sprintf("head -c %d /dev/zero | timeout 300 nc %s", size, sink.address), "")
	if got := <-sink.bytes; got != size {
		t.Errorf("%d bytes were received", got)
	}
	l, err := net.Listen("tcp", gatewayV4+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if conn, err := l.Accept(); err == nil {
			_, _ = io.CopyN(conn, zeroes{}, size)
			conn.Close()
		}
	}()
	took("receiving", fmt.Sprintf("timeout 300 nc %s </dev/null | wc -c", strings.ReplaceAll(l.Addr().String(), ":", " ")), fmt.Sprint(size))
}

type zeroes struct{}

func (zeroes) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}
