package seccomp

import (
	"os"

	"golang.org/x/sys/unix"
)

// goThreadFlags are the flags with which Go's runtime makes a thread, cloneFlags
// in runtime/os_linux.go and one more in sys_linux_amd64.s: no new process, no new
// namespace.
const goThreadFlags = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_SYSVSEM | unix.CLONE_THREAD |
	unix.CLONE_SETTLS

// Runtime is what Go's runtime does on any thread, even on one that is locked to
// a goroutine: it allocates, collects garbage, schedules and polls there.
func Runtime() []Rule {
	rules := Calls(
		unix.SYS_FUTEX,
		unix.SYS_NANOSLEEP,
		unix.SYS_SCHED_YIELD,
		unix.SYS_CLOCK_GETTIME, // where the vDSO cannot
		unix.SYS_GETPID,
		unix.SYS_GETTID,
		unix.SYS_RT_SIGRETURN,
		unix.SYS_RT_SIGPROCMASK,
		unix.SYS_RT_SIGACTION, // a crash takes its own signal's handler away
		unix.SYS_SIGALTSTACK,
		unix.SYS_MADVISE,
		unix.SYS_MUNMAP,
		unix.SYS_MINCORE,
		unix.SYS_GETRANDOM,
		unix.SYS_RESTART_SYSCALL,
		unix.SYS_EXIT,
		unix.SYS_EXIT_GROUP,
		unix.SYS_EPOLL_PWAIT,
		unix.SYS_READ,  // of the poller's own eventfd, and of ours
		unix.SYS_WRITE, // likewise, and the log
		unix.SYS_CLOSE,
	)
	return append(rules,
		// Memory that can be executed is there from the start.
		Rule{unix.SYS_MMAP, []Arg{Clear(2, unix.PROT_EXEC)}},
		// Signals that interrupt a goroutine, and a vCPU, go to own threads.
		Rule{unix.SYS_TGKILL, []Arg{Int(0, uint32(os.Getpid()))}},
		// Names of mappings.
		Rule{unix.SYS_PRCTL, []Arg{Int(0, unix.PR_SET_VMA)}},
	)
}

// Threads is what the runtime does only on threads that are not locked to a
// goroutine: threads come and go, GOMAXPROCS follows the host unless it was set,
// and the poller is made when something is waited for the first time.
func Threads() []Rule {
	return []Rule{
		{unix.SYS_CLONE, []Arg{{Index: 0, Mask: 0xffffffffffffffff, Value: goThreadFlags}}},
		{Call: unix.SYS_SCHED_GETAFFINITY},
		{Call: unix.SYS_PREAD64}, // cpu.max, which is open from the start
		{Call: unix.SYS_EPOLL_CREATE1},
		{Call: unix.SYS_EPOLL_CTL},
		{Call: unix.SYS_EVENTFD2},
	}
}
