//go:build privileged

package agent

import (
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/agent/guest"
	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// inNamespace runs a test in a network namespace of its own, which goes with
// the thread.
func inNamespace(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			t.Error(err)
			return
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			t.Error(err)
			return
		}
		test(t)
	}()
	<-done
}

// makeDevice makes a link with a MAC address; its other end is up.
func makeDevice(t *testing.T, name, mac string) {
	t.Helper()
	address, err := net.ParseMAC(mac)
	if err != nil {
		t.Error(err)
		return
	}
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, HardwareAddr: address}, PeerName: "host-" + name}
	if err := netlink.LinkAdd(veth); err != nil {
		t.Errorf("%s: %v", name, err)
		return
	}
	peer, err := netlink.LinkByName("host-" + name)
	if err == nil {
		err = netlink.LinkSetUp(peer)
	}
	if err != nil {
		t.Error(err)
	}
}

// routesOf are those of the main table, in a short form.
func routesOf(t *testing.T) (list []string) {
	t.Helper()
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteList(nil, family)
		if err != nil {
			t.Error(err)
		}
		for _, r := range routes {
			if link, err := netlink.LinkByIndex(r.LinkIndex); err == nil && strings.HasPrefix(link.Attrs().Name, "host-") {
				continue
			}
			s := r.Dst.String()
			if r.Gw != nil {
				s += " via " + r.Gw.String()
			}
			if r.Via != nil {
				s += " via6"
			}
			for _, h := range r.MultiPath {
				s += " hop " + h.Gw.String()
			}
			if r.Flags&unix.RTNH_F_ONLINK != 0 {
				s += " onlink"
			}
			if r.Src != nil {
				s += " src " + r.Src.String()
			}
			if r.Type == unix.RTN_BLACKHOLE {
				s += " blackhole"
			}
			if r.Family == netlink.FAMILY_V4 && r.Priority != 0 || r.Family == netlink.FAMILY_V6 && r.Priority != 1024 {
				s += " with metric"
			}
			if r.MTU != 0 {
				s += " with mtu"
			}
			list = append(list, s)
		}
	}
	slices.Sort(list)
	return list
}

// addressesOf are those of an interface; none may wait for a proof.
func addressesOf(t *testing.T, name string) (list []string) {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Error(err)
		return nil
	}
	addresses, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		t.Error(err)
	}
	for _, a := range addresses {
		if a.Flags&unix.IFA_F_TENTATIVE != 0 {
			t.Errorf("%v is tentative", a.IPNet)
		}
		s := a.IPNet.String()
		if a.Broadcast != nil {
			s += " brd " + a.Broadcast.String()
		}
		if a.Peer != nil && !a.Peer.IP.Equal(a.IP) {
			s += " peer " + a.Peer.String()
		}
		list = append(list, s)
	}
	slices.Sort(list)
	return list
}

func expect(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%s:\n %q\nwant\n %q", what, got, want)
	}
}

func unicast(destination, iface, gateway string) *agentproto.Route {
	return &agentproto.Route{Destination: destination, Type: unix.RTN_UNICAST, Protocol: unix.RTPROT_STATIC,
		Hops: []*agentproto.NextHop{{Interface: iface, Gateway: gateway}}}
}

func newGuestNetwork(t *testing.T) *guestNetwork {
	return &guestNetwork{sys: t.TempDir(), index: map[deviceKey]int{}}
}

func TestNetworkOfAGuest(t *testing.T) {
	inNamespace(t, testNetworkOfAGuest)
}

func testNetworkOfAGuest(t *testing.T) {
	// The kernel has chosen the names in the other order.
	makeDevice(t, "eth0", "02:00:00:00:00:02")
	makeDevice(t, "eth1", "02:00:00:00:00:01")
	n := newGuestNetwork(t)
	onlink := unicast("0.0.0.0/0", "eth0", "192.168.255.1")
	onlink.Hops[0].Onlink = true
	kernel := unicast("10.1.0.0/24", "eth0", "")
	kernel.Source, kernel.Scope, kernel.Protocol = "10.1.0.2", unix.RT_SCOPE_LINK, unix.RTPROT_KERNEL
	metric := unicast("10.3.0.0/16", "eth0", "10.1.0.1")
	metric.Metric, metric.Mtu = 77, 1300
	several := unicast("fd01::/16", "eth0", "fd00::3")
	several.Hops = append(several.Hops, &agentproto.NextHop{Interface: "eth0", Gateway: "fd00::4", Weight: 2})
	several.Hops[0].Weight = 1
	far := unicast("10.5.0.0/16", "eth1", "10.4.0.1")
	reach := unicast("10.4.0.1/32", "eth1", "")
	reach.Scope = unix.RT_SCOPE_LINK
	network := &agentproto.Network{
		Interfaces: []*agentproto.Interface{
			{Mac: "02:00:00:00:00:01", Name: "eth0", Mtu: 1400, Addresses: []*agentproto.Address{
				{Prefix: "10.1.0.2/24", Broadcast: "10.1.0.255"}, {Prefix: "fd00::2/64"}, {Prefix: "fe80::aa/64", Scope: unix.RT_SCOPE_LINK},
			}},
			{Mac: "02:00:00:00:00:02", Name: "eth1", Mtu: 9000, Ipv6Disabled: true, AcceptRa: 1, Addresses: []*agentproto.Address{
				{Prefix: "10.2.0.2/32", Peer: "10.2.0.1/32"},
			}},
		},
		// Those that need another one come first.
		Routes: []*agentproto.Route{
			far, reach, metric, onlink, several, unicast("::/0", "eth0", "fe80::1"), unicast("fe80::/64", "eth0", ""),
			unicast("10.6.0.0/16", "eth0", "fd00::5"), {Destination: "10.9.0.0/16", Type: unix.RTN_BLACKHOLE}, unicast("fd00::/64", "eth0", ""), kernel,
		},
		Neighbours: []*agentproto.Neighbour{{Interface: "eth0", Address: "10.1.0.1", Mac: "02:00:00:00:00:fe"}},
	}
	if err := n.update(network); err != nil {
		t.Error(err)
		return
	}
	expect(t, "eth0", addressesOf(t, "eth0"), "10.1.0.2/24 brd 10.1.0.255", "fd00::2/64", "fe80::aa/64")
	expect(t, "eth1", addressesOf(t, "eth1"), "10.2.0.2/32 peer 10.2.0.1/32")
	expect(t, "routes", routesOf(t),
		"0.0.0.0/0 via 192.168.255.1 onlink", "10.1.0.0/24 src 10.1.0.2", "10.3.0.0/16 via 10.1.0.1 with metric with mtu", "10.4.0.1/32",
		"10.5.0.0/16 via 10.4.0.1", "10.6.0.0/16 via6", "10.9.0.0/16 blackhole", "::/0 via fe80::1", "fd00::/64", "fd01::/16 hop fd00::3 hop fd00::4", "fe80::/64")
	for name, want := range map[string]struct {
		mac string
		mtu int
		ra  string
	}{"eth0": {"02:00:00:00:00:01", 1400, "0"}, "eth1": {"02:00:00:00:00:02", 9000, "1"}} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			t.Error(err)
			return
		}
		if a := link.Attrs(); a.HardwareAddr.String() != want.mac || a.MTU != want.mtu || a.Flags&net.FlagUp == 0 {
			t.Errorf("%s: %+v", name, a)
		}
		ra, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + name + "/accept_ra")
		if err != nil || strings.TrimSpace(string(ra)) != want.ra {
			t.Errorf("%s: accept_ra %q, %v", name, ra, err)
		}
	}
	eth0, _ := netlink.LinkByName("eth0")
	neighbours, err := netlink.NeighList(eth0.Attrs().Index, netlink.FAMILY_V4)
	if err != nil || len(neighbours) != 1 || neighbours[0].State != netlink.NUD_PERMANENT || neighbours[0].HardwareAddr.String() != "02:00:00:00:00:fe" {
		t.Errorf("%v, %v", neighbours, err)
	}
	// What a pod may set in its own network.
	for name, value := range map[string]string{
		"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647", "net.core.somaxconn": "1024",
		"net.ipv4.conf.eth0.forwarding": "1", "net/ipv6/conf/eth1/hop_limit": "33",
	} {
		if err := guest.WriteSysctl(name, value); err != nil {
			t.Error(err)
		}
	}

	// Another one comes by its PCI address, and eth1 goes. What the pod has done
	// itself stays.
	own := &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 77, 0, 1), Mask: net.CIDRMask(24, 32)}}
	if err := netlink.AddrAdd(eth0, own); err != nil {
		t.Error(err)
	}
	makeDevice(t, "veth9", "02:00:00:00:00:03")
	if err := os.MkdirAll(filepath.Join(n.sys, "bus/pci/devices/0000:00:09.0/virtio7/net/veth9"), 0o755); err != nil {
		t.Error(err)
	}
	network.Interfaces[0].Addresses[0].Prefix = "10.1.0.3/24"
	network.Interfaces[1] = &agentproto.Interface{PciAddress: "0000:00:09.0", Name: "eth1", Mtu: 1500,
		Addresses: []*agentproto.Address{{Prefix: "10.8.0.2/24"}, {Prefix: "fe80::bb/64", Scope: unix.RT_SCOPE_LINK}}}
	kernel.Source = "10.1.0.3"
	reach = unicast("10.8.0.0/24", "eth1", "")
	reach.Scope = unix.RT_SCOPE_LINK
	network.Routes = []*agentproto.Route{kernel, unicast("0.0.0.0/0", "eth1", "10.8.0.1"), reach, unicast("fe80::/64", "eth0", "")}
	network.Neighbours = nil
	for range 2 { // the second changes nothing
		if err := n.update(network); err != nil {
			t.Error(err)
			return
		}
		expect(t, "eth0", addressesOf(t, "eth0"), "10.1.0.3/24 brd 10.1.0.255", "fd00::2/64", "fe80::aa/64", "10.77.0.1/24 brd 10.77.0.255")
		expect(t, "eth1", addressesOf(t, "eth1"), "10.8.0.2/24", "fe80::bb/64")
		expect(t, "routes", routesOf(t), "0.0.0.0/0 via 10.8.0.1", "10.1.0.0/24 src 10.1.0.3", "10.77.0.0/24 src 10.77.0.1", "10.8.0.0/24", "fe80::/64")
	}
	if neighbours, err := netlink.NeighList(eth0.Attrs().Index, netlink.FAMILY_V4); err != nil || len(neighbours) != 0 {
		t.Errorf("%v, %v", neighbours, err)
	}

	// One that cannot be done can be followed by one that can.
	good := network.Routes
	network.Routes = append(slices.Clone(good), unicast("10.6.0.0/16", "eth0", "203.0.113.1"))
	if err := n.update(network); err == nil || !strings.Contains(err.Error(), "10.6.0.0/16") {
		t.Errorf("unreachable gateway: %v", err)
	}
	network.Routes = good
	if err := n.update(network); err != nil {
		t.Error(err)
	}
	// A device that has been taken away in the middle of its use.
	veth9, err := netlink.LinkByName("eth1")
	if err == nil {
		err = netlink.LinkDel(veth9)
	}
	if err != nil {
		t.Error(err)
	}
	if err := n.update(network); !errdefs.IsNotFound(err) {
		t.Errorf("device gone: %v", err)
	}
	network.Interfaces, network.Routes = network.Interfaces[:1], network.Routes[:1]
	if err := n.update(network); err != nil {
		t.Error(err)
	}
	if err := n.update(nil); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(n.sys, "bus/pci/devices/0000:00:09.0/remove")); err != nil {
		t.Errorf("it is still on the bus: %v", err)
	}
	if _, err := netlink.LinkByName("eth0"); err == nil {
		t.Error("eth0 is in use though it should not be")
	}
}

func TestNetworkWithoutDevice(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		n := newGuestNetwork(t)
		err := n.update(&agentproto.Network{Interfaces: []*agentproto.Interface{{Mac: "02:00:00:00:00:01", Name: "eth0", Mtu: 1500}}})
		if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "02:00:00:00:00:01") {
			t.Error(err)
		}
		if err := n.update(nil); err != nil {
			t.Error(err)
		}
	})
}

// After an error, the same or another update may be tried: what goes is gone, what is to be there is there, and nothing else.
func TestNetworkAfterAnError(t *testing.T) {
	inNamespace(t, testNetworkAfterAnError)
}

func testNetworkAfterAnError(t *testing.T) {
	makeDevice(t, "v0", "02:00:00:00:00:01")
	makeDevice(t, "v1", "02:00:00:00:00:02")
	n := newGuestNetwork(t)
	address := func(prefix string) *agentproto.Address { return &agentproto.Address{Prefix: prefix} }
	first := func(mtu uint32, addresses ...*agentproto.Address) *agentproto.Interface {
		return &agentproto.Interface{Mac: "02:00:00:00:00:01", Name: "eth0", Mtu: mtu, Ipv6Disabled: true, Addresses: addresses}
	}
	second := &agentproto.Interface{Mac: "02:00:00:00:00:02", Name: "eth1", Mtu: 1400, Ipv6Disabled: true, Addresses: []*agentproto.Address{address("10.2.0.2/24")}}
	reach := func(destination, iface string) *agentproto.Route {
		r := unicast(destination, iface, "")
		r.Scope = unix.RT_SCOPE_LINK
		return r
	}
	neighbour := func(address string) *agentproto.Neighbour {
		return &agentproto.Neighbour{Interface: "eth0", Address: address, Mac: "02:00:00:00:00:fe"}
	}
	good := &agentproto.Network{
		Interfaces: []*agentproto.Interface{first(1400, address("10.1.0.2/24")), second},
		Routes:     []*agentproto.Route{reach("10.1.0.0/24", "eth0"), unicast("10.3.0.0/16", "eth0", "10.1.0.1"), reach("10.2.0.0/24", "eth1")},
		Neighbours: []*agentproto.Neighbour{neighbour("10.1.0.7")},
	}
	// It has another address and other routes, lacks an interface, and cannot be done.
	bad := &agentproto.Network{
		Interfaces: []*agentproto.Interface{first(1300, address("10.4.0.2/24"))},
		Routes:     []*agentproto.Route{reach("10.4.0.0/24", "eth0"), unicast("10.5.0.0/16", "eth0", "10.4.0.1"), unicast("10.6.0.0/16", "eth0", "203.0.113.1")},
		Neighbours: []*agentproto.Neighbour{neighbour("10.4.0.7")},
	}
	neighbours := func() (list []string) {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			t.Error(err)
			return nil
		}
		all, err := netlink.NeighList(eth0.Attrs().Index, netlink.FAMILY_V4)
		if err != nil {
			t.Error(err)
		}
		for _, n := range all {
			list = append(list, n.IP.String())
		}
		return list
	}
	isGood := func() {
		t.Helper()
		expect(t, "eth0", addressesOf(t, "eth0"), "10.1.0.2/24")
		expect(t, "eth1", addressesOf(t, "eth1"), "10.2.0.2/24")
		expect(t, "routes", routesOf(t), "10.1.0.0/24", "10.2.0.0/24", "10.3.0.0/16 via 10.1.0.1")
		expect(t, "neighbours", neighbours(), "10.1.0.7")
		if eth0, err := netlink.LinkByName("eth0"); err != nil || eth0.Attrs().MTU != 1400 {
			t.Errorf("eth0: %v, %+v", err, eth0)
		}
	}
	must := func(what string, network *agentproto.Network) {
		t.Helper()
		if err := n.update(network); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	must("the first one", good)
	isGood()
	for range 2 {
		if err := n.update(bad); err == nil || !strings.Contains(err.Error(), "10.6.0.0/16") {
			t.Errorf("unreachable gateway: %v", err)
		}
	}
	must("what there was, again", good)
	isGood()
	if err := n.update(bad); err == nil {
		t.Error("unreachable gateway")
	}
	must("without what fails", &agentproto.Network{Interfaces: bad.Interfaces, Routes: bad.Routes[:2], Neighbours: bad.Neighbours})
	expect(t, "eth0", addressesOf(t, "eth0"), "10.4.0.2/24")
	expect(t, "routes", routesOf(t), "10.4.0.0/24", "10.5.0.0/16 via 10.4.0.1")
	expect(t, "neighbours", neighbours(), "10.4.0.7")

	// A device does not come, and is not what the next one has.
	unknown := &agentproto.Interface{Mac: "02:00:00:00:00:99", Name: "eth9", Mtu: 1500}
	if err := n.update(&agentproto.Network{Interfaces: []*agentproto.Interface{second, unknown}}); !errdefs.IsNotFound(err) {
		t.Errorf("no device: %v", err)
	}
	must("what there was first", good)
	isGood()
	must("nothing", nil)
	expect(t, "routes", routesOf(t))
	for _, name := range []string{"eth0", "eth1"} {
		if _, err := netlink.LinkByName(name); err == nil {
			t.Errorf("%s is in use though it should not be", name)
		}
	}
}

// What a plan has like the one before is there also where the kernel has taken it
// away with something that has changed: a device (docker network disconnect and
// connect, in one update), an address.
func TestNetworkGoesAlong(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		makeDevice(t, "v0", "02:00:00:00:00:01")
		makeDevice(t, "v1", "02:00:00:00:00:02")
		n := newGuestNetwork(t)
		reach := unicast("10.1.0.0/24", "eth0", "")
		reach.Scope = unix.RT_SCOPE_LINK
		one := &agentproto.Interface{Name: "eth0", Mtu: 1400, Ipv6Disabled: true}
		network := &agentproto.Network{
			Interfaces: []*agentproto.Interface{one},
			Routes:     []*agentproto.Route{reach, unicast("0.0.0.0/0", "eth0", "10.1.0.1")},
			Neighbours: []*agentproto.Neighbour{{Interface: "eth0", Address: "10.1.0.1", Mac: "02:00:00:00:00:fe"}},
		}
		for _, now := range []struct {
			mac       string
			addresses []string
		}{
			{"02:00:00:00:00:01", []string{"10.1.0.2/24"}},
			{"02:00:00:00:00:02", []string{"10.1.0.2/24"}},
			{"02:00:00:00:00:02", []string{"10.1.0.3/24", "10.1.0.4/24"}},
			{"02:00:00:00:00:02", []string{"10.1.0.4/24"}},
		} {
			one.Mac, one.Addresses = now.mac, nil
			for _, a := range now.addresses {
				one.Addresses = append(one.Addresses, &agentproto.Address{Prefix: a})
			}
			if err := n.update(network); err != nil {
				t.Error(err)
			}
			eth0, err := netlink.LinkByName("eth0")
			if err != nil || eth0.Attrs().HardwareAddr.String() != now.mac {
				t.Errorf("%v, %+v", err, eth0)
				return
			}
			expect(t, "eth0", addressesOf(t, "eth0"), now.addresses...)
			expect(t, "routes", routesOf(t), "0.0.0.0/0 via 10.1.0.1", "10.1.0.0/24")
			if list, err := netlink.NeighList(eth0.Attrs().Index, netlink.FAMILY_V4); err != nil || len(list) != 1 {
				t.Errorf("neighbours %v, %v", list, err)
			}
		}
	})
}
