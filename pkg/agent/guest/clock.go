package guest

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// BootTime returns CLOCK_BOOTTIME in nanoseconds: how long ago the guest began
// to boot.
func BootTime() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0 // the clock exists since Linux 2.6.39
	}
	return ts.Nano()
}

// SetTime sets the wall clock. kvm-clock keeps it right from then on.
func SetTime(t time.Time) error {
	ts := unix.NsecToTimespec(t.UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("set the clock: %w", err)
	}
	return nil
}
