package guest

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Modes of adjtimex(2), include/uapi/linux/timex.h. Both count microseconds.
const (
	adjSetOffset        = 0x0100
	adjOffsetSingleshot = 0x8001
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

// SetTime sets the wall clock.
func SetTime(t time.Time) error {
	ts := unix.NsecToTimespec(t.UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("set the clock: %w", err)
	}
	return nil
}

// SlewTime has the wall clock gain d, or lose it, by running faster or slower by
// 500 ppm until it has. What is left of a call before is forgotten.
func SlewTime(d time.Duration) error {
	if _, err := unix.Adjtimex(&unix.Timex{Modes: adjOffsetSingleshot, Offset: d.Microseconds()}); err != nil {
		return fmt.Errorf("slew the clock by %v: %w", d, err)
	}
	return nil
}

// StepTime adds d to the wall clock, and ends what SlewTime has begun.
func StepTime(d time.Duration) error {
	// Of a negative one the microseconds are positive, as the kernel asks for.
	if _, err := unix.Adjtimex(&unix.Timex{Modes: adjSetOffset, Time: unix.NsecToTimeval(d.Nanoseconds())}); err != nil {
		return fmt.Errorf("step the clock by %v: %w", d, err)
	}
	return nil
}
