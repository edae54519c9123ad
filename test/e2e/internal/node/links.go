package node

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"

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

// namespace is how /proc shows one, namespaces(7).
var namespace = regexp.MustCompile(`^(cgroup|ipc|mnt|net|pid|time|user|uts):\[[0-9]+\]$`)

// namespaces adds those of all kinds that a process is in or keeps by a descriptor. Those that are kept by a mount are among the
// mounts.
func (s hostState) namespaces(pid int) {
	for _, dir := range []string{"ns", "fd"} {
		links, err := filepath.Glob(fmt.Sprintf("/proc/%d/%s/*", pid, dir))
		if err != nil {
			continue
		}
		for _, link := range links {
			if target, err := os.Readlink(link); err == nil && namespace.MatchString(target) {
				s["namespace "+target] = 1 // by how many is no matter
			}
		}
	}
}
