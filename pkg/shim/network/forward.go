package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/log"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// maxForwards bounds the connections at a time; further ones are reset.
	maxForwards = 256
	// forwardTimeout bounds the time until the guest has answered.
	forwardTimeout = 30 * time.Second
	// acceptPause is waited after an error of accept(2), such as of too many
	// open files.
	acceptPause = 100 * time.Millisecond
)

// Dial connects with a TCP port of the guest's loopback.
type Dial func(ctx context.Context, port uint16, ipv6 bool) (*net.UnixConn, error)

// forwarder takes the connections to the namespace's loopback.
type forwarder struct {
	ns        *namespace
	dial      Dial
	lookup    *lookup
	listeners []*net.TCPListener
	ctx       context.Context
	cancel    context.CancelFunc
	wg        sync.WaitGroup
	slots     chan struct{}
	mu        sync.Mutex // held while the lookup is told of others
}

// Forward hands every TCP connection to the namespace's loopback on to the
// guest's, until Close: it is how containerd forwards ports. Nothing listens
// there on the host, since the programs that would are in the guest; a port on
// which something does listen is left to it. An error says what the host's
// kernel lacks.
func (n *Network) Forward(dial Dial) error {
	f := &forwarder{ns: n.ns, dial: dial, slots: make(chan struct{}, maxForwards)}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	if err := f.start(); err != nil {
		f.close()
		return fmt.Errorf("forward ports of %s: %w", n.ns.path, err)
	}
	n.mu.Lock()
	n.forward = f
	n.mu.Unlock()
	return nil
}

func (f *forwarder) start() (err error) {
	if f.lookup, err = newLookup(f.ns); err != nil {
		return fmt.Errorf("sk_lookup program: %w", err)
	}
	v4, err := f.listen("tcp4", "127.0.0.1:0", unix.SOL_IP, unix.IP_FREEBIND)
	if err != nil {
		return err
	}
	v6, err := f.listen("tcp6", "[::1]:0", unix.SOL_IPV6, unix.IPV6_FREEBIND)
	if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return err // else there is no IPv6
	}
	if _, err := f.leaveOthers(); err != nil {
		// The kernel may not tell (CONFIG_INET_DIAG).
		log.L.WithError(err).Debug("listeners in the pod's network namespace are not known")
	}
	if err := f.lookup.add(socketIPv4, v4); err != nil {
		return fmt.Errorf("sk_lookup program: %w", err)
	}
	if v6 != nil {
		if err := f.lookup.add(socketIPv6, v6); err != nil {
			return fmt.Errorf("sk_lookup program: %w", err)
		}
	}
	for _, l := range f.listeners {
		f.wg.Go(func() { f.accept(l) })
	}
	return nil
}

// listen makes a socket in the namespace. Its loopback need not be up yet.
func (f *forwarder) listen(network, address string, level, freebind int) (*net.TCPListener, error) {
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		controlErr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, freebind, 1) })
		return errors.Join(controlErr, err)
	}}
	config.SetMultipathTCP(false) // the socket map takes plain TCP only
	var listener *net.TCPListener
	err := f.ns.do(func() error {
		l, err := config.Listen(f.ctx, network, address)
		if err == nil {
			listener = l.(*net.TCPListener)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen on the loopback: %w", err)
	}
	f.listeners = append(f.listeners, listener)
	return listener, nil
}

// leaveOthers leaves those ports alone that somebody else listens on, and
// returns them.
func (f *forwarder) leaveOthers() (map[uint32]bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	ports, err := f.others()
	if err != nil {
		return nil, err
	}
	return ports, f.lookup.leave(ports)
}

// others are the ports on which something but us listens.
func (f *forwarder) others() (map[uint32]bool, error) {
	ports := map[uint32]bool{}
	err := f.ns.do(func() error {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			list, err := netlink.SocketDiagTCP(family)
			if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
				return fmt.Errorf("list sockets: %w", err)
			}
			for _, s := range list {
				if s.State == netlink.TCP_LISTEN && !f.isOurs(s) {
					ports[uint32(s.ID.SourcePort)] = true
				}
			}
		}
		return nil
	})
	return ports, err
}

func (f *forwarder) isOurs(s *netlink.Socket) bool {
	for _, l := range f.listeners {
		if a, ok := l.Addr().(*net.TCPAddr); ok && a.Port == int(s.ID.SourcePort) && a.IP.Equal(s.ID.Source) {
			return true
		}
	}
	return false
}

func (f *forwarder) accept(l *net.TCPListener) {
	for {
		conn, err := l.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			log.L.WithError(err).Warn("port-forward")
			select {
			case <-time.After(acceptPause):
				continue
			case <-f.ctx.Done():
				return
			}
		}
		select {
		case f.slots <- struct{}{}:
			f.wg.Go(func() {
				f.serve(conn)
				<-f.slots
			})
		default:
			log.L.Warnf("port-forward: more than %d connections", maxForwards)
			reset(conn)
		}
	}
}

// serve carries one connection. The port that it is for is that of its own
// address, whichever the listener's is.
func (f *forwarder) serve(conn *net.TCPConn) {
	local, ok := conn.LocalAddr().(*net.TCPAddr)
	if !ok {
		reset(conn)
		return
	}
	// Somebody may have begun to listen: the next connection is for them.
	ports, err := f.leaveOthers()
	if err != nil {
		log.L.WithError(err).Debug("port-forward")
	}
	if ports[uint32(local.Port)] {
		reset(conn)
		return
	}
	ctx, cancel := context.WithTimeout(f.ctx, forwardTimeout)
	guest, err := f.dial(ctx, uint16(local.Port), local.IP.To4() == nil)
	cancel()
	if err != nil {
		log.L.WithError(err).Debugf("port-forward to port %d", local.Port)
		reset(conn)
		return
	}
	join(f.ctx, conn, guest)
}

// reset ends a connection so that its other end sees that it was refused.
func reset(conn *net.TCPConn) {
	conn.SetLinger(0)
	conn.Close()
}

// join copies both ways, ends included, until both have ended or one has
// failed. While nothing moves, it holds no buffer: the kernel splices.
func join(ctx context.Context, conn *net.TCPConn, guest *net.UnixConn) {
	abort := func() {
		reset(conn)
		guest.Close()
	}
	stop := context.AfterFunc(ctx, abort)
	defer stop()
	var wg sync.WaitGroup
	type half interface {
		io.ReadWriter
		CloseWrite() error
	}
	for _, way := range []struct{ to, from half }{{conn, guest}, {guest, conn}} {
		wg.Go(func() {
			_, err := io.Copy(way.to, way.from)
			if err == nil {
				err = way.to.CloseWrite()
			}
			if err != nil {
				abort()
			}
		})
	}
	wg.Wait()
	conn.Close()
	guest.Close()
}

func (f *forwarder) close() {
	f.cancel()
	if f.lookup != nil {
		f.lookup.detach()
		defer f.lookup.close()
	}
	for _, l := range f.listeners {
		l.Close()
	}
	f.wg.Wait()
}
