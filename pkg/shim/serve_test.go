package shim

import (
	"net"
	"path/filepath"
	"testing"
	"time"
)

// A shim that containerd has started and forgotten does not stay.
func TestAwaitCall(t *testing.T) {
	for _, calls := range []bool{false, true} {
		path := filepath.Join(t.TempDir(), "socket")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		if calls {
			conn, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
		}
		within := 10 * time.Millisecond
		if calls {
			within = time.Hour
		}
		never := make(chan struct{})
		called := awaitCall(l, within, func() { close(never); l.Close() })
		conn, err := called.Accept()
		switch {
		case calls && err != nil:
			t.Errorf("the first call: %v", err)
		case calls:
			conn.Close()
			if called.(*callListener).timer.Stop() {
				t.Error("the timer runs after the first call")
			}
		default:
			<-never
			if err == nil {
				t.Error("a call from nobody")
			}
		}
		l.Close()
	}
}
