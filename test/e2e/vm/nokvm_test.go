//go:build e2e

package vm

import (
	"testing"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

func TestNoKVM(t *testing.T) {
	// A /dev of its own with the usual devices, but no /dev/kvm.
	n := node.WithMounts(t, `
		mkdir -p "$SCRATCH/dev"
		mount --rbind /dev "$SCRATCH/dev"
		mount -t tmpfs tmpfs /dev
		for d in null zero full random urandom tty; do touch /dev/$d; mount --bind "$SCRATCH/dev/$d" /dev/$d; done
		for d in pts shm net; do mkdir /dev/$d; mount --rbind "$SCRATCH/dev/$d" /dev/$d; done
		ln -s pts/ptmx /dev/ptmx; ln -s /proc/self/fd /dev/fd
		umount -R -l "$SCRATCH/dev"`)
	n.Run(t, nil, "true").WantError(t, "/dev/kvm", "no such file or directory")
}

func TestKVMIsAnotherDevice(t *testing.T) {
	n := node.WithMounts(t, "mount --bind /dev/null /dev/kvm")
	n.Run(t, nil, "true").WantError(t, "/dev/kvm", "not KVM's device")
}

// Root without the right to the device: as in a container whose device rules leave KVM out.
func TestNoRightToKVM(t *testing.T) {
	// A file system that allows no devices answers every open of one with EACCES.
	n := node.WithMounts(t, `
		mkdir -p "$SCRATCH/nodev"
		mount -t tmpfs -o nodev tmpfs "$SCRATCH/nodev"
		mknod "$SCRATCH/nodev/kvm" c 10 232
		mount --bind "$SCRATCH/nodev/kvm" /dev/kvm
		umount -l "$SCRATCH/nodev"`)
	n.Run(t, nil, "true").WantError(t, "/dev/kvm", "permission denied")
}
