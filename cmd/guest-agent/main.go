// guest-agent is the first process of a microVM's guest: /sbin/init of the guest
// image. It makes the kernel a machine, tells the shim on the host that it is
// ready, and then makes containers as it is told.
//
// As "guest-agent init", which libcontainer starts, it is the first process of a
// container until that executes its own program; as "/pause" it is that of
// namespaces which the containers of a pod share.
package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/mdlayher/vsock"
	_ "github.com/opencontainers/cgroups/devices" // device rules are BPF programs of this package
	"github.com/opencontainers/runc/libcontainer"
	_ "github.com/opencontainers/runc/libcontainer/nsenter" // enters the namespaces before Go's runtime starts
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/agent"
	"github.com/microvm-runtime/microvm/pkg/agent/guest"
)

const (
	// root is the agent's directory, on a tmpfs.
	root = "/run/microvm"

	// controlPort is the host's, streamPort the guest's (see agent.proto).
	controlPort = 1024
	streamPort  = 1025

	// dialTimeout is how long the host may take to accept the control
	// connection.
	dialTimeout  = 5 * time.Second
	dialInterval = 5 * time.Millisecond

	// maxProcs is enough for what the agent does itself; more would cost
	// memory per processor of the guest.
	maxProcs = 4
	// gcPercent trades processor time, of which the agent uses little, for
	// memory, which the pod pays for.
	gcPercent = 50
)

func init() {
	if len(os.Args) > 1 && os.Args[1] == "init" && os.Getenv("_LIBCONTAINER_INITPIPE") != "" {
		libcontainer.Init() // does not return
	}
	if os.Args[0] == agent.PauseName {
		agent.Pause() // does not return
	}
	// Keeps goroutines off the first thread. libcontainer sends the thread of
	// one of its goroutines into a container's mount namespace and lets it end
	// there, which the first thread cannot: it would stay in there, and with
	// it /proc/1/root and /proc/self/mounts.
	runtime.LockOSThread()
}

func main() {
	begun := guest.BootTime()
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "guest-agent is the first process of a microVM's guest and not for anything else")
		os.Exit(1)
	}
	runtime.GOMAXPROCS(min(runtime.NumCPU(), maxProcs))
	// For the processes that libcontainer makes of this program, which give
	// themselves one processor only after their runtime has set up all.
	os.Setenv("GOMAXPROCS", "1")
	debug.SetGCPercent(gcPercent)
	console := guest.NewConsole(os.Stderr)
	log := slog.New(slog.NewTextHandler(console, &slog.HandlerOptions{ReplaceAttr: withoutTime}))
	logrus.SetOutput(console)
	logrus.SetFormatter(&logrus.TextFormatter{DisableColors: true, DisableTimestamp: true})

	if err := run(begun, log); err != nil {
		log.Error("the guest ends", "error", err)
	}
	guest.PowerOff(log)
}

// withoutTime leaves out the time of a log record: who keeps the console's
// output has a better clock.
func withoutTime(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && a.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return a
}

func run(begun int64, log *slog.Logger) error {
	// The shim learns that the guest is up, and does its part while the agent
	// does the rest. It is answered when that is done.
	control, err := dialHost()
	if err != nil {
		return fmt.Errorf("connect with the shim: %w", err)
	}
	if err := guest.Setup(log); err != nil {
		return fmt.Errorf("set up the guest: %w", err)
	}
	reaper := agent.NewReaper()
	go reaper.Run()
	interrupted := handleSignals(reaper)

	streams, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, streamPort, nil)
	if err != nil {
		return fmt.Errorf("listen for streams: %w", err)
	}
	a, err := agent.New(agent.Config{
		Streams:   streams,
		AllowPeer: isHost,
		Reaper:    reaper,
		Root:      root,
		Begun:     begun,
		Log:       log,
	})
	if err != nil {
		return fmt.Errorf("start the agent: %w", err)
	}
	served := make(chan error, 1)
	go func() { served <- a.Serve(control) }()
	select {
	case err := <-served:
		return err
	case <-interrupted:
		return errors.New("interrupted from the console")
	}
}

// isHost says whether a stream comes from the host. The listener can be reached
// from the guest too, were there a loopback transport.
func isHost(peer net.Addr) bool {
	a, ok := peer.(*vsock.Addr)
	return ok && a.ContextID == vsock.Host
}

// dialHost opens the control connection.
func dialHost() (net.Conn, error) {
	for deadline := time.Now().Add(dialTimeout); ; time.Sleep(dialInterval) {
		conn, err := vsock.Dial(vsock.Host, controlPort, nil)
		if err == nil || time.Now().After(deadline) {
			return conn, err
		}
	}
}

// handleSignals keeps signals from ending the first process, which ends the
// guest. SIGINT, the kernel's for ctrl-alt-del, does end it, in order. They are
// caught rather than ignored because containers would inherit that.
func handleSignals(reaper *agent.Reaper) (interrupted <-chan struct{}) {
	// ctrl-alt-del is told to this process instead of resetting the machine.
	// It fails in a pid namespace only.
	unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF)

	all := make(chan os.Signal, 16)
	signal.Notify(all, unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGPIPE, unix.SIGALRM,
		unix.SIGTERM, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU, unix.SIGIO, unix.SIGPWR)
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	done := make(chan struct{})
	go func() {
		for {
			select {
			case <-children:
				reaper.Wake()
			case sig := <-all:
				if sig == unix.SIGINT {
					close(done)
					return // what comes now is not read: the guest ends
				}
			}
		}
	}()
	return done
}
