package agent

import (
	"context"
	"io"
	"net"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/microvm-runtime/microvm/pkg/internal/socktest"
)

// shout answers what it has read, at its end.
func shout(t *testing.T, address string) (port uint32) {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			said, _ := io.ReadAll(c)
			c.Write(append(said, '!'))
			c.Close()
		}
	}()
	return uint32(l.Addr().(*net.TCPAddr).Port)
}

func TestForward(t *testing.T) {
	a := &Agent{forwards: make(chan struct{}, maxForwards)}
	for _, address := range []string{"127.0.0.1:0", "[::1]:0", "0.0.0.0:0", "[::]:0"} {
		port := shout(t, address)
		for _, ipv6First := range []bool{false, true} {
			ours, agents := socktest.Pair(t)
			if err := a.forward(context.Background(), agents, port, ipv6First); err != nil {
				t.Errorf("%s: %v", address, err)
				continue
			}
			ours.Write([]byte("hello"))
			ours.CloseWrite()
			if got, err := io.ReadAll(ours); err != nil || string(got) != "hello!" {
				t.Errorf("%s: %q, %v", address, got, err)
			}
		}
	}
	for range cap(a.forwards) { // all of them have ended
		a.forwards <- struct{}{}
	}
}

// A server that ends a connection ends its stream, though the client goes on.
func TestForwardServerEnds(t *testing.T) {
	a := &Agent{forwards: make(chan struct{}, maxForwards)}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ours, agents := socktest.Pair(t)
	if err := a.forward(context.Background(), agents, uint32(l.Addr().(*net.TCPAddr).Port), false); err != nil {
		t.Fatal(err)
	}
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	server.(*net.TCPConn).SetLinger(0)
	server.Close()
	if n, err := io.Copy(io.Discard, ours); n != 0 || err != nil {
		t.Error(n, err)
	}
	for { // until the stream is closed altogether
		if _, err := ours.Write([]byte("more")); err != nil {
			return
		}
	}
}

func TestForwardRefused(t *testing.T) {
	a := &Agent{forwards: make(chan struct{}, 1)}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := uint32(l.Addr().(*net.TCPAddr).Port)
	l.Close()
	_, agents := socktest.Pair(t)
	if err := a.forward(context.Background(), agents, port, false); !errdefs.IsUnavailable(err) {
		t.Errorf("closed port: %v", err)
	}
	for _, port := range []uint32{0, 65536, 1 << 31} {
		if err := a.forward(context.Background(), agents, port, false); !errdefs.IsInvalidArgument(err) {
			t.Errorf("port %d: %v", port, err)
		}
	}
	a.forwards <- struct{}{}
	if err := a.forward(context.Background(), agents, port, false); !errdefs.IsResourceExhausted(err) {
		t.Errorf("too many: %v", err)
	}
}
