package main

import (
	"fmt"

	"github.com/microvm-runtime/microvm/pkg/vmm"
	"github.com/microvm-runtime/microvm/pkg/vmm/control"
	"github.com/microvm-runtime/microvm/pkg/vmm/seccomp"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/blk"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/passthrough"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/net"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/vsock"
)

// confine puts the process under its filter.
func confine() error {
	f, err := processFilter()
	if err != nil {
		return err
	}
	return f.InstallAll()
}

// processFilter is for all threads, from the moment that the machine is assembled
// on. The machine comes first: its ioctls are what is called most.
func processFilter() (seccomp.Filter, error) {
	f, err := seccomp.Compile(
		vmm.Syscalls(),
		net.Syscalls(),
		seccomp.Runtime(),
		seccomp.Threads(),
		vsock.Syscalls(),
		blk.Syscalls(),
		passthrough.Syscalls(),
		control.Syscalls(),
	)
	if err != nil {
		return nil, fmt.Errorf("the process's filter: %w", err)
	}
	return f, nil
}

// vcpuFilter is for the threads of the vCPUs, where the guest's accesses to
// registers are handled. NICs tell their taps there, and vsock makes its poller
// and closes its connections; nothing opens a file, makes a socket, or sends or
// receives a descriptor.
func vcpuFilter() (seccomp.Filter, error) {
	f, err := seccomp.Compile(
		vmm.VCPUSyscalls(),
		net.ActivateSyscalls(),
		seccomp.Runtime(),
		vsock.ActivateSyscalls(),
	)
	if err != nil {
		return nil, fmt.Errorf("the vCPUs' filter: %w", err)
	}
	return f, nil
}
