package node

import (
	"bufio"
	"context"
	"encoding/json"
	"strings"
	"sync"
	"testing"
)

// An Event is one line of ctr events.
type Event struct {
	Topic string
	// Fields of the event's message, as ctr prints them.
	ContainerID string `json:"container_id"`
	ExecID      string `json:"exec_id"`
	ID          string `json:"id"`
	Pid         uint32 `json:"pid"`
	ExitStatus  uint32 `json:"exit_status"`
}

// Events are those of the tasks of a node, as they come in.
type Events struct {
	mu   sync.Mutex
	seen []Event
}

// Events listens until the end of the test.
func (n *Node) Events(t *testing.T) *Events {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	c := n.Command(ctx, "events")
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	e := &Events{}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for s := bufio.NewScanner(out); s.Scan(); {
			e.line(s.Text())
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
		_ = c.Wait()
	})
	// ctr does not say when it has subscribed: make something happen until it is seen.
	Until(t, "ctr events shows an event", func() bool {
		n.MustCtr(t, "containers", "create", "--runtime", n.Runtime, Busybox, "probe-events")
		n.MustCtr(t, "containers", "rm", "probe-events")
		e.mu.Lock()
		defer e.mu.Unlock()
		return len(e.seen) > 0
	})
	return e
}

// line takes "DATE TIME ZONE ZONE NAMESPACE TOPIC JSON".
func (e *Events) line(l string) {
	head, body, ok := strings.Cut(l, " {")
	f := strings.Fields(head)
	if !ok || len(f) < 2 {
		return
	}
	ev := Event{Topic: f[len(f)-1]}
	if json.Unmarshal([]byte("{"+body), &ev) != nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.seen = append(e.seen, ev)
}

// Of returns the events of one container's tasks so far, in order.
func (e *Events) Of(id string) []Event {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []Event
	for _, ev := range e.seen {
		if ev.ContainerID == id && strings.HasPrefix(ev.Topic, "/tasks/") {
			out = append(out, ev)
		}
	}
	return out
}
