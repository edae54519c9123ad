package eventfd

import (
	"errors"
	"os"
	"testing"
)

func TestSignalWakesWait(t *testing.T) {
	e, err := New()
	if err != nil {
		t.Fatal(err)
	}
	for range 3 { // several signals are one wake-up
		if err := e.Signal(); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.Wait(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- e.Wait() }()
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, os.ErrClosed) {
		t.Fatalf("Wait after Close: %v", err)
	}
}
