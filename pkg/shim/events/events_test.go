package events

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	ttrpcevents "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
)

// containerd is the event service, which fails at first.
type containerd struct {
	mu    sync.Mutex
	fail  int
	seen  []string
	count chan struct{}
}

func (c *containerd) Forward(_ context.Context, r *ttrpcevents.ForwardRequest) (*emptypb.Empty, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fail > 0 {
		c.fail--
		return nil, errors.New("not now")
	}
	event, err := typeurl.UnmarshalAny(r.Envelope.Event)
	if err != nil {
		return nil, err
	}
	id := event.(interface{ GetContainerID() string }).GetContainerID()
	c.seen = append(c.seen, fmt.Sprintf("%s %s %s", r.Envelope.Namespace, r.Envelope.Topic, id))
	c.count <- struct{}{}
	return &emptypb.Empty{}, nil
}

func serve(t *testing.T, path string, c *containerd) *ttrpc.Server {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	ttrpcevents.RegisterTTRPCEventsService(s, c)
	go s.Serve(context.Background(), l)
	t.Cleanup(func() { s.Close() })
	return s
}

func TestOrder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	c := &containerd{fail: 2, count: make(chan struct{}, 10000)}
	p := NewPublisher("unix://"+path, "ns")
	var want []string
	publish := func(from, to int) {
		for i := from; i < to; i++ {
			id := fmt.Sprint(i)
			p.Publish(&eventsapi.TaskCreate{ContainerID: id})
			p.Publish(&eventsapi.TaskExit{ContainerID: id})
			want = append(want, "ns /tasks/create "+id, "ns /tasks/exit "+id)
		}
	}
	publish(0, 20) // containerd is not there yet
	server := serve(t, path, c)
	for range 40 {
		<-c.count
	}
	server.Close() // it restarts
	publish(20, 30)
	serve(t, path, c)
	p.Close(context.Background())
	p.Publish(&eventsapi.TaskDelete{ContainerID: "late"})

	c.mu.Lock()
	defer c.mu.Unlock()
	// The event whose answer is lost in the restart is told again.
	if got := slices.Compact(slices.Clone(c.seen)); !slices.Equal(got, want) || len(c.seen) > len(want)+1 {
		t.Errorf("got  %q\nwant %q", c.seen, want)
	}
}

func TestCloseGivesUp(t *testing.T) {
	p := NewPublisher(filepath.Join(t.TempDir(), "absent"), "ns")
	p.Publish(&eventsapi.TaskStart{ContainerID: "1"})
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	p.Close(ctx)
}

func TestQueueIsBounded(t *testing.T) {
	p := NewPublisher(filepath.Join(t.TempDir(), "absent"), "ns")
	for range maxQueue + 10 {
		p.Publish(&eventsapi.TaskOOM{ContainerID: "1"})
	}
	p.mu.Lock()
	n := len(p.queue)
	p.mu.Unlock()
	if n > maxQueue {
		t.Errorf("%d events queued", n)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	p.Close(ctx)
}

func TestWithoutAddress(t *testing.T) {
	p := NewPublisher("", "ns")
	p.Publish(&eventsapi.TaskOOM{ContainerID: "1"})
	p.Close(context.Background())
}

// The topics are those that containerd itself gives the events.
func TestTopics(t *testing.T) {
	for _, event := range []proto.Message{
		&eventsapi.TaskCreate{}, &eventsapi.TaskStart{}, &eventsapi.TaskOOM{}, &eventsapi.TaskExit{},
		&eventsapi.TaskDelete{}, &eventsapi.TaskExecAdded{}, &eventsapi.TaskExecStarted{},
		&eventsapi.TaskPaused{}, &eventsapi.TaskResumed{},
	} {
		if got, want := topic(event), runtime.GetTopic(event); got != want {
			t.Errorf("%T: %q, want %q", event, got, want)
		}
	}
}
