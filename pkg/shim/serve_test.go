package shim

import (
	"net"
	"path/filepath"
	"testing"
	"time"
)

// A shim that containerd has started and forgotten does not stay.
func TestNobodyCalls(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "socket"))
	if err != nil {
		t.Fatal(err)
	}
	never := make(chan struct{})
	called := awaitCall(l, 10*time.Millisecond, func() { close(never); l.Close() })
	if _, err := called.Accept(); err == nil {
		t.Error("a call from nobody")
	}
	<-never
}

func TestFirstCall(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	called := awaitCall(l, time.Hour, func() {})
	caller, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer caller.Close()
	conn, err := called.Accept()
	if err != nil {
		t.Fatalf("the first call: %v", err)
	}
	defer conn.Close()
	if called.timer.Stop() {
		t.Error("the timer runs after the first call")
	}
}
