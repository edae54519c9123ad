package shim

import (
	"fmt"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/jail"
)

// shimCapabilities are those that the serving process has, on all threads and in its
// bounding set: programs that it executes can get no other ones. Those of the
// VMM's jail are there because it hands them down, but it needs most of them
// itself: it reads and makes files of any owner, an overlay that it has mounted
// works with its rights (chown, device nodes for whiteouts, xattrs), and ids are
// mapped for a mount with SETUID, SETGID and SETFCAP.
var shimCapabilities = slices.Concat(jail.Capabilities, []uintptr{
	unix.CAP_SYS_ADMIN,  // mounts, namespaces, sk_lookup; the VMM's, until its jail is closed
	unix.CAP_SYS_CHROOT, // setns(2) with a mount namespace, the host's; chroot(2) of stand-ins
	unix.CAP_SYS_PTRACE, // /proc/PID/ns of the VMM, which is another user's and not dumpable
	unix.CAP_KILL,       // the VMM and the programs that were started, whoever's they are
	unix.CAP_NET_ADMIN,  // taps, tc, sysctls and sk_lookup in the pod's network namespace
	unix.CAP_SETPCAP,    // bounding set and secure bits of the jail
	// Of no use to the shim: OCI hooks are its children, and what nerdctl sets a
	// network up with (CNI's plugins, iptables) opens raw sockets.
	unix.CAP_NET_RAW,
})

// limitCapabilities leaves to what this goroutine executes from now on, as root,
// the shimCapabilities and no other ones. The goroutine stays on its thread, which
// cannot have them back.
func limitCapabilities() error {
	runtime.LockOSThread()
	// execve(2) would add what is inheritable to the bounding set.
	if err := jail.LimitCapabilities(nil, shimCapabilities); err != nil {
		return fmt.Errorf("give capabilities up: %w", err)
	}
	return nil
}
