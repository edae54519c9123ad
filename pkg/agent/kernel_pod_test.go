//go:build agentkernel

package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// runAs makes a container with more in its request, and starts it.
func (s *sandbox) runAs(id string, spec *specs.Spec, change func(*agentproto.CreateContainerRequest)) (*testProcess, error) {
	s.t.Helper()
	p, ids := s.newProcess(id, "", false)
	data, err := json.Marshal(spec)
	if err != nil {
		s.t.Fatal(err)
	}
	r := &agentproto.CreateContainerRequest{Id: id, Spec: data, Streams: ids}
	change(r)
	if _, err := s.client.CreateContainer(context.Background(), r); err != nil {
		return p, err
	}
	s.t.Cleanup(func() { s.remove(id) })
	p.start()
	return p, nil
}

func sharedPIDs(r *agentproto.CreateContainerRequest) {
	r.PidNamespace = &agentproto.PIDNamespace{}
}

func pidsOf(id string) func(*agentproto.CreateContainerRequest) {
	return func(r *agentproto.CreateContainerRequest) { r.PidNamespace = &agentproto.PIDNamespace{ContainerId: id} }
}

// Containers that share the pod's pids see each other and a first process that
// reaps and cannot be killed; the end of one does not end another.
func TestPodPIDs(t *testing.T) {
	s := newSandbox(t)
	one, err := s.runAs("one", testSpec(t, "sh -c 'sleep 7777 & echo $!'; echo up; exec sleep 8888"), sharedPIDs)
	if err != nil {
		t.Fatal(err)
	}
	one.awaitOut("up")
	orphan, _, _ := strings.Cut(one.out(), "\n")
	spec := testSpec(t, `tr '\0' '\n' </proc/1/cmdline
for p in /proc/[0-9]*; do tr '\0' ' ' <$p/cmdline; echo; done | grep -c '^sleep [78]'
grep PPid /proc/`+orphan+`/status
kill -9 `+orphan+`
while [ -d /proc/`+orphan+` ]; do sleep 0.01; done
for s in TERM INT HUP CHLD USR1 KILL; do kill -$s 1; done
sleep 0.1; [ -d /proc/1 ] && echo first`)
	two, err := s.runAs("two", spec, sharedPIDs)
	if err != nil {
		t.Fatal(err)
	}
	if status := two.wait(); status != 0 || two.out() != "/pause\n2\nPPid:\t1\nfirst\n" {
		t.Errorf("status %d, output %q, %q", status, two.out(), two.stderr.String())
	}
	two.delete()
	apart, stderr, _ := s.output("apart", testSpec(t, "grep -h . /proc/[0-9]*/comm"))
	if slices.Contains(strings.Fields(apart), "sleep") || !strings.Contains(apart, "grep") {
		t.Errorf("a container of its own sees the processes %q, %q", apart, stderr)
	}
	one.signal(unix.SIGKILL, false)
	if status := one.wait(); status != 137 {
		t.Errorf("ended with %d", status)
	}
}

// Who may trace the pod's first process gets nothing by it.
func TestFirstProcessHasNothing(t *testing.T) {
	const script = `P=/proc/1
grep -E '^(Uid|Gid|Groups|Cap...|NoNewPrivs):' $P/status | tr '\t' ' '
cat $P/comm $P/oom_score_adj
sed 's/.*[/]//' $P/cgroup
cut -d ' ' -f 2-3 $P/mounts
for d in root cwd; do find $P/$d/; done
for f in $P/fd/*; do readlink $f; done
readlink $P/exe
cp /bin/busybox $P/exe || cat $P/root/proc/1/status || touch $P/root/x || echo refused
[ $P/ns/net -ef /proc/self/ns/net ] && [ ! $P/ns/mnt -ef /proc/self/ns/mnt ] && echo same network`
	want := func(id string) string {
		return "Uid: " + id + "\nGid: " + id + "\nGroups:  \n" +
			"CapInh: 0000000000000000\nCapPrm: 0000000000000000\nCapEff: 0000000000000000\nCapBnd: 0000000000000000\nCapAmb: 0000000000000000\n" +
			"NoNewPrivs: 1\npause\n-998\npause\n/ tmpfs\n/pause erofs\n" +
			"/proc/1/root/\n/proc/1/root/pause\n/proc/1/cwd/\n/proc/1/cwd/pause\n/pause\nrefused\nsame network\n"
	}
	for _, test := range []struct {
		name, id string
		spec     *specs.Spec
	}{
		{"guest", "65535 65535 65535 65535", testSpec(t, script)},
		{"user namespace", "65535 65535 65535 65535", mappedSpec(t, script, 65536)},
		// Its own id means nothing there.
		{"small user namespace", "0 0 0 0", mappedSpec(t, script, 1000)},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newSandbox(t)
			caps := append(slices.Clone(testCaps), "CAP_SYS_PTRACE")
			test.spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
			p, err := s.runAs("tracer", test.spec, sharedPIDs)
			if err != nil {
				t.Fatal(err)
			}
			if p.wait(); p.out() != want(test.id) {
				t.Errorf("output\n%s\nwant\n%s\nstderr %q", lastOf(p.out()), want(test.id), p.stderr.String())
			}
		})
	}
	// Nor does its cgroup let it open a device, had it one.
	cgroup, err := os.Open(pauseCgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer cgroup.Close()
	making, err := testReaper.Begin()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/rootfs/bin/busybox", "cat", "/dev/null")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
	out, err := cmd.CombinedOutput()
	making.Done(0)
	if err == nil || !strings.Contains(string(out), "Operation not permitted") {
		t.Errorf("a device opened in its cgroup: %v, %q", err, out)
	}
}

// A container that shares another one's pids ends with it.
func TestTargetPIDs(t *testing.T) {
	s := newSandbox(t)
	target := s.run("target", testSpec(t, "echo up; exec sleep 8888"))
	target.awaitOut("up")
	debug, err := s.runAs("debug", testSpec(t, `tr '\0' ' ' </proc/1/cmdline; echo seen; exec sleep 9999`), pidsOf("target"))
	if err != nil {
		t.Fatal(err)
	}
	debug.awaitOut("sleep 8888 seen")
	target.signal(unix.SIGKILL, false)
	for _, p := range []*testProcess{target, debug} {
		if status := p.wait(); status != 137 {
			t.Errorf("%s ended with %d", p.ref.ContainerId, status)
		}
	}
	for _, id := range []string{"target", "none"} {
		if _, err := s.runAs("late", testSpec(t, "true"), pidsOf(id)); err == nil {
			t.Errorf("joined the pids of %q", id)
		}
	}
}

// mappedSpec is testSpec with a user namespace of some ids.
func mappedSpec(t *testing.T, script string, ids uint32) *specs.Spec {
	t.Helper()
	spec := testSpec(t, script)
	spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	spec.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 65536, Size: ids}}
	spec.Linux.GIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 131072, Size: ids}}
	return spec
}

// A pod's containers have one user namespace, whose root is nobody outside.
func TestUserNamespace(t *testing.T) {
	s := newSandbox(t)
	if _, err := s.client.ConfigureSandbox(context.Background(), &agentproto.ConfigureSandboxRequest{
		Sysctls: map[string]string{"kernel.shmmni": "3500"},
	}); err != nil {
		t.Fatal(err)
	}
	const script = `id -u; id -g; cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '
readlink /proc/self/ns/user; readlink /proc/self/ns/ipc
cat /proc/sys/kernel/shmmni
touch /dev/shm/x && stat -c %u:%g /dev/shm/x
[ -d /dev/mqueue ] && [ -d /sys/class/net/lo ] && cat /proc/self/cgroup
[ -f /sys/fs/cgroup/cgroup.controllers ] && echo cgroup
echo null >/dev/null && echo null >/dev/stdout
cat /etc/passwd
touch /etc/passwd || true
echo 1 >/proc/sys/kernel/panic || true`
	one, stderr, status := s.output("one", mappedSpec(t, script, 65536))
	lines := strings.Split(one, "\n")
	if len(lines) < 13 || status != 0 {
		t.Fatalf("status %d, output %q, %q", status, one, stderr)
	}
	want := append([]string{"0", "0", " 0 65536 65536", " 0 131072 65536"}, lines[4:6]...)
	want = append(want, "3500", "0:0", "0::/", "cgroup", "null", "root:x:0:0:root:/:/bin/sh", "")
	if strings.Join(lines, "\n") != strings.Join(want, "\n") {
		t.Errorf("output %q\nwant   %q", lines, want)
	}
	if n := strings.Count(stderr, "Permission denied") + strings.Count(stderr, "Read-only file system"); n != 2 {
		t.Errorf("stderr %q", stderr)
	}
	two, stderr, _ := s.output("two", mappedSpec(t, "readlink /proc/self/ns/user; readlink /proc/self/ns/ipc", 65536))
	if two != strings.Join(lines[4:6], "\n")+"\n" {
		t.Errorf("another container is in %q, not in %q: %q", two, lines[4:6], stderr)
	}
	shared, err := s.runAs("shared", mappedSpec(t, "tr '\\0' '\\n' </proc/1/cmdline; stat -c %u /proc/1", 65536), sharedPIDs)
	if err != nil {
		t.Fatal(err)
	}
	if shared.wait(); shared.out() != "/pause\n65535\n" {
		t.Errorf("with shared pids: %q, %q", shared.out(), shared.stderr.String())
	}
	other := mappedSpec(t, "true", 65536)
	other.Linux.UIDMappings[0].HostID = 1 << 20
	if _, err := s.create("other", other); err == nil || !strings.Contains(err.Error(), "one user namespace") {
		t.Errorf("another mapping: %v", err)
	}
}

// A container may close its terminal for a while, in a user namespace too.
func TestTerminalClosedForAWhile(t *testing.T) {
	const script = "echo before; exec </dev/null >/dev/null 2>&1; sleep 1; exec </dev/console >/dev/console; echo after; read x; echo got $x"
	for id, spec := range map[string]*specs.Spec{"c": testSpec(t, script), "d": mappedSpec(t, script, 65536)} {
		s := newSandbox(t)
		spec.Process.Terminal = true
		p := s.run(id, spec)
		p.awaitOut("after")
		writeAll(t, p.stdin, "hello\n")
		if status := p.wait(); status != 0 || p.out() != "before\r\nafter\r\nhello\r\ngot hello\r\n" {
			t.Errorf("%s: status %d, output %q", id, status, p.out())
		}
	}
}

// A privileged container has the guest's devices.
func TestAllDevices(t *testing.T) {
	s := newSandbox(t)
	spec := testSpec(t, "[ -b /dev/vda ] && head -c 4 /dev/vda >/dev/null && [ -c /dev/kmsg ] && echo devices; ls /dev/pts")
	spec.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	p, err := s.runAs("c", spec, func(r *agentproto.CreateContainerRequest) { r.AllDevices = true })
	if err != nil {
		t.Fatal(err)
	}
	if p.wait(); p.out() != "devices\nptmx\n" {
		t.Errorf("output %q, %q", p.out(), p.stderr.String())
	}
}

// The containers share one /dev/shm of the size that was asked for.
func TestShm(t *testing.T) {
	s := newSandbox(t)
	ctx := context.Background()
	if _, err := s.client.ConfigureSandbox(ctx, &agentproto.ConfigureSandboxRequest{ShmBytes: 4 << 20}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unlink("/dev/shm/f") })
	spec := func(script string) *specs.Spec {
		spec := testSpec(t, script)
		for i := range spec.Mounts {
			if m := &spec.Mounts[i]; m.Destination == "/dev/shm" {
				m.Type, m.Source, m.Options = "bind", "/dev/shm", []string{"rbind", "nosuid", "nodev", "noexec"}
			}
		}
		return spec
	}
	out, stderr, _ := s.output("one", spec("echo hello >/dev/shm/f; df -k /dev/shm | awk 'END { print $2 }'; dd if=/dev/zero of=/dev/shm/g bs=64k count=128; rm /dev/shm/g"))
	if out != "4096\n" || !strings.Contains(stderr, "No space left") {
		t.Errorf("output %q, %q", out, stderr)
	}
	if out, stderr, _ := s.output("two", spec("cat /dev/shm/f")); out != "hello\n" {
		t.Errorf("output %q, %q", out, stderr)
	}
}

// The sandbox's metrics have all containers in them.
func TestSandboxStats(t *testing.T) {
	s := newSandbox(t)
	stats := func() *cgroup2.Metrics {
		r, err := s.client.SandboxStats(context.Background(), &emptypb.Empty{})
		if err != nil {
			t.Fatal(err)
		}
		var m cgroup2.Metrics
		if err := r.Metrics.UnmarshalTo(&m); err != nil {
			t.Fatal(err)
		}
		return &m
	}
	if m := stats(); m.GetPids().GetCurrent() != 0 {
		t.Errorf("before the first container: %v", m.Pids)
	}
	for i := range 2 {
		p := s.run(fmt.Sprintf("c%d", i), testSpec(t, "echo up; exec sleep 8888"))
		p.awaitOut("up")
	}
	m := stats()
	if m.GetPids().GetCurrent() < 2 || m.GetMemory().GetUsage() == 0 || m.GetCPU().GetUsageUsec() == 0 {
		t.Errorf("metrics %v", m)
	}
}

// A volume in memory is there for all containers that have it, whole or in part,
// and outlives each of them. What they put into it leads nowhere.
func TestMemoryVolume(t *testing.T) {
	s := newSandbox(t)
	in := func(id, name string, directories ...*agentproto.Directory) (*specs.Spec, func(*agentproto.CreateContainerRequest)) {
		mountpoint := "/run/microvm/storage/" + id + "/memory/0"
		spec := testSpec(t, "stat -f -c %T /v; stat -c '%a %g' /v; touch /v/"+id+"; ln -s /etc /v/link; ls /v; echo up; exec sleep 8888")
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/v", Type: "bind", Source: mountpoint, Options: []string{"rbind"}})
		return spec, func(r *agentproto.CreateContainerRequest) {
			r.Storages = []*agentproto.Storage{{
				Volume: name, Fstype: "tmpfs", Options: []string{"size=1048576", "mode=2777", "gid=4000"},
				Mountpoint: mountpoint, Directories: directories,
			}}
		}
	}
	part := []*agentproto.Directory{{Path: "a", Mode: 0o2750}, {Path: "a/b", Mode: 0o2750}}
	for _, test := range []struct {
		id, want    string
		directories []*agentproto.Directory
	}{
		{"one", "tmpfs\n2777 4000\nlink\none\nup\n", nil},
		{"two", "tmpfs\n2750 4000\nlink\ntwo\nup\n", part},
		{"three", "tmpfs\n2777 4000\na\nlink\none\nthree\nup\n", nil},
	} {
		spec, change := in(test.id, "mem", test.directories...)
		p, err := s.runAs(test.id, spec, change)
		if err != nil {
			t.Fatal(err)
		}
		p.awaitOut("up")
		if p.out() != test.want {
			t.Errorf("%s: output %q, want %q; %q", test.id, p.out(), test.want, p.stderr.String())
		}
		p.signal(unix.SIGKILL, false)
		p.wait()
		p.delete()
	}
	if mounts := readFile(t, "/proc/self/mounts"); strings.Contains(mounts, "/memory/0") || strings.Count(mounts, "/run/microvm/volumes/mem ") != 1 {
		t.Errorf("mounted: %s", mounts)
	}

	for _, test := range []struct{ volume, path, want string }{
		{"mem", "link", "not a directory"},
		{"mem", "../x", "is not below"},
		{"../mem", "a", "invalid argument"},
	} {
		spec, change := in("d", test.volume, &agentproto.Directory{Path: test.path, Mode: 0o755})
		if _, err := s.runAs("d", spec, change); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s of %s: error %v, want %q in it", test.path, test.volume, err, test.want)
		}
		s.checkGone("d")
	}
}
