package shim

import (
	"errors"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
	"github.com/microvm-runtime/microvm/pkg/shim/agentclient"
	"github.com/microvm-runtime/microvm/pkg/shim/agenttest"
)

// testClock has keepTime run for ten and a half minutes, in a time of the test's
// own, with an agent that is asked by answer. It ends with the connection. The
// requests and the warnings of the log are returned.
func testClock(t *testing.T, answer func(method string, request any) error) (requests []string, said warnings) {
	t.Helper()
	said = make(warnings, 100)
	old := log.L.Logger.ReplaceHooks(logrus.LevelHooks{})
	log.L.Logger.AddHook(said)
	defer log.L.Logger.ReplaceHooks(old)
	synctest.Test(t, func(t *testing.T) {
		ours, guest := net.Pipe()
		a := agenttest.New()
		a.SetIntercept(func(method string, request any) (any, error) { return nil, answer(method, request) })
		var all sync.WaitGroup
		all.Go(func() { a.Serve(guest) })
		c := agentclient.New(ours, func() { t.Error("it is said that the agent is silent") })
		all.Go(func() { keepTime(c) })
		time.Sleep(10*time.Minute + 30*time.Second)
		requests = a.Calls()
		c.Close()
		a.SetIntercept(nil)
		a.Shutdown(t.Context(), &emptypb.Empty{})
		all.Wait()
		time.Sleep(time.Hour) // for the answers that are still to come
	})
	return requests, said
}

// The guest is told the host's time every minute, with how exactly that is known.
func TestClock(t *testing.T) {
	const took = 100 * time.Millisecond
	var noted time.Time
	requests, said := testClock(t, func(method string, request any) error {
		switch r := request.(type) {
		case *emptypb.Empty:
			if method == "NoteTime" {
				if now := time.Now(); !noted.IsZero() && now.Sub(noted).Round(time.Second) != clockInterval {
					t.Errorf("%v after the last time", now.Sub(noted))
				}
				time.Sleep(took / 2)
				noted = time.Now()
				time.Sleep(took / 2)
			}
		case *agentproto.CorrectTimeRequest:
			if e, l := r.GetEarliest().AsTime(), r.GetLatest().AsTime(); noted.Sub(e) != took/2 || l.Sub(noted) != took/2 {
				t.Errorf("at %v it is told that it is from %v to %v", noted, e, l)
			}
		}
		return nil
	})
	var want []string
	for range 11 {
		want = append(want, "NoteTime", "CorrectTime")
	}
	if !slices.Equal(requests, want) {
		t.Errorf("requests %q", requests)
	}
	if len(said) != 0 {
		t.Errorf("%d warnings", len(said))
	}
}

// An agent that does not answer gets no further request until it does, and one
// that answers with errors is worth one line of the log.
func TestClockOfHostileAgent(t *testing.T) {
	for name, test := range map[string]struct {
		answer   func(method string, _ any) error
		requests int
		said     int
	}{
		"does not answer": {func(string, any) error { time.Sleep(time.Hour); return nil }, 1, 0},
		"answers late":    {func(string, any) error { time.Sleep(4 * time.Minute); return nil }, 3, 0},
		"refuses":         {func(string, any) error { return errors.New("no\n\x1b[2J") }, 11, 1},
		"refuses in part": {func(method string, _ any) error {
			if method == "CorrectTime" {
				return errors.New("no")
			}
			return nil
		}, 22, 1},
	} {
		t.Run(name, func(t *testing.T) {
			requests, said := testClock(t, test.answer)
			if len(requests) != test.requests || len(said) != test.said {
				t.Errorf("%d requests: %q, %d warnings", len(requests), requests, len(said))
			}
		})
	}
}

// It is begun with the sandbox.
func TestClockOfSandbox(t *testing.T) {
	f := newFixture(t)
	f.create("c1", "sleep")
	for !slices.Contains(f.agent.Calls(), "CorrectTime") {
		time.Sleep(time.Millisecond)
	}
	f.delete("c1", "")
}
