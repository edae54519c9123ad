package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// inPod puts a container into a pod's network namespace.
func inPod(spec *specs.Spec) {
	for i := range spec.Linux.Namespaces {
		if spec.Linux.Namespaces[i].Type == specs.NetworkNamespace {
			spec.Linux.Namespaces[i].Path = "/run/netns/pod"
		}
	}
}

func (f *fixture) createConnected(id string) error {
	f.t.Helper()
	_, err := f.Create(f.t.Context(), &taskapi.CreateTaskRequest{ID: id, Bundle: f.bundle(inPod, "sleep")})
	return err
}

// endAll kills and deletes containers.
func (f *fixture) endAll(ids ...string) {
	f.t.Helper()
	for _, id := range ids {
		f.kill(id, "")
		f.wait(id, "")
		if err := f.delete(id, ""); err != nil {
			f.t.Error(err)
		}
	}
}

// interfaces is a short form of what the guest knows.
func interfaces(m *agentproto.Network) string {
	var list []string
	for _, i := range m.GetInterfaces() {
		list = append(list, i.GetName()+" "+i.GetMac()+" "+i.GetPciAddress())
	}
	return strings.Join(list, ", ")
}

func TestPodNetwork(t *testing.T) {
	f := newFixture(t)
	f.conf.DefaultVCPUs = 3
	f.net.set("eth0", "02:00:00:00:00:01")
	f.net.set("net1", "02:00:00:00:00:02")
	if err := f.createConnected("c1"); err != nil {
		t.Fatal(err)
	}
	if f.net.path != "/run/netns/pod" || f.net.loopback || f.net.dial == nil || f.net.changed == nil {
		t.Errorf("%+v", f.net)
	}
	r := f.requests[0]
	if len(r.devices) != 2 || r.devices[0].NIC.QueuePairs != 3 {
		t.Errorf("devices %+v", r.devices)
	}
	for _, d := range r.devices {
		if _, err := d.Files[0].Stat(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("the file of %s: %v", d.Link, err)
		}
	}
	if got := interfaces(f.agent.Sandbox().GetNetwork()); got != "eth0 02:00:00:00:00:01 , net1 02:00:00:00:00:02 " {
		t.Error(got)
	}
	// Another container of the pod changes nothing.
	if err := f.createConnected("c2"); err != nil {
		t.Fatal(err)
	}
	f.start("c1", "")
	f.start("c2", "")
	if calls := f.agent.Calls(); slices.Contains(calls, "UpdateNetwork") {
		t.Errorf("calls %q", calls)
	}
	if f.net.path != "/run/netns/pod" {
		t.Error(f.net.path)
	}
	f.endAll("c1", "c2")
}

// Docker connects the namespace of the process, which is the VMM's, between
// Create and Start.
func TestNetworkOfItsOwn(t *testing.T) {
	f := newFixture(t)
	f.create("c1", "sleep")
	if want := fmt.Sprintf("/proc/%d/ns/net", f.machine().Pid()); f.net.path != want || !f.net.loopback || f.net.dial != nil {
		t.Errorf("%+v", f.net)
	}
	if len(f.requests[0].devices) != 0 || interfaces(f.agent.Network()) != "" {
		t.Errorf("%+v, %v", f.requests[0].devices, f.agent.Network())
	}
	changed := f.net.changed
	f.net.changed = nil // it comes at Start
	f.net.set("eth0", "02:00:00:00:00:01")
	f.start("c1", "")
	if got := interfaces(f.agent.Network()); got != "eth0 02:00:00:00:00:01 0000:00:10.0" {
		t.Error(got)
	}
	// And any time later.
	f.net.changed = changed
	f.net.set("eth1", "02:00:00:00:00:02")
	if got := interfaces(f.agent.Network()); got != "eth0 02:00:00:00:00:01 0000:00:10.0, eth1 02:00:00:00:00:02 0000:00:11.0" {
		t.Error(got)
	}
	f.net.set("eth0", "")
	if got := interfaces(f.agent.Network()); got != "eth1 02:00:00:00:00:02 0000:00:11.0" {
		t.Error(got)
	}
	if nics := f.machine().nics; len(nics) != 1 || nics["0000:00:11.0"].MAC != "02:00:00:00:00:02" {
		t.Errorf("left on the bus: %v", nics)
	}
	// A machine that takes no more.
	f.machine().attachError = errors.New("no slot is free")
	f.net.set("eth2", "02:00:00:00:00:03")
	if got := interfaces(f.agent.Network()); got != "eth1 02:00:00:00:00:02 0000:00:11.0" || !slices.Equal(f.net.refused, []string{"eth2"}) {
		t.Error(got, f.net.refused)
	}
	f.endAll("c1")
}

func TestNetworkChangeFails(t *testing.T) {
	f := newFixture(t)
	f.create("c1", "sleep")
	fails := true
	f.agent.SetIntercept(func(method string, _ any) (any, error) {
		if method == "UpdateNetwork" && fails {
			return nil, errors.New("network is unreachable")
		}
		return nil, nil
	})
	f.net.set("eth0", "02:00:00:00:00:01")
	if _, err := f.Start(t.Context(), &taskapi.StartRequest{ID: "c1"}); err == nil || !strings.Contains(err.Error(), "network is unreachable") {
		t.Errorf("start: %v", err)
	}
	fails = false
	f.start("c1", "")
	if got := interfaces(f.agent.Network()); got != "eth0 02:00:00:00:00:01 0000:00:10.0" {
		t.Error(got)
	}
	f.endAll("c1")
}

func TestNetworkRefused(t *testing.T) {
	for method, err := range map[string]error{
		"open":    fmt.Errorf("a virtual machine cannot share the host's network: %w", errdefs.ErrNotImplemented),
		"Connect": fmt.Errorf("link net1: ipvlan: %w", errdefs.ErrNotImplemented),
	} {
		f := newFixture(t)
		f.net.fail[method] = err
		if got := f.createConnected("c1"); !errors.Is(got, err) || !errdefs.IsNotImplemented(got) {
			t.Errorf("%s: %v", method, got)
		}
		if f.net.open || f.tree.open || len(f.requests) > 0 {
			t.Errorf("%s: network open %v, tree open %v, %d machines", method, f.net.open, f.tree.open, len(f.requests))
		}
	}
}

func TestPortForward(t *testing.T) {
	f := newFixture(t)
	f.agent.Ports = map[uint32]func(*net.UnixConn){8080: func(c *net.UnixConn) {
		said, _ := io.ReadAll(c)
		c.Write(append(said, '!'))
		c.Close()
	}}
	if err := f.createConnected("c1"); err != nil {
		t.Fatal(err)
	}
	conn, err := f.net.dial(context.Background(), 8080, false)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	io.WriteString(conn, "hello")
	conn.CloseWrite()
	if got, err := io.ReadAll(conn); string(got) != "hello!" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := f.net.dial(context.Background(), 81, true); !errdefs.IsUnavailable(err) {
		t.Errorf("closed port: %v", err)
	}
	f.endAll("c1")
}

// A host whose kernel has no sk_lookup runs pods all the same.
func TestNoPortForward(t *testing.T) {
	f := newFixture(t)
	f.net.fail["Forward"] = errors.New("sk_lookup program: invalid argument")
	if err := f.createConnected("c1"); err != nil {
		t.Fatal(err)
	}
	f.start("c1", "")
	f.endAll("c1")
}
