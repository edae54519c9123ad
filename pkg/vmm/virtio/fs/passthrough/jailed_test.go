//go:build privileged

package passthrough

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/jail"
	"github.com/microvm-runtime/microvm/pkg/vmm/seccomp"
)

// Descriptors of serveInJail.
const (
	fuseFD = 3 + iota
	rootFD
)

// inJail makes this program a file server in a jail.
const inJail = "MICROVM_TEST_JAIL"

func init() {
	if os.Getenv(inJail) != "" {
		serveInJail()
		os.Exit(0)
	}
}

// serveInJail is a process that serves a kernel with the rights of a VMM: those of
// the jail, and the system calls of this package and of Go's runtime.
func serveInJail() {
	root := os.NewFile(rootFD, "root")
	inside, err := jail.Enter(root)
	var server *Server
	if err == nil {
		root.Close()
		server, err = New(Config{Root: inside.Root, ProcSelfFD: inside.ProcSelfFD, AttrTimeout: DefaultTimeout, EntryTimeout: DefaultTimeout})
	}
	var filter seccomp.Filter
	if err == nil {
		filter, err = seccomp.Compile(seccomp.Runtime(), seccomp.Threads(), Syscalls())
	}
	if err == nil {
		err = filter.InstallAll()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	failed := func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
	var readers sync.WaitGroup
	for range 8 {
		readers.Go(func() { serveDevice(failed, server.Handle, fuseFD) })
	}
	readers.Wait()
}

// TestConformanceInJail is TestConformance with a server that has no more rights
// than a VMM.
func TestConformanceInJail(t *testing.T) {
	program := buildConformance(t)
	t.Run("plain", func(t *testing.T) {
		root, err := jail.Detached(tempDir(t))
		must(t, err)
		conform(t, program, "^$", mountInJail(t, root))
	})
	// As a volume of a pod with a user namespace: the ids of the server are not
	// among those that the mount maps.
	t.Run("mapped ids", func(t *testing.T) {
		dir := tempDir(t)
		must(t, os.Chown(dir, 100000, 100000))
		root, err := jail.Detached(dir)
		must(t, err)
		namespace := userNamespace(t, syscall.SysProcIDMap{ContainerID: 100000, HostID: 0, Size: 65536})
		defer namespace.Close()
		must(t, unix.MountSetattr(int(root.Fd()), "", unix.AT_EMPTY_PATH, &unix.MountAttr{
			Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(namespace.Fd()),
		}))
		// There are no ids but those.
		conform(t, program, big+"|chown/ids", mountInJail(t, root))
	})
}

// userNamespace makes one that maps users and groups like this.
func userNamespace(t *testing.T, ids syscall.SysProcIDMap) *os.File {
	t.Helper()
	cmd := exec.Command("sleep", "infinity")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{ids}, GidMappings: []syscall.SysProcIDMap{ids},
	}
	must(t, cmd.Start())
	namespace, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid))
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	must(t, err)
	return namespace
}

// mountInJail is mountShare for a server in a jail with this root, which it closes.
func mountInJail(t *testing.T, root *os.File) string {
	t.Helper()
	fuse, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	must(t, err)
	at := tempDir(t)
	must(t, unix.Mount("share", at, "fuse.share", unix.MS_NOSUID,
		fmt.Sprintf("fd=%d,rootmode=40755,user_id=0,group_id=0,default_permissions,allow_other", fuse.Fd())))
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), inJail+"=1")
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{fuse, root} // in the order of the constants
	started, ended := make(chan error), make(chan error)
	go func() {
		runtime.LockOSThread() // for good, see jail.Start
		err := jail.Start(cmd, 1999999995, nil)
		started <- err
		if err == nil {
			ended <- cmd.Wait()
		}
	}()
	must(t, <-started)
	fuse.Close() // else requests would wait for ever should the server die
	root.Close()
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Errorf("unmount: %v", err)
			_ = unix.Unmount(at, unix.MNT_FORCE|unix.MNT_DETACH)
		}
		if err := <-ended; err != nil {
			t.Errorf("the server: %v", err)
		}
	})
	return at
}
