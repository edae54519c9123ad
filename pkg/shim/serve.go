package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/shim/bootstrap"
	"github.com/microvm-runtime/microvm/pkg/shim/config"
	"github.com/microvm-runtime/microvm/pkg/shim/events"
	"github.com/microvm-runtime/microvm/pkg/shim/hostcgroup"
	"github.com/microvm-runtime/microvm/pkg/shim/network"
	"github.com/microvm-runtime/microvm/pkg/shim/share"
	"github.com/microvm-runtime/microvm/pkg/shim/state"
)

const (
	// readyMessage is what the serving process tells start; anything else is
	// an error's text.
	readyMessage = "ready\n"
	// lastAnswers bounds the time for answers and events that are on their way
	// when the shim ends.
	lastAnswers = time.Second
	// firstCall is how long containerd may take to connect after start. One that
	// has ended start when its client went away never does.
	firstCall = time.Minute
	// killPatience is how long a guest may take to do what the kernel of a
	// host does at once.
	killPatience = 30 * time.Second
)

// serve is the process that serves a sandbox until that is shut down.
func (p *Program) serve(in bootstrap.Invocation, stdin io.Reader) error {
	report := os.NewFile(readyFD, "ready")
	d, err := p.newDaemon(in, stdin)
	if err != nil {
		fmt.Fprint(report, err)
		report.Close()
		return err
	}
	if _, err := io.WriteString(report, readyMessage); err != nil {
		return errors.Join(err, d.end()) // start is gone
	}
	report.Close()
	return d.run()
}

// daemon is the serving process.
type daemon struct {
	settings  settings
	listener  net.Listener
	server    *ttrpc.Server
	service   *service
	publisher *events.Publisher
	shutdown  chan struct{} // closed by closeDoor
	closing   sync.Once

	mu     sync.Mutex
	record state.Record
}

func (p *Program) newDaemon(in bootstrap.Invocation, stdin io.Reader) (*daemon, error) {
	d := &daemon{shutdown: make(chan struct{})}
	// None of these is for the processes that we start. The lock is held until
	// this process ends.
	for _, fd := range []int{listenerFD, readyFD, lockFD, hostNamespaceFD} {
		unix.CloseOnExec(fd)
	}
	if err := json.NewDecoder(stdin).Decode(&d.settings); err != nil {
		return nil, fmt.Errorf("this is for start to call: settings: %w", err)
	}
	// Mounts of the host's appear here, but none of ours there.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return nil, fmt.Errorf("make mounts our own: %w", err)
	}
	tuneMemory()
	setupLog("log", in.Debug)
	log.L = log.L.WithFields(log.Fields{"runtime": Name, "namespace": in.Namespace, "sandbox": filepath.Base(d.settings.Dir.Path)})
	if path := d.settings.Options.ShimCgroup; path != "" {
		if err := hostcgroup.Join(path); err != nil {
			return nil, err
		}
	}
	if err := os.Chdir("/"); err != nil { // the bundle may go before us
		return nil, err
	}
	var err error
	if d.record.Shim, err = state.Identify(os.Getpid()); err != nil {
		return nil, err
	}
	if err := d.update(func(r *state.Record) { r.Socket = d.settings.Socket }); err != nil {
		return nil, err
	}
	file := os.NewFile(listenerFD, "listener")
	d.listener, err = net.FileListener(file)
	file.Close()
	if err != nil {
		return nil, fmt.Errorf("shim socket: %w", err)
	}
	d.server, err = ttrpc.NewServer(ttrpc.WithServerHandshaker(ttrpc.UnixSocketRequireSameUser()))
	if err != nil {
		return nil, fmt.Errorf("shim server: %w", err)
	}
	d.publisher = events.NewPublisher(d.settings.TTRPCAddress, in.Namespace)
	h, err := d.newHost(p)
	if err != nil {
		return nil, err
	}
	d.service = newService(in.Namespace, h, d.publisher.Publish, d.closeDoor)
	register(d.server, d.service)
	registerSandbox(d.server, d.service)
	return d, nil
}

// run serves until Shutdown, or a signal that asks for it.
func (d *daemon) run() error {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT)
	// Nobody reads these. Were they ignored, so they would be by hooks and logging
	// programs, which inherit that.
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE, unix.SIGHUP)
	reports := make(chan os.Signal, 1)
	signal.Notify(reports, unix.SIGUSR1)
	go func() {
		for range reports {
			d.service.report()
		}
	}()

	served := make(chan error, 1)
	called := awaitCall(d.listener, firstCall, func() {
		log.L.Warn("nobody has called since the shim was started")
		d.closeDoor()
	})
	go func() { served <- d.server.Serve(context.Background(), called) }()
	var err error
	select {
	case <-d.shutdown:
		log.L.Debug("shutting down")
	case s := <-signals:
		log.L.Warnf("shutting down: %v", s)
	case err = <-served:
		log.L.WithError(err).Info("shutting down: nothing is accepted any more")
		if errors.Is(err, net.ErrClosed) {
			err = nil // by closeDoor
		}
	}
	return errors.Join(err, d.end())
}

// callListener is a listener whose timer the first connection stops.
type callListener struct {
	net.Listener
	timer *time.Timer
}

// awaitCall calls never if l has accepted no connection within a time.
func awaitCall(l net.Listener, within time.Duration, never func()) *callListener {
	return &callListener{l, time.AfterFunc(within, never)}
}

func (l *callListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil {
		l.timer.Stop()
	}
	return conn, err
}

// closeDoor ends the service for those who are not connected. Whoever got the
// answer to Shutdown can tell by the socket that the shim is ending.
func (d *daemon) closeDoor() {
	d.closing.Do(func() {
		os.Remove(d.settings.Socket)
		d.listener.Close()
		close(d.shutdown)
	})
}

// end leaves nothing behind. New calls of start wait for it.
func (d *daemon) end() error {
	d.closeDoor()
	err := d.service.stop()
	// Not sooner: ttrpc takes a connection for idle while the answer to
	// Shutdown is on its way.
	ctx, cancel := context.WithTimeout(context.Background(), lastAnswers)
	defer cancel()
	d.server.Shutdown(ctx)
	d.server.Close()
	ctx, cancel = context.WithTimeout(context.Background(), lastAnswers)
	defer cancel()
	d.publisher.Close(ctx)
	// A caller of start may have come meanwhile; from here on it is on its
	// own.
	if err == nil {
		err = d.settings.Dir.Remove()
	} else {
		// By now it may work. If not, the record stays for the next delete.
		ctx, cancel := context.WithTimeout(context.Background(), deleteTime)
		defer cancel()
		err = errors.Join(err, removeDead(ctx, d.settings.Dir))
	}
	if err != nil {
		log.L.WithError(err).Error("the shim leaves something behind")
	}
	return err
}

// update changes the record on disk.
func (d *daemon) update(change func(*state.Record)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	change(&d.record)
	return d.settings.Dir.Store(d.record)
}

// newHost is the host as it really is.
func (d *daemon) newHost(p *Program) (*host, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return nil, fmt.Errorf("sysinfo: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	options := d.settings.Options
	hostNamespace := os.NewFile(hostNamespaceFD, "host mount namespace")
	return &host{
		config: func() (*config.Config, error) {
			path := options.ConfigPath
			if path == "" {
				path = os.Getenv("MICROVM_CONFIG")
			}
			return config.Load(config.Sources{Path: path, Body: options.ConfigBody, ProgramDir: filepath.Dir(self)})
		},
		launch: p.launch,
		newTree: func() (tree, error) {
			return share.New(d.settings.Dir.Shared(), hostNamespace)
		},
		place: func(path string) (*placement, error) { return d.place(p.stateRoot, path) },
		openNetwork: func(path string) (podNetwork, error) {
			n, err := network.Open(path, func(done network.Record) error {
				return d.update(func(r *state.Record) { r.Network = done })
			})
			if err != nil {
				return nil, err // not a nil *network.Network, which would be no nil podNetwork
			}
			return n, nil
		},
		chooseID: func(ctx context.Context, first, n uint32) (id uint32, err error) {
			err = state.ChooseID(ctx, p.stateRoot, first, n, func(free uint32) error {
				id = free
				return d.update(func(r *state.Record) { r.ID = free })
			})
			return id, err
		},
		newStandIn:  newStandIn,
		record:      func(vmm state.Process) error { return d.update(func(r *state.Record) { r.VMM = vmm }) },
		identify:    state.Identify,
		cpus:        runtime.NumCPU(),
		memory:      info.Totalram * uint64(info.Unit),
		patience:    killPatience,
		volumeDelay: volumeDelay,
	}, nil
}

// place moves the shim, and so the VMM that it starts, into the sandbox's
// cgroup. A shim that was placed elsewhere goes back when the VMM has started. The
// VMM starts in one below that, if this host can keep it from devices there.
func (d *daemon) place(root, path string) (*placement, error) {
	group, err := hostcgroup.New(path)
	if err != nil {
		return nil, err
	}
	owned := group.Owned(state.Cgroups(root))
	if err := d.update(func(r *state.Record) { r.Cgroups = owned }); err != nil {
		return nil, err
	}
	elsewhere := d.settings.Options.ShimCgroup != ""
	leave := func() {
		if err := group.Leave(); err != nil {
			log.L.WithError(err).Warn("the shim does not get out of the sandbox's cgroup")
		}
	}
	vmm, err := enter(group)
	if err != nil {
		leave()
		hostcgroup.Remove(owned)
		return nil, err
	}
	return &placement{
		vmm:      vmm,
		oomKills: group.OOMKills,
		launched: func() {
			vmm.Close() // of nil, nothing
			if elsewhere {
				leave()
			}
		},
		leave: func() error {
			vmm.Close() // if it was not launched
			if !elsewhere {
				leave()
			}
			return hostcgroup.Remove(owned)
		},
	}, nil
}

// enter enters a cgroup and makes the VMM's, which is nil if this host cannot keep
// the VMM from devices.
func enter(group *hostcgroup.Group) (vmm *os.File, err error) {
	if err := group.Enter(); err != nil {
		return nil, err
	}
	vmm, err = group.Confine()
	if errors.Is(err, hostcgroup.ErrNoDeviceControl) {
		log.L.WithField("missing", err.Error()).Warn("this host lacks a part of the jail")
		return nil, nil
	}
	return vmm, err
}
