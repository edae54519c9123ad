package agent

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// maxEvents bounds the events that wait to be sent. They come from what happens
// in containers, which the host does not drive.
const maxEvents = 256

// sentTimeout is how long someone waits for an event to be on its way.
const sentTimeout = time.Second

// eventQueue holds events until the shim's Events call takes them.
type eventQueue struct {
	log   *slog.Logger
	queue chan *queuedEvent
	// sending is held by the one call that takes events.
	sending sync.Mutex
}

type queuedEvent struct {
	event *agentproto.Event
	sent  chan struct{}
}

func newEventQueue(log *slog.Logger) *eventQueue {
	return &eventQueue{log: log, queue: make(chan *queuedEvent, maxEvents)}
}

// publish queues an event and returns a channel that is closed when it has been
// sent. An event too many is lost.
func (q *eventQueue) publish(e *agentproto.Event) (sent <-chan struct{}) {
	queued := &queuedEvent{event: e, sent: make(chan struct{})}
	select {
	case q.queue <- queued:
	default:
		q.log.Error("event lost: too many wait to be sent")
		close(queued.sent)
	}
	return queued.sent
}

// awaitSent waits, for a bounded time, until an event has been sent: what is
// answered afterwards arrives after the event.
func awaitSent(sent <-chan struct{}) {
	timeout := time.NewTimer(sentTimeout)
	defer timeout.Stop()
	select {
	case <-sent:
	case <-timeout.C:
	}
}

// send sends events until ctx ends or sending fails.
func (q *eventQueue) send(ctx context.Context, send func(*agentproto.Event) error) error {
	q.sending.Lock()
	defer q.sending.Unlock()
	for {
		select {
		case queued := <-q.queue:
			err := send(queued.event)
			close(queued.sent)
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
