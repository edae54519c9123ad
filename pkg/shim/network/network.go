// Package network connects a virtual machine with the network namespace of its
// pod. Each link that CNI, or whoever else, has put into the namespace is joined
// with a tap, in both directions, before the host's network stack gets to see
// what arrives; the guest gets the link's MAC address, its addresses, routes and
// neighbours. Everything that is there stays as it was made, for those who made
// it and will remove it.
package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
	"github.com/microvm-runtime/microvm/pkg/vmm/control"
)

// dumpAttempts is how often a list is asked for that changes while the kernel
// writes it.
const dumpAttempts = 10

// Record is what has to be undone in a namespace. The zero Record is nothing.
type Record struct {
	// Path of the namespace, and which namespace was there.
	Path   string  `json:"path,omitempty"`
	Device uint64  `json:"device,omitempty"`
	Inode  uint64  `json:"inode,omitempty"`
	Joints []Joint `json:"joints,omitempty"`
}

// Network is the network of one pod. All methods may be called concurrently.
type Network struct {
	ns *namespace
	nl *netlink.Handle // of the namespace
	// record is called with what will have to be undone, before it is done.
	record func(Record) error

	mu     sync.Mutex
	joints []Joint
	taps   map[int]bool
	// links are those that the guest has, by index, with their PCI addresses
	// where they came after boot. refused are those that it could not get.
	links   map[int]string
	refused map[int]bool
	// departed are the PCI addresses of links that have gone.
	departed []string
	watch    *watch
	forward  *forwarder
	closed   bool
}

// Device is a link that the guest is to have.
type Device struct {
	Link string // its name
	NIC  control.NIC
	// Files are the tap's descriptors, one for each queue pair. They are the
	// caller's. The tap is gone when all of them are closed.
	Files []*os.File

	index int
}

// Open looks at the namespace of a path. The host's own is refused. Changes of
// what has to be undone are told to record before they happen.
func Open(path string, record func(Record) error) (*Network, error) {
	ns, err := openNamespace(path)
	if err != nil {
		return nil, err
	}
	n := &Network{
		ns:      ns,
		record:  record,
		taps:    map[int]bool{},
		links:   map[int]string{},
		refused: map[int]bool{},
	}
	err = ns.do(func() (err error) {
		n.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		ns.close()
		return nil, fmt.Errorf("network namespace %s: %w", path, err)
	}
	return n, nil
}

// RaiseLoopback brings the namespace's loopback up, as runtimes do for a
// namespace that they have made.
func (n *Network) RaiseLoopback() error {
	lo, err := n.nl.LinkByName("lo")
	if err == nil {
		err = n.nl.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("loopback of %s: %w", n.ns.path, err)
	}
	return nil
}

// Connect joins all links that are not joined yet with taps of so many queue
// pairs. Either all of them are joined, or none and there is an error.
func (n *Network) Connect(queuePairs int) (_ []Device, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	joined := map[int]bool{}
	for index := range n.links {
		joined[index] = true
	}
	var list []netlink.Link
	err = retry(func() (err error) {
		list, err = n.nl.LinkList()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	taps := map[int]bool{}
	for index := range n.taps {
		taps[index] = true
	}
	for index := range n.refused {
		taps[index] = true
	}
	found, err := candidates(list, joined, taps)
	if err != nil {
		return nil, err
	}
	var devices []Device
	defer func() {
		if err != nil {
			for _, d := range devices {
				closeAll(d.Files)
				err = errors.Join(err, n.dropLocked(d.index))
			}
		}
	}()
	for _, link := range found {
		d, err := n.connectLocked(link, queuePairs)
		if err != nil {
			return nil, fmt.Errorf("link %s: %w", link.Attrs().Name, err)
		}
		devices = append(devices, d)
	}
	return devices, nil
}

// connectLocked joins one link with a tap. After an error nothing is left.
func (n *Network) connectLocked(link netlink.Link, queuePairs int) (d Device, err error) {
	a := link.Attrs()
	d = Device{
		Link:  a.Name,
		NIC:   control.NIC{MAC: a.HardwareAddr.String(), MTU: a.MTU, QueuePairs: queuePairs},
		index: a.Index,
	}
	var tap int
	err = n.ns.do(func() (err error) {
		var name string
		if name, d.Files, err = openTap(queuePairs); err != nil {
			return err
		}
		tap, err = raiseTap(name, a.MTU)
		return err
	})
	defer func() {
		if err != nil {
			err = errors.Join(err, n.dropLocked(a.Index))
			closeAll(d.Files) // and the tap, with its filter, is gone
			delete(n.taps, tap)
		}
	}()
	if err != nil {
		return d, err
	}
	n.taps[tap] = true
	// It is ours and goes with its descriptors: nothing to record.
	if err := (Joint{Link: tap, Priority: 1, Qdisc: true}).make(n.nl, a.Index); err != nil {
		return d, err
	}
	joint, err := planJoint(n.nl, link)
	if err != nil {
		return d, err
	}
	n.joints = append(n.joints, joint)
	if err := n.record(n.recordLocked()); err != nil {
		return d, err
	}
	if err := joint.make(n.nl, tap); err != nil {
		return d, err
	}
	n.links[a.Index] = ""
	return d, nil
}

func (n *Network) recordLocked() Record {
	return Record{Path: n.ns.path, Device: n.ns.device, Inode: n.ns.inode, Joints: n.joints}
}

// dropLocked undoes what was done to a link.
func (n *Network) dropLocked(index int) error {
	delete(n.links, index)
	for i, j := range n.joints {
		if j.Link != index {
			continue
		}
		if err := j.remove(n.nl); err != nil {
			return err
		}
		n.joints = append(n.joints[:i:i], n.joints[i+1:]...)
		return n.record(n.recordLocked())
	}
	return nil
}

// Attached notes the PCI address that a device has in the guest. One that has
// come with the boot needs none.
func (n *Network) Attached(d Device, pciAddress string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, ok := n.links[d.index]; ok {
		n.links[d.index] = pciAddress
	}
}

// Refuse gives a link up that the guest could not get: it is not tried again.
// The caller closes the device's files.
func (n *Network) Refuse(d Device) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.refused[d.index] = true
	return n.dropLocked(d.index)
}

// Describe says what the guest's network is to be: of the links that are joined
// and still there, what is set on them now.
func (n *Network) Describe() (*agentproto.Network, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var m *agentproto.Network
	err := n.ns.do(func() error {
		return retry(func() (err error) {
			m, err = n.describeLocked()
			return err
		})
	})
	if err != nil {
		return nil, fmt.Errorf("network namespace %s: %w", n.ns.path, err)
	}
	return m, nil
}

func (n *Network) describeLocked() (*agentproto.Network, error) {
	list, err := n.nl.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	m := &agentproto.Network{}
	names := map[int]string{}
	n.forgetLocked(list)
	for _, link := range list {
		pci, joined := n.links[link.Attrs().Index]
		if !joined {
			continue
		}
		i, err := interfaceOf(n.nl, link)
		if err != nil {
			return nil, err
		}
		i.PciAddress = pci
		names[link.Attrs().Index] = link.Attrs().Name
		m.Interfaces = append(m.Interfaces, i)
	}
	if m.Routes, err = routesOf(n.nl, names); err != nil {
		return nil, err
	}
	m.Neighbours, err = neighboursOf(n.nl, names)
	return m, err
}

// forgetLocked forgets the links that are not there any more. What was done to
// them went with them.
func (n *Network) forgetLocked(list []netlink.Link) {
	for index, pci := range n.links {
		if slices.ContainsFunc(list, func(l netlink.Link) bool { return l.Attrs().Index == index }) {
			continue
		}
		delete(n.links, index)
		if pci != "" {
			n.departed = append(n.departed, pci)
		}
	}
}

// Departed returns the PCI addresses of devices whose links have gone, once.
// The guest is to be told before they are taken away.
func (n *Network) Departed() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	list := n.departed
	n.departed = nil
	return list
}

// retry repeats what has read lists that were changing.
func retry(f func() error) error {
	for attempt := 0; ; attempt++ {
		err := f()
		if !errors.Is(err, netlink.ErrDumpInterrupted) || attempt == dumpAttempts {
			return err
		}
	}
}

// Equal says that two descriptions are the same.
func Equal(a, b *agentproto.Network) bool { return proto.Equal(a, b) }

// Close undoes everything. It may be called again. Nothing else may be called
// then.
func (n *Network) Close() error {
	n.mu.Lock()
	watch, forward := n.watch, n.forward
	n.watch, n.forward = nil, nil
	n.mu.Unlock()
	// Both may be in the middle of a call of ours.
	if watch != nil {
		watch.close()
	}
	if forward != nil {
		forward.close()
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil
	}
	var errs []error
	var left []Joint
	for _, j := range n.joints {
		if err := j.remove(n.nl); err != nil {
			errs = append(errs, err)
			left = append(left, j)
		}
	}
	n.joints = left
	clear(n.links)
	if len(errs) > 0 {
		return fmt.Errorf("network namespace %s: %w", n.ns.path, errors.Join(errs...))
	}
	n.closed = true
	n.nl.Close()
	n.ns.close()
	return n.record(Record{})
}

// Remove undoes what a process that is gone has done. What is not there any
// more is no error, be it the whole namespace.
func Remove(ctx context.Context, r Record) error {
	if len(r.Joints) == 0 {
		return nil
	}
	ns, err := openNamespace(r.Path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNoNamespace) {
		return nil
	}
	if err != nil {
		return err
	}
	defer ns.close()
	if ns.device != r.Device || ns.inode != r.Inode {
		return nil // another one of the same name
	}
	var nl *netlink.Handle
	err = ns.do(func() (err error) {
		nl, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", r.Path, err)
	}
	defer nl.Close()
	var errs []error
	for _, j := range r.Joints {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		errs = append(errs, j.remove(nl))
	}
	return errors.Join(errs...)
}
