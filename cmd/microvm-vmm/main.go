// Command microvm-vmm is one virtual machine: the process that holds the guest.
//
// The shim starts it in a jail (package jail), with a control socket and the
// shared directory as descriptors (package control). Its arguments then say for
// which pod it is, to people who look at `ps`; it reads none of them. For
// debugging it can be run by hand, without a jail unless it is asked for:
//
//	microvm-vmm run --kernel vmlinux --image guest.erofs --append 'loglevel=7'
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"time"

	"github.com/microvm-runtime/microvm/pkg/vmm"
	"github.com/microvm-runtime/microvm/pkg/vmm/control"
	"github.com/microvm-runtime/microvm/pkg/vmm/jail"
)

func main() {
	// The VMM allocates next to nothing once the machine runs; collecting early
	// keeps its private memory small.
	debug.SetGCPercent(50)

	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	var err error
	switch {
	case len(os.Args) == 1, os.Args[1] == control.NameArgument:
		err = serve(log)
	case os.Args[1] == "run":
		err = runByHand(log, os.Args[2:])
	default:
		err = fmt.Errorf("unknown command %q; the only one is run", os.Args[1])
	}
	if err != nil {
		log.Error(err.Error())
		os.Exit(1)
	}
}

// serve is the VMM as the shim runs it. It returns when the machine has ended
// or the shim is gone.
func serve(log *slog.Logger) error {
	// The log's time zone is read from a file that is not there in a moment.
	_, _ = time.Now().Zone()
	inside, err := enterJail(log)
	if err != nil {
		return err
	}
	server, err := control.NewServer(os.NewFile(control.SocketFD, "control"))
	if err != nil {
		return err
	}
	request, err := server.Boot()
	if err != nil {
		return err
	}
	server.Phase("vmm-started")
	request.Files[fileShared] = inside.Root
	request.Files[fileProcSelfFD] = inside.ProcSelfFD
	machine, err := assemble(request.Config, request.Files, log, hooks{
		phase: func(name string) { server.Phase(name) },
		accept: func(port uint32) (*os.File, error) {
			ours, theirs, err := control.Socketpair()
			if err != nil {
				return nil, err
			}
			defer theirs.Close()
			if err := server.Accepted(port, theirs); err != nil {
				ours.Close()
				return nil, err
			}
			return ours, nil
		},
		running:  func() { server.ReplyBoot(request, nil) },
		confined: true,
	})
	if err == nil {
		// Nothing of the guest's has run yet.
		err = confine()
	}
	if err != nil {
		return errors.Join(err, server.ReplyBoot(request, err))
	}
	go func() {
		if err := server.Serve(control.Handler{
			Dial: func(ctx context.Context, port uint32) (*os.File, error) {
				return machine.vsock.Dial(ctx, port)
			},
			Pause:      machine.Pause,
			Resume:     machine.Resume,
			Stats:      machine.stats,
			AttachNIC:  machine.attachNIC,
			AttachDisk: machine.attachDisk,
			Detach:     machine.detach,
			Stop:       machine.Stop,
			Resize:     machine.resize,
		}); err != nil {
			log.Error("control socket", "error", err)
		}
		machine.Stop() // the shim is gone: nobody needs the machine
	}()
	exit := machine.run()
	log.Info("machine ended", "reason", exit.Reason, "detail", exit.Detail)
	return server.Exited(exit)
}

// enterJail closes the jail that the shim has started this process in.
func enterJail(log *slog.Logger) (*jail.Inside, error) {
	root := os.NewFile(control.RootFD, "root")
	if root == nil {
		return nil, errors.New("the shim starts this program; for a run by hand use: microvm-vmm run")
	}
	defer root.Close()
	inside, err := jail.Enter(root)
	if err != nil {
		return nil, fmt.Errorf("%w; for a run by hand use: microvm-vmm run", err)
	}
	if inside.Missing != "" {
		log.Warn("this kernel lacks a part of the jail", "missing", inside.Missing)
	}
	return inside, nil
}

// exitReasons translates the machine's reasons to the control protocol's.
var exitReasons = map[vmm.ExitReason]string{
	vmm.ExitPowerOff:    control.ReasonPowerOff,
	vmm.ExitReset:       control.ReasonReset,
	vmm.ExitPanic:       control.ReasonPanic,
	vmm.ExitTripleFault: control.ReasonTripleFault,
	vmm.ExitStopped:     control.ReasonStopped,
	vmm.ExitError:       control.ReasonError,
}
