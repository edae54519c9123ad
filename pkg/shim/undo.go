package shim

import (
	"context"
	"errors"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

const (
	// undoTime bounds what is done to get rid of a process that nobody waits for
	// any more.
	undoTime = time.Minute
	undoPoll = 100 * time.Millisecond
)

// outlive has the agent do what takes effect whether or not its answer is waited
// for. If it is not, undo is called with the answer, concurrently: once it has
// come, or the agent has let its time pass and it will never be known.
func outlive(ctx context.Context, do func(context.Context) error, undo func(answer error)) (undoing bool, err error) {
	answer := make(chan error, 1)
	go func() { answer <- do(context.WithoutCancel(ctx)) }()
	select {
	case err = <-answer:
		if !errors.Is(err, context.DeadlineExceeded) {
			return false, err
		}
		answer <- err
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	go func() { undo(<-answer) }()
	return true, err
}

// discard ends and deletes a process of the guest's, a container if it is an
// init, that the agent has made or started for nobody. answer is what it has
// said to that.
func (s *sandbox) discard(id, execID string, answer error) {
	unknown := errors.Is(answer, context.DeadlineExceeded)
	if answer != nil && !unknown && execID == "" {
		return // it has not come to be; an exec has, before its start
	}
	ctx, cancel := context.WithTimeout(context.Background(), undoTime)
	defer cancel()
	for s.alive() == nil {
		s.agent.Signal(ctx, id, execID, sigkill, execID == "")
		err := s.agent.DeleteProcess(ctx, id, execID)
		if err == nil || !unknown && errdefs.IsNotFound(err) {
			return
		}
		select {
		case <-time.After(undoPoll):
		case <-ctx.Done():
			// The guest keeps something; it has its machine's limits.
			log.L.WithError(err).Warnf("container %s: something that nobody waits for is left in the guest", id)
			return
		}
	}
}
