package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/microvm-runtime/microvm/pkg/shim/bootstrap"
	"github.com/microvm-runtime/microvm/pkg/shim/hostcgroup"
	"github.com/microvm-runtime/microvm/pkg/shim/network"
	"github.com/microvm-runtime/microvm/pkg/shim/state"
)

const (
	// deleteTime is less than the five seconds that containerd gives delete,
	// the program's own start included.
	deleteTime = 4 * time.Second
	// askTime bounds what a shim that lives is asked to do.
	askTime = 2 * time.Second
	// othersTime bounds what is done about other sandboxes: the answer waits for it.
	othersTime = time.Second
)

// delete removes a container whose shim containerd has lost, and the sandbox
// with the last one. It answers with the container's exit.
func (p *Program) delete(in bootstrap.Invocation, stdout, stderr io.Writer) error {
	bundle := in.Bundle
	if bundle == "" {
		var err error
		if bundle, err = os.Getwd(); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), deleteTime)
	defer cancel()
	record, err := p.deleteSandbox(ctx, in, bundle)
	if errors.Is(err, errEnding) {
		fmt.Fprintf(stderr, "%v\n", err)
		err = nil
	}
	if err != nil {
		return err
	}
	p.deleteOthers(ctx)
	exit := exitRecord{Pid: uint32(record.VMM.Pid), ExitStatus: statusKilled, ExitedAt: time.Now()}
	if data, err := os.ReadFile(exitRecordPath(bundle)); err == nil {
		// An exit that nobody was told of.
		if err := json.Unmarshal(data, &exit); err != nil {
			return fmt.Errorf("exit of %s: %w", in.ID, err)
		}
	}
	data, err := proto.Marshal(&taskapi.DeleteResponse{
		Pid:        exit.Pid,
		ExitStatus: exit.ExitStatus,
		ExitedAt:   timestamppb.New(exit.ExitedAt),
	})
	if err != nil {
		return err
	}
	_, err = stdout.Write(data)
	return err
}

// deleteSandbox returns what was recorded of the sandbox, if there was one.
func (p *Program) deleteSandbox(ctx context.Context, in bootstrap.Invocation, bundle string) (state.Record, error) {
	group, _, err := sandboxOf(bundle, in.ID)
	if err != nil {
		group = in.ID // a bundle that start has refused
	}
	dir, err := state.At(p.stateRoot, in.Namespace, group)
	if err != nil {
		return state.Record{}, err
	}
	if _, err := os.Stat(dir.Path); errors.Is(err, fs.ErrNotExist) {
		return state.Record{}, nil // it was shut down in order
	}
	held, err := dir.Hold(ctx)
	if err != nil {
		return state.Record{}, err
	}
	defer held.Release()
	record, err := dir.Load()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return state.Record{}, err
	}
	lock, err := dir.Lock()
	if errors.Is(err, state.ErrLocked) {
		switch askToDelete(ctx, record.Socket, in.ID, in.ID == group) {
		case shimServes:
			return record, nil // others
		case shimHangs:
			// The VMM ends with it.
			if err := record.Shim.Kill(ctx); err != nil {
				return record, err
			}
		}
		lock, err = dir.LockWait(ctx)
	}
	if err == nil {
		defer lock.Close()
	}
	if held.Gone() {
		return record, nil // it has ended in order meanwhile
	}
	if errors.Is(err, state.ErrLocked) {
		return record, fmt.Errorf("sandbox %s: %w", dir.Path, errEnding)
	}
	if err != nil {
		return record, err
	}
	return record, removeDead(ctx, dir)
}

// errEnding is about a shim that needs more time than there is, to clean up
// after itself.
var errEnding = errors.New("its shim is still shutting down")

// What a shim that lives does.
type shimState int

const (
	shimServes shimState = iota
	shimEnds
	shimHangs
)

// askToDelete has a shim kill and delete a container, or the sandbox of this
// name, and end if it was the last one. A shim that needs more time for a
// container goes on with it, and for a sandbox is said to hang.
func askToDelete(ctx context.Context, socket, id string, isSandbox bool) shimState {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return shimEnds // it takes its socket away first
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	task := taskapi.NewTTRPCTaskClient(client)
	if _, err := task.Connect(ctx, &taskapi.ConnectRequest{ID: id}); err != nil && ctx.Err() != nil {
		return shimHangs
	}
	// Each of them may fail, because the shim has done it or does not know the
	// container.
	if _, err := task.Kill(ctx, &taskapi.KillRequest{ID: id, Signal: uint32(unix.SIGKILL), All: true}); err == nil {
		task.Wait(ctx, &taskapi.WaitRequest{ID: id})
	}
	task.Delete(ctx, &taskapi.DeleteRequest{ID: id})
	if !isSandbox {
		// The time may be over, and the shim is to hear this all the same: other
		// containers run in there.
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), askTime/2)
		defer cancel()
	}
	task.Shutdown(ctx, &taskapi.ShutdownRequest{ID: id})
	sandboxapi.NewTTRPCSandboxClient(client).ShutdownSandbox(ctx, &sandboxapi.ShutdownSandboxRequest{SandboxID: id})
	if ctx.Err() != nil {
		if isSandbox {
			return shimHangs
		}
		return shimServes
	}
	second, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return shimEnds
	}
	second.Close()
	return shimServes
}

// deleteOthers cleans up after sandboxes whose own delete did not get to the
// end, because it was killed or the VMM took too long to go. What fails here
// is left to the next one.
func (p *Program) deleteOthers(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, othersTime)
	defer cancel()
	dirs, err := filepath.Glob(filepath.Join(p.stateRoot, "*", "*"))
	if err != nil {
		return
	}
	for _, path := range dirs {
		if ctx.Err() != nil {
			return
		}
		deleteIfDead(ctx, state.Dir{Path: path})
	}
}

func deleteIfDead(ctx context.Context, dir state.Dir) {
	brief, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	held, err := dir.Hold(brief)
	if err != nil {
		return // it is just being started or deleted
	}
	defer held.Release()
	lock, err := dir.Lock()
	if err != nil {
		return // it lives
	}
	defer lock.Close()
	removeDead(ctx, dir)
}

// removeDead leaves nothing of a shim that is gone. What cannot be cleaned up
// keeps its record, by which the next delete goes on. The caller has its lock.
func removeDead(ctx context.Context, dir state.Dir) error {
	if err := cleanUp(ctx, dir); err != nil {
		return err
	}
	return dir.Remove()
}

// cleanUp removes what a shim that is gone has left outside of its directory,
// as much of it as can be. The caller has its lock.
func cleanUp(ctx context.Context, dir state.Dir) error {
	record, err := dir.Load()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	// The shim's mounts went with its namespace.
	if err := record.VMM.Kill(ctx); err != nil {
		return err
	}
	errs := []error{network.Remove(ctx, record.Network), hostcgroup.Remove(record.Cgroups)}
	if err := os.Remove(record.Socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, fmt.Errorf("shim socket: %w", err))
	}
	return errors.Join(errs...)
}
