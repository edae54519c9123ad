package shim

import (
	"context"
	"os"
	"sync"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
)

// TestSilentAgent: from a container on which the agent answers nothing any more
// there is a way out, by SIGKILL and Delete, and another sandbox notices nothing.
func TestSilentAgent(t *testing.T) {
	f, other := newFixture(t), newFixture(t)
	f.host.patience = 20 * time.Millisecond
	other.create("o1", "sleep")
	other.start("o1", "")
	f.create("c1", "sleep")
	f.start("c1", "")
	machine := f.machine()
	silent := make(chan struct{})
	var once sync.Once
	f.agent.SetIntercept(func(string, any) (any, error) {
		once.Do(func() { close(silent) })
		<-machine.done
		return nil, os.ErrClosed
	})
	// Callers that wait do so as long as they like.
	ctx, cancel := context.WithCancel(t.Context())
	asked := make(chan error)
	go func() {
		_, err := f.Stats(ctx, &taskapi.StatsRequest{ID: "c1"})
		asked <- err
	}()
	<-silent
	cancel()
	if err := <-asked; err == nil {
		t.Error("statistics of nowhere")
	}
	if s := f.status("c1", ""); s.Status != tasktypes.Status_RUNNING {
		t.Errorf("status %v", s)
	}
	if s := other.status("o1", ""); s.Status != tasktypes.Status_RUNNING {
		t.Errorf("the other sandbox: %v", s)
	}
	f.kill("c1", "") // it has the machine killed, whatever it answers
	if code := f.wait("c1", ""); code != 137 {
		t.Errorf("ended with %d", code)
	}
	if err := f.delete("c1", ""); err != nil {
		t.Error(err)
	}
	f.shutdown("c1")
	<-f.down
	other.kill("o1", "")
	if code := other.wait("o1", ""); code != 137 {
		t.Errorf("the other sandbox's container ended with %d", code)
	}
	other.delete("o1", "")
}
