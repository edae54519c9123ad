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

// guestNetwork is the network of the guest.
type guestNetwork struct {
	// sys is where sysfs is mounted.
	sys string

	mu sync.Mutex
	// set is what has been set, step by step: the shim's last plan or, if that has
	// failed, what there is of it and still is of those before.
	set netPlan
	// index is the number of each device of set.
	index map[deviceKey]int
}

// UpdateNetwork replaces the network by another one.
func (a *Agent) UpdateNetwork(_ context.Context, r *agentproto.Network) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, a.network.update(r)
}

// update makes the network of the guest what r says. It changes only what is
// not the same as before: the rest may be the pod's own work. After an error,
// the same or another update may be tried: what was set until then is known.
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
	c := &netChange{Handle: nl, network: n, links: map[deviceKey]netlink.Link{}}
	if err := c.apply(plan); err != nil {
		return fmt.Errorf("network: %w", err)
	}
	return nil
}

// netChange is one change of the network.
type netChange struct {
	*netlink.Handle
	network *guestNetwork
	links   map[deviceKey]netlink.Link
}

func (c *netChange) apply(plan netPlan) error {
	set := &c.network.set
	// What goes first makes room: for a name, for an address.
	for _, i := range without(set.interfaces, func(i netInterface) bool { return plan.with(i.deviceKey) != nil }) {
		if err := c.retire(i); err != nil {
			return fmt.Errorf("interface %s: %w", i.name, err)
		}
	}
	for _, i := range plan.interfaces {
		if err := c.find(i); err != nil {
			return fmt.Errorf("interface %s: %w", i.name, err)
		}
	}
	if err := c.rename(plan); err != nil {
		return err
	}
	for _, i := range plan.interfaces {
		if err := c.configure(i, set.with(i.deviceKey)); err != nil {
			return fmt.Errorf("interface %s: %w", i.name, err)
		}
	}
	if err := remove(&set.routes, missing(set.routes, plan.routes), c.removeRoute); err != nil {
		return err
	}
	if err := c.addRoutes(missing(plan.routes, set.routes)); err != nil {
		return err
	}
	if err := remove(&set.neighbours, missing(set.neighbours, plan.neighbours), c.removeNeighbour); err != nil {
		return err
	}
	return add(&set.neighbours, missing(plan.neighbours, set.neighbours), c.addNeighbour)
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

// retire takes an interface out of use, and one that came after boot off the
// bus: the host takes it back.
func (c *netChange) retire(i netInterface) error {
	if err := c.removeVia(i.deviceKey, func(netip.Addr) bool { return true }); err != nil {
		return err
	}
	if err := c.disable(i); err != nil {
		return err
	}
	if i.pci != "" {
		file := filepath.Join(c.network.sys, "bus/pci/devices", i.pci, "remove")
		if err := os.WriteFile(file, []byte("1"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("take it off the bus: %w", err)
		}
	}
	set := &c.network.set
	set.interfaces = without(set.interfaces, func(other netInterface) bool { return other.deviceKey == i.deviceKey })
	delete(c.network.index, i.deviceKey)
	return nil
}

// removeVia removes the routes and neighbours that a device leads to, those with
// an address of which is says true.
func (c *netChange) removeVia(device deviceKey, is func(netip.Addr) bool) error {
	set := &c.network.set
	hop := func(h netHop) bool { return h.device == device }
	routes := without(set.routes, func(r netRoute) bool { return !is(r.destination.Addr()) || !slices.ContainsFunc(r.hops, hop) })
	if err := remove(&set.routes, routes, c.removeRoute); err != nil {
		return err
	}
	neighbours := without(set.neighbours, func(n netNeighbour) bool { return !is(n.address) || n.device != device })
	return remove(&set.neighbours, neighbours, c.removeNeighbour)
}

// disable does nothing where the device is gone already.
func (c *netChange) disable(i netInterface) error {
	link, err := c.LinkByIndex(c.network.index[i.deviceKey])
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
		if err := c.removeAddress(link, a); err != nil {
			return err
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
	c.links[i.deviceKey] = link
	if c.network.set.with(i.deviceKey) == nil {
		c.network.set.interfaces = append(c.network.set.interfaces, netInterface{deviceKey: i.deviceKey})
	}
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
func (c *netChange) rename(plan netPlan) error {
	for _, i := range plan.interfaces {
		link, set := c.links[i.deviceKey], c.network.set.with(i.deviceKey)
		if set.name == i.name {
			continue
		}
		if link.Attrs().Name != i.name {
			if err := c.makeRoom(i.name); err != nil {
				return fmt.Errorf("interface %s: %w", i.name, err)
			}
			if err := c.LinkSetName(link, i.name); err != nil {
				return fmt.Errorf("rename %s to %s: %w", link.Attrs().Name, i.name, err)
			}
			link.Attrs().Name = i.name
		}
		set.name = i.name
	}
	return nil
}

// makeRoom frees a name that another link may have.
func (c *netChange) makeRoom(name string) error {
	other, err := c.LinkByName(name)
	if notFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := c.moveAside(other); err != nil {
		return err
	}
	for key, l := range c.links {
		if l.Attrs().Index == other.Attrs().Index {
			l.Attrs().Name = asideName(l)
			c.network.set.with(key).name = ""
		}
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

// configure sets what belongs to one interface, of which set is what has been
// set.
func (c *netChange) configure(i netInterface, set *netInterface) error {
	link := c.links[i.deviceKey]
	if set.mtu != i.mtu {
		if link.Attrs().MTU != i.mtu {
			if err := c.LinkSetMTU(link, i.mtu); err != nil {
				return fmt.Errorf("set the MTU to %d: %w", i.mtu, err)
			}
		}
		set.mtu = i.mtu
	}
	if !set.up || set.ipv6Disabled != i.ipv6Disabled || set.acceptRA != i.acceptRA {
		if err := i.setIPv6(link.Attrs().Name); err != nil {
			return err
		}
		set.ipv6Disabled, set.acceptRA = i.ipv6Disabled, i.acceptRA
	}
	if !set.up {
		if err := c.LinkSetUp(link); err != nil {
			return fmt.Errorf("bring it up: %w", err)
		}
		set.up = true
	}
	is4 := func(a netAddress) bool { return a.prefix.Addr().Is4() }
	gone := missing(set.addresses, i.addresses)
	if slices.ContainsFunc(gone, is4) {
		// With one of IPv4 the kernel takes away those that are secondary to it
		// (__inet_del_ifa), and with the last one all routes and neighbours of the
		// link (fib_disable_ip). Those of the plan are set again.
		if err := c.removeVia(i.deviceKey, netip.Addr.Is4); err != nil {
			return err
		}
		gone = without(set.addresses, func(a netAddress) bool { return !is4(a) && slices.Contains(i.addresses, a) })
	}
	if err := remove(&set.addresses, gone, func(a netAddress) error { return c.removeAddress(link, a) }); err != nil {
		return err
	}
	return add(&set.addresses, missing(i.addresses, set.addresses), func(a netAddress) error {
		if err := c.AddrReplace(link, a.netlink()); err != nil {
			return fmt.Errorf("add address %s: %w", a.prefix, err)
		}
		return nil
	})
}

func (c *netChange) removeAddress(link netlink.Link, a netAddress) error {
	if err := c.AddrDel(link, a.netlink()); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("remove address %s: %w", a.prefix, err)
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
			// Not to replace one: several links have the same, fe80::/64.
			err := c.RouteAppend(c.route(r))
			if err != nil && !errors.Is(err, unix.EEXIST) {
				failed = append(failed, r)
				errs = append(errs, fmt.Errorf("route to %s: %w", r.destination, err))
				continue
			}
			c.network.set.routes = append(c.network.set.routes, r)
		}
		if len(failed) == len(routes) {
			return errs[0]
		}
		routes = failed
	}
	return nil
}

// removeRoute does nothing where it has gone with an interface or an address, or
// by the pod's hand.
func (c *netChange) removeRoute(r netRoute) error {
	if err := c.RouteDel(c.route(r)); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("remove the route to %s: %w", r.destination, err)
	}
	return nil
}

func (c *netChange) route(r netRoute) *netlink.Route {
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
		hop := &netlink.NexthopInfo{LinkIndex: c.network.index[h.device]}
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
	return route
}

// removeNeighbour does nothing where it is gone, with its device or without.
func (c *netChange) removeNeighbour(n netNeighbour) error {
	if err := c.NeighDel(c.neighbour(n)); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove neighbour %s: %w", n.address, err)
	}
	return nil
}

func (c *netChange) addNeighbour(n netNeighbour) error {
	if err := c.NeighSet(c.neighbour(n)); err != nil {
		return fmt.Errorf("neighbour %s: %w", n.address, err)
	}
	return nil
}

func (c *netChange) neighbour(n netNeighbour) *netlink.Neigh {
	mac, _ := net.ParseMAC(n.mac) // parseMAC has made it
	family := unix.AF_INET
	if n.address.Is6() {
		family = unix.AF_INET6
	}
	return &netlink.Neigh{
		LinkIndex:    c.network.index[n.device],
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
