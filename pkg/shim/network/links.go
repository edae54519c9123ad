package network

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// Bounds that the agent has too.
const (
	maxLinks      = 32
	maxRoutes     = 1024
	maxNeighbours = 1024
)

// candidates are the links of the namespace that a guest is to have. joined are
// those that it has already; taps are ours.
func candidates(links []netlink.Link, joined, taps map[int]bool) ([]netlink.Link, error) {
	var list []netlink.Link
	for _, link := range links {
		a := link.Attrs()
		switch {
		case joined[a.Index] || taps[a.Index]:
			continue
		case strings.HasPrefix(a.Name, tapPrefix) && link.Type() == "tuntap":
			return nil, fmt.Errorf("link %s: the network namespace is another virtual machine's: %w", a.Name, errdefs.ErrNotImplemented)
		case a.Flags&net.FlagLoopback != 0, a.Flags&net.FlagUp == 0:
			// One that is down has not been set up yet, or is made by the kernel
			// for tunnels, one in each namespace.
			continue
		case a.MasterIndex != 0:
			// A part of a bridge or a bond, which is the link that counts.
			continue
		}
		if err := suitable(link, links); err != nil {
			return nil, fmt.Errorf("link %s: %w: %w", a.Name, err, errdefs.ErrNotImplemented)
		}
		list = append(list, link)
	}
	if len(list)+len(joined) > maxLinks {
		return nil, fmt.Errorf("%d links in the network namespace, at most %d: %w", len(list)+len(joined), maxLinks, errdefs.ErrResourceExhausted)
	}
	return list, nil
}

// suitable says why a link cannot be a virtual machine's.
func suitable(link netlink.Link, all []netlink.Link) error {
	a := link.Attrs()
	switch kind := link.Type(); {
	case kind == "ipvlan" || kind == "ipvtap":
		return fmt.Errorf("%s has the MAC address of the host's own link, a virtual machine needs one of its own: use bridge, ptp or macvlan", kind)
	case a.EncapType != "ether" || len(a.HardwareAddr) != 6:
		return fmt.Errorf("%s carries no Ethernet frames", kind)
	case kind == "vlan" || kind == "macvlan" || kind == "macvtap":
		// NetNsID is set where what is below is in another namespace.
		lower := func(l netlink.Link) bool { return l.Attrs().Index == a.ParentIndex && l.Attrs().Flags&net.FlagUp != 0 }
		if a.NetNsID == -1 && slices.ContainsFunc(all, lower) {
			return fmt.Errorf("%s is on top of another link in the pod: a virtual machine gets that one", kind)
		}
	}
	return nil
}

// interfaceOf describes a link. The caller is in the namespace.
func interfaceOf(nl *netlink.Handle, link netlink.Link) (*agentproto.Interface, error) {
	a := link.Attrs()
	i := &agentproto.Interface{Mac: a.HardwareAddr.String(), Name: a.Name, Mtu: uint32(a.MTU)}
	conf := filepath.Join("/proc/sys/net/ipv6/conf", a.Name)
	if disabled, err := readNumber(filepath.Join(conf, "disable_ipv6")); err != nil || disabled != 0 {
		i.Ipv6Disabled = true // by the kernel's command line, if it is not there
	} else if ra, err := readNumber(filepath.Join(conf, "accept_ra")); err == nil {
		i.AcceptRa = uint32(min(max(ra, 0), 2))
	}
	addresses, err := nl.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("link %s: list addresses: %w", a.Name, err)
	}
	for _, a := range addresses {
		// One that a router's advertisement has made is the guest's to make: it
		// gets the advertisements from now on.
		if a.Flags&unix.IFA_F_PERMANENT == 0 || a.Flags&unix.IFA_F_DADFAILED != 0 {
			continue
		}
		i.Addresses = append(i.Addresses, addressOf(a))
	}
	return i, nil
}

func addressOf(a netlink.Addr) *agentproto.Address {
	m := &agentproto.Address{Prefix: prefix(a.IPNet), Scope: uint32(a.Scope)}
	if a.Peer != nil && !a.Peer.IP.Equal(a.IP) {
		m.Peer = prefix(a.Peer)
	}
	if a.Broadcast != nil {
		m.Broadcast = a.Broadcast.String()
	}
	return m
}

func readNumber(path string) (int, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(data)))
}

// prefix prints a network without losing bits of its address.
func prefix(n *net.IPNet) string {
	ip, _ := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(ip.Unmap(), bits).String()
}

// routesOf describes the routes that lead to links; names has these by index.
func routesOf(nl *netlink.Handle, names map[int]string) ([]*agentproto.Route, error) {
	var list []*agentproto.Route
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := nl.RouteList(nil, family) // of the table main
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			if m := routeOf(r, names); m != nil {
				list = append(list, m)
			}
		}
	}
	if len(list) > maxRoutes {
		return nil, fmt.Errorf("%d routes in the network namespace, at most %d: %w", len(list), maxRoutes, errdefs.ErrResourceExhausted)
	}
	return list, nil
}

// routeOf returns nil for a route that is not the guest's, or that the guest
// learns by itself.
func routeOf(r netlink.Route, names map[int]string) *agentproto.Route {
	if r.Protocol == unix.RTPROT_RA || r.Protocol == unix.RTPROT_REDIRECT || r.Flags&unix.RTM_F_CLONED != 0 {
		return nil
	}
	m := &agentproto.Route{
		Type:     uint32(r.Type),
		Protocol: uint32(r.Protocol),
		Scope:    uint32(r.Scope),
		Metric:   uint32(r.Priority),
		Mtu:      uint32(r.MTU),
		Advmss:   uint32(r.AdvMSS),
	}
	switch {
	case r.Dst != nil:
		m.Destination = prefix(r.Dst)
	case r.Family == netlink.FAMILY_V4:
		m.Destination = "0.0.0.0/0"
	default:
		m.Destination = "::/0"
	}
	if r.Src != nil {
		m.Source = r.Src.String()
	}
	switch r.Type {
	case unix.RTN_BLACKHOLE, unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT:
		if r.Protocol == unix.RTPROT_KERNEL {
			return nil // every kernel has its own
		}
		return m
	case unix.RTN_UNICAST:
	default:
		return nil
	}
	hops := r.MultiPath
	if len(hops) == 0 {
		hops = []*netlink.NexthopInfo{{LinkIndex: r.LinkIndex, Gw: r.Gw, Via: r.Via, Flags: r.Flags}}
	}
	for _, h := range hops {
		name := names[h.LinkIndex]
		if name == "" {
			return nil
		}
		hop := &agentproto.NextHop{Interface: name, Onlink: h.Flags&unix.RTNH_F_ONLINK != 0}
		if h.Gw != nil {
			hop.Gateway = h.Gw.String()
		} else if via, ok := h.Via.(*netlink.Via); ok {
			hop.Gateway = via.Addr.String()
		}
		if len(hops) > 1 {
			hop.Weight = uint32(h.Hops) + 1
		}
		m.Hops = append(m.Hops, hop)
	}
	return m
}

// neighboursOf describes the neighbours that somebody has set.
func neighboursOf(nl *netlink.Handle, names map[int]string) ([]*agentproto.Neighbour, error) {
	neighbours, err := nl.NeighListExecute(netlink.Ndmsg{State: netlink.NUD_PERMANENT})
	if err != nil {
		return nil, fmt.Errorf("list neighbours: %w", err)
	}
	var list []*agentproto.Neighbour
	for _, n := range neighbours {
		name := names[n.LinkIndex]
		if name == "" || n.State&netlink.NUD_PERMANENT == 0 || len(n.HardwareAddr) != 6 ||
			n.Family != unix.AF_INET && n.Family != unix.AF_INET6 {
			continue
		}
		list = append(list, &agentproto.Neighbour{Interface: name, Address: n.IP.String(), Mac: n.HardwareAddr.String()})
	}
	if len(list) > maxNeighbours {
		return nil, fmt.Errorf("%d permanent neighbours, at most %d: %w", len(list), maxNeighbours, errdefs.ErrResourceExhausted)
	}
	return list, nil
}
