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

	"github.com/microvm-runtime/microvm/pkg/vmm/seccomp"
)

// What a child is told by its environment.
const (
	inNamespace = "MICROVM_TEST_MOUNT_NAMESPACE"
	childEnv    = "MICROVM_TEST_JAIL"   // which of children to be
	withoutEnv  = "MICROVM_TEST_ENOSYS" // the number of a system call that this kernel shall not have
)

// children run in a jail, or on the way to it. What they print is looked at.
var children = map[string]func(*Inside) error{
	"lent": tryLent,
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
	if os.Getenv(inNamespace) == "" {
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}
		if err == nil {
			err = unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), inNamespace+"=1"))
		}
		fmt.Fprintln(os.Stderr, "cannot run the tests (they need root):", err)
		os.Exit(1)
	}
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
		err := Start(cmd, 1999999994)
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

// tempDir is a file system with devices, which a temporary directory may not be.
func tempDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	return dir
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

// TestLent: a VMM that its guest has taken over has no more of what it was lent than
// its descriptors.
func TestLent(t *testing.T) {
	program := build(t)
	for name, without := range map[string]uint32{"with Landlock": 0, "without Landlock": unix.SYS_LANDLOCK_CREATE_RULESET} {
		t.Run(name, func(t *testing.T) {
			dir := tempDir(t)
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
			if without != 0 != strings.Contains(said, "missing: ") && landlock(t) {
				t.Errorf("it said %s", said)
			}
			for _, what := range []string{"the program", "descriptor 0", "descriptor 1"} {
				for _, way := range ways {
					_, result, _ := strings.Cut(said, what+": "+way.name+": ")
					result, _, found := strings.Cut(result, "\n")
					if result == unix.ETXTBSY.Error() && what == "the program" {
						continue // it runs
					}
					if !found || result != unix.EROFS.Error() && result != unix.EACCES.Error() {
						t.Errorf("%s: %s: %q", what, way.name, result)
					}
				}
			}
			// What a descriptor was lent for it does.
			if _, err := lent[1].Write([]byte("x")); err != nil {
				t.Error(err)
			}
		})
	}
}

func landlock(t *testing.T) bool {
	t.Helper()
	abi, err := landlockABI()
	if err != nil {
		t.Fatal(err)
	}
	return abi >= 2
}
