package shim

import (
	"flag"
	"io"
	"os"
	"testing"

	"github.com/containerd/log"
)

func TestMain(m *testing.M) {
	flag.Parse()
	log.L.Logger.SetOutput(io.Discard)
	if testing.Verbose() {
		log.L.Logger.SetOutput(os.Stderr)
	}
	os.Exit(m.Run())
}
