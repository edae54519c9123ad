//go:build privileged

package hostcgroup

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/jail/jailtest"
)

// childEnv is a directory, for the process that TestConfine starts.
const childEnv = "MICROVM_TEST_CONFINED"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		if err := tryDevices(dir); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	jailtest.EnterNamespace()
	os.Exit(m.Run())
}

// tryDevices uses a device that it was lent, and makes nodes that it cannot open.
func tryDevices(dir string) error {
	self, err := os.ReadFile("/proc/self/cgroup")
	if err != nil || !strings.Contains(string(self), "/c1/"+machine+"\n") {
		return fmt.Errorf("the cgroups are %s, %w", self, err)
	}
	if _, err := io.ReadFull(os.Stdin, make([]byte, 1)); err != nil {
		return fmt.Errorf("a device that it was lent: %w", err)
	}
	for _, node := range []struct {
		kind         uint32
		major, minor uint32
	}{
		{unix.S_IFCHR, 1, 5},
		{unix.S_IFBLK, 7, 0},
	} {
		path := filepath.Join(dir, "device")
		if err := unix.Mknod(path, node.kind|0o600, int(unix.Mkdev(node.major, node.minor))); err != nil {
			return fmt.Errorf("make %+v: %w", node, err)
		}
		for _, flags := range []int{unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR, unix.O_ACCMODE} {
			fd, err := unix.Open(path, flags|unix.O_NONBLOCK, 0)
			if !errors.Is(err, unix.EPERM) {
				return fmt.Errorf("open %+v with flags %#x: %d, %w", node, flags, fd, err)
			}
		}
		if err := errors.Join(unix.Chmod(path, 0o666), unix.Lchown(path, 1, 1), unix.Unlink(path)); err != nil {
			return fmt.Errorf("what a file server does with %+v: %w", node, err)
		}
	}
	return os.WriteFile(filepath.Join(dir, "file"), nil, 0o600)
}

// A process that is started in there can open no device, whoever has made the node.
func TestConfine(t *testing.T) {
	path := "/microvm-test-" + strconv.Itoa(os.Getpid()) + "/c1"
	g, err := New(path)
	if err != nil {
		t.Fatal(err)
	}
	owned := g.Owned(nil)
	if err := g.Enter(); err != nil {
		t.Error(err)
	}
	for range 2 { // as two sandboxes in one cgroup do
		dir, err := g.Confine()
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		zero, err := os.Open("/dev/zero")
		if err != nil {
			t.Fatal(err)
		}
		defer zero.Close()
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), childEnv+"="+jailtest.TempDir(t))
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
		cmd.Stdin = zero
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	}
	if err := g.Leave(); err != nil {
		t.Error(err)
	}
	removeOwned(t, owned)
}
