//go:build e2e

package cri

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

type securityContext = cri.LinuxContainerSecurityContext

func TestUsersAndGroups(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	for name, c := range map[string]struct {
		change func(*securityContext)
		want   string
	}{
		"image's default": {func(*securityContext) {}, "uid=0(root) gid=0(root) groups=0(root)"},
		"runAsUser": {func(s *securityContext) { s.RunAsUser = &cri.Int64Value{Value: 1234} },
			"uid=1234 gid=0(root) groups=0(root)"},
		"runAsGroup": {func(s *securityContext) {
			s.RunAsUser, s.RunAsGroup = &cri.Int64Value{Value: 1234}, &cri.Int64Value{Value: 2345}
		}, "uid=1234 gid=2345 groups=2345"},
		"user name": {func(s *securityContext) { s.RunAsUsername = "www-data" },
			"uid=33(www-data) gid=33(www-data) groups=33(www-data)"},
		"supplemental groups": {func(s *securityContext) {
			s.RunAsUser, s.SupplementalGroups = &cri.Int64Value{Value: 1234}, []int64{5000, 5001}
		}, "uid=1234 gid=0(root) groups=0(root),5000,5001"},
	} {
		t.Run(name, func(t *testing.T) {
			r := p.Output(t, pods.Command("id"), pods.Security(c.change))
			// busybox shows the primary group among the groups only if it is one of them.
			if got := strings.TrimSpace(r.Stdout); got != c.want {
				t.Errorf("id: %q, want %q", got, c.want)
			}
		})
	}
}

// fsGroup: the kubelet gives the volume to the group, with the set-group-ID bit, and the group to the process.
func TestFSGroup(t *testing.T) {
	n := pods.For(t)
	dir := t.TempDir()
	if err := os.Chown(dir, 0, 3000); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, os.ModeSetgid|0o770); err != nil {
		t.Fatal(err)
	}
	r := n.Pod(t).Output(t, pods.Mount(dir, "/v"), pods.Shell("echo >/v/file && stat -c '%u %g' /v/file"), pods.Security(func(s *securityContext) {
		s.RunAsUser, s.RunAsGroup = &cri.Int64Value{Value: 1234}, &cri.Int64Value{Value: 1234}
		s.SupplementalGroups = []int64{3000}
	}))
	r.WantOutput(t, "1234 3000\n")
}

// The runtime's seccomp profile denies what it denies, a local one what it says, and unconfined nothing.
func TestSeccomp(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	profile := filepath.Join(t.TempDir(), "profile.json")
	write(t, profile, `{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]}`)
	for name, c := range map[string]struct {
		profile *cri.SecurityProfile
		mode    string
		mkdir   int
		unshare int // not allowed to processes without CAP_SYS_ADMIN by containerd's default profile
	}{
		"RuntimeDefault": {&cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}, "2", 0, 1},
		"Localhost":      {&cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: profile}, "2", 1, 0},
		"Unconfined":     {&cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}, "0", 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			container := p.Run(t, pods.Security(func(s *securityContext) { s.Seccomp = c.profile }))
			if got := container.Get(t, "awk '/^Seccomp:/ {print $2}' /proc/self/status"); got != c.mode {
				t.Errorf("seccomp mode %s", got)
			}
			r := container.Shell(t, "mkdir /d")
			r.WantExit(t, c.mkdir)
			if c.mkdir != 0 && !strings.Contains(r.Stderr, "Not supported") && !strings.Contains(r.Stderr, "not supported") {
				t.Errorf("not the profile's error: %s", r)
			}
			container.Shell(t, "unshare --user true").WantExit(t, c.unshare)
		})
	}
	_, err := p.TryCreate(t, pods.Security(func(s *securityContext) {
		s.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: profile + ".gone"}
	}))
	if err == nil || !strings.Contains(err.Error(), profile) {
		t.Errorf("a profile that is not there: %v", err)
	}
}

func TestCapabilities(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	effective := "awk '/^CapEff:/ {print $2}' /proc/self/status"
	for name, c := range map[string]struct {
		capabilities *cri.Capability
		want         string
	}{
		"default": {nil, "00000000a80425fb"}, // containerd's 14
		"none":    {&cri.Capability{DropCapabilities: []string{"ALL"}}, "0000000000000000"},
		"one":     {&cri.Capability{DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"NET_ADMIN"}}, "0000000000001000"},
		"added":   {&cri.Capability{AddCapabilities: []string{"SYS_TIME"}}, "00000000aa0425fb"},
		"dropped": {&cri.Capability{DropCapabilities: []string{"CHOWN"}}, "00000000a80425fa"},
	} {
		t.Run(name, func(t *testing.T) {
			r := p.Output(t, pods.Shell(effective), pods.Security(func(s *securityContext) { s.Capabilities = c.capabilities }))
			r.WantOutput(t, c.want+"\n")
		})
	}
	r := p.Output(t, pods.Shell("ip link set lo down"))
	if r.Code == 0 || !strings.Contains(r.Stderr, "Operation not permitted") {
		t.Errorf("changing a link without NET_ADMIN: %s", r)
	}
	p.Output(t, pods.Shell("ip addr add 10.1.2.3/32 dev lo"), pods.Security(func(s *securityContext) {
		s.Capabilities = &cri.Capability{AddCapabilities: []string{"NET_ADMIN"}}
	})).WantExit(t, 0)
}

func TestReadOnlyRootFilesystem(t *testing.T) {
	n := pods.For(t)
	c := n.Pod(t).Run(t, pods.Mount(t.TempDir(), "/v"), pods.Security(func(s *securityContext) { s.ReadonlyRootfs = true }))
	if r := c.Shell(t, "echo >/file"); r.Code == 0 || !strings.Contains(r.Stderr, "Read-only file system") {
		t.Errorf("writing to the root file system: %s", r)
	}
	c.Get(t, "echo >/v/file; echo >/dev/shm/file; echo >/dev/null")
}

func TestSysctls(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t, func(c *cri.PodSandboxConfig) {
		c.Linux.Sysctls = map[string]string{
			"net.ipv4.ip_local_port_range": "40000 41000",
			"net.ipv4.tcp_syncookies":      "0",
			"kernel.shm_rmid_forced":       "1",
		}
	})
	c := p.Run(t)
	got := strings.Fields(c.Get(t, "cd /proc/sys; cat net/ipv4/ip_local_port_range net/ipv4/tcp_syncookies kernel/shm_rmid_forced"))
	if strings.Join(got, " ") != "40000 41000 0 1" {
		t.Errorf("sysctls in the pod: %v", got)
	}
	if b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_syncookies"); err != nil || strings.TrimSpace(string(b)) == "0" {
		t.Errorf("the host's: %q, %v", b, err)
	}
	if r := c.Shell(t, "echo 1 >/proc/sys/net/ipv4/tcp_syncookies"); r.Code == 0 {
		t.Errorf("/proc/sys is writable: %s", r)
	}
}

// What containers must not see is masked, what they must not change is read-only, and set-user-ID gives no rights.
func TestConfinement(t *testing.T) {
	n := pods.For(t)
	c := n.Pod(t).Run(t, pods.Security(func(s *securityContext) { s.NoNewPrivs = true }))
	if got := c.Get(t, "awk '/^NoNewPrivs:/ {print $2}' /proc/self/status"); got != "1" {
		t.Errorf("NoNewPrivs: %s", got)
	}
	if got := c.Get(t, "head -c 1 /proc/kcore 2>/dev/null | wc -c; ls -A /sys/firmware | wc -l"); got != "0\n0" {
		t.Errorf("masked paths show something: %q", got)
	}
	for _, script := range []string{"echo 1 >/proc/sysrq-trigger", "echo x >/proc/sys/kernel/hostname", "mount -t tmpfs x /mnt", "mknod /d b 8 0 && head -c 1 /d"} {
		if r := c.Shell(t, script); r.Code == 0 {
			t.Errorf("%s was allowed: %s", script, r)
		}
	}
}

// procMount Unmasked: nothing is masked or read-only that is by default, and the capabilities say what may be done there.
func TestProcMountUnmasked(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	capabilities := func(s *securityContext) { s.Capabilities = &cri.Capability{AddCapabilities: []string{"NET_ADMIN"}} }
	masked := p.Run(t, pods.Security(capabilities))
	unmasked := p.Run(t, pods.Security(capabilities), pods.Security(func(s *securityContext) {
		s.MaskedPaths, s.ReadonlyPaths = []string{}, []string{}
	}))
	const (
		// Which of the files there are is the kernel's to say. A masked one is /dev/null.
		look = "cd /proc; for f in kcore keys timer_list; do [ ! -c $f ] || echo masked; [ ! -f $f ] || echo shown; done | sort -u; ls /sys/firmware | head -n 1 | wc -l"
		set  = "echo 0 >/proc/sys/net/ipv4/tcp_syncookies"
	)
	if got := masked.Get(t, look); got != "masked\n0" {
		t.Errorf("masked: %q", got)
	}
	if got := unmasked.Get(t, look+"; grep -c ' /proc/' /proc/mounts || :"); got != "shown\n1\n0" {
		t.Errorf("unmasked: %q", got)
	}
	if r := masked.Shell(t, set); r.Code == 0 || !strings.Contains(r.Stderr, "Read-only file system") {
		t.Errorf("masked: %s: %s", set, r)
	}
	if got := unmasked.Get(t, set+"; cat /proc/sys/net/ipv4/tcp_syncookies"); got != "0" {
		t.Errorf("unmasked: the setting is %s", got)
	}
	if b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_syncookies"); err != nil || strings.TrimSpace(string(b)) == "0" {
		t.Errorf("the host's: %q, %v", b, err)
	}
}

// Devices that every kernel has can be given to a container, and opened there; those that it was not given are not there.
func TestDevices(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	with := p.Run(t, pods.Device("/dev/net/tun", "/dev/net/tun", "rwm"), pods.Device("/dev/fuse", "/dev/mine", "rwm"))
	reader := p.Run(t, pods.Device("/dev/fuse", "/dev/fuse", "r"))
	without := p.Run(t)
	if got := with.Get(t, "stat -c '%F %t %T' /dev/net/tun /dev/mine"); got != "character special file a c8\ncharacter special file a e5" {
		t.Errorf("the devices: %q", got)
	}
	with.Get(t, ": <>/dev/net/tun && : <>/dev/mine")
	reader.Get(t, ": </dev/fuse")
	without.Shell(t, "ls /dev/net/tun || ls /dev/fuse").WantExit(t, 1)
	for what, c := range map[string]struct {
		container *pods.Container
		script    string
	}{
		"writing to what may only be read":          {reader, ": <>/dev/fuse"},
		"a device that the container was not given": {without, "mknod /d c 10 229 && : <>/d"},
	} {
		if r := c.container.Shell(t, c.script); r.Code == 0 || !strings.Contains(r.Stderr, "Operation not permitted") {
			t.Errorf("%s: %s", what, r)
		}
	}
}

// A privileged container may do everything that is for its own kernel, or the host's, to allow.
func TestPrivileged(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t, pods.PrivilegedPod)
	c := p.Run(t, pods.Privileged)
	if got := c.Get(t, "awk '/^CapEff:/ {print $2}' /proc/self/status"); !strings.HasPrefix(got, "00000") || strings.Count(got, "f") < 8 {
		t.Errorf("capabilities %s", got)
	}
	c.Get(t, "mount -t tmpfs x /mnt && umount /mnt; [ -w /proc/sys/kernel/hostname ]; grep -q ' /sys sysfs rw' /proc/mounts")
	unprivileged := p.Run(t)
	unprivileged.Shell(t, "mount -t tmpfs x /mnt").WantExit(t, 1)
}

func TestEnvironment(t *testing.T) {
	n := pods.For(t)
	r := n.Pod(t).Output(t, pods.Shell("env | sort"), func(c *cri.ContainerConfig) {
		c.Envs = []*cri.KeyValue{{Key: "EMPTY"}, {Key: "WITH_SPACE", Value: []byte("a  b=c")}}
	})
	for _, want := range []string{"EMPTY=\n", "WITH_SPACE=a  b=c\n", "HOSTNAME=pod\n", "PATH=/usr/local/sbin:"} {
		if !strings.Contains(r.Stdout, want) {
			t.Errorf("the environment lacks %q: %s", want, r)
		}
	}
}
