package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

const (
	// maxForwards bounds the connections of Forward at a time.
	maxForwards = 512
	// forwardDialTimeout is for a port of the guest itself, which answers at
	// once unless its backlog is full.
	forwardDialTimeout = 10 * time.Second
)

// Forward connects a stream with a TCP port of the guest's loopback.
func (a *Agent) Forward(ctx context.Context, r *agentproto.ForwardRequest) (*emptypb.Empty, error) {
	stream, err := a.streams.take(ctx, r.GetStream())
	if err != nil {
		return nil, err
	}
	if err := a.forward(ctx, stream, r.GetPort(), r.GetIpv6First()); err != nil {
		stream.Close()
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// forward owns the stream if it returns without error.
func (a *Agent) forward(ctx context.Context, stream streamConn, port uint32, ipv6First bool) error {
	if port == 0 || port > 65535 {
		return fmt.Errorf("forward: invalid port %d: %w", port, errdefs.ErrInvalidArgument)
	}
	select {
	case a.forwards <- struct{}{}:
	default:
		return fmt.Errorf("forward: %d connections are open: %w", maxForwards, errdefs.ErrResourceExhausted)
	}
	conn, err := dialLoopback(ctx, port, ipv6First)
	if err != nil {
		<-a.forwards
		return fmt.Errorf("forward: %w", err)
	}
	go func() {
		join(stream, conn)
		<-a.forwards
	}()
	return nil
}

// dialLoopback connects with a port that is bound on either loopback address, or
// on all addresses.
func dialLoopback(ctx context.Context, port uint32, ipv6First bool) (*net.TCPConn, error) {
	addresses := []string{"127.0.0.1", "::1"}
	if ipv6First {
		addresses = []string{"::1", "127.0.0.1"}
	}
	dialer := net.Dialer{Timeout: forwardDialTimeout}
	var errs []error
	for _, address := range addresses {
		conn, err := dialer.DialContext(ctx, "tcp", net.JoinHostPort(address, strconv.FormatUint(uint64(port), 10)))
		if err == nil {
			return conn.(*net.TCPConn), nil
		}
		errs = append(errs, err)
	}
	err := errors.Join(errs...)
	if errors.Is(err, unix.ECONNREFUSED) {
		return nil, fmt.Errorf("nothing listens on port %d: %w", port, errdefs.ErrUnavailable)
	}
	return nil, err
}

// join copies both ways, ends included, and closes both connections when both
// ways have ended or one has failed.
func join(stream streamConn, conn *net.TCPConn) {
	var wg sync.WaitGroup
	for _, way := range []struct{ dst, src streamConn }{{stream, conn}, {conn, stream}} {
		wg.Go(func() {
			err := copyStream(way.dst, way.src)
			if err == nil {
				err = way.dst.CloseWrite()
			}
			if err != nil { // nothing of it arrives any more
				stream.Close()
				conn.Close()
			}
		})
	}
	wg.Wait()
	stream.Close()
	conn.Close()
}
