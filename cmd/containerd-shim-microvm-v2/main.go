// Command containerd-shim-microvm-v2 is the runtime io.containerd.microvm.v2:
// containerd runs it for containers that are to live in a virtual machine.
package main

import (
	"os"

	"github.com/microvm-runtime/microvm/pkg/shim"
)

func main() {
	var p shim.Program
	os.Exit(p.Run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
