package vmm

import "fmt"

// ExitReason is why a machine ended.
type ExitReason int

// The reasons.
const (
	ExitPowerOff    ExitReason = iota + 1 // the guest switched itself off
	ExitReset                             // the guest asked for a reset, which ends the machine
	ExitPanic                             // the guest's kernel panicked and said so through pvpanic
	ExitTripleFault                       // a processor could not deliver an exception
	ExitStopped                           // Machine.Stop
	ExitError                             // KVM or the VMM failed; Run returns the error too
)

// String is the reason in one word.
func (r ExitReason) String() string {
	switch r {
	case ExitPowerOff:
		return "poweroff"
	case ExitReset:
		return "reset"
	case ExitPanic:
		return "panic"
	case ExitTripleFault:
		return "triple-fault"
	case ExitStopped:
		return "stopped"
	case ExitError:
		return "error"
	}
	return fmt.Sprintf("ExitReason(%d)", int(r))
}

// Exit is how a machine ended.
type Exit struct {
	Reason ExitReason
	// Detail says more where there is more to say, for a log.
	Detail string
}
