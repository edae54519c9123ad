package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/control"
	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit"
	"github.com/microvm-runtime/microvm/pkg/vmm/seccomp"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/balloon"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/console"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/rng"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/vsock"
)

// A guest activates and resets each device by writes to a register, which a vCPU's
// thread handles. The filter ends the process if it does not allow what that takes:
// a process of its own.
func TestDevicesOnVCPUThread(t *testing.T) {
	const child = "MICROVM_TEST_VCPU_THREAD"
	if os.Getenv(child) == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), child+"=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		return
	}
	log := slog.New(slog.DiscardHandler)
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	rate := ratelimit.Limits{Operations: ratelimit.Rate{PerSecond: 1, Burst: 1}}
	limits, err := newLimiters(control.RateLimits{Disk: rate, NetworkReceive: rate, NetworkTransmit: rate}, ratelimit.SystemClock)
	if err != nil {
		t.Fatal(err)
	}
	share, err := limits.newShare("shared", dir, nil, log)
	if err != nil {
		t.Fatal(err)
	}
	nic, err := limits.newNIC(control.NIC{MAC: "02:00:00:00:00:01", QueuePairs: 2}, openTaps(t, 2), log)
	if err != nil {
		t.Fatal(err)
	}
	disk, err := limits.newDisk(control.Disk{}, tempFile(t, "disk", make([]byte, 512)), log)
	if err != nil {
		t.Fatal(err)
	}
	var drivers []*virtiotest.Driver
	for _, d := range []virtio.Device{
		console.New(tempFile(t, "console", nil)), rng.New(rng.Kernel), balloon.New(log),
		vsock.New(vsock.Config{GuestCID: guestCID, Log: log}), share, nic.device, disk.device,
	} {
		driver := virtiotest.NewDriver(t, d, virtiotest.Options{})
		driver.Reset()
		drivers = append(drivers, driver)
	}
	filter, err := vcpuFilter()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good
		err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
		if err == nil {
			err = filter.Install()
		}
		if err == nil {
			for range 3 {
				for _, d := range drivers {
					if d.Device == nic.device {
						d.Features ^= 1 << 1 // GUEST_CSUM: the tap is told
					}
					d.Activate()
					d.Reset()
				}
				runtime.GC()
			}
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestSocketsStayNonBlocking: a VMM that its guest has taken over must not make the
// shim's ends of streams block, see vmm.Syscalls.
func TestSocketsStayNonBlocking(t *testing.T) {
	const child = "MICROVM_TEST_NONBLOCK"
	const allowed = "it may be set"
	filters := map[string]func() (seccomp.Filter, error){"process": processFilter, "vCPU": vcpuFilter}
	if name := os.Getenv(child); name != "" {
		runtime.LockOSThread()
		filter, err := filters[name]()
		if err == nil {
			err = unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
		}
		if err == nil {
			err = filter.Install()
		}
		if err == nil {
			_, err = unix.FcntlInt(0, unix.F_SETFL, unix.O_NONBLOCK|unix.O_APPEND)
		}
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println(allowed)
		unix.FcntlInt(0, unix.F_SETFL, unix.O_APPEND)
		return
	}
	for name := range filters {
		cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), child+"="+name)
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != unix.SIGSYS || !strings.HasPrefix(string(out), allowed) {
			t.Errorf("%s: %v: %s", name, err, out)
		}
	}
}

// ioctls that the filters must know.
const (
	kvmCreateVM            = 0xae01
	kvmCreateVCPU          = 0xae41
	kvmSetUserMemoryRegion = 0x4020ae46
)

// goThread are the flags with which Go's runtime makes a thread, as strace shows.
const goThread = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_THREAD | unix.CLONE_SYSVSEM | unix.CLONE_SETTLS

// none is no descriptor.
const none = ^uintptr(0)

type call struct {
	name string
	args []uintptr // its number, and its arguments
}

// deniedCalls are those by which a process gets at others, at the kernel, or out of
// the jail. The arguments make those fail that a filter would let through.
func deniedCalls() []call {
	return []call{
		{"execve", []uintptr{unix.SYS_EXECVE}},
		{"execveat", []uintptr{unix.SYS_EXECVEAT, none}},
		{"fork", []uintptr{unix.SYS_FORK}},
		{"clone of a process", []uintptr{unix.SYS_CLONE, uintptr(unix.SIGCHLD)}},
		{"clone in a namespace", []uintptr{unix.SYS_CLONE, goThread | unix.CLONE_NEWUSER}},
		{"clone3", []uintptr{unix.SYS_CLONE3}},
		{"ptrace", []uintptr{unix.SYS_PTRACE, none}},
		{"process_vm_readv", []uintptr{unix.SYS_PROCESS_VM_READV, 1}},
		{"process_vm_writev", []uintptr{unix.SYS_PROCESS_VM_WRITEV, 1}},
		{"pidfd_open", []uintptr{unix.SYS_PIDFD_OPEN}},
		{"pidfd_getfd", []uintptr{unix.SYS_PIDFD_GETFD, none}},
		{"kcmp", []uintptr{unix.SYS_KCMP, 1, 1, none}},

		{"kill", []uintptr{unix.SYS_KILL, uintptr(os.Getppid())}},
		{"kill of all", []uintptr{unix.SYS_KILL, none}},
		{"tkill", []uintptr{unix.SYS_TKILL, uintptr(os.Getppid())}},
		{"tgkill of another process", []uintptr{unix.SYS_TGKILL, uintptr(os.Getppid()), uintptr(os.Getppid())}},
		{"rt_sigqueueinfo", []uintptr{unix.SYS_RT_SIGQUEUEINFO, 1}},
		{"pidfd_send_signal", []uintptr{unix.SYS_PIDFD_SEND_SIGNAL, none}},
		{"fcntl F_SETOWN", []uintptr{unix.SYS_FCNTL, none, unix.F_SETOWN, 1}},

		{"setns", []uintptr{unix.SYS_SETNS, none}},
		{"unshare of a user namespace", []uintptr{unix.SYS_UNSHARE, unix.CLONE_NEWUSER}},
		{"unshare of more than CLONE_FS", []uintptr{unix.SYS_UNSHARE, unix.CLONE_FS | unix.CLONE_NEWNS}},
		{"mount", []uintptr{unix.SYS_MOUNT}},
		{"umount2", []uintptr{unix.SYS_UMOUNT2}},
		{"pivot_root", []uintptr{unix.SYS_PIVOT_ROOT}},
		{"chroot", []uintptr{unix.SYS_CHROOT}},
		{"fsopen", []uintptr{unix.SYS_FSOPEN}},
		{"fsmount", []uintptr{unix.SYS_FSMOUNT, none}},
		{"open_tree", []uintptr{unix.SYS_OPEN_TREE, none}},
		{"move_mount", []uintptr{unix.SYS_MOVE_MOUNT, none}},
		{"mount_setattr", []uintptr{unix.SYS_MOUNT_SETATTR, none}},
		{"open_by_handle_at", []uintptr{unix.SYS_OPEN_BY_HANDLE_AT, none}},

		{"bpf", []uintptr{unix.SYS_BPF, none}},
		{"io_uring_setup", []uintptr{unix.SYS_IO_URING_SETUP}},
		{"io_uring_enter", []uintptr{unix.SYS_IO_URING_ENTER, none}},
		{"userfaultfd", []uintptr{unix.SYS_USERFAULTFD, none}},
		{"perf_event_open", []uintptr{unix.SYS_PERF_EVENT_OPEN}},
		{"keyctl", []uintptr{unix.SYS_KEYCTL, none}},
		{"add_key", []uintptr{unix.SYS_ADD_KEY}},
		{"request_key", []uintptr{unix.SYS_REQUEST_KEY}},
		{"memfd_create", []uintptr{unix.SYS_MEMFD_CREATE}},
		{"fanotify_init", []uintptr{unix.SYS_FANOTIFY_INIT, none}},
		{"init_module", []uintptr{unix.SYS_INIT_MODULE}},
		{"finit_module", []uintptr{unix.SYS_FINIT_MODULE, none}},
		{"kexec_load", []uintptr{unix.SYS_KEXEC_LOAD, none, none}},
		{"syslog", []uintptr{unix.SYS_SYSLOG, none}},
		{"modify_ldt", []uintptr{unix.SYS_MODIFY_LDT, none}},
		{"msgget", []uintptr{unix.SYS_MSGGET}},
		{"shmat", []uintptr{unix.SYS_SHMAT, none}},
		{"mq_open", []uintptr{unix.SYS_MQ_OPEN}},

		{"setuid", []uintptr{unix.SYS_SETUID, none}},
		{"setgid", []uintptr{unix.SYS_SETGID, none}},
		{"setresuid", []uintptr{unix.SYS_SETRESUID, none, none, none}},
		{"setgroups", []uintptr{unix.SYS_SETGROUPS, none}},
		{"capset", []uintptr{unix.SYS_CAPSET}},
		{"prlimit64", []uintptr{unix.SYS_PRLIMIT64, 0, none}},
		{"prctl PR_SET_DUMPABLE", []uintptr{unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 1}},
		{"prctl PR_SET_PDEATHSIG", []uintptr{unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, none}},
		{"prctl PR_SET_SECCOMP", []uintptr{unix.SYS_PRCTL, unix.PR_SET_SECCOMP, none}},
		{"seccomp's notification", []uintptr{unix.SYS_SECCOMP, unix.SECCOMP_GET_NOTIF_SIZES}},
		{"arch_prctl", []uintptr{unix.SYS_ARCH_PRCTL, none}},

		{"mprotect with PROT_EXEC", []uintptr{unix.SYS_MPROTECT, 0, 0, unix.PROT_READ | unix.PROT_EXEC}},
		{"pkey_mprotect", []uintptr{unix.SYS_PKEY_MPROTECT, 1}},
		{"mmap with PROT_EXEC", []uintptr{unix.SYS_MMAP, 0, 0, unix.PROT_READ | unix.PROT_EXEC, unix.MAP_PRIVATE, none}},
		{"mremap", []uintptr{unix.SYS_MREMAP, 1}},

		{"ioctl KVM_CREATE_VM", []uintptr{unix.SYS_IOCTL, none, kvmCreateVM}},
		{"ioctl TUNSETIFF", []uintptr{unix.SYS_IOCTL, none, unix.TUNSETIFF}},
		{"ioctl TIOCSTI", []uintptr{unix.SYS_IOCTL, none, unix.TIOCSTI}},
		{"ioctl TIOCLINUX", []uintptr{unix.SYS_IOCTL, none, unix.TIOCLINUX}},
		{"ioctl FIOASYNC", []uintptr{unix.SYS_IOCTL, none, 0x5452}},
		{"ioctl FIFREEZE", []uintptr{unix.SYS_IOCTL, none, 0xc0045877}},
		{"ioctl FS_IOC_SETFLAGS", []uintptr{unix.SYS_IOCTL, none, unix.FS_IOC_SETFLAGS}},
		{"ioctl BLKROSET", []uintptr{unix.SYS_IOCTL, none, unix.BLKROSET}},

		{"socket", []uintptr{unix.SYS_SOCKET, none}},
		{"bind", []uintptr{unix.SYS_BIND, none}},
		{"connect", []uintptr{unix.SYS_CONNECT, none}},
		{"sendto", []uintptr{unix.SYS_SENDTO, none}},
		{"socketpair of datagrams", []uintptr{unix.SYS_SOCKETPAIR, unix.AF_UNIX, unix.SOCK_DGRAM | unix.SOCK_CLOEXEC, 0, 1}},
		{"socketpair of datagrams, non-blocking", []uintptr{
			unix.SYS_SOCKETPAIR, unix.AF_UNIX, unix.SOCK_DGRAM | unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK, 0, 1}},
		{"socketpair of raw sockets", []uintptr{unix.SYS_SOCKETPAIR, unix.AF_UNIX, unix.SOCK_RAW | unix.SOCK_CLOEXEC, 0, 1}},
		{"socketpair of packets", []uintptr{unix.SYS_SOCKETPAIR, unix.AF_UNIX, unix.SOCK_SEQPACKET | unix.SOCK_CLOEXEC, 0, 1}},
		{"socketpair of another family", []uintptr{unix.SYS_SOCKETPAIR, unix.AF_TIPC, unix.SOCK_STREAM | unix.SOCK_CLOEXEC, 0, 1}},

		{"the x32 ABI", []uintptr{1<<30 | unix.SYS_GETPID}},
	}
}

// deniedToVCPUs are further calls, which the process needs, but not on the thread of
// a vCPU.
func deniedToVCPUs() []call {
	return []call{
		{"clone of a thread", []uintptr{unix.SYS_CLONE, goThread}},
		{"unshare of CLONE_FS", []uintptr{unix.SYS_UNSHARE, unix.CLONE_FS}},
		{"seccomp", []uintptr{unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER}},
		{"mprotect", []uintptr{unix.SYS_MPROTECT, 1}},
		{"ioctl KVM_SET_USER_MEMORY_REGION", []uintptr{unix.SYS_IOCTL, none, kvmSetUserMemoryRegion}},
		{"ioctl KVM_CREATE_VCPU", []uintptr{unix.SYS_IOCTL, none, kvmCreateVCPU}},
		{"ioctl BLKDISCARD", []uintptr{unix.SYS_IOCTL, none, unix.BLKDISCARD}},
		{"socketpair", []uintptr{unix.SYS_SOCKETPAIR, unix.AF_UNIX, unix.SOCK_STREAM | unix.SOCK_CLOEXEC, 0, 1}},
		{"sendmsg", []uintptr{unix.SYS_SENDMSG, none}},
		{"recvmsg", []uintptr{unix.SYS_RECVMSG, none}},
		{"readv", []uintptr{unix.SYS_READV, none}},
		{"writev", []uintptr{unix.SYS_WRITEV, none}},
		{"pread64", []uintptr{unix.SYS_PREAD64, none}},
		{"preadv2", []uintptr{unix.SYS_PREADV2, none}},
		{"pwritev2", []uintptr{unix.SYS_PWRITEV2, none}},
		{"openat", []uintptr{unix.SYS_OPENAT, none}},
		{"openat2", []uintptr{unix.SYS_OPENAT2, none}},
		{"fchmodat", []uintptr{unix.SYS_FCHMODAT, none}},
		{"fchownat", []uintptr{unix.SYS_FCHOWNAT, none}},
		{"setxattr", []uintptr{unix.SYS_SETXATTR}},
		{"linkat", []uintptr{unix.SYS_LINKAT, none, 0, none}},
		{"renameat2", []uintptr{unix.SYS_RENAMEAT2, none, 0, none}},
		{"unlinkat", []uintptr{unix.SYS_UNLINKAT, none}},
		{"fcntl F_DUPFD_CLOEXEC", []uintptr{unix.SYS_FCNTL, none, unix.F_DUPFD_CLOEXEC}},
		{"setfsuid", []uintptr{unix.SYS_SETFSUID, none}},
	}
}

// TestDenied: what the filters kill for. They are the real ones, but for their
// verdict, which here is an error that no call of these has.
func TestDenied(t *testing.T) {
	const verdict = unix.EXFULL
	for name, tc := range map[string]struct {
		filter func() (seccomp.Filter, error)
		calls  []call
	}{
		"process": {processFilter, deniedCalls()},
		"vCPU":    {vcpuFilter, append(deniedCalls(), deniedToVCPUs()...)},
	} {
		filter, err := tc.filter()
		if err != nil {
			t.Fatal(err)
		}
		for i := range filter {
			switch in := &filter[i]; {
			case in.Code != unix.BPF_RET|unix.BPF_K || in.K == unix.SECCOMP_RET_ALLOW:
			case in.K == unix.SECCOMP_RET_KILL_PROCESS:
				in.K = unix.SECCOMP_RET_ERRNO | uint32(verdict)
			default:
				t.Errorf("%s: the verdict %#x", name, in.K)
			}
		}
		done := make(chan error)
		go func() {
			runtime.LockOSThread() // and never unlock: the thread ends
			err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
			if err == nil {
				err = filter.Install()
			}
			if err == nil {
				for _, c := range tc.calls {
					a := append(c.args[1:], make([]uintptr, 6)...)
					if _, _, errno := unix.Syscall6(c.args[0], a[0], a[1], a[2], a[3], a[4], a[5]); errno != verdict {
						err = errors.Join(err, fmt.Errorf("%s is allowed: %w", c.name, errno))
					}
				}
				// As the vsock device and control.Socketpair make them.
				for _, flags := range []int{unix.SOCK_CLOEXEC, unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK} {
					pair, e := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|flags, 0)
					if e == nil {
						unix.Close(pair[0])
						unix.Close(pair[1])
					}
					if (e == nil) != (name == "process") {
						err = errors.Join(err, fmt.Errorf("socketpair of streams: %w", e))
					}
				}
			}
			done <- err
		}()
		if err := <-done; err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
