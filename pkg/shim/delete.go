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
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/microvm-runtime/microvm/pkg/shim/bootstrap"
	"github.com/microvm-runtime/microvm/pkg/shim/hostcgroup"
	"github.com/microvm-runtime/microvm/pkg/shim/state"
)

const (
	// deleteTime is less than the five seconds that containerd gives delete.
	deleteTime = 4800 * time.Millisecond
	// askTime bounds what a shim that lives is asked to do, endTime how long
	// it may take to end.
	askTime = 2 * time.Second
	endTime = 4500 * time.Millisecond
)

// delete removes a container whose shim containerd has lost, and the sandbox
// with the last one. It answers with the container's exit.
func (p *Program) delete(in bootstrap.Invocation, stdout io.Writer) error {
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
	if err != nil {
		return err
	}
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
	group, err := groupOf(bundle, in.ID)
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
		if askToDelete(ctx, record.Socket, in.ID) {
			return record, nil // it serves others
		}
		wait, cancel := context.WithTimeout(ctx, endTime)
		defer cancel()
		if lock, err = dir.LockWait(wait); errors.Is(err, state.ErrLocked) {
			// It hangs. The VMM ends with it.
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer cancel()
			if err := record.Shim.Kill(last); err != nil {
				return record, err
			}
			lock, err = dir.LockWait(last)
		}
	}
	if err == nil {
		defer lock.Close()
	}
	if held.Gone() {
		return record, nil // it has ended in order meanwhile
	}
	if err != nil {
		return record, err
	}
	return record, errors.Join(cleanUp(ctx, dir), dir.Remove())
}

// askToDelete has a shim that lives kill and delete a container, and end if it
// was the last one. It says whether the shim goes on serving.
func askToDelete(ctx context.Context, socket, id string) bool {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return false
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	task := taskapi.NewTTRPCTaskClient(client)
	// Each of them may fail, because the shim has done it or does not know the
	// container.
	if _, err := task.Kill(ctx, &taskapi.KillRequest{ID: id, Signal: uint32(unix.SIGKILL), All: true}); err == nil {
		task.Wait(ctx, &taskapi.WaitRequest{ID: id})
	}
	task.Delete(ctx, &taskapi.DeleteRequest{ID: id})
	task.Shutdown(ctx, &taskapi.ShutdownRequest{ID: id})
	if ctx.Err() != nil {
		return false
	}
	// A shim that ends takes its socket away first.
	second, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return false
	}
	second.Close()
	return true
}

// cleanUp removes what a shim that is gone has left outside of its directory.
// The caller has its lock.
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
	if err := hostcgroup.Remove(record.Cgroups); err != nil {
		return err
	}
	if err := os.Remove(record.Socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("shim socket: %w", err)
	}
	return nil
}
