//go:build privileged

package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/agent"
	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// guest stands for a virtual machine: a namespace whose links are taps, from
// which frames are copied to the pod's taps and back, and the real agent's code.
type guest struct {
	*namespace
	agent *agent.Agent
}

func newGuest(t *testing.T) *guest {
	t.Helper()
	l, err := net.Listen("unix", t.TempDir()+"/streams")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	g := &guest{namespace: newNamespace(t)}
	g.agent, err = agent.New(agent.Config{Streams: l, Root: t.TempDir(), Log: slog.New(slog.DiscardHandler), Reaper: agent.NewReaper()})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// attach makes a network card of a device.
func (g *guest) attach(t *testing.T, d Device) {
	t.Helper()
	var files []*os.File
	in(t, g.namespace, func() error {
		name, made, err := openTap(len(d.Files))
		if err != nil {
			return err
		}
		files = made
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		mac, err := net.ParseMAC(d.NIC.MAC)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetHardwareAddr(link, mac); err != nil {
			return err
		}
		return netlink.LinkSetName(link, "nic-"+d.Link)
	})
	t.Cleanup(func() {
		closeAll(d.Files)
		closeAll(files)
	})
	for i := range files {
		go copyFrames(files[i], d.Files[i])
		go copyFrames(d.Files[i], files[i])
	}
}

// copyFrames carries frames with their headers.
func copyFrames(to, from *os.File) {
	frame := make([]byte, headerSize+65536)
	for {
		n, err := from.Read(frame)
		if err != nil {
			return
		}
		if _, err := to.Write(frame[:n]); err != nil && !errors.Is(err, unix.EIO) { // the link is down
			return
		}
	}
}

func (g *guest) update(t *testing.T, m *agentproto.Network) {
	t.Helper()
	in(t, g.namespace, func() error {
		_, err := g.agent.UpdateNetwork(context.Background(), m)
		return err
	})
}

// serve answers each connection to an address with a text, and what it got.
func serve(t *testing.T, ns *namespace, address, text string) {
	t.Helper()
	in(t, ns, func() error {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				got, _ := io.ReadAll(c)
				c.Write(append([]byte(text), got...))
				c.Close()
			}
		}()
		return nil
	})
}

// expectAnswer sends more than fits into a packet and expects it back.
func expectAnswer(t *testing.T, from *namespace, address, text string) {
	t.Helper()
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	var number int
	fmt.Sscan(port, &number)
	conn, err := dialIn(t, from, "tcp", host, number)
	if err != nil {
		t.Errorf("%s: %v", address, err)
		return
	}
	defer conn.Close()
	data := bytes.Repeat([]byte("0123456789"), 20000)
	go func() {
		conn.Write(data)
		conn.CloseWrite()
	}()
	got, err := io.ReadAll(conn)
	if err != nil || string(got) != text+string(data) {
		t.Errorf("%s: %d bytes beginning with %.20q, %v", address, len(got), got, err)
	}
}

func TestPod(t *testing.T) {
	for _, queuePairs := range []int{1, 4} {
		t.Run(fmt.Sprintf("%d queue pairs", queuePairs), func(t *testing.T) { testPod(t, queuePairs) })
	}
}

func testPod(t *testing.T, queuePairs int) {
	host, pod := newNamespace(t), newNamespace(t)
	// Two links, the default routes through the second.
	connect(t, host, "vethb", pod, "net1", 1500)
	connect(t, host, "vetha", pod, "eth0", 1400)
	address(t, host, "vetha", "10.88.0.1/24", "fd88::1/64")
	address(t, pod, "eth0", "10.88.0.5/24", "fd88::5/64")
	address(t, host, "vethb", "10.99.0.1/24")
	address(t, pod, "net1", "10.99.0.5/24")
	address(t, host, "lo", "203.0.113.1/32", "fd77::1/128")
	route(t, pod, &netlink.Route{Dst: parsePrefix("0.0.0.0/0"), Gw: net.ParseIP("10.88.0.1")}, "eth0")
	route(t, pod, &netlink.Route{Dst: parsePrefix("::/0"), Gw: net.ParseIP("fd88::1")}, "eth0")
	route(t, pod, &netlink.Route{Dst: parsePrefix("198.51.100.0/24"), Gw: net.ParseIP("10.99.7.7"), Flags: unix.RTNH_F_ONLINK, Priority: 9}, "net1")
	route(t, pod, &netlink.Route{Dst: parsePrefix("198.18.0.0/15"), Scope: netlink.SCOPE_LINK, Src: net.ParseIP("10.99.0.5"), MTU: 1300}, "net1")
	before := state(t, pod)

	// What listens in the namespace on the host must not be reached.
	serve(t, pod, "10.88.0.5:80", "the host's ")
	r := &recorder{}
	n := open(t, pod, r)
	devices, err := n.Connect(queuePairs)
	if err != nil {
		t.Fatal(err)
	}
	g := newGuest(t)
	for _, d := range devices {
		if d.NIC.QueuePairs != queuePairs || len(d.Files) != queuePairs || d.NIC.MTU != map[string]int{"eth0": 1400, "net1": 1500}[d.Link] {
			t.Errorf("device %+v", d)
		}
		for _, f := range d.Files {
			if err := f.Chmod(0o666); !errors.Is(err, unix.EROFS) {
				t.Errorf("the mode of /dev/net/tun can be changed: %v", err)
			}
		}
		g.attach(t, d)
	}
	if len(devices) != 2 || len(r.Joints) != 2 {
		t.Fatalf("devices %v, joints %v", devices, r.Joints)
	}
	if again, err := n.Connect(queuePairs); err != nil || len(again) != 0 {
		t.Errorf("again: %v, %v", again, err)
	}
	m, err := n.Describe()
	if err != nil {
		t.Fatal(err)
	}
	g.update(t, m)
	serve(t, g.namespace, "[::]:80", "the guest's ")
	serve(t, host, "[::]:80", "outside's ")
	expectAnswer(t, host, "10.88.0.5:80", "the guest's ")
	expectAnswer(t, host, "[fd88::5]:80", "the guest's ")
	expectAnswer(t, host, "10.99.0.5:80", "the guest's ")
	expectAnswer(t, g.namespace, "203.0.113.1:80", "outside's ")
	expectAnswer(t, g.namespace, "[fd77::1]:80", "outside's ")
	expectAnswer(t, g.namespace, "10.99.0.1:80", "outside's ")

	// The guest's network is the pod's.
	if got, want := routes(t, g.namespace), routes(t, pod); !slices.Equal(got, want) {
		t.Errorf("routes of the guest\n %q\nof the pod\n %q", got, want)
	}
	for _, name := range []string{"eth0", "net1"} {
		if got, want := linkText(t, g.namespace, name), linkText(t, pod, name); got != want {
			t.Errorf("the guest's %s is\n %s\nthe pod's\n %s", name, got, want)
		}
	}
	if m2, err := n.Describe(); err != nil || !Equal(m, m2) {
		t.Errorf("another description: %v, %v", m2, err)
	}

	// It all goes, and may go twice.
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if len(r.Joints) != 0 {
		t.Errorf("left to be undone: %+v", r)
	}
	for _, d := range devices {
		closeAll(d.Files)
	}
	if after := state(t, pod); !slices.Equal(before, after) {
		t.Errorf("the namespace was\n %q\nand is\n %q", before, after)
	}
	expectAnswer(t, host, "10.88.0.5:80", "the host's ")
}

// linkText is what the guest has to have too.
func linkText(t *testing.T, ns *namespace, name string) (text string) {
	t.Helper()
	in(t, ns, func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		a := link.Attrs()
		addresses, err := netlink.AddrList(link, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		var list []string
		for _, a := range addresses {
			list = append(list, fmt.Sprint(a.IPNet, " brd ", a.Broadcast, " scope ", a.Scope))
		}
		slices.Sort(list)
		text = fmt.Sprint(a.HardwareAddr, " mtu ", a.MTU, list)
		return nil
	})
	return text
}

func routes(t *testing.T, ns *namespace) (list []string) {
	t.Helper()
	in(t, ns, func() error {
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			routes, err := netlink.RouteList(nil, family)
			if err != nil {
				return err
			}
			for _, r := range routes {
				link, err := netlink.LinkByIndex(r.LinkIndex)
				if err != nil {
					return err
				}
				r.LinkIndex = 0
				r.Flags &= unix.RTNH_F_ONLINK // others come and go
				list = append(list, link.Attrs().Name+" "+r.String())
			}
		}
		return nil
	})
	slices.Sort(list)
	return list
}

// A shim that is killed leaves the namespace to the program's delete.
func TestRemoveAfterACrash(t *testing.T) {
	host, pod := newNamespace(t), newNamespace(t)
	connect(t, host, "vetha", pod, "eth0", 1500)
	connect(t, host, "vethb", pod, "eth1", 1500)
	// Somebody else has a filter there, and goes on having it.
	in(t, pod, func() error {
		link, err := netlink.LinkByName("eth1")
		if err != nil {
			return err
		}
		attrs := netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Parent: netlink.HANDLE_INGRESS, Handle: netlink.MakeHandle(0xffff, 0)}
		if err := netlink.QdiscAdd(&netlink.Ingress{QdiscAttrs: attrs}); err != nil {
			return err
		}
		return netlink.FilterAdd(&netlink.U32{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: link.Attrs().Index, Parent: netlink.MakeHandle(0xffff, 0), Priority: 7, Protocol: unix.ETH_P_IP},
			ClassId:     netlink.MakeHandle(1, 1),
		})
	})
	before := state(t, pod)
	crash := func() Record {
		t.Helper()
		r := &recorder{}
		n, err := Open(pod.path, r.record)
		if err != nil {
			t.Fatal(err)
		}
		devices, err := n.Connect(1)
		if err != nil || len(devices) != 2 {
			t.Fatalf("%v, %v", devices, err)
		}
		record := r.Record
		// Nothing but the end of the processes' descriptors.
		for _, d := range devices {
			closeAll(d.Files)
		}
		n.nl.Close()
		n.ns.close()
		return record
	}
	for range 2 {
		r := crash()
		if slices.Equal(before, state(t, pod)) {
			t.Error("nothing was done")
		}
		for range 2 {
			if err := Remove(t.Context(), r); err != nil {
				t.Error(err)
			}
		}
		if after := state(t, pod); !slices.Equal(before, after) {
			t.Errorf("the namespace was\n %q\nand is\n %q", before, after)
		}
	}
	// Of another namespace with the same path, nothing is removed, nor of one
	// that is gone, with its links or without.
	r := crash()
	other := newNamespace(t)
	wrong := r
	wrong.Path = other.path
	gone := r
	gone.Path = "/nonexistent"
	file := r
	file.Path = t.TempDir() + "/file"
	if err := os.WriteFile(file.Path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, r := range []Record{{}, wrong, gone, file} {
		if err := Remove(t.Context(), r); err != nil {
			t.Errorf("%s: %v", r.Path, err)
		}
	}
	in(t, pod, func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkDel(link)
	})
	if err := Remove(t.Context(), r); err != nil {
		t.Error(err)
	}
}

// Two virtual machines cannot share a namespace.
func TestSecondMachine(t *testing.T) {
	host, pod := newNamespace(t), newNamespace(t)
	connect(t, host, "vetha", pod, "eth0", 1500)
	first, second := open(t, pod, &recorder{}), open(t, pod, &recorder{})
	devices, err := first.Connect(1)
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(devices[0].Files)
	before := state(t, pod)
	if _, err := second.Connect(1); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "another virtual machine") {
		t.Errorf("second machine: %v", err)
	}
	if after := state(t, pod); !slices.Equal(before, after) {
		t.Errorf("the namespace was\n %q\nand is\n %q", before, after)
	}
}

// A link that cannot be joined leaves those before it as they were.
func TestUnsuitableLink(t *testing.T) {
	host, pod := newNamespace(t), newNamespace(t)
	connect(t, host, "vetha", pod, "eth0", 1500)
	in(t, pod, func() error {
		return netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tun9", Flags: net.FlagUp}, Mode: netlink.TUNTAP_MODE_TUN, NonPersist: false})
	})
	n := open(t, pod, &recorder{})
	if _, err := n.Connect(1); err != nil {
		t.Errorf("a link that is down: %v", err)
	}
	in(t, pod, func() error {
		link, err := netlink.LinkByName("tun9")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(link)
	})
	if _, err := n.Connect(1); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "tun9") {
		t.Errorf("a tun: %v", err)
	}
	failing := errors.New("disk full")
	m, err := Open(newPodWithLink(t, host).path, func(r Record) error {
		if len(r.Joints) > 0 {
			return failing
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	untouched := state(t, m.ns)
	if _, err := m.Connect(1); !errors.Is(err, failing) {
		t.Errorf("%v", err)
	}
	if after := state(t, m.ns); !slices.Equal(untouched, after) {
		t.Errorf("the namespace was\n %q\nand is\n %q", untouched, after)
	}
}

func newPodWithLink(t *testing.T, host *namespace) *namespace {
	t.Helper()
	pod := newNamespace(t)
	connect(t, host, "vethz", pod, "eth0", 1500)
	return pod
}

// Docker connects a container's network when its process exists.
func TestLateLink(t *testing.T) {
	host, pod := newNamespace(t), newNamespace(t)
	n := open(t, pod, &recorder{})
	if devices, err := n.Connect(1); err != nil || len(devices) != 0 {
		t.Fatalf("%v, %v", devices, err)
	}
	if m, err := n.Describe(); err != nil || len(m.Interfaces)+len(m.Routes)+len(m.Neighbours) != 0 {
		t.Errorf("%v, %v", m, err)
	}
	changes := make(chan struct{}, 100)
	if err := n.Watch(func() { changes <- struct{}{} }); err != nil {
		t.Fatal(err)
	}
	connect(t, host, "vetha", pod, "eth0", 1500)
	address(t, host, "vetha", "fd88::1/64")
	var devices []Device
	for len(devices) == 0 {
		<-changes
		var err error
		if devices, err = n.Connect(1); err != nil {
			t.Fatal(err)
		}
	}
	g := newGuest(t)
	g.attach(t, devices[0])
	// Its address comes even later.
	address(t, pod, "eth0", "fd88::5/64")
	for {
		<-changes
		m, err := n.Describe()
		if err != nil {
			t.Fatal(err)
		}
		i := m.Interfaces[0]
		if slices.ContainsFunc(i.Addresses, func(a *agentproto.Address) bool { return a.Prefix == "fd88::5/64" }) {
			g.update(t, m)
			break
		}
	}
	serve(t, g.namespace, "[::]:80", "the guest's ")
	expectAnswer(t, host, "[fd88::5]:80", "the guest's ")

	n.Attached(devices[0], "0000:00:09.0")
	if m, err := n.Describe(); err != nil || m.Interfaces[0].PciAddress != "0000:00:09.0" {
		t.Errorf("%v, %v", m, err)
	}
	// It goes as it has come.
	in(t, pod, func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkDel(link)
	})
	for {
		<-changes
		m, err := n.Describe()
		if err != nil {
			t.Fatal(err)
		}
		if len(m.Interfaces) == 0 {
			break
		}
	}
	if d := n.Departed(); !slices.Equal(d, []string{"0000:00:09.0"}) {
		t.Errorf("departed %q", d)
	}
	if d := n.Departed(); len(d) != 0 {
		t.Errorf("departed again: %q", d)
	}
}

// A link that the guest cannot get is left alone from then on.
func TestRefuse(t *testing.T) {
	host := newNamespace(t)
	pod := newPodWithLink(t, host)
	before := state(t, pod)
	n := open(t, pod, &recorder{})
	devices, err := n.Connect(1)
	if err != nil {
		t.Fatal(err)
	}
	closeAll(devices[0].Files)
	if err := n.Refuse(devices[0]); err != nil {
		t.Error(err)
	}
	if after := state(t, pod); !slices.Equal(before, after) {
		t.Errorf("the namespace was\n %q\nand is\n %q", before, after)
	}
	if again, err := n.Connect(1); err != nil || len(again) != 0 {
		t.Errorf("%v, %v", again, err)
	}
}

func TestOpen(t *testing.T) {
	file := t.TempDir() + "/file"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]struct {
		is   func(error) bool
		text string
	}{
		"/proc/thread-self/ns/net": {errdefs.IsNotImplemented, "hostNetwork"},
		"/proc/self/ns/mnt":        {errdefs.IsInvalidArgument, "not a network namespace"},
		file:                       {errdefs.IsInvalidArgument, "not a network namespace"},
		"/nonexistent":             {errdefs.IsInvalidArgument, "no such file"},
	} {
		if _, err := Open(path, (&recorder{}).record); !want.is(err) || !strings.Contains(err.Error(), want.text) {
			t.Errorf("%s: %v", path, err)
		}
	}
}
