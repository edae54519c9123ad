package node

import (
	"fmt"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
)

// links adds the network links of our namespace, and the queueing disciplines and filters on them.
func (s hostState) links() error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		name := l.Attrs().Name
		s.add("link", name)
		disciplines, err := netlink.QdiscList(l)
		if err != nil {
			continue // the link has gone since
		}
		for _, d := range disciplines {
			s.add("qdisc", name+" "+d.Type())
		}
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			filters, err := netlink.FilterList(l, parent)
			if err != nil {
				continue // gone, or without the discipline that has filters
			}
			for _, f := range filters {
				s.add("filter", fmt.Sprintf("%s %x %s", name, parent, f.Type()))
			}
		}
	}
	return nil
}

// namespaces adds the network namespaces that a process is in or keeps by a descriptor. Those that are kept by a mount are
// among the mounts.
func (s hostState) namespaces(pid int) {
	add := func(path string) {
		if target, err := os.Readlink(path); err == nil && strings.HasPrefix(target, "net:[") {
			s["namespace "+target] = 1 // by how many is no matter
		}
	}
	process := fmt.Sprintf("/proc/%d/", pid)
	add(process + "ns/net")
	descriptors, err := os.ReadDir(process + "fd")
	if err != nil {
		return // it has ended
	}
	for _, d := range descriptors {
		add(process + "fd/" + d.Name())
	}
}
