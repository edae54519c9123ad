package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
)

const (
	// streamIDSize is the length of the id that begins every stream connection
	// (see agent.proto).
	streamIDSize = 8
	// maxStrangers bounds the connections which have not said their id yet.
	maxStrangers = 64
	// maxWaitingStreams bounds the connections whose id no process has named
	// yet. A process has at most three.
	maxWaitingStreams = 256

	// streamIDTimeout is how long a connection may take to say its id.
	streamIDTimeout = 10 * time.Second
	// streamTakeTimeout is how long a process waits for a stream it was told
	// of. The shim opens the stream first, so only the scheduling of two
	// goroutines can be in the way.
	streamTakeTimeout = 10 * time.Second
	// streamIdleTimeout is how long a stream waits to be named by a process.
	streamIdleTimeout = 60 * time.Second
)

// streamConn is one standard stream of a process. CloseWrite is the half-close
// that ends it.
type streamConn interface {
	net.Conn
	syscall.Conn
	CloseWrite() error
}

// streamHub accepts the connections that carry standard streams and keeps each
// until the process that it belongs to is made.
type streamHub struct {
	log *slog.Logger

	mu      sync.Mutex
	waiting map[uint64]*waitingStream
	wanted  map[uint64]chan streamConn
	// strangers counts the connections that have not said their id.
	strangers int
}

type waitingStream struct {
	conn    streamConn
	timeout *time.Timer
}

func newStreamHub(log *slog.Logger) *streamHub {
	return &streamHub{
		log:     log,
		waiting: make(map[uint64]*waitingStream),
		wanted:  make(map[uint64]chan streamConn),
	}
}

// serve accepts connections until the listener is closed. allow says whether a
// peer may bring streams: only the host may, a process in a container must not.
func (h *streamHub) serve(l net.Listener, allow func(net.Addr) bool) error {
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept a stream: %w", err)
		}
		sc, ok := conn.(streamConn)
		if !ok || !allow(conn.RemoteAddr()) || !h.admit() {
			h.log.Warn("stream connection refused", "peer", conn.RemoteAddr().String())
			conn.Close()
			continue
		}
		go h.identify(sc)
	}
}

// admit counts one more connection without id, unless there are too many.
func (h *streamHub) admit() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.strangers >= maxStrangers {
		return false
	}
	h.strangers++
	return true
}

// identify reads the id of a connection and hands the connection on.
func (h *streamHub) identify(conn streamConn) {
	id, err := readStreamID(conn)

	h.mu.Lock()
	h.strangers--
	if err == nil {
		err = h.deliverLocked(id, conn)
	}
	h.mu.Unlock()

	if err != nil {
		h.log.Warn("stream connection dropped", "error", err)
		conn.Close()
	}
}

func readStreamID(conn net.Conn) (uint64, error) {
	if err := conn.SetReadDeadline(time.Now().Add(streamIDTimeout)); err != nil {
		return 0, err
	}
	var b [streamIDSize]byte
	if _, err := io.ReadFull(conn, b[:]); err != nil {
		return 0, fmt.Errorf("read the stream's id: %w", err)
	}
	if err := conn.SetReadDeadline(time.Time{}); err != nil {
		return 0, err
	}
	id := binary.BigEndian.Uint64(b[:])
	if id == 0 {
		return 0, errors.New("stream id 0 means no stream")
	}
	return id, nil
}

// deliverLocked gives the connection to who waits for it, or keeps it for later.
func (h *streamHub) deliverLocked(id uint64, conn streamConn) error {
	if ch, ok := h.wanted[id]; ok {
		delete(h.wanted, id)
		ch <- conn // has room for one
		return nil
	}
	if _, ok := h.waiting[id]; ok {
		return fmt.Errorf("stream %d exists already", id)
	}
	if len(h.waiting) >= maxWaitingStreams {
		return fmt.Errorf("stream %d: %d others wait for their process already", id, maxWaitingStreams)
	}
	w := &waitingStream{conn: conn}
	w.timeout = time.AfterFunc(streamIdleTimeout, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.waiting[id] == w {
			delete(h.waiting, id)
			conn.Close()
		}
	})
	h.waiting[id] = w
	return nil
}

// take returns the connection of a stream, which is the caller's from then on.
// It waits for one that has not arrived yet.
func (h *streamHub) take(ctx context.Context, id uint64) (streamConn, error) {
	h.mu.Lock()
	if w, ok := h.waiting[id]; ok {
		delete(h.waiting, id)
		h.mu.Unlock()
		w.timeout.Stop()
		return w.conn, nil
	}
	if _, ok := h.wanted[id]; ok {
		h.mu.Unlock()
		return nil, fmt.Errorf("stream %d is another process's: %w", id, errdefs.ErrAlreadyExists)
	}
	ch := make(chan streamConn, 1)
	h.wanted[id] = ch
	h.mu.Unlock()

	ctx, cancel := context.WithTimeout(ctx, streamTakeTimeout)
	defer cancel()
	select {
	case conn := <-ch:
		return conn, nil
	case <-ctx.Done():
	}

	h.mu.Lock()
	delete(h.wanted, id)
	h.mu.Unlock()
	// It may have come in the meantime.
	select {
	case conn := <-ch:
		return conn, nil
	default:
		return nil, fmt.Errorf("stream %d was not opened: %w", id, ctx.Err())
	}
}

// finish ends a stream to its peer. What was written arrives: the connection is
// closed only when the peer has closed its side too, or does not within a time.
func finish(conn streamConn) {
	if conn.CloseWrite() == nil && conn.SetReadDeadline(time.Now().Add(streamIDTimeout)) == nil {
		io.Copy(io.Discard, conn)
	}
	conn.Close()
}
