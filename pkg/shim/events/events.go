// Package events tells containerd what happens to tasks: in order, and once.
package events

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	ttrpcevents "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// maxQueue bounds what waits while containerd is away. When it is full
	// the oldest event is dropped: containerd asks for the state of tasks when
	// it comes back.
	maxQueue = 2048
	// forwardTimeout bounds one attempt.
	forwardTimeout = 5 * time.Second
	maxBackoff     = 2 * time.Second
)

// Publisher sends events. Publish may be called concurrently; events are sent
// in the order of the calls.
type Publisher struct {
	namespace string
	address   string

	mu      sync.Mutex
	queue   []*types.Envelope
	dropped int
	closing bool

	wake   chan struct{}      // something to do
	cancel context.CancelFunc // give up what could not be sent
	done   chan struct{}
}

// NewPublisher sends to containerd's ttrpc socket. With an empty address it
// sends nothing: the caller has no use for events.
func NewPublisher(address, namespace string) *Publisher {
	ctx, cancel := context.WithCancel(context.Background())
	p := &Publisher{
		namespace: namespace,
		address:   strings.TrimPrefix(address, "unix://"),
		wake:      make(chan struct{}, 1),
		cancel:    cancel,
		done:      make(chan struct{}),
	}
	go p.run(ctx)
	return p
}

// Publish queues an event and never waits.
func (p *Publisher) Publish(event proto.Message) {
	body, err := typeurl.MarshalAnyToProto(event)
	if err != nil { // our own message, of a type that marshals
		log.L.WithError(err).Errorf("event %T", event)
		return
	}
	envelope := &types.Envelope{
		Timestamp: timestamppb.Now(),
		Namespace: p.namespace,
		Topic:     topic(event),
		Event:     body,
	}
	p.mu.Lock()
	if p.address != "" && !p.closing {
		if len(p.queue) == maxQueue {
			p.queue = p.queue[1:]
			p.dropped++
		}
		p.queue = append(p.queue, envelope)
	}
	p.mu.Unlock()
	p.signal()
}

func (p *Publisher) signal() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// topic is the one that containerd gives the event.
func topic(event proto.Message) string {
	switch event.(type) {
	case *eventsapi.TaskCreate:
		return "/tasks/create"
	case *eventsapi.TaskStart:
		return "/tasks/start"
	case *eventsapi.TaskOOM:
		return "/tasks/oom"
	case *eventsapi.TaskExit:
		return "/tasks/exit"
	case *eventsapi.TaskDelete:
		return "/tasks/delete"
	case *eventsapi.TaskExecAdded:
		return "/tasks/exec-added"
	case *eventsapi.TaskExecStarted:
		return "/tasks/exec-started"
	case *eventsapi.TaskPaused:
		return "/tasks/paused"
	case *eventsapi.TaskResumed:
		return "/tasks/resumed"
	}
	return "/tasks/?"
}

// Close sends what is queued and ends the publisher. Events published from now
// on are lost, and so is, when ctx ends, what could not be sent.
func (p *Publisher) Close(ctx context.Context) {
	p.mu.Lock()
	p.closing = true
	p.mu.Unlock()
	p.signal()
	select {
	case <-p.done:
	case <-ctx.Done():
		p.cancel()
		<-p.done
	}
	p.cancel()
}

func (p *Publisher) run(ctx context.Context) {
	defer close(p.done)
	var client *ttrpc.Client
	defer func() {
		if client != nil {
			client.Close()
		}
	}()
	var backoff time.Duration
	for {
		envelope, closing := p.head()
		if envelope == nil {
			if closing {
				return
			}
			select {
			case <-p.wake:
			case <-ctx.Done():
				return
			}
			continue
		}
		err := p.forward(ctx, &client, envelope)
		if err == nil {
			p.pop(envelope)
			backoff = 0
			continue
		}
		if backoff == 0 {
			log.L.WithError(err).WithField("topic", envelope.Topic).Warn("containerd does not take an event, trying again")
		}
		backoff = min(2*backoff+50*time.Millisecond, maxBackoff)
		select {
		case <-time.After(backoff):
		case <-ctx.Done():
			return
		}
	}
}

// head is the next event to send; closing says that no more will come.
func (p *Publisher) head() (_ *types.Envelope, closing bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dropped > 0 {
		log.L.Errorf("dropped %d events that containerd did not take", p.dropped)
		p.dropped = 0
	}
	if len(p.queue) == 0 {
		return nil, p.closing
	}
	return p.queue[0], p.closing
}

// pop removes the event that was sent, unless it was dropped meanwhile.
func (p *Publisher) pop(sent *types.Envelope) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.queue) > 0 && p.queue[0] == sent {
		p.queue = p.queue[1:]
	}
	if len(p.queue) == 0 {
		p.queue = nil // let go of what the array holds
	}
}

func (p *Publisher) forward(ctx context.Context, client **ttrpc.Client, envelope *types.Envelope) error {
	ctx, cancel := context.WithTimeout(ctx, forwardTimeout)
	defer cancel()
	if *client == nil {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", p.address)
		if err != nil {
			return fmt.Errorf("containerd's event service: %w", err)
		}
		*client = ttrpc.NewClient(conn)
	}
	_, err := ttrpcevents.NewTTRPCEventsClient(*client).Forward(ctx, &ttrpcevents.ForwardRequest{Envelope: envelope})
	if err != nil {
		(*client).Close()
		*client = nil
		return fmt.Errorf("forward event: %w", err)
	}
	return nil
}
