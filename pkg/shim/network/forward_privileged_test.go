//go:build privileged

package network

import (
	"context"
	"errors"
	"io"
	"net"
	"strconv"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/internal/socktest"
)

// dialIn connects in a namespace, as containerd does.
func dialIn(t *testing.T, ns *namespace, network, host string, port int) (conn *net.TCPConn, err error) {
	t.Helper()
	err = ns.do(func() error {
		c, err := net.Dial(network, net.JoinHostPort(host, strconv.Itoa(port)))
		if err == nil {
			conn = c.(*net.TCPConn)
		}
		return err
	})
	return conn, err
}

func TestForward(t *testing.T) {
	pod := newNamespace(t)
	n := open(t, pod, &recorder{})
	const big = 1 << 20
	err := n.Forward(func(_ context.Context, port uint16, ipv6 bool) (*net.UnixConn, error) {
		if port == 81 {
			return nil, errors.New("nothing listens")
		}
		shim, guest := socktest.Pair(t)
		go func() { // says which port it is, and how much it got
			defer guest.Close()
			said, _ := io.Copy(io.Discard, guest)
			io.WriteString(guest, strconv.Itoa(int(port))+" "+strconv.FormatBool(ipv6)+" "+strconv.FormatInt(said, 10))
		}()
		return shim, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		network, host string
		port          int
		want          string
	}{
		{"tcp4", "localhost", 80, "80 false 1048576"},
		{"tcp6", "::1", 80, "80 true 1048576"},
		{"tcp4", "127.9.8.7", 65535, "65535 false 1048576"},
		{"tcp4", "127.0.0.1", 1, "1 false 1048576"},
	} {
		conn, err := dialIn(t, pod, test.network, test.host, test.port)
		if err != nil {
			t.Errorf("%v: %v", test, err)
			continue
		}
		if _, err := conn.Write(make([]byte, big)); err != nil {
			t.Error(err)
		}
		conn.CloseWrite()
		if got, err := io.ReadAll(conn); err != nil || string(got) != test.want {
			t.Errorf("%v: %q, %v", test, got, err)
		}
		conn.Close()
	}
	// Nothing listens in the guest.
	conn, err := dialIn(t, pod, "tcp4", "127.0.0.1", 81)
	if err == nil {
		_, err = io.ReadAll(conn)
		conn.Close()
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("refused: %v", err)
	}
	// Not the loopback.
	address(t, pod, "lo", "192.0.2.1/32")
	if _, err := dialIn(t, pod, "tcp4", "192.0.2.1", 80); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("another address: %v", err)
	}
	// Nothing of it outlives Close, which the connection of a client that does
	// nothing does not hold up.
	idle, err := dialIn(t, pod, "tcp4", "127.0.0.1", 80)
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadAll(idle); !errors.Is(err, unix.ECONNRESET) && err != nil {
		t.Errorf("idle connection: %v", err)
	}
	if _, err := dialIn(t, pod, "tcp4", "127.0.0.1", 80); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("after Close: %v", err)
	}
}

// A port on which something of the host's listens in the namespace is left to
// it, whether it was there before or has come later.
func TestForwardLeavesOthersAlone(t *testing.T) {
	pod := newNamespace(t)
	serve := func() int {
		var l net.Listener
		in(t, pod, func() (err error) {
			l, err = net.Listen("tcp4", "127.0.0.1:0")
			return err
		})
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				io.WriteString(c, "own")
				c.Close()
			}
		}()
		return l.Addr().(*net.TCPAddr).Port
	}
	get := func(port int) (string, error) {
		conn, err := dialIn(t, pod, "tcp4", "127.0.0.1", port)
		if err != nil {
			return "", err
		}
		defer conn.Close()
		got, err := io.ReadAll(conn)
		return string(got), err
	}
	before := serve()
	n := open(t, pod, &recorder{})
	err := n.Forward(func(context.Context, uint16, bool) (*net.UnixConn, error) {
		shim, guest := socktest.Pair(t)
		io.WriteString(guest, "guest")
		guest.Close()
		return shim, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := get(before); got != "own" || err != nil {
		t.Errorf("a listener from before: %q, %v", got, err)
	}
	later := serve()
	if _, err := get(later); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the connection that finds a new listener: %v", err)
	}
	if got, err := get(later); got != "own" || err != nil {
		t.Errorf("a later listener: %q, %v", got, err)
	}
	if got, err := get(later + 1); got != "guest" || err != nil {
		t.Errorf("another port: %q, %v", got, err)
	}
}

func TestForwardIsBounded(t *testing.T) {
	pod := newNamespace(t)
	n := open(t, pod, &recorder{})
	var dialled atomic.Int64
	err := n.Forward(func(context.Context, uint16, bool) (*net.UnixConn, error) {
		dialled.Add(1)
		shim, guest := socktest.Pair(t)
		t.Cleanup(func() { guest.Close() })
		return shim, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for range maxForwards {
		conn, err := dialIn(t, pod, "tcp4", "127.0.0.1", 80)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	// It is reset while it is made, or right after.
	conn, err := dialIn(t, pod, "tcp4", "127.0.0.1", 80)
	if err == nil {
		defer conn.Close()
		_, err = io.ReadAll(conn)
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("one too many: %v", err)
	}
	if n := dialled.Load(); n > maxForwards {
		t.Errorf("%d connections to the guest", n)
	}
}
