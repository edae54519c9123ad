package seccomp

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	childEnv = "SECCOMP_TEST_CALL"
	survived = "survived"
)

// rules are those of the child.
func rules() []Rule {
	r := append(Runtime(), Threads()...)
	r = append(r, Ioctls(unix.TCGETS, unix.TIOCINQ)...)
	r = append(r, Rule{unix.SYS_UNSHARE, []Arg{{Index: 0, Mask: ^uint64(0), Value: unix.CLONE_FS}}})
	// Of two rules one is enough.
	r = append(r,
		Rule{unix.SYS_LSEEK, []Arg{Int(0, 100), Int(2, unix.SEEK_SET)}},
		Rule{unix.SYS_LSEEK, []Arg{Int(0, 101), Clear(2, ^uint64(1))}},
	)
	r = append(r, Calls(unix.SYS_SECCOMP)...)
	return append(r, raceRules()...)
}

// calls are what the child does under its filter, and whether that is allowed.
var calls = map[string]struct {
	allowed bool
	call    [4]uintptr // its number and arguments
}{
	"getpid":                     {true, [4]uintptr{unix.SYS_GETPID}},
	"an allowed ioctl":           {true, [4]uintptr{unix.SYS_IOCTL, 0, unix.TCGETS}},
	"the last allowed ioctl":     {true, [4]uintptr{unix.SYS_IOCTL, 0, unix.TIOCINQ}},
	"another ioctl":              {false, [4]uintptr{unix.SYS_IOCTL, 0, unix.TIOCSTI}},
	"a file system context":      {true, [4]uintptr{unix.SYS_UNSHARE, unix.CLONE_FS}},
	"a namespace":                {false, [4]uintptr{unix.SYS_UNSHARE, unix.CLONE_FS | unix.CLONE_NEWNS}},
	"a process":                  {false, [4]uintptr{unix.SYS_CLONE, uintptr(unix.SIGCHLD)}},
	"a thread in a namespace":    {false, [4]uintptr{unix.SYS_CLONE, goThreadFlags | unix.CLONE_NEWNET}},
	"the first rule":             {true, [4]uintptr{unix.SYS_LSEEK, 100, 0, unix.SEEK_SET}},
	"the second rule":            {true, [4]uintptr{unix.SYS_LSEEK, 101, 0, unix.SEEK_CUR}},
	"half of each rule":          {false, [4]uintptr{unix.SYS_LSEEK, 100, 0, unix.SEEK_CUR}},
	"a bit that is to be clear":  {false, [4]uintptr{unix.SYS_LSEEK, 101, 0, 1 << 40}},
	"executable memory":          {false, [4]uintptr{unix.SYS_MMAP, 0, 4096, unix.PROT_READ | unix.PROT_EXEC}},
	"a signal for someone else":  {false, [4]uintptr{unix.SYS_TGKILL, 1, 1, 0}},
	"a file":                     {false, [4]uintptr{unix.SYS_OPENAT}},
	"a program":                  {false, [4]uintptr{unix.SYS_EXECVE}},
	"a socket":                   {false, [4]uintptr{unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM}},
	"tracing":                    {false, [4]uintptr{unix.SYS_PTRACE}},
	"the x32 ABI":                {false, [4]uintptr{1<<30 | unix.SYS_GETPID}},
	"prctl":                      {false, [4]uintptr{unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 1}},
	"on another, older thread":   {false, [4]uintptr{unix.SYS_OPENAT}},
	"on a stricter thread":       {false, [4]uintptr{unix.SYS_IOCTL, 0, unix.TCGETS}},
	"not on the stricter thread": {true, [4]uintptr{unix.SYS_IOCTL, 0, unix.TCGETS}},
}

func TestMain(m *testing.M) {
	if name := os.Getenv(childEnv); name != "" {
		if err := child(name); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(survived)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func child(name string) error {
	older := make(chan func())
	done := make(chan struct{})
	go func() {
		runtime.LockOSThread()
		for f := range older {
			f()
			done <- struct{}{}
		}
	}()
	older <- func() {} // it runs
	<-done
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	filter, err := Compile(rules())
	if err != nil {
		return err
	}
	strict, err := Compile(Runtime(), raceRules())
	if err != nil {
		return err
	}
	if err := filter.InstallAll(); err != nil {
		return err
	}
	c := calls[name].call
	call := func() { unix.Syscall(c[0], c[1], c[2], c[3]) }
	switch name {
	case "on another, older thread":
		older <- call
		<-done
	case "on a stricter thread":
		if err := strict.Install(); err != nil {
			return err
		}
		call()
	case "not on the stricter thread":
		if err := strict.Install(); err != nil {
			return err
		}
		older <- call
		<-done
	default:
		call()
	}
	return nil
}

// run returns the process's id, whether it was killed for a system call, and
// what it said.
func run(t *testing.T, name string) (pid int, killed bool, said string) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+name)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	status := cmd.ProcessState.Sys().(syscall.WaitStatus)
	return cmd.Process.Pid, status.Signaled() && status.Signal() == unix.SIGSYS, string(out)
}

func TestFilter(t *testing.T) {
	for name, c := range calls {
		_, killed, said := run(t, name)
		if killed == c.allowed || strings.TrimSpace(said) == survived != c.allowed {
			t.Errorf("%s: killed %v, said %q", name, killed, said)
		}
	}
}

// The kernel's log names the call. It writes ten lines in five seconds at most,
// whoever they are from.
func TestLog(t *testing.T) {
	kmsg, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(kmsg)
	if _, err := unix.Seek(kmsg, 0, unix.SEEK_END); err != nil {
		t.Fatal(err)
	}
	record := make([]byte, 8192)
	for range 20 {
		pid, killed, said := run(t, "a file")
		if !killed {
			t.Fatalf("not killed, said %q", said)
		}
		for {
			n, err := unix.Read(kmsg, record)
			if errors.Is(err, unix.EPIPE) {
				continue // records were overwritten
			}
			if err != nil {
				break
			}
			line := string(record[:n])
			if strings.Contains(line, "type=1326") && strings.Contains(line, fmt.Sprintf("pid=%d ", pid)) &&
				strings.Contains(line, fmt.Sprintf("syscall=%d ", unix.SYS_OPENAT)) {
				return
			}
		}
		time.Sleep(time.Second)
	}
	t.Error("the kernel's log does not name the call")
}

func TestCompileRefuses(t *testing.T) {
	many := make([]Arg, 200)
	for i := range many {
		many[i] = Int(0, 1)
	}
	for name, rules := range map[string][]Rule{
		"argument":   {{1, []Arg{Int(6, 0)}}},
		"negative":   {{1, []Arg{Int(-1, 0)}}},
		"no mask":    {{1, []Arg{{Index: 0}}}},
		"impossible": {{1, []Arg{{Index: 0, Mask: 1, Value: 2}}}},
		"conditions": {{1, many}},
		"length":     Calls(make([]int, 0)...),
	} {
		if name == "length" {
			for i := range 2000 {
				rules = append(rules, Rule{Call: i})
			}
		}
		if _, err := Compile(rules); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if err := (Filter{}).Install(); err == nil {
		t.Error("an empty filter was installed")
	}
}
