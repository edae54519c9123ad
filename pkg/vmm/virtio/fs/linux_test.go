//go:build guestkernel

package fs

import (
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/console"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/rng"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

// The test of this file boots the real guest kernel, whose virtio-fs driver is
// the peer that counts; see "make test-guest". The guest's only program is this
// test binary, static, as process 1. Then it runs bin/fsconformance, which must
// have been built, from the share.

func TestMain(m *testing.M) {
	switch {
	case os.Getpid() == 1:
		guestInit()
	case os.Getenv(waitEnv) != "":
		_, _ = os.Stdin.Read(make([]byte, 1))
		os.Exit(0)
	}
	os.Exit(m.Run())
}

const (
	shared  = "/shared"
	waitEnv = "MICROVM_TEST_WAIT" // makes this program wait for its input to end
)

// guestInit is process 1 of the guest: it writes a report to the share and
// powers off.
func guestInit() {
	for dir, kind := range map[string]string{"/dev": "devtmpfs", "/proc": "proc", "/tmp": "tmpfs"} {
		if err := unix.Mount(kind, dir, kind, 0, ""); err != nil {
			panic(fmt.Sprintf("mount %s: %v", dir, err))
		}
	}
	say := func(format string, args ...any) {
		_ = os.WriteFile("/dev/kmsg", fmt.Appendf(nil, "<1>guest: "+format+"\n", args...), 0)
	}
	say("up")
	if err := errors.Join(os.Mkdir(shared, 0o755), mountShared()); err != nil {
		say("mount: %v", err)
		panic(err)
	}
	report, err := os.Create(shared + "/report")
	if err != nil {
		say("report: %v", err)
		panic(err)
	}
	for _, c := range guestChecks {
		say("%s", c.name)
		if err := c.run(); err != nil {
			fmt.Fprintf(report, "FAIL %s: %v\n", c.name, err)
		} else {
			fmt.Fprintf(report, "PASS %s\n", c.name)
		}
	}
	say("fsconformance")
	cmd := exec.Command(shared+"/fsconformance", "-entries", "300", shared)
	cmd.Stdout, cmd.Stderr = report, report
	fmt.Fprintf(report, "fsconformance ended: %v\n", cmd.Run())
	say("the end: %v", report.Close())
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func mountShared() error { return unix.Mount("shared", shared, "virtiofs", 0, "") }

type guestCheck struct {
	name string
	run  func() error
}

// guestChecks are about what virtio-fs has besides FUSE.
var guestChecks = []guestCheck{
	{"submount is a device of its own", func() error {
		var root, mount, in, file unix.Stat_t
		// stat(2) alone does not have the kernel mount anything.
		if err := errors.Join(unix.Stat(shared, &root), unix.Stat(shared+"/mount/.", &mount), unix.Stat(shared+"/mount/in", &in), unix.Stat(shared+"/bound", &file)); err != nil {
			return err
		}
		if mount.Dev == root.Dev || in.Dev != mount.Dev || file.Dev != root.Dev {
			return fmt.Errorf("devices: root %#x, mount %#x, in it %#x, bound file %#x", root.Dev, mount.Dev, in.Dev, file.Dev)
		}
		if in.Ino == file.Ino && in.Dev == file.Dev {
			return errors.New("two files are one")
		}
		mounts, err := os.ReadFile("/proc/mounts")
		if err != nil || !strings.Contains(string(mounts), shared+"/mount virtiofs") {
			return fmt.Errorf("no automatic mount, %v:\n%s", err, mounts)
		}
		var st unix.Statfs_t
		if err := unix.Statfs(shared+"/mount", &st); err != nil || st.Blocks*uint64(st.Bsize) != 1<<20 {
			return fmt.Errorf("statfs: %+v, %v", st, err)
		}
		return nil
	}},
	{"rename and link across a submount", func() error {
		if err := unix.Rename(shared+"/mount/in", shared+"/x"); err != unix.EXDEV {
			return fmt.Errorf("rename: %v", err)
		}
		if err := unix.Link(shared+"/bound", shared+"/x"); err != unix.EXDEV {
			return fmt.Errorf("link: %v", err)
		}
		return nil
	}},
	{"ACLs in a submount", func() error {
		// Version 2; owner, user 1000, group, mask and others, see acl(5).
		acl := []byte{2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 6, 0, 232, 3, 0, 0, 4, 0, 0, 0, 255, 255, 255, 255,
			16, 0, 6, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255}
		if err := unix.Setxattr(shared+"/mount/in", "system.posix_acl_access", acl, 0); err != nil {
			return err
		}
		defer unix.Removexattr(shared+"/mount/in", "system.posix_acl_access")
		var st unix.Stat_t
		if err := unix.Stat(shared+"/mount/in", &st); err != nil || st.Mode != unix.S_IFREG|0o660 {
			return fmt.Errorf("mode %#o, %v", st.Mode, err)
		}
		return nil
	}},
	{"mount below a read-only file system", func() error { // as the agent makes them
		change := func(flag string) error {
			fd, err := unix.Fspick(unix.AT_FDCWD, shared+"/mount", unix.FSPICK_CLOEXEC)
			if err == nil {
				err = errors.Join(unix.FsconfigSetFlag(fd, flag), unix.FsconfigReconfigure(fd))
				unix.Close(fd)
			}
			return err
		}
		if err := change("ro"); err != nil {
			return err
		}
		above := os.WriteFile(shared+"/mount/x", nil, 0o600)
		below := os.WriteFile(shared+"/mount/below/x", nil, 0o600)
		if err := change("rw"); err != nil {
			return err
		}
		if !errors.Is(above, unix.EROFS) || below != nil {
			return fmt.Errorf("create: %v, in the mount below: %v", above, below)
		}
		return os.WriteFile(shared+"/mount/y", nil, 0o600)
	}},
	{"read-only mount of the host", func() error {
		if err := os.WriteFile(shared+"/readonly/x", nil, 0o600); !errors.Is(err, unix.EROFS) {
			return fmt.Errorf("create: %v", err)
		}
		return nil
	}},
	{"the host's changes show", func() error {
		// The host answers each file named ask-N with answer-N, and appends to log.
		for i := range 3 {
			if err := os.WriteFile(fmt.Sprintf("%s/ask-%d", shared, i), nil, 0o600); err != nil {
				return err
			}
			want := strings.Repeat("answer\n", i+1)
			var got []byte
			for range 600 {
				got, _ = os.ReadFile(shared + "/log")
				if string(got) == want {
					break
				}
				time.Sleep(100 * time.Millisecond)
			}
			if string(got) != want {
				return fmt.Errorf("the log is %q", got)
			}
		}
		return nil
	}},
	{"unmount and mount again", func() error {
		fd, err := unix.Open(shared+"/file", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		_ = unix.Close(fd)
		if err := os.Mkdir("/second", 0o755); err != nil {
			return err
		}
		// The report keeps the first mount busy; the same share again is the
		// same superblock.
		if err := unix.Mount("shared", "/second", "virtiofs", unix.MS_RDONLY, ""); err != nil {
			return err
		}
		return unix.Unmount("/second", 0)
	}},
	{"idmapped mount", func() error {
		tree, err := unix.OpenTree(unix.AT_FDCWD, shared, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return fmt.Errorf("open_tree: %w", err)
		}
		defer unix.Close(tree)
		userns, err := userNamespace()
		if err != nil {
			return err
		}
		defer userns.Close()
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(userns.Fd())}
		if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
			return fmt.Errorf("mount_setattr: %w", err)
		}
		if err := os.Mkdir("/idmapped", 0o755); err != nil {
			return err
		}
		if err := unix.MoveMount(tree, "", unix.AT_FDCWD, "/idmapped", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return fmt.Errorf("move_mount: %w", err)
		}
		defer unix.Unmount("/idmapped", unix.MNT_DETACH)
		var st unix.Stat_t
		if err := unix.Stat("/idmapped/file", &st); err != nil || st.Uid != 100000 {
			return fmt.Errorf("the host's root is %d, %v", st.Uid, err)
		}
		return nil
	}},
}

// userNamespace makes one in which 0 is 100000 outside.
func userNamespace() (*os.File, error) {
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 1000}}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{waitEnv + "=1"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("user namespace: %w", err)
	}
	defer func() {
		_ = in.Close()
		_ = cmd.Wait()
	}()
	return os.Open(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid))
}

// hostMounts prepares what guestChecks look at, in the share dir.
func hostMounts(t *testing.T, dir string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	mount := func(source, target, kind string, flags uintptr, data string) {
		t.Helper()
		must(unix.Mount(source, target, kind, flags, data))
		t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH) })
	}
	for _, d := range []string{"mount", "readonly", "mount/below"} {
		must(os.Mkdir(filepath.Join(dir, d), 0o755))
		mount("tmpfs", filepath.Join(dir, d), "tmpfs", 0, "size=1m")
	}
	must(unix.Mount("", filepath.Join(dir, "readonly"), "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
	for _, f := range []string{"file", "bound", "log", "mount/in"} {
		must(os.WriteFile(filepath.Join(dir, f), nil, 0o644))
	}
	mount(filepath.Join(dir, "mount/in"), filepath.Join(dir, "bound"), "", unix.MS_BIND, "")
	program, err := os.ReadFile(filepath.Join(repository, "bin/fsconformance"))
	must(err)
	must(os.WriteFile(filepath.Join(dir, "fsconformance"), program, 0o755))
}

// answer appends to the log for each question of the guest's, until stop.
func answer(t *testing.T, dir string, stop <-chan struct{}) {
	log, err := os.OpenFile(filepath.Join(dir, "log"), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Error(err)
		return
	}
	defer log.Close()
	for i := 0; ; {
		select {
		case <-stop:
			return
		case <-time.After(50 * time.Millisecond):
		}
		if _, err := os.Stat(filepath.Join(dir, fmt.Sprintf("ask-%d", i))); err == nil {
			if _, err := log.WriteString("answer\n"); err != nil {
				t.Error(err)
			}
			i++
		}
	}
}

const repository = "../../../.."

func TestLinux(t *testing.T) {
	open := func(path string, flags int) *os.File {
		f, err := os.OpenFile(path, flags, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		return f
	}
	kernel := os.Getenv("MICROVM_KERNEL")
	if kernel == "" {
		kernel = filepath.Join(repository, "bin/vmlinux")
	}
	dir := t.TempDir()
	hostMounts(t, dir)
	stop := make(chan struct{})
	defer close(stop)
	go answer(t, dir, stop)
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	share := newDevice(t, Config{Root: open(dir, unix.O_PATH), Queues: 2, Log: log})
	m, err := vmm.New(vmm.Config{
		KVM: open("/dev/kvm", os.O_RDWR), Kernel: open(kernel, os.O_RDONLY), Initrd: virtiotest.Initrd(t),
		CommandLine: "console=hvc0 panic=-1", MemoryBytes: 512 << 20, VCPUs: 2,
		Devices: []virtio.Device{console.New(os.Stderr), share, rng.New(rand.Reader)}, DebugConsole: os.Stderr, Log: log, Phase: func(string) {},
	})
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	exit, err := m.Run()
	t.Logf("the machine ended after %v: %v, %v", time.Since(begin), exit, err)
	report, err := os.ReadFile(filepath.Join(dir, "report"))
	if err != nil {
		t.Fatal(err)
	}
	passed := 0
	for line := range strings.Lines(string(report)) {
		switch {
		case strings.HasPrefix(line, "PASS"):
			passed++
		case strings.HasPrefix(line, "FAIL"):
			t.Error(line)
		default:
			t.Log(line)
		}
	}
	if passed < 300 || !strings.Contains(string(report), "fsconformance ended: <nil>") {
		t.Errorf("%d checks passed", passed)
	}
}
