package agent

import (
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// Bounds of a network, far above what a pod has.
const (
	maxInterfaces = 32
	maxAddresses  = 64 // of one interface
	maxRoutes     = 1024
	maxHops       = 32
	maxNeighbours = 1024

	// minMTU is what IPv4 asks of a link (RFC 791), maxMTU what virtio-net's
	// field has room for.
	minMTU = 68
	maxMTU = 65535
)

// netPlan is a network as the guest is to have it, checked.
type netPlan struct {
	interfaces []netInterface
	routes     []netRoute
	neighbours []netNeighbour
}

// netInterface is a network device by its key and what it is to be.
type netInterface struct {
	deviceKey
	name         string
	mtu          int
	ipv6Disabled bool
	acceptRA     uint32
	addresses    []netAddress
	up           bool // has been brought up; a plan's are to be
}

// deviceKey tells one device from the others: the PCI address if it has one,
// else the MAC address.
type deviceKey struct {
	pci string
	mac string
}

type netAddress struct {
	prefix    netip.Prefix
	peer      netip.Prefix // zero for none
	broadcast netip.Addr   // zero for none
	scope     uint8
}

type netRoute struct {
	destination netip.Prefix
	source      netip.Addr // zero for none
	kind        uint8
	protocol    uint8
	scope       uint8
	metric      uint32
	mtu         uint32
	advMSS      uint32
	hops        []netHop
}

type netHop struct {
	device  deviceKey
	gateway netip.Addr // zero for none
	onlink  bool
	weight  uint32
}

type netNeighbour struct {
	device  deviceKey
	address netip.Addr
	mac     string
}

// parseNetwork checks a network. nil is one with nothing in it.
func parseNetwork(m *agentproto.Network) (netPlan, error) {
	plan, err := parsePlan(m)
	if err != nil {
		return netPlan{}, fmt.Errorf("network: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return plan, nil
}

func parsePlan(m *agentproto.Network) (plan netPlan, err error) {
	for _, list := range []struct {
		what   string
		n, max int
	}{
		{"interfaces", len(m.GetInterfaces()), maxInterfaces},
		{"routes", len(m.GetRoutes()), maxRoutes},
		{"neighbours", len(m.GetNeighbours()), maxNeighbours},
	} {
		if list.n > list.max {
			return plan, fmt.Errorf("%d %s, at most %d", list.n, list.what, list.max)
		}
	}
	names, keys := map[string]deviceKey{}, map[deviceKey]bool{}
	for _, m := range m.GetInterfaces() {
		i, err := parseInterface(m)
		if err != nil {
			return plan, fmt.Errorf("interface %.20q: %w", m.GetName(), err)
		}
		if _, ok := names[i.name]; ok || keys[i.deviceKey] {
			return plan, fmt.Errorf("interface %q is there twice", i.name)
		}
		names[i.name], keys[i.deviceKey] = i.deviceKey, true
		plan.interfaces = append(plan.interfaces, i)
	}
	for _, m := range m.GetRoutes() {
		r, err := parseRoute(m, names)
		if err != nil {
			return plan, fmt.Errorf("route to %.50q: %w", m.GetDestination(), err)
		}
		plan.routes = append(plan.routes, r)
	}
	for _, m := range m.GetNeighbours() {
		n, err := parseNeighbour(m, names)
		if err != nil {
			return plan, fmt.Errorf("neighbour %.50q: %w", m.GetAddress(), err)
		}
		plan.neighbours = append(plan.neighbours, n)
	}
	return plan, nil
}

func parseInterface(m *agentproto.Interface) (i netInterface, err error) {
	i = netInterface{
		name:         m.GetName(),
		ipv6Disabled: m.GetIpv6Disabled(),
		acceptRA:     m.GetAcceptRa(),
	}
	switch {
	case !validLinkName(i.name) || i.name == "lo":
		return i, fmt.Errorf("invalid name")
	case m.GetMtu() < minMTU || m.GetMtu() > maxMTU:
		return i, fmt.Errorf("invalid MTU %d", m.GetMtu())
	case i.acceptRA > 2:
		return i, fmt.Errorf("invalid accept_ra %d", i.acceptRA)
	case len(m.GetAddresses()) > maxAddresses:
		return i, fmt.Errorf("%d addresses, at most %d", len(m.GetAddresses()), maxAddresses)
	}
	i.mtu = int(m.GetMtu())
	if i.pci = m.GetPciAddress(); i.pci == "" {
		i.mac, err = parseMAC(m.GetMac())
	} else if !pciAddress.MatchString(i.pci) {
		err = fmt.Errorf("invalid PCI address %.20q", i.pci)
	}
	if err != nil {
		return i, err
	}
	for _, m := range m.GetAddresses() {
		a, err := parseAddress(m)
		if err != nil {
			return i, fmt.Errorf("address %.50q: %w", m.GetPrefix(), err)
		}
		i.addresses = append(i.addresses, a)
	}
	return i, nil
}

// validLinkName is the kernel's dev_valid_name (net/core/dev.c), without what
// a path below /proc/sys could not have.
func validLinkName(name string) bool {
	return name != "" && len(name) < unix.IFNAMSIZ && name != "." && name != ".." &&
		!strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r >= 0x7f || r == '/' || r == ':' })
}

// parseMAC returns the address as package net prints it.
func parseMAC(s string) (string, error) {
	mac, err := net.ParseMAC(s)
	if err != nil || len(mac) != 6 {
		return "", fmt.Errorf("invalid MAC address %.20q", s)
	}
	return mac.String(), nil
}

func parseAddress(m *agentproto.Address) (a netAddress, err error) {
	if a.prefix, err = parsePrefix(m.GetPrefix()); err != nil {
		return a, err
	}
	if a.scope, err = parseByte("scope", m.GetScope()); err != nil {
		return a, err
	}
	if s := m.GetPeer(); s != "" {
		if a.peer, err = parsePrefix(s); err != nil {
			return a, err
		}
		if a.peer.Addr().Is4() != a.prefix.Addr().Is4() {
			return a, fmt.Errorf("peer %s is of the other family", a.peer)
		}
	}
	if s := m.GetBroadcast(); s != "" {
		if a.broadcast, err = parseAddr(s); err != nil {
			return a, err
		}
		if !a.broadcast.Is4() || !a.prefix.Addr().Is4() {
			return a, fmt.Errorf("broadcast %s is not for this address", a.broadcast)
		}
	}
	return a, nil
}

func parseRoute(m *agentproto.Route, names map[string]deviceKey) (r netRoute, err error) {
	if r.destination, err = parsePrefix(m.GetDestination()); err != nil {
		return r, err
	}
	if r.destination != r.destination.Masked() {
		return r, fmt.Errorf("the destination has bits outside of its mask")
	}
	if s := m.GetSource(); s != "" {
		if r.source, err = parseAddr(s); err != nil {
			return r, err
		}
		if r.source.Is4() != r.destination.Addr().Is4() {
			return r, fmt.Errorf("source %s is of the other family", r.source)
		}
	}
	for _, b := range []struct {
		what string
		n    uint32
		to   *uint8
	}{{"type", m.GetType(), &r.kind}, {"protocol", m.GetProtocol(), &r.protocol}, {"scope", m.GetScope(), &r.scope}} {
		if *b.to, err = parseByte(b.what, b.n); err != nil {
			return r, err
		}
	}
	r.metric, r.mtu, r.advMSS = m.GetMetric(), m.GetMtu(), m.GetAdvmss()
	switch hops := len(m.GetHops()); r.kind {
	case unix.RTN_UNICAST:
		if hops == 0 || hops > maxHops {
			return r, fmt.Errorf("%d hops", hops)
		}
	case unix.RTN_BLACKHOLE, unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT:
		if hops > 0 {
			return r, fmt.Errorf("%d hops where nothing is to go", hops)
		}
	default:
		return r, fmt.Errorf("unknown type %d", r.kind)
	}
	for _, hop := range m.GetHops() {
		device, ok := names[hop.GetInterface()]
		if !ok {
			return r, fmt.Errorf("no interface %.20q", hop.GetInterface())
		}
		h := netHop{device: device, onlink: hop.GetOnlink(), weight: hop.GetWeight()}
		if s := hop.GetGateway(); s != "" {
			if h.gateway, err = parseAddr(s); err != nil {
				return r, err
			}
			if h.gateway.Is4() && !r.destination.Addr().Is4() {
				return r, fmt.Errorf("gateway %s is of the other family", h.gateway)
			}
		}
		// rtnh_hops of struct rtnexthop is a byte, and one less.
		if h.weight > 256 || h.weight == 0 && len(m.GetHops()) > 1 {
			return r, fmt.Errorf("invalid weight %d", h.weight)
		}
		r.hops = append(r.hops, h)
	}
	return r, nil
}

func parseNeighbour(m *agentproto.Neighbour, names map[string]deviceKey) (n netNeighbour, err error) {
	device, ok := names[m.GetInterface()]
	if !ok {
		return n, fmt.Errorf("no interface %.20q", m.GetInterface())
	}
	n.device = device
	if n.address, err = parseAddr(m.GetAddress()); err != nil {
		return n, err
	}
	n.mac, err = parseMAC(m.GetMac())
	return n, err
}

func parsePrefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil || p.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("invalid prefix %.50q", s)
	}
	return p, nil
}

func parseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" || a.Is4In6() {
		return netip.Addr{}, fmt.Errorf("invalid address %.50q", s)
	}
	return a, nil
}

func parseByte(what string, n uint32) (uint8, error) {
	if n > 255 {
		return 0, fmt.Errorf("invalid %s %d", what, n)
	}
	return uint8(n), nil
}

// missing returns the elements of list that are not in other. Their text says
// all of what they are.
func missing[T any](list, other []T) []T {
	have := make(map[string]bool, len(other))
	for _, e := range other {
		have[fmt.Sprint(e)] = true
	}
	return without(list, func(e T) bool { return have[fmt.Sprint(e)] })
}

// remove takes elements of set away, one after the other. Those that are left
// after an error stay in set.
func remove[T any](set *[]T, gone []T, f func(T) error) (err error) {
	kept := missing(*set, gone)
	for len(gone) > 0 && err == nil {
		if err = f(gone[0]); err == nil {
			gone = gone[1:]
		}
	}
	*set = append(kept, gone...)
	return err
}

// add adds elements to set, one after the other, until there is an error.
func add[T any](set *[]T, more []T, f func(T) error) error {
	for _, e := range more {
		if err := f(e); err != nil {
			return err
		}
		*set = append(*set, e)
	}
	return nil
}
