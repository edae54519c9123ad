package network

import (
	"net"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

func attrs(index int, name string, change func(*netlink.LinkAttrs)) netlink.LinkAttrs {
	a := netlink.LinkAttrs{
		Index: index, Name: name, Flags: net.FlagUp | net.FlagBroadcast, EncapType: "ether", NetNsID: -1,
		HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, byte(index)},
	}
	if change != nil {
		change(&a)
	}
	return a
}

func TestCandidates(t *testing.T) {
	lo := &netlink.Device{LinkAttrs: attrs(1, "lo", func(a *netlink.LinkAttrs) { a.Flags |= net.FlagLoopback; a.EncapType = "loopback" })}
	eth0 := &netlink.Veth{LinkAttrs: attrs(2, "eth0", nil)}
	outside := func(a *netlink.LinkAttrs) { a.ParentIndex, a.NetNsID = 2, 0 }
	on := func(parent int) func(*netlink.LinkAttrs) {
		return func(a *netlink.LinkAttrs) { a.ParentIndex = parent }
	}
	for name, test := range map[string]struct {
		links []netlink.Link
		want  string // names, or of the error
		fails bool
	}{
		"nothing":        {[]netlink.Link{lo}, "", false},
		"veth":           {[]netlink.Link{lo, eth0}, "eth0", false},
		"macvlan":        {[]netlink.Link{lo, eth0, &netlink.Macvlan{LinkAttrs: attrs(3, "net1", outside)}}, "eth0 net1", false},
		"vlan":           {[]netlink.Link{lo, &netlink.Vlan{LinkAttrs: attrs(3, "net1", outside)}}, "net1", false},
		"host device":    {[]netlink.Link{lo, &netlink.Device{LinkAttrs: attrs(3, "ens1", nil)}}, "ens1", false},
		"of a container": {[]netlink.Link{lo, &netlink.Tuntap{LinkAttrs: attrs(3, "tap0", nil)}}, "tap0", false},
		"down":           {[]netlink.Link{lo, eth0, &netlink.Sittun{LinkAttrs: attrs(3, "sit0", func(a *netlink.LinkAttrs) { a.Flags, a.EncapType = 0, "sit" })}}, "eth0", false},
		"bridge with port": {[]netlink.Link{lo, &netlink.Veth{LinkAttrs: attrs(2, "eth0", func(a *netlink.LinkAttrs) { a.MasterIndex = 3 })},
			&netlink.Bridge{LinkAttrs: attrs(3, "br0", nil)}}, "br0", false},
		"joined": {[]netlink.Link{lo, &netlink.Veth{LinkAttrs: attrs(8, "eth8", nil)}}, "", false},
		"ours":   {[]netlink.Link{lo, &netlink.Tuntap{LinkAttrs: attrs(9, "mvtap0", nil)}}, "", false},

		"ipvlan":          {[]netlink.Link{lo, eth0, &netlink.IPVlan{LinkAttrs: attrs(3, "net1", outside)}}, "net1: ipvlan has the MAC address of the host's own link", true},
		"WireGuard":       {[]netlink.Link{lo, &netlink.Wireguard{LinkAttrs: attrs(3, "wg0", func(a *netlink.LinkAttrs) { a.EncapType = "none" })}}, "wg0: wireguard carries no Ethernet", true},
		"InfiniBand":      {[]netlink.Link{lo, &netlink.IPoIB{LinkAttrs: attrs(3, "ib0", func(a *netlink.LinkAttrs) { a.HardwareAddr = make(net.HardwareAddr, 20) })}}, "ib0: ipoib carries no Ethernet", true},
		"VLAN in the pod": {[]netlink.Link{lo, eth0, &netlink.Vlan{LinkAttrs: attrs(3, "eth0.7", on(2))}}, "eth0.7: vlan is on top of another link", true},
		"another VM":      {[]netlink.Link{lo, eth0, &netlink.Tuntap{LinkAttrs: attrs(3, "mvtap0", nil)}}, "another virtual machine's", true},
	} {
		found, err := candidates(test.links, map[int]bool{8: true}, map[int]bool{9: true})
		var names []string
		for _, l := range found {
			names = append(names, l.Attrs().Name)
		}
		switch {
		case test.fails && (!errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), test.want)):
			t.Errorf("%s: %v", name, err)
		case !test.fails && (err != nil || strings.Join(names, " ") != test.want):
			t.Errorf("%s: %q, %v", name, names, err)
		}
	}
	var many []netlink.Link
	for i := range maxLinks + 1 {
		many = append(many, &netlink.Veth{LinkAttrs: attrs(100+i, "eth", nil)})
	}
	if _, err := candidates(many, nil, nil); !errdefs.IsResourceExhausted(err) {
		t.Errorf("%d links: %v", len(many), err)
	}
}

func TestRouteOf(t *testing.T) {
	names := map[int]string{2: "eth0", 3: "net1"}
	gw, gw6 := net.ParseIP("10.0.0.1"), net.ParseIP("fe80::1")
	for name, test := range map[string]struct {
		route netlink.Route
		want  *agentproto.Route
	}{
		"default": {netlink.Route{Family: unix.AF_INET, Type: unix.RTN_UNICAST, LinkIndex: 2, Gw: gw, Priority: 100},
			&agentproto.Route{Destination: "0.0.0.0/0", Type: unix.RTN_UNICAST, Metric: 100, Hops: []*agentproto.NextHop{{Interface: "eth0", Gateway: "10.0.0.1"}}}},
		"default, IPv6": {netlink.Route{Family: unix.AF_INET6, Type: unix.RTN_UNICAST, LinkIndex: 2, Gw: gw6, Flags: unix.RTNH_F_ONLINK},
			&agentproto.Route{Destination: "::/0", Type: unix.RTN_UNICAST, Hops: []*agentproto.NextHop{{Interface: "eth0", Gateway: "fe80::1", Onlink: true}}}},
		"of the link": {netlink.Route{Dst: parsePrefix("10.0.0.0/24"), Src: net.ParseIP("10.0.0.2"), Type: unix.RTN_UNICAST, LinkIndex: 3,
			Scope: unix.RT_SCOPE_LINK, Protocol: unix.RTPROT_KERNEL, MTU: 1400, AdvMSS: 1300},
			&agentproto.Route{Destination: "10.0.0.0/24", Source: "10.0.0.2", Type: unix.RTN_UNICAST, Scope: unix.RT_SCOPE_LINK, Protocol: unix.RTPROT_KERNEL,
				Mtu: 1400, Advmss: 1300, Hops: []*agentproto.NextHop{{Interface: "net1"}}}},
		"by the other family": {netlink.Route{Dst: parsePrefix("10.1.0.0/24"), Type: unix.RTN_UNICAST, LinkIndex: 2, Via: &netlink.Via{AddrFamily: unix.AF_INET6, Addr: gw6}},
			&agentproto.Route{Destination: "10.1.0.0/24", Type: unix.RTN_UNICAST, Hops: []*agentproto.NextHop{{Interface: "eth0", Gateway: "fe80::1"}}}},
		"several hops": {netlink.Route{Dst: parsePrefix("fd00::/16"), Type: unix.RTN_UNICAST, MultiPath: []*netlink.NexthopInfo{{LinkIndex: 2, Gw: gw6}, {LinkIndex: 3, Gw: gw6, Hops: 4}}},
			&agentproto.Route{Destination: "fd00::/16", Type: unix.RTN_UNICAST, Hops: []*agentproto.NextHop{
				{Interface: "eth0", Gateway: "fe80::1", Weight: 1}, {Interface: "net1", Gateway: "fe80::1", Weight: 5}}}},
		"blackhole": {netlink.Route{Dst: parsePrefix("10.2.0.0/16"), Type: unix.RTN_BLACKHOLE, Protocol: unix.RTPROT_STATIC},
			&agentproto.Route{Destination: "10.2.0.0/16", Type: unix.RTN_BLACKHOLE, Protocol: unix.RTPROT_STATIC}},
		"other link":         {netlink.Route{Dst: parsePrefix("10.0.0.0/24"), Type: unix.RTN_UNICAST, LinkIndex: 9}, nil},
		"one other hop":      {netlink.Route{Dst: parsePrefix("10.0.0.0/24"), Type: unix.RTN_UNICAST, MultiPath: []*netlink.NexthopInfo{{LinkIndex: 2}, {LinkIndex: 9}}}, nil},
		"advertised":         {netlink.Route{Family: unix.AF_INET6, Type: unix.RTN_UNICAST, LinkIndex: 2, Gw: gw6, Protocol: unix.RTPROT_RA}, nil},
		"the kernel's own":   {netlink.Route{Family: unix.AF_INET6, Type: unix.RTN_UNREACHABLE, LinkIndex: 1, Protocol: unix.RTPROT_KERNEL}, nil},
		"of another type":    {netlink.Route{Dst: parsePrefix("10.0.0.2/32"), Type: unix.RTN_LOCAL, LinkIndex: 2}, nil},
		"a learned redirect": {netlink.Route{Dst: parsePrefix("fd00::/16"), Type: unix.RTN_UNICAST, LinkIndex: 2, Protocol: unix.RTPROT_REDIRECT}, nil},
	} {
		if got := routeOf(test.route, names); !proto.Equal(got, test.want) {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestAddressOf(t *testing.T) {
	ip := func(s string) *net.IPNet {
		ip, network, err := net.ParseCIDR(s)
		if err != nil {
			t.Fatal(err)
		}
		return &net.IPNet{IP: ip, Mask: network.Mask}
	}
	for _, test := range []struct {
		address netlink.Addr
		want    *agentproto.Address
	}{
		{netlink.Addr{IPNet: ip("10.0.0.2/24"), Broadcast: net.IP{10, 0, 0, 255}}, &agentproto.Address{Prefix: "10.0.0.2/24", Broadcast: "10.0.0.255"}},
		{netlink.Addr{IPNet: ip("10.0.0.2/32"), Peer: ip("10.0.0.1/32")}, &agentproto.Address{Prefix: "10.0.0.2/32", Peer: "10.0.0.1/32"}},
		{netlink.Addr{IPNet: ip("fe80::2/64"), Scope: unix.RT_SCOPE_LINK}, &agentproto.Address{Prefix: "fe80::2/64", Scope: unix.RT_SCOPE_LINK}},
	} {
		if got := addressOf(test.address); !proto.Equal(got, test.want) {
			t.Errorf("%v: %v", test.address, got)
		}
	}
}

func parsePrefix(prefix string) *net.IPNet {
	_, network, err := net.ParseCIDR(prefix)
	if err != nil {
		panic(err)
	}
	return network
}
