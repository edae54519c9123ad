package agent

import (
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// goodNetwork has something of everything.
func goodNetwork() *agentproto.Network {
	return &agentproto.Network{
		Interfaces: []*agentproto.Interface{
			{Mac: "02:00:00:00:00:01", Name: "eth0", Mtu: 1450, AcceptRa: 2, Addresses: []*agentproto.Address{
				{Prefix: "10.1.0.2/24", Broadcast: "10.1.0.255"},
				{Prefix: "fd00::2/64"},
				{Prefix: "fe80::2/64", Scope: unix.RT_SCOPE_LINK},
			}},
			{PciAddress: "0000:00:07.0", Name: "net1.5", Mtu: 9000, Ipv6Disabled: true, Addresses: []*agentproto.Address{
				{Prefix: "10.2.0.2/32", Peer: "10.2.0.1/32"},
			}},
		},
		Routes: []*agentproto.Route{
			{Destination: "0.0.0.0/0", Type: unix.RTN_UNICAST, Hops: []*agentproto.NextHop{{Interface: "eth0", Gateway: "10.1.0.1"}}},
			{Destination: "::/0", Type: unix.RTN_UNICAST, Hops: []*agentproto.NextHop{
				{Interface: "eth0", Gateway: "fe80::1", Onlink: true, Weight: 1}, {Interface: "eth0", Gateway: "fe80::3", Weight: 256},
			}},
			{Destination: "10.1.0.0/24", Source: "10.1.0.2", Type: unix.RTN_UNICAST, Protocol: unix.RTPROT_KERNEL, Scope: unix.RT_SCOPE_LINK,
				Hops: []*agentproto.NextHop{{Interface: "eth0"}}},
			{Destination: "10.9.0.0/16", Type: unix.RTN_BLACKHOLE, Metric: 1 << 31},
			{Destination: "10.8.0.0/16", Type: unix.RTN_UNICAST, Hops: []*agentproto.NextHop{{Interface: "eth0", Gateway: "fd00::1"}}},
		},
		Neighbours: []*agentproto.Neighbour{{Interface: "eth0", Address: "10.1.0.1", Mac: "02:00:00:00:00:fe"}},
	}
}

func TestParseNetwork(t *testing.T) {
	plan, err := parseNetwork(goodNetwork())
	if err != nil {
		t.Fatal(err)
	}
	if len(plan.interfaces) != 2 || len(plan.interfaces[0].addresses) != 3 || len(plan.routes) != 5 || len(plan.routes[1].hops) != 2 || len(plan.neighbours) != 1 {
		t.Errorf("%+v", plan)
	}
	if plan, err := parseNetwork(nil); err != nil || len(plan.interfaces) != 0 {
		t.Errorf("none: %+v, %v", plan, err)
	}
	for name, change := range map[string]func(*agentproto.Network){
		"no name":           func(n *agentproto.Network) { n.Interfaces[0].Name = "" },
		"loopback":          func(n *agentproto.Network) { n.Interfaces[0].Name = "lo" },
		"path":              func(n *agentproto.Network) { n.Interfaces[0].Name = "../x" },
		"parent":            func(n *agentproto.Network) { n.Interfaces[0].Name = ".." },
		"long name":         func(n *agentproto.Network) { n.Interfaces[0].Name = strings.Repeat("e", 16) },
		"control character": func(n *agentproto.Network) { n.Interfaces[0].Name = "eth\n0" },
		"same name":         func(n *agentproto.Network) { n.Interfaces[1].Name = "eth0" },
		"same device": func(n *agentproto.Network) {
			n.Interfaces = append(n.Interfaces, proto.CloneOf(n.Interfaces[0]))
			n.Interfaces[2].Name = "eth5"
		},
		"no device":            func(n *agentproto.Network) { n.Interfaces[0].Mac = "" },
		"long MAC":             func(n *agentproto.Network) { n.Interfaces[0].Mac = "02:00:00:00:00:00:00:01" },
		"PCI path":             func(n *agentproto.Network) { n.Interfaces[1].PciAddress = "../../0000:00:07.0" },
		"no MTU":               func(n *agentproto.Network) { n.Interfaces[0].Mtu = 0 },
		"MTU":                  func(n *agentproto.Network) { n.Interfaces[0].Mtu = 65536 },
		"accept_ra":            func(n *agentproto.Network) { n.Interfaces[0].AcceptRa = 3 },
		"address":              func(n *agentproto.Network) { n.Interfaces[0].Addresses[0].Prefix = "10.1.0.2" },
		"zone":                 func(n *agentproto.Network) { n.Neighbours[0].Address = "fe80::1%eth0" },
		"mapped address":       func(n *agentproto.Network) { n.Interfaces[0].Addresses[0].Prefix = "::ffff:10.1.0.2/120" },
		"scope":                func(n *agentproto.Network) { n.Interfaces[0].Addresses[0].Scope = 256 },
		"peer":                 func(n *agentproto.Network) { n.Interfaces[1].Addresses[0].Peer = "fd00::1/128" },
		"broadcast":            func(n *agentproto.Network) { n.Interfaces[0].Addresses[1].Broadcast = "10.1.0.255" },
		"destination":          func(n *agentproto.Network) { n.Routes[0].Destination = "default" },
		"bits of destination":  func(n *agentproto.Network) { n.Routes[2].Destination = "10.1.0.2/24" },
		"source":               func(n *agentproto.Network) { n.Routes[2].Source = "fd00::2" },
		"type":                 func(n *agentproto.Network) { n.Routes[0].Type = unix.RTN_LOCAL },
		"no type":              func(n *agentproto.Network) { n.Routes[0].Type = 0 },
		"protocol":             func(n *agentproto.Network) { n.Routes[0].Protocol = 1 << 20 },
		"no hop":               func(n *agentproto.Network) { n.Routes[0].Hops = nil },
		"hop of a blackhole":   func(n *agentproto.Network) { n.Routes[3].Hops = n.Routes[0].Hops },
		"unknown interface":    func(n *agentproto.Network) { n.Routes[0].Hops[0].Interface = "lo" },
		"gateway":              func(n *agentproto.Network) { n.Routes[0].Hops[0].Gateway = "gateway" },
		"gateway's family":     func(n *agentproto.Network) { n.Routes[1].Hops[0].Gateway = "10.1.0.1" },
		"weight":               func(n *agentproto.Network) { n.Routes[1].Hops[0].Weight = 257 },
		"no weight":            func(n *agentproto.Network) { n.Routes[1].Hops[0].Weight = 0 },
		"neighbour's MAC":      func(n *agentproto.Network) { n.Neighbours[0].Mac = "x" },
		"neighbour's link":     func(n *agentproto.Network) { n.Neighbours[0].Interface = "" },
		"too many interfaces":  func(n *agentproto.Network) { n.Interfaces = make([]*agentproto.Interface, maxInterfaces+1) },
		"too many addresses":   func(n *agentproto.Network) { n.Interfaces[0].Addresses = make([]*agentproto.Address, maxAddresses+1) },
		"too many routes":      func(n *agentproto.Network) { n.Routes = make([]*agentproto.Route, maxRoutes+1) },
		"too many hops":        func(n *agentproto.Network) { n.Routes[0].Hops = make([]*agentproto.NextHop, maxHops+1) },
		"too many neighbours":  func(n *agentproto.Network) { n.Neighbours = make([]*agentproto.Neighbour, maxNeighbours+1) },
		"a nil in each of all": func(n *agentproto.Network) { n.Interfaces[0], n.Routes[0], n.Neighbours[0] = nil, nil, nil },
	} {
		n := goodNetwork()
		change(n)
		if _, err := parseNetwork(n); !errdefs.IsInvalidArgument(err) || len(err.Error()) > 300 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMissing(t *testing.T) {
	plan, err := parseNetwork(goodNetwork())
	if err != nil {
		t.Fatal(err)
	}
	other := goodNetwork()
	other.Routes[1].Hops[1].Weight = 3
	changed, err := parseNetwork(other)
	if err != nil {
		t.Fatal(err)
	}
	if m := missing(changed.routes, plan.routes); len(m) != 1 || m[0].hops[1].weight != 3 {
		t.Errorf("%+v", m)
	}
	if m := missing(plan.interfaces[0].addresses, changed.interfaces[0].addresses); len(m) != 0 {
		t.Errorf("%+v", m)
	}
}

func FuzzParseNetwork(f *testing.F) {
	seed, err := proto.Marshal(goodNetwork())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		var n agentproto.Network
		if proto.Unmarshal(data, &n) != nil {
			return
		}
		plan, err := parseNetwork(&n)
		if err != nil {
			return
		}
		// What passes can be handed to the kernel.
		for _, i := range plan.interfaces {
			if strings.Contains(i.name, "/") || len(i.name) > 15 {
				t.Errorf("name %q", i.name)
			}
			for _, a := range i.addresses {
				if n := a.netlink(); n.IP == nil || n.Mask == nil {
					t.Error(fmt.Sprint(a))
				}
			}
		}
		for _, r := range plan.routes {
			if n := ipNet(r.destination); n.IP == nil || n.Mask == nil {
				t.Error(fmt.Sprint(r))
			}
		}
	})
}
