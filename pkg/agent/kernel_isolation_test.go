//go:build agentkernel

package agent

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

func TestPrivileges(t *testing.T) {
	s := newSandbox(t)
	spec := testSpec(t, `grep -E '^(Cap(Eff|Bnd|Amb)|NoNewPrivs|Seccomp|Groups|Uid|Gid):' /proc/self/status
ulimit -n
cat /proc/self/oom_score_adj
umask
pwd
touch /x && echo written
mkdir /tmp/d && echo made
wc -c </proc/interrupts
echo 1 >/proc/sys/kernel/panic && echo sysctl
mount -t tmpfs none /tmp && echo mounted
mknod /tmp/disk b 254 0 && cat /tmp/disk && echo disk
mknod /tmp/zero c 1 5 && head -c1 /tmp/zero >/dev/null && echo zero
hostname other && echo hostname
kill -0 1 && echo init`)
	spec.Root.Readonly = true
	spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs", Options: []string{"mode=1777"}})
	spec.Process.Cwd = "/etc"
	spec.Process.OOMScoreAdj = ptr(-100)
	spec.Process.User.Umask = ptr(uint32(0o27))
	spec.Process.User.AdditionalGids = []uint32{7, 8}
	spec.Linux.Seccomp = &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow,
		Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86},
		Syscalls:      []specs.LinuxSyscall{{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno, ErrnoRet: ptr(uint(unix.EXDEV))}},
	}
	spec.Process.ApparmorProfile = "cri-containerd.apparmor.d"
	spec.Process.SelinuxLabel = "system_u:system_r:container_t:s0"
	spec.Linux.MountLabel = "system_u:object_r:container_file_t:s0"
	spec.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/nonesuch"}}, Poststop: []specs.Hook{{Path: "/nonesuch"}}}
	stdout, stderr, _ := s.output("c", spec)
	var mask uint64
	for _, c := range testCaps {
		mask |= 1 << capNumber[c]
	}
	caps := fmt.Sprintf("%016x", mask)
	want := "Uid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nGroups:\t7 8 \n" +
		"CapEff:\t" + caps + "\nCapBnd:\t" + caps + "\nCapAmb:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\n" +
		"1024\n-100\n0027\n/etc\n0\nzero\ninit\n"
	if stdout != want {
		t.Errorf("output\n%q\nwant\n%q\nstderr %q", stdout, want, stderr)
	}
	if !strings.Contains(stderr, "Read-only file system") || !strings.Contains(stderr, "cross-device link") {
		t.Errorf("stderr %q", stderr)
	}
}

// capNumber is of include/uapi/linux/capability.h.
var capNumber = map[string]uint{
	"CAP_CHOWN": 0, "CAP_DAC_OVERRIDE": 1, "CAP_FOWNER": 3, "CAP_FSETID": 4, "CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7,
	"CAP_SETPCAP": 8, "CAP_NET_BIND_SERVICE": 10, "CAP_NET_RAW": 13, "CAP_SYS_CHROOT": 18, "CAP_MKNOD": 27,
	"CAP_AUDIT_WRITE": 29, "CAP_SETFCAP": 31,
}

func TestUser(t *testing.T) {
	s := newSandbox(t)
	spec := testSpec(t, "id; echo x >/dev/stdout; echo y >/dev/stderr; cat /proc/1/environ | tr '\\0' '\\n'; echo no >/etc/passwd")
	spec.Process.User = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{1002}}
	spec.Process.Capabilities = &specs.LinuxCapabilities{}
	spec.Process.Env = []string{"PATH=/bin", "A=b c"}
	stdout, stderr, status := s.output("c", spec)
	if !strings.HasPrefix(stdout, "uid=1000 gid=1001 groups=1001,1002\nx\n") && !strings.HasPrefix(stdout, "uid=1000 gid=1001 groups=1002\nx\n") {
		t.Errorf("output %q", stdout)
	}
	if !strings.Contains(stdout, "A=b c\n") || !strings.HasPrefix(stderr, "y\n") || status == 0 {
		t.Errorf("output %q, %q, status %d", stdout, stderr, status)
	}
}

// TestNamespaces: what is the sandbox's is shared, what is the container's is not.
func TestNamespaces(t *testing.T) {
	s := newSandbox(t)
	script := "for n in net ipc uts pid mnt cgroup; do readlink /proc/self/ns/$n; done; hostname; cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmni /proc/self/cgroup; ls /sys/fs/cgroup | grep -c ."
	spec := testSpec(t, script)
	spec.Hostname = "ignored"
	spec.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1", "kernel.shmmni": "4000", "vm/swappiness": "7"}
	stdout, stderr, _ := s.output("c", spec)
	lines := strings.Split(stdout, "\n")
	if len(lines) < 11 {
		t.Fatalf("output %q, %q", stdout, stderr)
	}
	for i, ns := range []string{"net", "ipc", "uts", "pid", "mnt", "cgroup"} {
		own, err := os.Readlink("/proc/self/ns/" + ns)
		if err != nil {
			t.Fatal(err)
		}
		if shared := i < 3; shared != (lines[i] == own) {
			t.Errorf("namespace %s is %s, the guest's is %s", ns, lines[i], own)
		}
	}
	if lines[6] != "microvm" || lines[7] != "1" || lines[8] != "4000" || lines[9] != "0::/" {
		t.Errorf("output %q", stdout)
	}
	if got := readFile(t, "/proc/sys/vm/swappiness"); got != "7" {
		t.Errorf("vm.swappiness is %s", got)
	}

	spec = testSpec(t, "hostname; cat /proc/sys/kernel/shmmni")
	spec.Hostname = "own"
	spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UTSNamespace}, specs.LinuxNamespace{Type: specs.IPCNamespace})
	spec.Linux.Sysctl = map[string]string{"kernel.shmmni": "3000"}
	if stdout, stderr, _ := s.output("d", spec); stdout != "own\n3000\n" {
		t.Errorf("output %q, %q", stdout, stderr)
	}
	if got := readFile(t, "/proc/sys/kernel/shmmni"); got != "4000" {
		t.Errorf("the guest's kernel.shmmni is %s", got)
	}
}

func TestBindMounts(t *testing.T) {
	s := newSandbox(t)
	dir := t.TempDir()
	for _, f := range []string{"rw", "ro"} {
		if err := os.MkdirAll(filepath.Join(dir, f), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, f, "file"), []byte(f+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	spec := testSpec(t, "cat /a/file /b/file /c; echo new >/a/new; echo new >/b/new; df /shm | tail -1 | cut -d' ' -f1")
	spec.Mounts = append(spec.Mounts,
		specs.Mount{Destination: "/a", Type: "bind", Source: dir + "/rw", Options: []string{"rbind", "rw", "rprivate"}},
		specs.Mount{Destination: "/b", Type: "bind", Source: dir + "/ro", Options: []string{"rbind", "ro", "rprivate"}},
		specs.Mount{Destination: "/c", Type: "bind", Source: dir + "/ro/file", Options: []string{"bind", "ro", "nosuid", "nodev", "noexec"}},
		specs.Mount{Destination: "/shm", Type: "tmpfs", Source: "tmpfs", Options: []string{"size=1m"}},
	)
	stdout, stderr, _ := s.output("c", spec)
	if stdout != "rw\nro\nro\ntmpfs\n" || !strings.Contains(stderr, "Read-only") {
		t.Errorf("output %q, %q", stdout, stderr)
	}
	if got := readFile(t, dir+"/rw/new"); got != "new" {
		t.Errorf("written %q", got)
	}
}

// TestStorage mounts the second disk of the test machine, which is ext4.
func TestStorage(t *testing.T) {
	found, err := filepath.Glob("/sys/bus/pci/devices/*/virtio*/block/vdb")
	if err != nil || len(found) != 1 {
		t.Fatalf("the test machine's disk: %q, %v", found, err)
	}
	address := strings.Split(found[0], "/")[5]
	s := newSandbox(t)
	const mountpoint = "/run/microvm/storage/disk"
	spec := testSpec(t, "cat /data/hello; touch /data/new; ls /data")
	spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/data", Type: "bind", Source: mountpoint, Options: []string{"rbind"}})
	data, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	p, ids := s.newProcess("c", "", false)
	if _, err := s.client.CreateContainer(background, &agentproto.CreateContainerRequest{
		Id: "c", Spec: data, Streams: ids,
		Storages: []*agentproto.Storage{{PciAddresses: []string{address}, Fstype: "ext4", Options: []string{"noatime", "errors=remount-ro"}, Mountpoint: mountpoint}},
	}); err != nil {
		t.Fatal(err)
	}
	p.start()
	if status := p.wait(); status != 0 || p.out() != "hello from the disk\nhello\nlost+found\nnew\n" {
		t.Errorf("status %d, output %q, %q", status, p.out(), p.stderr.String())
	}
	p.delete()
	if mounts := readFile(t, "/proc/self/mounts"); strings.Contains(mounts, mountpoint) {
		t.Errorf("still mounted: %s", mounts)
	}

	for want, storage := range map[string]*agentproto.Storage{
		"0000:00:1f.7":     {PciAddresses: []string{"0000:00:1f.7"}, Fstype: "ext4", Mountpoint: mountpoint},
		"invalid":          {PciAddresses: []string{"../../x"}, Fstype: "ext4", Mountpoint: mountpoint},
		"is not below":     {PciAddresses: []string{address}, Fstype: "ext4", Mountpoint: "/etc"},
		"invalid argument": {PciAddresses: []string{address}, Fstype: "xfs", Mountpoint: mountpoint},
	} {
		_, ids := s.newProcess("d", "", false)
		if _, err := s.client.CreateContainer(background, &agentproto.CreateContainerRequest{
			Id: "d", Spec: data, Streams: ids, Storages: []*agentproto.Storage{storage},
		}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q in it", err, want)
		}
		s.checkGone("d")
	}
}

// TestInitProgram: what a container could find of the agent's program is neither
// the program itself nor a copy in memory.
func TestInitProgram(t *testing.T) {
	s := newSandbox(t)
	if _, err := s.create("c", testSpec(t, "true")); err != nil {
		t.Fatal(err)
	}
	list, err := s.client.ListProcesses(background, &agentproto.ContainerRequest{ContainerId: "c"})
	if err != nil || len(list.Processes) != 1 {
		t.Fatalf("%v, %v", list, err)
	}
	proc := fmt.Sprintf("/proc/%d", list.Processes[0].Pid)
	exe, err := os.Readlink(proc + "/exe")
	if err != nil || exe != "/init" {
		t.Errorf("init executes %q, %v; want it on an overlay of its own", exe, err)
	}
	if maps := readFile(t, proc+"/maps"); strings.Contains(maps, "memfd") {
		t.Errorf("maps %s", maps)
	}
}

// TestUnmountBelow: submounts of the shared directory go with their container.
func TestUnmountBelow(t *testing.T) {
	for _, dir := range []string{"c/rootfs", "c/mounts/0", "cc/rootfs"} {
		path := "/run/microvm/shared/" + dir
		if err := os.MkdirAll(path, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", path, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir("/run/microvm/shared/c/rootfs/sub", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", "/run/microvm/shared/c/rootfs/sub", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	s := newSandbox(t)
	s.output("c", testSpec(t, "true"))
	s.remove("c")
	if mounts := readFile(t, "/proc/self/mounts"); strings.Contains(mounts, "/shared/c/") || !strings.Contains(mounts, "/shared/cc/rootfs") {
		t.Errorf("mounts:\n%s", mounts)
	}
	if err := unix.Unmount("/run/microvm/shared/cc/rootfs", 0); err != nil {
		t.Error(err)
	}
}
