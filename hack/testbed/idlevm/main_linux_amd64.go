// Command idlevm holds a virtual machine with a processor that never runs, for as long as the outer machine lives.
//
// KVM patches the kernel's code when the first machine comes and when the last one goes (preempt_notifier_key), and when there is the
// first local APIC that its guest has not turned on, or no such one any more (apic_sw_disabled), which is at each boot of a
// guest. The emulation now and then still has a processor run into the breakpoint of such a change (int3) when the change is over,
// and the kernel panics. With this machine there are always some of each, and nothing is patched.
package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/kvm"
)

func main() {
	if err := hold(); err != nil {
		fmt.Fprintf(os.Stderr, "testbed: no idle virtual machine: %v\n", err)
		os.Exit(1)
	}
	for {
		_ = unix.Pause()
	}
}

// hold makes the machine. Its descriptors are those of this process, and stay open.
func hold() error {
	file, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	system, err := kvm.NewSystem(file)
	if err != nil {
		return err
	}
	vm, err := system.CreateVM()
	if err != nil {
		return err
	}
	// Local APICs in the kernel, as the VMM has them.
	if err := vm.EnableCap(kvm.CapSplitIRQChip, 24); err != nil {
		return err
	}
	_, err = vm.CreateVCPU(0)
	return err
}
