package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
	"github.com/microvm-runtime/microvm/pkg/internal/socktest"
	"github.com/microvm-runtime/microvm/pkg/shim/agentclient"
	"github.com/microvm-runtime/microvm/pkg/shim/agenttest"
	"github.com/microvm-runtime/microvm/pkg/shim/config"
	"github.com/microvm-runtime/microvm/pkg/shim/guestspec"
	"github.com/microvm-runtime/microvm/pkg/shim/network"
	"github.com/microvm-runtime/microvm/pkg/shim/share"
	"github.com/microvm-runtime/microvm/pkg/shim/state"
	"github.com/microvm-runtime/microvm/pkg/vmm/control"
)

// fakeMachine is a VMM without a machine: its guest is an agenttest.Agent.
type fakeMachine struct {
	agent *agenttest.Agent
	// silent is a guest whose agent does not come.
	silent bool
	// stuck is a VMM that does not answer.
	stuck atomic.Bool
	pid   int
	// attachError makes AttachNIC and AttachDisk fail.
	attachError error
	// pmemError makes AttachDisk fail for persistent memory.
	pmemError error

	mu      sync.Mutex
	conns   []*net.UnixConn // the guest's ends
	nics    map[string]control.NIC
	disks   map[string]fakeDisk
	sizes   []control.Size
	looks   uint64 // of Stats
	exit    control.Exit
	done    chan struct{}
	endOnce sync.Once
}

func newFakeMachine(agent *agenttest.Agent) *fakeMachine {
	m := &fakeMachine{agent: agent, pid: os.Getpid(), nics: map[string]control.NIC{}, disks: map[string]fakeDisk{}, done: make(chan struct{})}
	go func() {
		<-agent.Stopped()
		m.end(control.ReasonPowerOff, "")
	}()
	return m
}

func (m *fakeMachine) pair() (*net.UnixConn, *net.UnixConn, error) {
	ours, guest, err := socktest.New()
	if err != nil {
		return nil, nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-m.done:
		ours.Close()
		guest.Close()
		return nil, nil, errors.New("the VMM has ended")
	default:
	}
	m.conns = append(m.conns, guest)
	return ours, guest, nil
}

func (m *fakeMachine) Pid() int { return m.pid }

func (m *fakeMachine) AttachNIC(_ context.Context, nic control.NIC, _ []*os.File) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.attachError != nil {
		return "", m.attachError
	}
	address := fmt.Sprintf("0000:00:%02x.0", 0x10+len(m.nics))
	m.nics[address] = nic
	return address, nil
}

func (m *fakeMachine) Detach(_ context.Context, address string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.nics, address)
	delete(m.disks, address)
	return nil
}

// fakeDisk is a disk that was attached: the place of its file, and whether that
// can be written.
type fakeDisk struct {
	path               string
	readOnly, writable bool
	pmem               bool
}

func (m *fakeMachine) AttachDisk(_ context.Context, disk control.Disk, file *os.File) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.attachError != nil || disk.Pmem && m.pmemError != nil {
		return "", errors.Join(m.attachError, m.pmemError)
	}
	flags, err := unix.FcntlInt(file.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return "", err
	}
	for slot := 0x18; ; slot++ {
		address := fmt.Sprintf("0000:00:%02x.0", slot)
		if _, taken := m.disks[address]; !taken {
			m.disks[address] = fakeDisk{file.Name(), disk.ReadOnly, flags&unix.O_ACCMODE == unix.O_RDWR, disk.Pmem}
			return address, nil
		}
	}
}

// attached are the disks now, in the order of their places.
func (m *fakeMachine) attached() (list []fakeDisk) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, address := range slices.Sorted(maps.Keys(m.disks)) {
		list = append(list, m.disks[address])
	}
	return list
}

func (m *fakeMachine) Dial(ctx context.Context, port uint32) (*net.UnixConn, error) {
	if m.stuck.Load() {
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}
	if port != agentclient.StreamPort {
		return nil, fmt.Errorf("port %d", port)
	}
	ours, guest, err := m.pair()
	if err == nil {
		go m.agent.Stream(guest)
	}
	return ours, err
}

func (m *fakeMachine) Accept(ctx context.Context, port uint32) (*net.UnixConn, error) {
	if m.silent {
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-m.done:
			return nil, errors.New("the VMM has ended")
		}
	}
	ours, guest, err := m.pair()
	if err == nil {
		go m.agent.Serve(guest)
	}
	return ours, err
}

func (m *fakeMachine) Stop(context.Context) error {
	m.end(control.ReasonStopped, "vCPU 0 halted at rip 0x1234")
	return nil
}

// Stats has one counter, which goes on, and a name that wants to be more.
func (m *fakeMachine) Stats(context.Context) (control.Stats, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.looks++
	return control.Stats{
		Exits: map[string]uint64{"mmio-write": 10 * m.looks, "still": 1},
		KVM:   map[string]uint64{"blocking": 1, "\x1b[31m\nlevel=error": m.looks},

		Goroutines: 17,
	}, nil
}

// Resize does all that it is asked for.
func (m *fakeMachine) Resize(ctx context.Context, size control.Size) (control.Size, error) {
	if m.stuck.Load() {
		<-ctx.Done()
		return control.Size{}, context.Cause(ctx)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sizes = append(m.sizes, size)
	return size, nil
}

func (m *fakeMachine) Kill() error {
	m.end(control.ReasonKilled, "killed")
	return nil
}

func (m *fakeMachine) Done() <-chan struct{} { return m.done }

func (m *fakeMachine) Exit() control.Exit {
	<-m.done
	return m.exit
}

// end is the end of the machine, with all that is in it.
func (m *fakeMachine) end(reason, detail string) {
	m.endOnce.Do(func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.exit = control.Exit{Reason: reason, Detail: detail}
		for _, c := range m.conns {
			c.Close()
		}
		close(m.done)
		m.agent.KillAll()
	})
}

// loseAgent closes the agent's connection while the machine goes on.
func (m *fakeMachine) loseAgent() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.conns[0].Close()
}

// fakeTree mounts nothing.
type fakeTree struct {
	mu    sync.Mutex
	added map[string]share.Rootfs
	// mounts are those that were added last.
	mounts map[string][]guestspec.Mount
	fail   error
	open   bool
	onHost atomic.Int32
}

func (t *fakeTree) Open() (*os.File, error) { return os.Open(os.DevNull) }

func (t *fakeTree) Add(id string, rootfs share.Rootfs, mounts []guestspec.Mount) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.fail != nil {
		return t.fail
	}
	t.added[id] = rootfs
	t.mounts[id] = mounts
	return nil
}

func (t *fakeTree) OnHost(f func() error) error {
	t.onHost.Add(1)
	return f()
}

func (t *fakeTree) Mount(id string, n int) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.mounts[id][n].Source
}

func (t *fakeTree) Remove(id string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.added, id)
	return nil
}

func (t *fakeTree) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.open = false
	return nil
}

func (t *fakeTree) left() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.added)
}

// fakeNetwork is a pod's network without a namespace.
type fakeNetwork struct {
	mu sync.Mutex
	// path is that of the namespace; open says that it was taken and not left.
	path string
	open bool
	// links have their MAC addresses by name; joined, their PCI addresses.
	links, joined map[string]string
	refused       []string
	departed      []string
	loopback      bool
	changed       func()
	dial          network.Dial
	// fail makes the method of a name fail.
	fail map[string]error
}

func (n *fakeNetwork) RaiseLoopback() error {
	n.loopback = true
	return n.fail["RaiseLoopback"]
}

func (n *fakeNetwork) Connect(queuePairs int) ([]network.Device, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.fail["Connect"]; err != nil {
		return nil, err
	}
	var list []network.Device
	for name, mac := range n.links {
		if _, ok := n.joined[name]; ok || mac == "" || slices.Contains(n.refused, name) {
			continue
		}
		f, err := os.Open(os.DevNull)
		if err != nil {
			return nil, err
		}
		n.joined[name] = ""
		list = append(list, network.Device{Link: name, NIC: control.NIC{MAC: mac, MTU: 1500, QueuePairs: queuePairs}, Files: []*os.File{f}})
	}
	return list, nil
}

func (n *fakeNetwork) Attached(d network.Device, pciAddress string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.joined[d.Link] = pciAddress
}

func (n *fakeNetwork) Refuse(d network.Device) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.joined, d.Link)
	n.refused = append(n.refused, d.Link)
	return nil
}

func (n *fakeNetwork) Describe() (*agentproto.Network, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	m := &agentproto.Network{}
	for name, pci := range n.joined {
		if n.links[name] == "" {
			delete(n.joined, name)
			n.departed = append(n.departed, pci)
			continue
		}
		m.Interfaces = append(m.Interfaces, &agentproto.Interface{Name: name, Mac: n.links[name], PciAddress: pci, Mtu: 1500})
	}
	slices.SortFunc(m.Interfaces, func(a, b *agentproto.Interface) int { return strings.Compare(a.Name, b.Name) })
	return m, nil
}

func (n *fakeNetwork) Departed() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	list := n.departed
	n.departed = nil
	return list
}

func (n *fakeNetwork) Watch(changed func()) error {
	n.changed = changed
	return nil
}

func (n *fakeNetwork) Forward(dial network.Dial) error {
	n.dial = dial
	return n.fail["Forward"]
}

func (n *fakeNetwork) Close() error {
	n.open = false
	return nil
}

// set changes a link, an empty MAC address being that it goes, and tells.
func (n *fakeNetwork) set(name, mac string) {
	n.mu.Lock()
	n.links[name] = mac
	n.mu.Unlock()
	if n.changed != nil {
		n.changed()
	}
}

// fixture is a service with all that is fake around it.
type fixture struct {
	*service
	t     *testing.T
	agent *agenttest.Agent
	tree  *fakeTree
	net   *fakeNetwork
	conf  *config.Config
	// launchError makes launch fail.
	launchError error
	silent      bool

	mu       sync.Mutex
	machines []*fakeMachine
	events   []proto.Message
	news     *sync.Cond
	cgroups  []string
	requests []launchRequest
	down     chan struct{}
	end      func() error // stops the service, once
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{
		t:     t,
		agent: agenttest.New(),
		tree:  &fakeTree{added: map[string]share.Rootfs{}, mounts: map[string][]guestspec.Mount{}},
		net:   &fakeNetwork{links: map[string]string{}, joined: map[string]string{}, fail: map[string]error{}},
		conf:  &config.Config{DefaultVCPUs: 1, DefaultMemory: 512 << 20, BootTimeout: time.Minute},
		down:  make(chan struct{}),
	}
	f.news = sync.NewCond(&f.mu)
	h := &host{
		config: func() (*config.Config, error) { return f.conf, nil },
		launch: f.launch,
		newTree: func() (tree, error) {
			f.tree.open = true
			return f.tree, nil
		},
		place: func(path string) (*placement, error) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.cgroups = append(f.cgroups, path)
			return &placement{launched: func() {}, oomKills: func() int { return 0 }, leave: func() error {
				f.mu.Lock()
				defer f.mu.Unlock()
				f.cgroups = slices.DeleteFunc(f.cgroups, func(p string) bool { return p == path })
				return nil
			}}, nil
		},
		openNetwork: func(path string) (podNetwork, error) {
			if err := f.net.fail["open"]; err != nil {
				return nil, err
			}
			f.net.path, f.net.open = path, true
			return f.net, nil
		},
		chooseID: func(_ context.Context, first, _ uint32) (uint32, error) { return first, nil },
		newStandIn: func(vmm int) (*standIn, error) {
			return startStandIn(func() error { return joinNetwork(vmm) }) // another root takes privileges
		},
		record:   func(state.Process) error { return nil },
		identify: state.Identify,
		cpus:     4,
		memory:   8 << 30,
		patience: time.Minute,
		// Not at all: the fake guest caches nothing.
		volumeDelay: 0,
	}
	f.service = newService("ns", h, f.publish, func() { close(f.down) })
	f.end = sync.OnceValue(f.service.stop)
	t.Cleanup(func() {
		if err := f.end(); err != nil {
			t.Error(err)
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		if len(f.cgroups) > 0 || f.tree.open || f.tree.left() > 0 || f.net.open {
			t.Errorf("left behind: cgroups %v, tree open %v with %d containers, network open %v", f.cgroups, f.tree.open, f.tree.left(), f.net.open)
		}
		for _, m := range f.machines {
			select {
			case <-m.done:
			default:
				t.Error("a machine is left running")
			}
		}
	})
	return f
}

func (f *fixture) launch(_ context.Context, r launchRequest) (machine, error) {
	fmt.Fprintln(r.console, "Linux version 6.12")
	r.console.Close()
	r.log.Close()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.requests = append(f.requests, r)
	if f.launchError != nil {
		return nil, f.launchError
	}
	m := newFakeMachine(f.agent)
	m.silent = f.silent
	f.machines = append(f.machines, m)
	return m, nil
}

func (f *fixture) machine() *fakeMachine {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.machines[len(f.machines)-1]
}

func (f *fixture) publish(event proto.Message) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.events = append(f.events, event)
	f.news.Broadcast()
}

// describe shortens an event.
func describe(event proto.Message) string {
	switch e := event.(type) {
	case *eventsapi.TaskCreate:
		return "create " + e.ContainerID
	case *eventsapi.TaskStart:
		return "start " + e.ContainerID
	case *eventsapi.TaskExecAdded:
		return "exec-added " + e.ContainerID + " " + e.ExecID
	case *eventsapi.TaskExecStarted:
		return "exec-started " + e.ContainerID + " " + e.ExecID
	case *eventsapi.TaskExit:
		return fmt.Sprintf("exit %s %s %d", e.ContainerID, e.ID, e.ExitStatus)
	case *eventsapi.TaskOOM:
		return "oom " + e.ContainerID
	case *eventsapi.TaskPaused:
		return "paused " + e.ContainerID
	case *eventsapi.TaskResumed:
		return "resumed " + e.ContainerID
	case *eventsapi.TaskDelete:
		return fmt.Sprintf("delete %s %d", e.ContainerID, e.ExitStatus)
	}
	return fmt.Sprintf("%T", event)
}

// seen are the events until now; await waits until there are n.
func (f *fixture) seen() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var list []string
	for _, e := range f.events {
		list = append(list, describe(e))
	}
	return list
}

func (f *fixture) await(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.events) < n {
		f.news.Wait()
	}
}

func (f *fixture) expectEvents(want ...string) {
	f.t.Helper()
	f.await(len(want))
	if got := f.seen(); !slices.Equal(got, want) {
		f.t.Errorf("events\n %q\nwant\n %q", got, want)
	}
}

// bundle writes a bundle whose process is a program of the fake guest.
func (f *fixture) bundle(change func(*specs.Spec), args ...string) string {
	f.t.Helper()
	spec := &specs.Spec{
		Version:  "1.2.0",
		Process:  &specs.Process{Args: args, Cwd: "/"},
		Root:     &specs.Root{Path: "rootfs"},
		Hostname: "host",
		Linux: &specs.Linux{
			CgroupsPath: "/default/c1",
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
				{Type: specs.MountNamespace}, {Type: specs.NetworkNamespace},
			},
		},
	}
	if change != nil {
		change(spec)
	}
	data, err := json.Marshal(spec)
	if err != nil {
		f.t.Fatal(err)
	}
	dir := f.t.TempDir()
	writeConfig(f.t, dir, data)
	return dir
}

func (f *fixture) create(id string, args ...string) {
	f.t.Helper()
	if _, err := f.Create(f.t.Context(), &taskapi.CreateTaskRequest{ID: id, Bundle: f.bundle(nil, args...)}); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) start(id, execID string) {
	f.t.Helper()
	if _, err := f.Start(f.t.Context(), &taskapi.StartRequest{ID: id, ExecID: execID}); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) exec(id, execID string, args ...string) error {
	f.t.Helper()
	data, err := json.Marshal(specs.Process{Args: args, Cwd: "/"})
	if err != nil {
		f.t.Fatal(err)
	}
	_, err = f.Exec(f.t.Context(), &taskapi.ExecProcessRequest{ID: id, ExecID: execID, Spec: &anypb.Any{Value: data}})
	return err
}

func (f *fixture) wait(id, execID string) uint32 {
	f.t.Helper()
	r, err := f.Wait(context.Background(), &taskapi.WaitRequest{ID: id, ExecID: execID})
	if err != nil {
		f.t.Fatal(err)
	}
	return r.ExitStatus
}

func (f *fixture) kill(id, execID string) error {
	_, err := f.Kill(context.Background(), &taskapi.KillRequest{ID: id, ExecID: execID, Signal: sigkill})
	return err
}

func (f *fixture) delete(id, execID string) error {
	_, err := f.Delete(context.Background(), &taskapi.DeleteRequest{ID: id, ExecID: execID})
	return err
}

func (f *fixture) shutdown(id string) {
	f.t.Helper()
	if _, err := f.Shutdown(context.Background(), &taskapi.ShutdownRequest{ID: id}); err != nil {
		f.t.Fatal(err)
	}
}
