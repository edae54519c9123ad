//go:build e2e

package cri

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// The bridge's addresses on the host and its MTU, as hack/containerd.sh has them.
const (
	hostV4, hostV6 = "10.88.0.1", "fd88::1"
	mtu            = "1450"
)

// echo makes a server that sends every line back, for TCP or UDP, on a port of both families. It returns when that listens.
func echo(t *testing.T, p *pods.Pod, protocol string, port int) {
	t.Helper()
	server := map[string]string{"tcp": "tcpsvd", "udp": "udpsvd"}[protocol]
	c := p.Run(t, pods.Command(server, "::", fmt.Sprint(port), "sh", "-c", "echo you said $(head -n 1)"))
	c.Listening(t, protocol, port)
}

// What the pod sees of its network is what CRI says and what the CNI plugins have made.
func TestNetworkInPod(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	v4, v6 := p.IPs(t)
	c := p.Run(t)
	if links := c.Get(t, "ls /sys/class/net"); strings.Join(strings.Fields(links), " ") != "eth0 lo" {
		t.Errorf("links: %s", links)
	}
	addresses := c.Get(t, "ip addr show dev eth0")
	for _, want := range []string{v4 + "/16", v6 + "/64", "mtu " + mtu, ",UP"} {
		if !strings.Contains(addresses, want) {
			t.Errorf("eth0 lacks %s:\n%s", want, addresses)
		}
	}
	if lo := c.Get(t, "ip addr show dev lo"); !strings.Contains(lo, "127.0.0.1/8") || !strings.Contains(lo, ",UP") {
		t.Errorf("lo: %s", lo)
	}
	if r := c.Get(t, "ip -4 route"); !strings.Contains(r, "default via "+hostV4+" dev eth0") {
		t.Errorf("IPv4 routes: %s", r)
	}
	if r := c.Get(t, "ip -6 route"); !strings.Contains(r, "default via "+hostV6+" dev eth0") {
		t.Errorf("IPv6 routes: %s", r)
	}
	if tentative := c.Get(t, "ip -6 addr"); strings.Contains(tentative, "dadfailed") {
		t.Errorf("duplicate address: %s", tentative)
	}
	if net.ParseIP(v4).To4() == nil || net.ParseIP(v6).To4() != nil {
		t.Errorf("addresses %s and %s", v4, v6)
	}
}

func TestPodToPod(t *testing.T) {
	n := pods.For(t)
	server := n.Pod(t)
	client := n.Pod(t).Run(t)
	v4, v6 := server.IPs(t)
	echo(t, server, "tcp", 7000)
	echo(t, server, "udp", 7001)
	for _, ip := range []string{v4, v6} {
		t.Run("tcp "+family(ip), func(t *testing.T) {
			client.Shell(t, fmt.Sprintf("echo hello | timeout 30 nc %s 7000", ip)).WantOutput(t, "you said hello\n")
		})
		t.Run("udp "+family(ip), func(t *testing.T) {
			// A datagram may be lost, and nc does not end by itself.
			node.Until(t, "an answer comes", func() bool {
				return strings.Contains(client.Shell(t, fmt.Sprintf("echo hello | timeout 2 nc -u %s 7001", ip)).Stdout, "you said hello")
			})
		})
		t.Run("ping "+family(ip), func(t *testing.T) {
			client.Shell(t, "ping -c 1 -W 20 "+ip).WantExit(t, 0)
		})
		t.Run("full size "+family(ip), func(t *testing.T) {
			client.Shell(t, "ping -c 1 -W 20 -s 1400 "+ip).WantExit(t, 0)
		})
	}
}

func family(ip string) string {
	if net.ParseIP(ip).To4() != nil {
		return "IPv4"
	}
	return "IPv6"
}

// More than fits into any buffer, both ways, unharmed.
func TestBulkTransfer(t *testing.T) {
	n := pods.For(t)
	server := n.Pod(t)
	c := server.Run(t, pods.Shell("tcpsvd 0.0.0.0 7002 cat"))
	c.Listening(t, "tcp", 7002)
	v4, _ := server.IPs(t)
	client := n.Pod(t).Run(t)
	client.Get(t, "head -c 20000000 /dev/urandom >/tmp/sent")
	// tcpsvd's cat ends at the end of its input, and nc with the connection.
	client.Get(t, fmt.Sprintf("timeout 300 nc %s 7002 </tmp/sent >/tmp/received; cmp /tmp/sent /tmp/received", v4))
}

func TestHostToPodAndBack(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	v4, v6 := p.IPs(t)
	echo(t, p, "tcp", 7003)
	c := p.Run(t)
	for pod, host := range map[string]string{v4: hostV4, v6: hostV6} {
		t.Run(family(pod), func(t *testing.T) { bothWays(t, c, pod, host) })
	}
}

// bothWays has the host and a pod, which echoes on port 7003, reach each other by TCP, the one under an address of the host.
func bothWays(t *testing.T, c *pods.Container, pod, host string) {
	t.Helper()
	if got := talk(t, "tcp", net.JoinHostPort(pod, "7003"), "hello\n"); got != "you said hello\n" {
		t.Errorf("answer of the pod: %q", got)
	}
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	from := make(chan string, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			from <- err.Error()
			return
		}
		fmt.Fprintln(conn, "welcome")
		ip, _, _ := net.SplitHostPort(conn.RemoteAddr().String())
		from <- ip
		conn.Close()
	}()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	c.Shell(t, fmt.Sprintf("timeout 30 nc %s %s </dev/null", host, port)).WantOutput(t, "welcome\n")
	l.Close() // if nobody came
	if ip := <-from; ip != pod {
		t.Errorf("the host sees %s, not the pod's address %s", ip, pod)
	}
}

func TestHostPort(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t, pods.HostPort(cri.Protocol_TCP, 7004, 18004), pods.HostPort(cri.Protocol_UDP, 7005, 18005))
	echo(t, p, "tcp", 7004)
	echo(t, p, "udp", 7005)
	// The portmap plugin does not lead from the host's IPv6 loopback to pods: there is no route_localnet for it.
	for _, host := range []string{"127.0.0.1", hostV4, hostV6} {
		if got := talk(t, "tcp", net.JoinHostPort(host, "18004"), "hello\n"); got != "you said hello\n" {
			t.Errorf("answer by TCP through %s: %q", host, got)
		}
		// A datagram may be lost.
		node.Until(t, "an answer comes by UDP through "+host, func() bool {
			got, err := ask("udp", net.JoinHostPort(host, "18005"), "hello\n", time.Duration(node.Slow())*time.Second)
			return err == nil && got == "you said hello\n"
		})
	}
}

// A web server as it is found in the wild: many processes, a page from a volume, several clients at once, a reload.
func TestWebServer(t *testing.T) {
	n := pods.For(t)
	n.Provide(t, node.Web)
	dir := t.TempDir()
	page := strings.Repeat("0123456789abcdef", 20000)
	write(t, filepath.Join(dir, "page"), page)
	p := n.Pod(t, pods.HostPort(cri.Protocol_TCP, 80, 18080))
	c := p.Run(t, pods.Image(node.Web), pods.Mount(dir, "/usr/share/nginx/html", pods.ReadOnly))
	c.Listening(t, "tcp", 80)
	v4, v6 := p.IPs(t)
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(host string) string {
		r, err := client.Get("http://" + host + "/page")
		if err != nil {
			return err.Error()
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil {
			return err.Error()
		}
		return string(b)
	}
	var wg sync.WaitGroup
	for _, host := range []string{v4, "[" + v6 + "]", "127.0.0.1:18080", hostV4 + ":18080"} {
		for range 3 {
			wg.Go(func() {
				if got := get(host); got != page {
					t.Errorf("%s: %d bytes, want %d: %.100s", host, len(got), len(page), got)
				}
			})
		}
	}
	wg.Wait()
	c.Get(t, "nginx -s reload")
	node.Until(t, "it serves after a reload", func() bool { return get(v4) == page })
	c.Stop(t, 60)
	if code := c.Wait(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

func TestDNS(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t, func(c *cri.PodSandboxConfig) {
		c.Hostname = "box-17"
		c.DnsConfig = &cri.DNSConfig{
			Servers: []string{"10.9.9.9", "fd99::9"}, Searches: []string{"a.example", "b.example"}, Options: []string{"ndots:3"},
		}
	})
	c := p.Run(t)
	got := strings.Fields(c.Get(t, "cat /etc/resolv.conf"))
	want := strings.Fields("search a.example b.example nameserver 10.9.9.9 nameserver fd99::9 options ndots:3")
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("resolv.conf: %v, want %v", got, want)
	}
	if got := c.Get(t, "hostname; cat /proc/sys/kernel/hostname /etc/hostname"); got != "box-17\nbox-17\nbox-17" {
		t.Errorf("host names: %q", got)
	}
}

// A network whose second plugin fails: the pod does not start, the message says why, and nothing is left of the first
// plugin's work.
func TestNetworkFailsHalfWay(t *testing.T) {
	n := pods.For(t)
	plugin := n.Path("cni/bin/broken")
	write(t, plugin, "#!/bin/sh\n"+`[ "$CNI_COMMAND" != ADD ] || { echo '{"cniVersion": "1.0.0", "code": 117, "msg": "broken on purpose"}'; exit 1; }`+"\n")
	if err := os.Chmod(plugin, 0o755); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(n.Path("cni/conf/50-pods.conflist"))
	if err != nil {
		t.Fatal(err)
	}
	// The first file in the order of names is the network. containerd sees changes by itself, some time later.
	conf := filepath.Join(n.Path("cni/conf"), "10-broken.conflist")
	write(t, conf, strings.Replace(string(good), `{"type": "portmap"`, `{"type": "broken"}, {"type": "portmap"`, 1))
	node.Until(t, "a pod cannot start", func() bool {
		p, err := n.TryPod(t, n.PodConfig(t))
		if err == nil {
			p.Remove(t)
			return false
		}
		if !strings.Contains(err.Error(), "broken on purpose") {
			t.Fatalf("the message does not say why: %v", err)
		}
		return true
	})
	if err := os.Remove(conf); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(plugin); err != nil {
		t.Fatal(err)
	}
	node.Until(t, "pods start again", func() bool {
		p, err := n.TryPod(t, n.PodConfig(t))
		if err == nil {
			p.Remove(t)
		}
		return err == nil
	})
	// A pod that failed to start may be left in CRI's list for the kubelet to remove.
	list, err := n.CRI.ListPodSandbox(n.Context(t), &cri.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range list.Items {
		n.MustCrictl(t, "rmp", "-f", s.Id)
	}
}

// Pods that come and go at once: each has its own address, and nothing is left.
func TestManyPodsAtOnce(t *testing.T) {
	n := pods.For(t)
	const count = 30
	all := make([]*pods.Pod, count)
	atOnce := func(what string, do func(i int) error) {
		t.Helper()
		var wg sync.WaitGroup
		for i := range all {
			wg.Go(func() {
				if err := do(i); err != nil {
					t.Errorf("%s: %v", what, err)
				}
			})
		}
		wg.Wait()
		if t.Failed() {
			t.FailNow()
		}
	}
	atOnce("run a pod", func(i int) (err error) {
		all[i], err = n.TryPod(t, n.PodConfig(t))
		return err
	})
	atOnce("use a container", func(i int) error {
		c, err := all[i].TryCreate(t)
		if err != nil {
			return err
		}
		if err := c.TryStart(t); err != nil {
			return err
		}
		_, err = n.CRI.ExecSync(n.Context(t), &cri.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{"true"}})
		return err
	})
	seen := map[string]bool{}
	for _, p := range all {
		v4, v6 := p.IPs(t)
		if seen[v4] || seen[v6] {
			t.Errorf("two pods have the address %s or %s", v4, v6)
		}
		seen[v4], seen[v6] = true, true
	}
	atOnce("remove a pod", func(i int) error {
		all[i].Remove(t)
		return nil
	})
}
