//go:build e2e

package task

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

func TestOutputAndExitCode(t *testing.T) {
	n := node.For(t)
	r := n.Run(t, nil, "sh", "-c", "echo out; echo err >&2; exit 42")
	if r.Stdout != "out\n" || r.Stderr != "err\n" || r.Code != 42 {
		t.Errorf("stdout and stderr must be apart and the exit code 42: %s", r)
	}
}

func TestStdin(t *testing.T) {
	n := node.For(t)
	in := make([]byte, 1<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(in)
	out := n.RunInput(t, string(in), nil, "cat")
	if out.Code != 0 || out.Stdout != string(in) {
		t.Errorf("cat of %d bytes returned %d bytes, exit code %d, stderr %s", len(in), len(out.Stdout), out.Code, out.Stderr)
	}
}

// terminalScript asks for its size until it is right, because the size goes its own way; then it wants a key's signal and a line.
const terminalScript = `
	until [ "$(stty size)" = '23 81' ]; do sleep 0.1; done; echo first size
	until [ "$(stty size)" = '43 132' ]; do sleep 0.1; done; echo second size
	tty; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo all terminals
	trap 'signal=yes' INT; echo press the key
	until [ "$signal" ]; do sleep 0.1; done; echo got the signal
	read line; echo "got the line: $line"; exit 5`

func useTerminal(t *testing.T, term *node.Terminal) {
	t.Helper()
	term.Expect("first size")
	term.ResizeUntil(132, 43, "second size")
	term.Expect("/dev/pts/")
	term.Expect("all terminals")
	term.Expect("press the key")
	term.Type("\x03")
	term.Expect("got the signal")
	term.Type("typed\n")
	term.Expect("got the line: typed\r")
	term.Wait().WantExit(t, 5)
}

func TestTerminal(t *testing.T) {
	useTerminal(t, node.For(t).RunTerminal(t, 81, 23, nil, "sh", "-c", terminalScript))
}

func TestEnvironmentDirectoryUser(t *testing.T) {
	n := node.For(t)
	flags := []string{"--env", "FOO=a b", "--cwd", "/var/log", "--user", "www-data"}
	n.Run(t, flags, "sh", "-c", `echo "$FOO"; pwd; id -u; id -g`).WantOutput(t, "a b\n/var/log\n33\n33\n")
	n.Run(t, []string{"--user", "1234:5678"}, "sh", "-c", "id -u; id -g").WantOutput(t, "1234\n5678\n")
}

func TestBindMounts(t *testing.T) {
	n := node.For(t)
	dir := t.TempDir()
	rw, ro, file := filepath.Join(dir, "rw"), filepath.Join(dir, "ro"), filepath.Join(dir, "file")
	for _, d := range []string{rw, ro} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(rw, "in"), "from the host\n")
	write(t, filepath.Join(ro, "in"), "read me\n")
	write(t, file, "one file\n")
	r := n.Run(t, []string{
		"--mount", "type=bind,src=" + rw + ",dst=/rw,options=rbind:rw",
		"--mount", "type=bind,src=" + ro + ",dst=/ro,options=rbind:ro",
		"--mount", "type=bind,src=" + file + ",dst=/etc/one,options=rbind:rw",
	}, "sh", "-c", `
		cat /rw/in /ro/in /etc/one
		echo from the container >/rw/out && chmod 640 /rw/out && chown 33:33 /rw/out
		ln -s out /rw/link && mkdir /rw/dir && rm /rw/in
		echo x >/ro/in; echo x >/ro/new; rm /ro/in; echo changed >/etc/one; true`)
	if want := "from the host\nread me\none file\n"; r.Code != 0 || r.Stdout != want {
		t.Errorf("want output %q: %s", want, r)
	}
	if got := strings.Count(r.Stderr, "Read-only file system"); got != 3 {
		t.Errorf("want three refusals to write to the read-only mount: %s", r)
	}
	for path, want := range map[string]string{
		filepath.Join(rw, "out"): "from the container\n",
		filepath.Join(ro, "in"):  "read me\n",
		file:                     "changed\n",
	} {
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%s on the host: %q, %v; want %q", path, got, err, want)
		}
	}
	if _, err := os.Stat(filepath.Join(rw, "in")); !os.IsNotExist(err) {
		t.Errorf("a file removed in the container is still on the host: %v", err)
	}
	var st syscall.Stat_t
	if err := syscall.Stat(filepath.Join(rw, "out"), &st); err != nil || st.Uid != 33 || st.Gid != 33 || st.Mode&0o777 != 0o640 {
		t.Errorf("owner %d:%d mode %o, %v; want 33:33 640", st.Uid, st.Gid, st.Mode&0o777, err)
	}
	if target, err := os.Readlink(filepath.Join(rw, "link")); target != "out" {
		t.Errorf("symlink target %q, %v", target, err)
	}
}

// The flags of a mount count in the container: those of a directory, and of a file system that the host has to mount.
func TestMountFlags(t *testing.T) {
	n := node.For(t)
	dir := t.TempDir()
	write(t, filepath.Join(dir, "program"), "#!/bin/sh\n")
	for _, err := range []error{
		os.Chmod(filepath.Join(dir, "program"), 0o755),
		os.Symlink("program", filepath.Join(dir, "link")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	disk := filepath.Join(t.TempDir(), "disk")
	node.Tool(t, "mkfs.ext4", "-q", "-d", dir, disk, "8M")
	r := n.Run(t, []string{
		"--mount", "type=bind,src=" + dir + ",dst=/dir,options=rbind:ro:nosuid:nodev:noexec:nosymfollow:rprivate",
		"--mount", "type=ext4,src=" + node.LoopDevice(t, disk) + ",dst=/disk,options=ro:noload:nosuid:nodev:noexec:nosymfollow:rprivate",
	}, "sh", "-c", `
		for m in /dir /disk; do
			grep " $m " /proc/mounts | cut -d' ' -f4 | tr , '\n' | grep -E '^(ro|rw|nosuid|nodev|noexec|nosymfollow)$' | sort | xargs
			$m/program || [ $? = 126 ] && cat $m/program || exit
			cat $m/link && exit 1
		done; true`)
	if want := strings.Repeat("nodev noexec nosuid nosymfollow ro\n#!/bin/sh\n", 2); r.Code != 0 || r.Stdout != want {
		t.Errorf("want output %q: %s", want, r)
	}
	for _, want := range []string{"Permission denied", "Too many levels of symbolic links"} {
		if strings.Count(r.Stderr, want) != 2 {
			t.Errorf("want %q of both: %s", want, r)
		}
	}
}

func TestTmpfsMount(t *testing.T) {
	n := node.For(t)
	r := n.Run(t, []string{"--mount", "type=tmpfs,src=tmpfs,dst=/scratch,options=size=1m:mode=1777"}, "sh", "-c",
		`grep ' /scratch ' /proc/mounts | cut -d' ' -f3; stat -c %a /scratch; dd if=/dev/zero of=/scratch/f bs=64k count=32`)
	if !strings.HasPrefix(r.Stdout, "tmpfs\n1777\n") {
		t.Errorf("want a tmpfs with mode 1777: %s", r)
	}
	r.WantError(t, "No space left on device")
}

// ctr mounts no cgroup file system by itself.
const cgroupMount = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro"

func TestMemoryLimit(t *testing.T) {
	n := node.For(t)
	flags := []string{"--memory-limit", fmt.Sprint(64 << 20), "--mount", cgroupMount}
	limit := "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes"
	n.Run(t, flags, "sh", "-c", limit).WantOutput(t, fmt.Sprintln(64<<20))
	// tail keeps its input until the end.
	n.Run(t, flags, "sh", "-c", "exec tail -c 200000000 </dev/zero").WantExit(t, 137)
}

func TestCPULimit(t *testing.T) {
	n := node.For(t)
	limit := "cat /sys/fs/cgroup/cpu.max 2>/dev/null || echo $(cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu/cpu.cfs_period_us)"
	n.Run(t, []string{"--cpus", "0.5", "--mount", cgroupMount}, "sh", "-c", limit).WantOutput(t, "50000 100000\n")
}

func TestReadOnlyRoot(t *testing.T) {
	n := node.For(t)
	r := n.Run(t, []string{"--read-only"}, "sh", "-c", "echo x >/tmp/x || echo x >/etc/passwd")
	r.WantError(t, "/tmp/x: Read-only file system", "/etc/passwd: Read-only file system")
}

// A directory as root file system, without image and snapshot.
func TestOwnRootfs(t *testing.T) {
	n := node.For(t)
	root := t.TempDir()
	for _, d := range []string{"bin", "proc", "sys", "dev", "run", "tmp", "etc"} {
		if err := os.Mkdir(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// The program comes out of the image, through a container.
	n.MustRun(t, []string{"--mount", "type=bind,src=" + root + ",dst=/out,options=rbind:rw"}, "cp", "/bin/busybox", "/out/bin/sh")
	run := func(flags []string, script string) node.Result {
		flags = append([]string{"--rm", "--rootfs"}, flags...)
		return n.Ctr(t, n.RunArgs(root, n.ID(t), flags, "/bin/sh", "-c", script)...)
	}
	run(nil, "echo hello >/file && echo done").WantOutput(t, "done\n")
	if got, err := os.ReadFile(filepath.Join(root, "file")); err != nil || string(got) != "hello\n" {
		t.Errorf("file written in the container: %q, %v", got, err)
	}
	run([]string{"--read-only"}, "echo x >/other").WantError(t, "Read-only file system")

	// ctr has no flag for a domain name, but takes a whole specification.
	var spec specs.Spec
	if err := json.Unmarshal([]byte(n.MustCtr(t, "oci", "spec").Stdout), &spec); err != nil {
		t.Fatal(err)
	}
	spec.Root.Path, spec.Linux.CgroupsPath, spec.Domainname = root, "", "example.org"
	spec.Process.Args = []string{"/bin/sh", "-c", "read name </proc/sys/kernel/domainname && echo $name"}
	data, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(t.TempDir(), "config.json")
	write(t, config, string(data))
	id := n.ID(t)
	n.RemoveIfFailed(t, id)
	args := n.RunArgs("", id, []string{"--rm", "--config", config})
	n.Ctr(t, slices.DeleteFunc(args, func(arg string) bool { return arg == "" })...).WantOutput(t, "example.org\n")
}

func TestSnapshotters(t *testing.T) {
	n := node.For(t)
	for _, s := range []string{"overlayfs", "native"} {
		t.Run(s, func(t *testing.T) {
			n.Import(t, node.Busybox, s)
			flags := []string{"--snapshotter", s}
			n.Run(t, flags, "sh", "-c", "echo changed >/etc/hostname && cat /etc/hostname && rm -r /var && ls -d /var 2>&1 || echo gone").WantOutput(t,
				"changed\nls: /var: No such file or directory\ngone\n")
			n.Run(t, flags, "ls", "-d", "/var").WantOutput(t, "/var\n")
		})
	}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}
