package shim

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
)

// warnings is a logrus.Hook.
type warnings chan *logrus.Entry

func (warnings) Levels() []logrus.Level { return []logrus.Level{logrus.WarnLevel} }

func (w warnings) Fire(e *logrus.Entry) error {
	select {
	case w <- e:
	default:
	}
	return nil
}

// The log says what the machine of a guest that does not answer is doing.
func TestSilentGuest(t *testing.T) {
	f := newFixture(t)
	f.create("c1", "sleep")
	said := make(warnings, 16)
	old := log.L.Logger.ReplaceHooks(logrus.LevelHooks{})
	log.L.Logger.AddHook(said)
	defer log.L.Logger.ReplaceHooks(old)

	answer := make(chan struct{})
	f.agent.SetIntercept(func(string, any) (any, error) {
		<-answer
		return nil, nil
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := f.service.Stats(ctx, &taskapi.StatsRequest{ID: "c1"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("stats: %v", err)
	}
	// containerd takes a shim that cannot name a process for one to be forgotten.
	if r, err := f.Pids(ctx, &taskapi.PidsRequest{ID: "c1"}); err != nil || len(r.Processes) != 1 || r.Processes[0].Pid == 0 {
		t.Errorf("pids: %v, %v", r, err)
	}
	e := <-said
	for !strings.Contains(e.Message, "does not answer") {
		e = <-said
	}
	if e.Data["exits"] != "mmio-write +10" || e.Data["halted"] != uint64(1) {
		t.Errorf("%v", e.Data)
	}
	if kvm := e.Data["kvm"].(string); strings.ContainsAny(kvm, "\x1b\n") || !strings.Contains(kvm, "+1") {
		t.Errorf("%q", kvm)
	}
	close(answer)
	f.delete("c1", "")
}
