package vsock

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/internal/fdtest"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"golang.org/x/sys/unix"
)

func TestManyConnections(t *testing.T) {
	const n = 1000
	accept, accepted := listenHost(t)
	g := newGuest(t, Config{Accept: accept})
	listening := g.listen(1)
	var wg sync.WaitGroup
	for i := range n {
		var host *net.UnixConn
		var s *socket
		if i%2 == 0 {
			host, s = dial(t, g, 1, listening)
		} else {
			host, s = connect(t, g, 1024, uint32(i), accepted)
		}
		wg.Go(func() {
			copyAll(s, s)
			s.shutdown(shutdownSend)
		})
		wg.Go(func() {
			const size = 50000
			wg.Go(func() {
				copyAll(host, stream(uint64(i), size))
				host.CloseWrite()
			})
			wantStream(t, "echo", host, uint64(i), size)
			host.Close()
		})
	}
	wg.Wait()
	waitFor(t, "no connection is left", func() bool { return g.connections() == 0 })
}

// Above the limit connections are refused in both directions, and others go on.
func TestConnectionFlood(t *testing.T) {
	const limit = 20
	accept, accepted := listenHost(t)
	g := newGuest(t, Config{Accept: accept, MaxConnections: limit})
	host, s := connect(t, g, 1024, 1, accepted)
	h := header{srcCID: testCID, dstCID: hostCID, dstPort: 1024, kind: typeStream, op: opRequest, bufAlloc: 1 << 18}
	answers := map[uint16]int{}
	for i := range uint32(2000) {
		h.srcPort = 100 + i
		g.send(h, nil)
		if i%500 == 499 { // no more at a time than resets may wait
			for range 500 {
				answers[g.packet().op]++
			}
		}
	}
	if answers[opResponse] != limit-1 || answers[opReset] != 2000-(limit-1) {
		t.Errorf("responses: %d, resets: %d", answers[opResponse], answers[opReset])
	}
	if _, err := g.device.Dial(t.Context(), 1); !errors.Is(err, ErrTooManyConnections) {
		t.Errorf("Dial: %v", err)
	}
	if n := g.connections(); n != limit {
		t.Errorf("%d connections", n)
	}
	echo(t, host, s)
	for range limit - 1 {
		(<-accepted).Close()
	}
	for range limit - 1 { // a shutdown for each, which nobody answers
		if got := g.packet(); got.op != opShutdown {
			t.Fatalf("got %+v, want a shutdown", got)
		}
	}
	for i := range uint32(2000) { // the guest confirms
		h.srcPort, h.op = 100+i, opReset
		g.send(h, nil)
	}
	h.srcPort, h.op = 5000, opRequest
	g.send(h, nil)
	g.want(opResponse, 5000)
}

// A reader on the host that takes nothing stops its own connection only.
func TestSlowReader(t *testing.T) {
	const size = 20 << 20
	accept, accepted := listenHost(t)
	g := newGuest(t, Config{Accept: accept})
	slow, slowGuest := connect(t, g, 1024, 1, accepted)
	go func() {
		copyAll(slowGuest, stream(1, size))
		slowGuest.Close()
	}()
	stuck := g.device.mux.listed[connKey{host: 1024, guest: 1}]
	full := func() bool { // the guest has used all the credit it knows of
		stuck.mu.Lock()
		defer stuck.mu.Unlock()
		return uint32(stuck.backlog.size)+stuck.fwdCnt-stuck.toldFwd == bufAlloc
	}
	waitFor(t, "the guest is stuck", full)
	var wg sync.WaitGroup
	for i := range uint32(4) {
		host, s := connect(t, g, 1024, 10+i, accepted)
		wg.Go(func() {
			copyAll(s, stream(uint64(i), size))
			s.Close()
		})
		wg.Go(func() { wantStream(t, "other connection", host, uint64(i), size) })
	}
	wg.Wait()
	if !full() {
		t.Error("the connection that nobody reads has moved")
	}
	wantStream(t, "slow connection", slow, 1, size)
}

// A guest socket that takes nothing stops its own connection only.
func TestSlowGuest(t *testing.T) {
	const size = 20 << 20
	accept, accepted := listenHost(t)
	g := newGuest(t, Config{Accept: accept})
	slow, slowGuest := connect(t, g, 1024, 1, accepted)
	go func() {
		copyAll(slow, stream(1, size))
		slow.Close()
	}()
	slowGuest.waitFull()
	var wg sync.WaitGroup
	for i := range uint32(4) {
		host, s := connect(t, g, 1024, 10+i, accepted)
		wg.Go(func() {
			copyAll(host, stream(uint64(i), size))
			host.Close()
		})
		wg.Go(func() { wantStream(t, "other connection", s, uint64(i), size) })
	}
	wg.Wait()
	wantStream(t, "slow connection", slowGuest, 1, size)
}

// A reset in the middle of everything ends everything, and the device works
// again after the next activation.
func TestReset(t *testing.T) {
	goroutines, files := runtime.NumGoroutine(), fdtest.Count(t)
	accept, accepted := listenHost(t)
	entered, block := make(chan struct{}), make(chan struct{})
	g := newGuest(t, Config{Accept: func(port uint32) (*os.File, error) {
		if port == 6 {
			entered <- struct{}{}
			<-block
		}
		return accept(port)
	}})
	var hosts []io.Closer
	for range 3 {
		var wg sync.WaitGroup
		for i := range uint32(10) {
			host, s := connect(t, g, 1024, i, accepted)
			hosts = append(hosts, host)
			wg.Go(func() { copyAll(s, stream(1, 1<<40)) })
			wg.Go(func() { copyAll(io.Discard, host) })
			wg.Go(func() { copyAll(host, stream(1, 1<<40)) })
			wg.Go(func() { copyAll(io.Discard, s) })
		}
		slow, s := connect(t, g, 1024, 50, accepted)
		hosts = append(hosts, slow)
		wg.Go(func() { copyAll(s, stream(1, 1<<40)) })
		g.send(header{srcCID: testCID, dstCID: hostCID, srcPort: 60, dstPort: 6, kind: typeStream, op: opRequest}, nil)
		<-entered
		g.listen(7)
		g.hold() // sooner or later there are no rx buffers, and nothing is answered
		dialled := make(chan error)
		go func() {
			for {
				f, err := g.device.Dial(t.Context(), 7)
				if err != nil {
					dialled <- err
					return
				}
				f.Close()
			}
		}()
		g.heldBuffers(dataQueueSize)
		g.reset()
		wg.Wait()
		if err := <-dialled; !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, ErrNotReady) {
			t.Errorf("Dial: %v", err)
		}
		g.start()
	}
	close(block) // what Accept returns now is for no one
	for range 3 {
		host := <-accepted
		if _, err := host.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("the host's end of a connection from before the reset: %v", err)
		}
		hosts = append(hosts, host)
	}
	g.reset()
	for _, host := range hosts {
		host.Close()
	}
	waitFor(t, "the goroutines have ended", func() bool { return runtime.NumGoroutine() <= goroutines })
	waitFor(t, "the files are closed", func() bool { return fdtest.Count(t) <= files })
}

// What a guest does wrong fills no log, however often it resets the device.
func TestLinesOfLog(t *testing.T) {
	var log bytes.Buffer
	g := newGuest(t, Config{Log: slog.New(slog.NewTextHandler(&log, nil))})
	for range 3 {
		for range maxComplaints + 10 {
			g.sendRaw([]byte("x"))
		}
		waitFor(t, "the packets are taken", func() bool { return len(g.txFree) == txSlots })
		g.reset()
		g.start()
	}
	if n := strings.Count(log.String(), "\n"); n != maxComplaints {
		t.Errorf("%d lines, want %d:\n%s", n, maxComplaints, &log)
	}
}

func TestActivateNeedsQueues(t *testing.T) {
	d := New(Config{})
	d.Reset() // does nothing
	if err := d.Activate(virtio.Activation{Queues: make([]*virtio.Queue, numQueues)}); err == nil {
		t.Error("activated without queues")
	}
}
