package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/microvm-runtime/microvm/pkg/agent/guest"
	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// networkPaths is where sysfs shows the network device of a virtio function.
var networkPaths = []string{"virtio*/net/*"}

// guestNetwork is the network of the guest as the shim has described it last.
type guestNetwork struct {
	// sys is where sysfs is mounted.
	sys string

	mu      sync.Mutex
	applied netPlan
	// index is the number of each device that a plan has named.
	index map[deviceKey]int
}

// UpdateNetwork replaces the network by another one.
func (a *Agent) UpdateNetwork(_ context.Context, r *agentproto.Network) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, a.network.update(r)
}

// update makes the network of the guest what r says. It changes only what is
// not the same as before: the rest may be the pod's own work. After an error,
// the same or another update may be tried.
func (n *guestNetwork) update(r *agentproto.Network) error {
	plan, err := parseNetwork(r)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer nl.Close()
	c := &netChange{Handle: nl, network: n, links: map[string]netlink.Link{}}
	if err := c.apply(plan); err != nil {
		return fmt.Errorf("network: %w", err)
	}
	n.applied = plan
	return nil
}

// netChange is one change of the network.
type netChange struct {
	*netlink.Handle
	network *guestNetwork
	links   map[string]netlink.Link // by the name in the plan
}

func (c *netChange) apply(plan netPlan) error {
	old := c.network.applied
	// What goes first makes room: for a name, for an address.
	for _, i := range missingInterfaces(old, plan) {
		if err := c.retire(i); err != nil {
			return fmt.Errorf("interface %s: %w", i.name, err)
		}
	}
	for _, i := range plan.interfaces {
		if err := c.find(i); err != nil {
			return fmt.Errorf("interface %s: %w", i.name, err)
		}
	}
	if err := c.rename(plan, old); err != nil {
		return err
	}
	for _, i := range plan.interfaces {
		if err := c.configure(i, old.with(i.deviceKey)); err != nil {
			return fmt.Errorf("interface %s: %w", i.name, err)
		}
	}
	for _, r := range missing(old.routes, plan.routes) {
		// It may have gone with an interface or an address, or by the pod's hand.
		route, err := c.route(r)
		if err == nil {
			err = c.RouteDel(route)
		}
		if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, errdefs.ErrNotFound) {
			return fmt.Errorf("remove the route to %s: %w", r.destination, err)
		}
	}
	if err := c.addRoutes(missing(plan.routes, old.routes)); err != nil {
		return err
	}
	return c.setNeighbours(missing(old.neighbours, plan.neighbours), missing(plan.neighbours, old.neighbours))
}

// with returns what the plan has about a device, or nil.
func (p netPlan) with(key deviceKey) *netInterface {
	for n := range p.interfaces {
		if p.interfaces[n].deviceKey == key {
			return &p.interfaces[n]
		}
	}
	return nil
}

func missingInterfaces(old, plan netPlan) []netInterface {
	return without(old.interfaces, func(i netInterface) bool { return plan.with(i.deviceKey) != nil })
}

// retire takes an interface out of use, and one that came after boot off the
// bus: the host takes it back.
func (c *netChange) retire(i netInterface) error {
	index := c.network.index[i.deviceKey]
	delete(c.network.index, i.deviceKey)
	if err := c.disable(i, index); err != nil {
		return err
	}
	if i.pci == "" {
		return nil
	}
	remove := filepath.Join(c.network.sys, "bus/pci/devices", i.pci, "remove")
	if err := os.WriteFile(remove, []byte("1"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("take it off the bus: %w", err)
	}
	return nil
}

// disable does nothing where the device is gone already.
func (c *netChange) disable(i netInterface, index int) error {
	link, err := c.LinkByIndex(index)
	if notFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := c.LinkSetDown(link); err != nil {
		return fmt.Errorf("take it down: %w", err)
	}
	for _, a := range i.addresses {
		if err := c.AddrDel(link, a.netlink()); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove address %s: %w", a.prefix, err)
		}
	}
	return c.moveAside(link)
}

// find looks a device up. One of a PCI address may just be on its way.
func (c *netChange) find(i netInterface) error {
	var link netlink.Link
	var err error
	switch index, known := c.network.index[i.deviceKey]; {
	case known:
		link, err = c.LinkByIndex(index)
	case i.pci != "":
		var name string
		if name, err = awaitDevice(c.network.sys, i.pci, "network", networkPaths, deviceTimeout); err == nil {
			link, err = c.LinkByName(name)
		}
	default:
		link, err = c.linkByMAC(i.mac)
	}
	if notFound(err) {
		return fmt.Errorf("its device is gone: %w", errdefs.ErrNotFound)
	}
	if err != nil {
		return err
	}
	c.network.index[i.deviceKey] = link.Attrs().Index
	c.links[i.name] = link
	return nil
}

func (c *netChange) linkByMAC(mac string) (netlink.Link, error) {
	links, err := c.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		if l.Attrs().Flags&net.FlagLoopback == 0 && l.Attrs().HardwareAddr.String() == mac {
			return l, nil
		}
	}
	return nil, fmt.Errorf("no device has the MAC address %s: %w", mac, errdefs.ErrNotFound)
}

// rename gives every new link its name. The kernel's own choice for one of them
// may be the name of another.
func (c *netChange) rename(plan, old netPlan) error {
	for _, i := range plan.interfaces {
		link := c.links[i.name]
		if was := old.with(i.deviceKey); link.Attrs().Name == i.name || was != nil && was.name == i.name {
			continue
		}
		other, err := c.LinkByName(i.name)
		if err != nil && !notFound(err) {
			return fmt.Errorf("interface %s: %w", i.name, err)
		}
		if err == nil {
			if err := c.moveAside(other); err != nil {
				return err
			}
			for _, l := range c.links {
				if l.Attrs().Index == other.Attrs().Index {
					l.Attrs().Name = asideName(l)
				}
			}
		}
		if err := c.LinkSetName(link, i.name); err != nil {
			return fmt.Errorf("rename %s to %s: %w", link.Attrs().Name, i.name, err)
		}
		link.Attrs().Name = i.name
	}
	return nil
}

// moveAside frees the name of a link that is not in use.
func (c *netChange) moveAside(link netlink.Link) error {
	if err := c.LinkSetName(link, asideName(link)); err != nil {
		return fmt.Errorf("the name %s is taken: %w", link.Attrs().Name, err)
	}
	return nil
}

// asideName cannot be the name of anything else: the index is the link's own.
func asideName(link netlink.Link) string {
	return "unused" + strconv.Itoa(link.Attrs().Index)
}

// configure sets what belongs to one interface; old is what was set before, nil
// for nothing.
func (c *netChange) configure(i netInterface, old *netInterface) error {
	link := c.links[i.name]
	if link.Attrs().MTU != i.mtu && (old == nil || old.mtu != i.mtu) {
		if err := c.LinkSetMTU(link, i.mtu); err != nil {
			return fmt.Errorf("set the MTU to %d: %w", i.mtu, err)
		}
	}
	var had []netAddress
	if old != nil {
		had = old.addresses
	}
	if old == nil || old.ipv6Disabled != i.ipv6Disabled || old.acceptRA != i.acceptRA {
		if err := i.setIPv6(link.Attrs().Name); err != nil {
			return err
		}
	}
	if old == nil {
		if err := c.LinkSetUp(link); err != nil {
			return fmt.Errorf("bring it up: %w", err)
		}
	}
	for _, a := range missing(had, i.addresses) {
		if err := c.AddrDel(link, a.netlink()); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove address %s: %w", a.prefix, err)
		}
	}
	for _, a := range missing(i.addresses, had) {
		if err := c.AddrReplace(link, a.netlink()); err != nil {
			return fmt.Errorf("add address %s: %w", a.prefix, err)
		}
	}
	return nil
}

// setIPv6 sets how the link does IPv6. One that gets a link-local address from
// the plan does not make one of its own, which would have to be proven first.
func (i netInterface) setIPv6(link string) error {
	generate := "0"
	if slices.ContainsFunc(i.addresses, func(a netAddress) bool { return a.prefix.Addr().Is6() && a.prefix.Addr().IsLinkLocalUnicast() }) {
		generate = "1" // IN6_ADDR_GEN_MODE_NONE, include/uapi/linux/if_link.h
	}
	disabled := "0"
	if i.ipv6Disabled {
		disabled = "1"
	}
	for _, s := range []struct{ name, value string }{
		{"addr_gen_mode", generate},
		{"accept_ra", strconv.Itoa(int(i.acceptRA))},
		{"disable_ipv6", disabled},
	} {
		if err := guest.WriteSysctl(filepath.Join("net/ipv6/conf", link, s.name), s.value); err != nil {
			return err
		}
	}
	return nil
}

// addRoutes sets routes in an order that works: a gateway has to be reachable
// by a route that is there before.
func (c *netChange) addRoutes(routes []netRoute) error {
	for len(routes) > 0 {
		var failed []netRoute
		var errs []error
		for _, r := range routes {
			route, err := c.route(r)
			if err == nil {
				// Not to replace one: several links have the same, fe80::/64.
				err = c.RouteAppend(route)
			}
			if err != nil && !errors.Is(err, unix.EEXIST) {
				failed = append(failed, r)
				errs = append(errs, fmt.Errorf("route to %s: %w", r.destination, err))
			}
		}
		if len(failed) == len(routes) {
			return errs[0]
		}
		routes = failed
	}
	return nil
}

func (c *netChange) route(r netRoute) (*netlink.Route, error) {
	route := &netlink.Route{
		Dst:      ipNet(r.destination),
		Type:     int(r.kind),
		Protocol: netlink.RouteProtocol(r.protocol),
		Scope:    netlink.Scope(r.scope),
		Priority: int(r.metric),
		MTU:      int(r.mtu),
		AdvMSS:   int(r.advMSS),
		Table:    unix.RT_TABLE_MAIN,
	}
	if r.source.IsValid() {
		route.Src = r.source.AsSlice()
	}
	for _, h := range r.hops {
		link := c.links[h.iface]
		if link == nil {
			return nil, fmt.Errorf("interface %s: %w", h.iface, errdefs.ErrNotFound)
		}
		hop := &netlink.NexthopInfo{LinkIndex: link.Attrs().Index}
		if h.weight > 0 {
			hop.Hops = int(h.weight) - 1
		}
		if h.onlink {
			hop.Flags = unix.RTNH_F_ONLINK
		}
		switch {
		case !h.gateway.IsValid():
		case h.gateway.Is4() == r.destination.Addr().Is4():
			hop.Gw = h.gateway.AsSlice()
		default:
			hop.Via = &netlink.Via{AddrFamily: unix.AF_INET6, Addr: h.gateway.AsSlice()}
		}
		route.MultiPath = append(route.MultiPath, hop)
	}
	if len(route.MultiPath) == 1 {
		hop := route.MultiPath[0]
		route.MultiPath = nil
		route.LinkIndex, route.Flags, route.Gw, route.Via = hop.LinkIndex, hop.Flags, hop.Gw, hop.Via
	}
	return route, nil
}

func (c *netChange) setNeighbours(gone, added []netNeighbour) error {
	for _, n := range gone {
		link := c.links[n.iface]
		if link == nil {
			continue // gone with its interface
		}
		if err := c.NeighDel(n.netlink(link)); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove neighbour %s: %w", n.address, err)
		}
	}
	for _, n := range added {
		if err := c.NeighSet(n.netlink(c.links[n.iface])); err != nil {
			return fmt.Errorf("neighbour %s: %w", n.address, err)
		}
	}
	return nil
}

func (n netNeighbour) netlink(link netlink.Link) *netlink.Neigh {
	mac, _ := net.ParseMAC(n.mac) // parseMAC has made it
	family := unix.AF_INET
	if n.address.Is6() {
		family = unix.AF_INET6
	}
	return &netlink.Neigh{
		LinkIndex:    link.Attrs().Index,
		Family:       family,
		State:        netlink.NUD_PERMANENT,
		IP:           n.address.AsSlice(),
		HardwareAddr: mac,
	}
}

func (a netAddress) netlink() *netlink.Addr {
	address := &netlink.Addr{
		IPNet: ipNet(a.prefix),
		Scope: int(a.scope),
		// The routes that the kernel would make may be others than the plan's.
		Flags: unix.IFA_F_NOPREFIXROUTE,
	}
	if a.prefix.Addr().Is6() {
		address.Flags |= unix.IFA_F_NODAD
	} else {
		address.Broadcast = net.IPv4zero // none; nil would be a guess
	}
	if a.broadcast.IsValid() {
		address.Broadcast = a.broadcast.AsSlice()
	}
	if a.peer.IsValid() {
		address.Peer = ipNet(a.peer)
	}
	return address
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func notFound(err error) bool {
	return errors.As(err, new(netlink.LinkNotFoundError))
}
