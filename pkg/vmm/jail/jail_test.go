package jail

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/jail/jailtest"
	"github.com/microvm-runtime/microvm/pkg/vmm/seccomp"
)

// What a child is told by its environment.
const (
	childEnv   = "MICROVM_TEST_JAIL"   // which of children to be
	withoutEnv = "MICROVM_TEST_ENOSYS" // the number of a system call that this kernel shall not have
)

// children run in a jail, or on the way to it. What they print is looked at.
var children = map[string]func(*Inside) error{
	"confined": confine,
	"lent":     tryLent,
	"paths":    tryPaths,
}

// The tests mount in a mount namespace of their own.
func TestMain(m *testing.M) {
	if name := os.Getenv(childEnv); name != "" {
		if err := child(children[name]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	jailtest.EnterNamespace()
	os.Exit(m.Run())
}

// Descriptors of a child.
const (
	rootFD = 3 + iota
	lentFD // the first of those that it is lent
)

func child(then func(*Inside) error) error {
	if number := os.Getenv(withoutEnv); number != "" {
		var call uint32
		if _, err := fmt.Sscan(number, &call); err != nil {
			return err
		}
		if err := without(call).InstallAll(); err != nil {
			return err
		}
	}
	root := os.NewFile(rootFD, "root")
	inside, err := Enter(root)
	if err != nil {
		return err
	}
	root.Close()
	if inside.Missing != "" {
		fmt.Println("missing:", inside.Missing)
	}
	return then(inside)
}

// confine does what a VMM does at the end of its start.
func confine(*Inside) error {
	bits, err := unix.PrctlRetInt(unix.PR_GET_SECUREBITS, 0, 0, 0, 0)
	if err != nil {
		return err
	}
	fmt.Printf("secure bits: %#x\n", bits)
	filter, err := seccomp.Compile(seccomp.Runtime(), seccomp.Threads())
	if err != nil {
		return err
	}
	return filter.InstallAll()
}

// without is a filter under which the kernel has no such system call.
func without(call uint32) seccomp.Filter {
	return seccomp.Filter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}, // its number
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: call},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
}

// build builds this test as the VMM is built, whatever the test is built with: a
// program with cgo, or the race detector, cannot change all its threads.
func build(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "jail.test")
	cmd := exec.Command("go", "test", "-c", "-o", program, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return program
}

// jailed runs a child whose root directory is root, and returns what it said.
func jailed(t *testing.T, program, name string, without uint32, root string, lent ...*os.File) (string, error) {
	t.Helper()
	mount, err := Detached(root)
	if err != nil {
		t.Fatal(err)
	}
	defer mount.Close()
	var out bytes.Buffer
	cmd := exec.Command(program)
	cmd.Env = []string{childEnv + "=" + name}
	if without != 0 {
		cmd.Env = append(cmd.Env, fmt.Sprintf("%s=%d", withoutEnv, without))
	}
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.ExtraFiles = append([]*os.File{mount}, lent...) // in the order of the constants
	ended := make(chan error)
	go func() {
		runtime.LockOSThread() // for good, see Start
		err := Start(cmd, 1999999994, nil)
		if err == nil {
			err = cmd.Wait()
		}
		ended <- err
	}()
	err = <-ended
	return out.String(), err
}

// lend opens a file as the shim does for a VMM.
func lend(t *testing.T, path string, flags int) *os.File {
	t.Helper()
	handle, err := Isolate(path)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(handle)
	fd, err := Reopen(handle, flags)
	if err == nil {
		err = Protect(handle)
	}
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return os.NewFile(uintptr(fd), path)
}

// ways are those to change a file that a name in a directory leads to.
var ways = []struct {
	name string
	try  func(dir int, name string) error
}{
	{"open for writing", func(dir int, name string) error {
		fd, err := unix.Openat(dir, name, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		unix.Close(fd)
		return err
	}},
	{"open to be cut off", func(dir int, name string) error {
		fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_TRUNC|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		unix.Close(fd)
		return err
	}},
	{"chmod", func(dir int, name string) error { return unix.Fchmodat(dir, name, 0o4777, 0) }},
	{"chown", func(dir int, name string) error { return unix.Fchownat(dir, name, 65534, 65534, 0) }},
	{"utimes", func(dir int, name string) error {
		return unix.UtimesNanoAt(dir, name, []unix.Timespec{{Sec: 1}, {Sec: 1}}, 0)
	}},
	{"setxattr", func(dir int, name string) error { // as the file server does
		if err := unix.Fchdir(dir); err != nil {
			return err
		}
		return unix.Setxattr(name, "user.mine", []byte("x"), 0)
	}},
}

// tryLent tries to change each file that this process was lent, and its program.
func tryLent(inside *Inside) error {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	proc := int(inside.ProcSelfFD.Fd())
	names := map[string]string{"the program": "../exe"}
	for fd := lentFD; ; fd++ {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			break
		}
		if fd != proc && fd != int(inside.Root.Fd()) {
			names[fmt.Sprint("descriptor ", fd-lentFD)] = fmt.Sprint(fd)
		}
	}
	for what, name := range names {
		for _, way := range ways {
			fmt.Printf("%s: %s: %v\n", what, way.name, way.try(proc, name))
		}
	}
	return nil
}

func TestJail(t *testing.T) {
	program := build(t)
	t.Run("confined", func(t *testing.T) {
		// SECBIT_NOROOT and SECBIT_NO_SETUID_FIXUP, locked, include/uapi/linux/securebits.h.
		if said, err := jailed(t, program, "confined", 0, t.TempDir()); err != nil || !strings.Contains(said, "secure bits: 0xf\n") {
			t.Errorf("%v: %s", err, said)
		}
	})
	t.Run("missing", func(t *testing.T) { testMissing(t, program) })
	for name, without := range map[string]uint32{"with Landlock": 0, "without Landlock": unix.SYS_LANDLOCK_CREATE_RULESET} {
		t.Run("lent/"+name, func(t *testing.T) { testLent(t, program, without) })
		t.Run("paths/"+name, func(t *testing.T) { testPaths(t, program, without) })
	}
}

// testMissing: a kernel that lacks a piece is told by name.
func testMissing(t *testing.T, program string) {
	for _, tc := range []struct {
		call uint32
		want string
	}{
		{unix.SYS_FSOPEN, "jail: procfs: fsopen (Linux 5.2)"},
		{unix.SYS_FSCONFIG, "jail: procfs: option subset=pid (Linux 5.8)"},
		{unix.SYS_FSMOUNT, "jail: procfs: fsmount"},
		{unix.SYS_MOUNT_SETATTR, "jail: root directory: mount_setattr (Linux 5.12)"},
		{unix.SYS_MOVE_MOUNT, "jail: root directory: move_mount"},
		{unix.SYS_PIVOT_ROOT, "jail: root directory: pivot_root"},
		{unix.SYS_CAPSET, "jail: capabilities"},
		{unix.SYS_SECCOMP, "seccomp: this kernel has no system call filters (CONFIG_SECCOMP_FILTER"},
	} {
		said, err := jailed(t, program, "confined", tc.call, t.TempDir())
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(said, tc.want) {
			t.Errorf("without %q: %v: %s", tc.want, err, said)
		}
	}
	// The only piece that it does without.
	said, err := jailed(t, program, "confined", unix.SYS_LANDLOCK_CREATE_RULESET, t.TempDir())
	if err != nil || !strings.Contains(said, "missing: Landlock of ABI 2 (Linux 5.19, ") {
		t.Errorf("%v: %s", err, said)
	}
	// What the shim needs for it.
	for _, tc := range []struct {
		call uint32
		want string
		do   func() error
	}{
		{unix.SYS_OPEN_TREE, "open_tree", func() error { _, err := Detached(t.TempDir()); return err }},
		{unix.SYS_MOUNT_SETATTR, "mount_setattr", func() error { _, err := Detached(t.TempDir()); return err }},
		{unix.SYS_CLOSE_RANGE, "jail: close_range (Linux 5.11)", func() error { return Start(exec.Command("/nonexistent"), 1999999994, nil) }},
	} {
		done := make(chan error)
		go func() {
			runtime.LockOSThread() // and never unlock: the thread ends
			err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
			if err == nil {
				err = without(tc.call).Install()
			}
			if err == nil {
				err = tc.do()
			}
			done <- err
		}()
		if err := <-done; !errors.Is(err, unix.ENOSYS) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("without %q: %v", tc.want, err)
		}
	}
}

// testLent: a process in a jail has no more of what it was lent than its descriptors.
func testLent(t *testing.T, program string, without uint32) {
	dir := jailtest.TempDir(t)
	image, device := filepath.Join(dir, "image"), filepath.Join(dir, "device")
	err := os.WriteFile(image, []byte("image"), 0o666)
	err = errors.Join(err, unix.Mknod(device, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3)))) // null
	if err != nil {
		t.Fatal(err)
	}
	lent := []*os.File{lend(t, image, unix.O_RDONLY), lend(t, device, unix.O_RDWR)}
	defer func() {
		for _, f := range lent {
			f.Close()
		}
	}()
	said, err := jailed(t, program, "lent", without, t.TempDir(), lent...)
	if err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	checkLandlock(t, without, said)
	for _, what := range []string{"the program", "descriptor 0", "descriptor 1"} {
		for _, way := range ways {
			switch result := resultOf(said, what+": "+way.name); {
			case result == unix.EROFS.Error() || result == unix.EACCES.Error():
			case result == unix.ETXTBSY.Error() && what == "the program": // it runs
			default:
				t.Errorf("%s: %s: %q", what, way.name, result)
			}
		}
	}
	// What a descriptor was lent for it does.
	if _, err := lent[1].Write([]byte("x")); err != nil {
		t.Error(err)
	}
}

// within are things that the file server does in its root directory.
var within = []struct {
	name string
	try  func() error
}{
	{"make directories", func() error { return errors.Join(os.Mkdir("/a", 0o755), os.Mkdir("/b", 0o755)) }},
	{"make a file", func() error { return os.WriteFile("/a/file", []byte("x"), 0o644) }},
	{"read it", func() error { _, err := os.ReadFile("/a/file"); return err }},
	{"cut it off", func() error { return os.Truncate("/a/file", 0) }},
	{"move it to another directory", func() error { return os.Rename("/a/file", "/b/file") }},
	{"link it", func() error { return errors.Join(os.Link("/b/file", "/a/link"), os.Symlink("file", "/b/symlink")) }},
	{"make others", func() error {
		return errors.Join(unix.Mkfifo("/a/fifo", 0o600), unix.Mknod("/a/device", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	}},
	{"list it", func() error { _, err := os.ReadDir("/a"); return err }},
	{"remove it", func() error { return errors.Join(os.Remove("/b/file"), os.Remove("/b/symlink"), os.RemoveAll("/a")) }},
}

// outside are things that need a right in a directory that is not below the root;
// dir is a descriptor of it.
var outside = []struct {
	name string
	try  func(dir int) error
	// otherwise is what comes of it without Landlock.
	otherwise error
}{
	{"open for reading", opening("file", unix.O_RDONLY), nil},
	{"open for writing", opening("file", unix.O_WRONLY), nil},
	{"open to be cut off", opening("file", unix.O_WRONLY|unix.O_TRUNC), nil},
	{"list", opening(".", unix.O_RDONLY|unix.O_DIRECTORY), nil},
	{"make a file", opening("new", unix.O_WRONLY|unix.O_CREAT), nil},
	{"make a directory", func(dir int) error { return unix.Mkdirat(dir, "directory", 0o755) }, nil},
	{"make a link", func(dir int) error { return unix.Symlinkat("file", dir, "symlink") }, nil},
	{"execute", func(dir int) error { return execveat(dir, "file") }, unix.ENOEXEC},
	{"remove", func(dir int) error { return unix.Unlinkat(dir, "file", 0) }, nil},
}

func opening(name string, flags int) func(int) error {
	return func(dir int) error {
		fd, err := unix.Openat(dir, name, flags|unix.O_CLOEXEC, 0o600)
		unix.Close(fd)
		return err
	}
}

// tryPaths does all of these.
func tryPaths(*Inside) error {
	for _, c := range within {
		fmt.Printf("within: %s: %v\n", c.name, c.try())
	}
	for _, c := range outside {
		fmt.Printf("outside: %s: %v\n", c.name, c.try(lentFD))
	}
	return nil
}

// testPaths: should a descriptor of a directory get into the jail, it leads nowhere
// with Landlock; and Landlock hinders nothing that the file server does.
func testPaths(t *testing.T, program string, without uint32) {
	dir := jailtest.TempDir(t)
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("no program"), 0o755); err != nil {
		t.Fatal(err)
	}
	lent, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer lent.Close()
	said, err := jailed(t, program, "paths", without, jailtest.TempDir(t), lent)
	if err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	confined := checkLandlock(t, without, said)
	for _, c := range within {
		if result := resultOf(said, "within: "+c.name); result != fmt.Sprint(error(nil)) {
			t.Errorf("within: %s: %q", c.name, result)
		}
	}
	for _, c := range outside {
		want := c.otherwise
		if confined {
			want = unix.EACCES
		}
		if result := resultOf(said, "outside: "+c.name); result != fmt.Sprint(want) {
			t.Errorf("outside: %s: %q, want %v", c.name, result, want)
		}
	}
}

// resultOf finds what a child said about something.
func resultOf(said, what string) string {
	for line := range strings.Lines(said) {
		if result, ok := strings.CutPrefix(line, what+": "); ok {
			return strings.TrimSpace(result)
		}
	}
	return "nothing"
}

// checkLandlock says whether the child was under Landlock, which it must have said
// too.
func checkLandlock(t *testing.T, without uint32, said string) bool {
	t.Helper()
	abi, err := landlockABI()
	if err != nil {
		t.Fatal(err)
	}
	there := abi >= 2 && without != unix.SYS_LANDLOCK_CREATE_RULESET
	if there == strings.Contains(said, "missing: Landlock") {
		t.Errorf("Landlock is there: %v; it said %s", there, said)
	}
	return there
}
