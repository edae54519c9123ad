//go:build agentkernel

package agent

import (
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"testing"

	_ "github.com/opencontainers/cgroups/devices"
	"github.com/opencontainers/runc/libcontainer"
	_ "github.com/opencontainers/runc/libcontainer/nsenter"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/agent/guest"
)

// The tests with this build tag are the first process of a machine: they need
// the guest kernel, a root file system that is this test binary, and /rootfs, a
// busybox. hack/agent-test.sh makes and boots that.

func init() {
	if len(os.Args) > 1 && os.Args[1] == "init" && os.Getenv("_LIBCONTAINER_INITPIPE") != "" {
		libcontainer.Init()
	}
	if os.Args[0] == PauseName {
		Pause()
	}
	runtime.LockOSThread() // as cmd/guest-agent
}

var testReaper = NewReaper()

func TestMain(m *testing.M) {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "these tests are run by hack/agent-test.sh, as the first process of a guest")
		os.Exit(2)
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	code := 2
	if err := guest.Setup(log); err != nil {
		log.Error("set up the guest", "error", err)
	} else {
		children := make(chan os.Signal, 1)
		signal.Notify(children, unix.SIGCHLD)
		go func() {
			for range children {
				testReaper.Wake()
			}
		}()
		go testReaper.Run()
		code = m.Run()
		printMemory()
	}
	fmt.Printf("\nagent-test: exit %d\n", code)
	guest.PowerOff(log)
}

// printMemory shows what this process, which has been the agent of many
// sandboxes, has of memory.
func printMemory() {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		fmt.Println(err)
		return
	}
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "VmHWM") || strings.HasPrefix(line, "Rss") || strings.HasPrefix(line, "Threads") {
			fmt.Print(line)
		}
	}
}
