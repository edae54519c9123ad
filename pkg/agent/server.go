package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// answerTime is how long the answer to Shutdown gets to leave the machine.
const answerTime = 10 * time.Millisecond

// Serve serves the shim on the control connection. It returns nil after a
// Shutdown, and an error when the connection is lost: then the shim is gone.
// In both cases no container runs any more.
func (a *Agent) Serve(conn net.Conn) error {
	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(a.intercept))
	if err != nil {
		return fmt.Errorf("make the control server: %w", err)
	}
	agentproto.RegisterAgentService(server, a)
	control := &controlConn{Conn: conn, lost: make(chan struct{})}
	listener := &oneListener{conns: make(chan net.Conn, 1), closed: make(chan struct{}), addr: conn.LocalAddr()}
	listener.conns <- control
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.Background(), listener) }()
	defer server.Close()

	select {
	case <-a.shutdown:
		time.Sleep(answerTime)
		return nil
	case <-control.lost:
		err = errors.New("the control connection is lost")
	case err = <-served:
		err = fmt.Errorf("control server: %w", err)
	}
	a.killAll(context.Background())
	return err
}

// intercept gives errors their code and keeps a panic in one call from ending
// the whole sandbox.
func (a *Agent) intercept(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (response any, err error) {
	defer func() {
		if r := recover(); r != nil {
			a.log.Error("panic", "method", info.FullMethod, "panic", fmt.Sprint(r), "stack", string(debug.Stack()))
			err = errgrpc.ToGRPC(fmt.Errorf("the agent panicked in %s: %v: %w", info.FullMethod, r, errdefs.ErrInternal))
		}
	}()
	response, err = method(ctx, unmarshal)
	return response, errgrpc.ToGRPC(err)
}

// controlConn tells when the connection is lost.
type controlConn struct {
	net.Conn
	once sync.Once
	lost chan struct{}
}

func (c *controlConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil {
		c.once.Do(func() { close(c.lost) })
	}
	return n, err
}

func (c *controlConn) Close() error {
	c.once.Do(func() { close(c.lost) })
	return c.Conn.Close()
}

// oneListener is a listener on which one connection arrives.
type oneListener struct {
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
	addr   net.Addr
}

func (l *oneListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *oneListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *oneListener) Addr() net.Addr { return l.addr }
