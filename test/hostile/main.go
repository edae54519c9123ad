// Command hostile is a guest that belongs to an attacker, for the tests of the host beside it.
//
// In a privileged container "hostile ATTACK [ARG...]" is what root of the guest may do: an attack of the table below. It goes on,
// round after round, until it is ended, and writes what each did and then "round N" as lines of their own.
//
// As the first process of a guest it is an agent that lies: HOSTILE_AGENT, which the kernel makes of its command line, says how.
package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// An attack makes a round, whose number counts from one, and says what it did.
type attack func(round int) (did string, err error)

// attacks make their preparations and return the attack.
var attacks = map[string]func(args []string) (attack, error){
	"registers": registers,
	"vsock":     vsockFlood,
	"console":   consoleFlood,
	"files":     fileFlood,
	"frames":    frameFlood,
}

func main() {
	if lie := os.Getenv("HOSTILE_AGENT"); lie != "" && os.Getpid() == 1 {
		beAgent(lie)
	}
	if err := run(os.Args[1:]); err != nil {
		fmt.Println("hostile:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 || attacks[args[0]] == nil {
		return errors.New("usage: hostile registers|vsock|console|files|frames [ARG...]")
	}
	if err := onlyInAGuest(); err != nil {
		return err
	}
	// The file that this program is in may be out of reach after an attack.
	if err := unix.Mlockall(unix.MCL_CURRENT); err != nil {
		return fmt.Errorf("lock memory: %w", err)
	}
	next, err := attacks[args[0]](args[1:])
	if err != nil {
		return fmt.Errorf("%s: %w", args[0], err)
	}
	for i := 1; ; i++ {
		did, err := next(i)
		if err != nil {
			return fmt.Errorf("%s, round %d: %w", args[0], i, err)
		}
		fmt.Printf("%s\nround %d\n", did, i)
	}
}

// onlyInAGuest keeps a mistake from attacking the machine of whoever tests.
func onlyInAGuest() error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	// CONFIG_LOCALVERSION of hack/kernel/microvm.config.
	if release := unix.ByteSliceToString(u.Release[:]); !strings.HasSuffix(release, "-microvm") {
		return fmt.Errorf("the kernel %s is not that of a guest", release)
	}
	return nil
}
