package guest

import (
	"log/slog"
	"time"

	"golang.org/x/sys/unix"
)

// syncTimeout is how long file systems get to be written back at the end. One
// whose device or server is gone would take for ever.
const syncTimeout = 5 * time.Second

// PowerOff ends all processes but the caller's, writes file systems back and
// turns the machine off. It does not return.
func PowerOff(log *slog.Logger) {
	if err := unix.Kill(-1, unix.SIGKILL); err != nil && err != unix.ESRCH {
		log.Warn("processes not killed", "error", err)
	}
	synced := make(chan struct{})
	go func() {
		unix.Sync()
		close(synced)
	}()
	select {
	case <-synced:
	case <-time.After(syncTimeout):
		log.Warn("file systems not written back in time")
	}
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	log.Error("the machine does not turn off", "error", err)
	// A reset ends a virtual machine too.
	unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	select {}
}
