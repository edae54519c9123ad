//go:build starved

package vsock

import (
	"io"
	"testing"
)

// Stray packets from a guest that gives no rx buffers cost a bounded number of
// resets, and connections in its other direction go on.
func TestRXStarved(t *testing.T) {
	accept, accepted := listenHost(t)
	g := newGuest(t, Config{Accept: accept})
	host, s := connect(t, g, 1024, 1, accepted)
	g.hold()
	stray := header{srcCID: testCID, dstCID: hostCID, srcPort: 9, dstPort: 9, kind: typeStream, op: opRW}
	for range dataQueueSize {
		g.send(stray, nil)
		g.packet()
	}
	g.heldBuffers(dataQueueSize)
	for range 2 * maxResets {
		g.send(stray, nil)
	}
	// Guest to host needs no rx buffer, until the credit is used up.
	s.Write(make([]byte, 100000))
	if _, err := io.ReadFull(host, make([]byte, 100000)); err != nil {
		t.Fatal(err)
	}
	go copyAll(host, stream(6, 1<<20))
	g.device.mux.mu.Lock()
	if n := len(g.device.mux.resets); n != maxResets {
		t.Errorf("%d resets wait, want %d", n, maxResets)
	}
	g.device.mux.mu.Unlock()
	g.release()
	for range maxResets {
		g.want(opReset, 9)
	}
	wantStream(t, "host to guest", io.LimitReader(s, 1<<20), 6, 1<<20)
	echo(t, host, s)
}
