//go:build privileged

package network

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// newNamespace makes a network namespace with a path, as CNI does, with its
// loopback up.
func newNamespace(t *testing.T) *namespace {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ns")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	ns, err := openNamespace(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ns.close)
	in(t, ns, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	return ns
}

// in does something in a namespace.
func in(t *testing.T, ns *namespace, f func() error) {
	t.Helper()
	if err := ns.do(f); err != nil {
		t.Fatal(err)
	}
}

// connect makes a veth pair between two namespaces; one is a pod's.
func connect(t *testing.T, host *namespace, hostName string, pod *namespace, podName string, mtu int) {
	t.Helper()
	in(t, host, func() error {
		veth := &netlink.Veth{
			LinkAttrs:     netlink.LinkAttrs{Name: hostName, MTU: mtu},
			PeerName:      podName,
			PeerNamespace: netlink.NsFd(int(pod.file.Fd())),
		}
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		return netlink.LinkSetUp(veth)
	})
	in(t, pod, func() error {
		link, err := netlink.LinkByName(podName)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetMTU(link, mtu); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		for { // until the kernel has done its part, in its own time
			addresses, err := netlink.AddrList(link, netlink.FAMILY_V6)
			if err != nil || len(addresses) > 0 {
				return err
			}
			time.Sleep(time.Millisecond)
		}
	})
}

// address gives a link addresses, which need no proof.
func address(t *testing.T, ns *namespace, name string, prefixes ...string) {
	t.Helper()
	in(t, ns, func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		for _, p := range prefixes {
			ip, network, err := net.ParseCIDR(p)
			if err != nil {
				return err
			}
			a := &netlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: network.Mask}}
			if ip.To4() == nil {
				a.Flags = unix.IFA_F_NODAD
			}
			if err := netlink.AddrAdd(link, a); err != nil {
				return fmt.Errorf("%s: %w", p, err)
			}
		}
		return nil
	})
}

func route(t *testing.T, ns *namespace, r *netlink.Route, name string) {
	t.Helper()
	in(t, ns, func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		r.LinkIndex = link.Attrs().Index
		return netlink.RouteAdd(r)
	})
}

// recorder keeps the last record.
type recorder struct{ Record }

func (r *recorder) record(record Record) error {
	record.Joints = slices.Clone(record.Joints)
	r.Record = record
	return nil
}

func open(t *testing.T, ns *namespace, r *recorder) *Network {
	t.Helper()
	n, err := Open(ns.path, r.record)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

// state is all that this package could have changed in a namespace.
func state(t *testing.T, ns *namespace) (list []string) {
	t.Helper()
	in(t, ns, func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			a := l.Attrs()
			list = append(list, fmt.Sprintf("%s %s mtu %d up %v", a.Name, l.Type(), a.MTU, a.Flags&net.FlagUp != 0))
			qdiscs, err := netlink.QdiscList(l)
			if err != nil {
				return err
			}
			for _, q := range qdiscs {
				list = append(list, fmt.Sprintf("%s qdisc %s %s", a.Name, q.Type(), netlink.HandleStr(q.Attrs().Handle)))
				if q.Attrs().Parent != netlink.HANDLE_INGRESS {
					continue
				}
				for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
					filters, err := netlink.FilterList(l, parent)
					if err != nil {
						return err
					}
					for _, f := range filters {
						list = append(list, fmt.Sprintf("%s filter %s %s priority %d", a.Name, netlink.HandleStr(parent), f.Type(), f.Attrs().Priority))
					}
				}
			}
			addresses, err := netlink.AddrList(l, netlink.FAMILY_ALL)
			if err != nil {
				return err
			}
			for _, address := range addresses {
				list = append(list, a.Name+" "+address.IPNet.String())
			}
		}
		return nil
	})
	return list
}
