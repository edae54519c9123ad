package network

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Joint is what makes the frames that arrive at a link go out of another one:
// a filter on the link's ingress, which comes before everything that the host
// would do with them.
type Joint struct {
	// Link is the link's index.
	Link int `json:"link"`
	// Priority is the filter's.
	Priority uint16 `json:"priority"`
	// Qdisc says that the filter's queueing discipline is ours too.
	Qdisc bool `json:"qdisc,omitempty"`
}

// planJoint decides how to join a link. The filters that are there come first.
func planJoint(nl *netlink.Handle, link netlink.Link) (Joint, error) {
	j := Joint{Link: link.Attrs().Index, Priority: 1}
	qdisc, err := hasIngress(nl, link)
	if err != nil {
		return j, err
	}
	if !qdisc {
		j.Qdisc = true
		return j, nil
	}
	filters, err := nl.FilterList(link, netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		return j, fmt.Errorf("list filters: %w", err)
	}
	for _, f := range filters {
		j.Priority = max(j.Priority, f.Attrs().Priority+1)
	}
	return j, nil
}

func hasIngress(nl *netlink.Handle, link netlink.Link) (bool, error) {
	qdiscs, err := nl.QdiscList(link)
	if err != nil {
		return false, fmt.Errorf("list queueing disciplines: %w", err)
	}
	for _, q := range qdiscs {
		// ingress and clsact; both take filters at the place that we use.
		if q.Attrs().Parent == netlink.HANDLE_INGRESS {
			return true, nil
		}
	}
	return false, nil
}

// make sends what arrives at the joint's link to another one.
func (j Joint) make(nl *netlink.Handle, to int) error {
	if j.Qdisc {
		qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: j.Link,
			Parent:    netlink.HANDLE_CLSACT,
			Handle:    netlink.MakeHandle(0xffff, 0),
		}}
		if err := nl.QdiscAdd(qdisc); err != nil {
			return fmt.Errorf("add clsact: %w (the host's kernel needs CONFIG_NET_SCH_INGRESS)", err)
		}
	}
	attrs := netlink.FilterAttrs{
		LinkIndex: j.Link,
		Parent:    netlink.HANDLE_MIN_INGRESS,
		Priority:  j.Priority,
		Protocol:  unix.ETH_P_ALL,
	}
	redirect := []netlink.Action{netlink.NewMirredAction(to)}
	err := nl.FilterAdd(&netlink.MatchAll{FilterAttrs: attrs, Actions: redirect})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) {
		// No cls_matchall. A u32 filter without selector matches all as well.
		err = nl.FilterAdd(&netlink.U32{FilterAttrs: attrs, Actions: redirect})
	}
	if err != nil {
		return fmt.Errorf("add a filter: %w (the host's kernel needs CONFIG_NET_ACT_MIRRED, and CONFIG_NET_CLS_MATCHALL or CONFIG_NET_CLS_U32)", err)
	}
	return nil
}

// remove undoes make, as far as it has come. A queueing discipline stays when
// others have put filters there meanwhile.
func (j Joint) remove(nl *netlink.Handle) error {
	link, err := nl.LinkByIndex(j.Link)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("link %d: %w", j.Link, err)
	}
	if present, err := hasIngress(nl, link); err != nil || !present {
		return err
	}
	others := 0
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		filters, err := nl.FilterList(link, parent)
		if err != nil {
			return fmt.Errorf("%s: list filters: %w", link.Attrs().Name, err)
		}
		removed := false
		for _, f := range filters {
			if parent != netlink.HANDLE_MIN_INGRESS || f.Attrs().Priority != j.Priority {
				others++
				continue
			}
			if removed {
				continue // u32 lists its tables too
			}
			all := &netlink.GenericFilter{FilterAttrs: *f.Attrs(), FilterType: f.Type()}
			all.Handle = 0 // of this priority
			if err := nl.FilterDel(all); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("%s: remove the filter: %w", link.Attrs().Name, err)
			}
			removed = true
		}
	}
	if !j.Qdisc || others > 0 {
		return nil
	}
	qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: j.Link,
		Parent:    netlink.HANDLE_CLSACT,
		Handle:    netlink.MakeHandle(0xffff, 0),
	}}
	if err := nl.QdiscDel(qdisc); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%s: remove clsact: %w", link.Attrs().Name, err)
	}
	return nil
}
