//go:build e2e

package cri

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

func propagation(p cri.MountPropagation) func(*cri.Mount) {
	return func(m *cri.Mount) { m.Propagation = p }
}

// Directories of the host, writable and not: what is written on one side is there on the other.
func TestHostPath(t *testing.T) {
	n := pods.For(t)
	dir := t.TempDir()
	write(t, filepath.Join(dir, "from-host"), "hello\n")
	c := n.Pod(t).Run(t, pods.Mount(dir, "/rw"), pods.Mount(dir, "/ro", pods.ReadOnly))
	c.Exec(t, "cat", "/rw/from-host", "/ro/from-host").WantOutput(t, "hello\nhello\n")
	c.Get(t, "echo answer >/rw/from-pod; mkdir /rw/dir; ln -s from-pod /rw/link")
	if b, err := os.ReadFile(filepath.Join(dir, "link")); err != nil || string(b) != "answer\n" {
		t.Errorf("on the host: %q, %v", b, err)
	}
	if got := c.Get(t, "cat /ro/from-pod"); got != "answer" {
		t.Errorf("through the read-only mount: %q", got)
	}
	for _, script := range []string{"echo >/ro/new", "rm /ro/from-host", "echo >>/ro/from-host", "chmod 700 /ro"} {
		if r := c.Shell(t, script); r.Code == 0 || !strings.Contains(r.Stderr, "Read-only file system") {
			t.Errorf("%s: %s", script, r)
		}
	}
	if err := os.Remove(filepath.Join(dir, "from-host")); err != nil {
		t.Fatal(err)
	}
	node.Until(t, "the pod sees that the file is gone", func() bool { return c.Shell(t, "[ ! -e /rw/from-host ]").Code == 0 })
}

// A block volume (volumeDevices) in two containers, of which one may only read, taken away and added again.
func TestBlockVolume(t *testing.T) {
	n := pods.For(t)
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	device := node.LoopDevice(t, file)
	p := n.Pod(t)
	writer := p.Run(t, pods.Device(device, "/dev/xvda", "mrw"))
	reader := p.Run(t, pods.Device(device, "/srv/raw", "r"))
	other := p.Run(t)
	if got := writer.Get(t, "blockdev --getsize64 /dev/xvda; echo first | dd of=/dev/xvda bs=512 conv=sync 2>/dev/null"); got != "4194304" {
		t.Errorf("size %s", got)
	}
	if got := reader.Get(t, "head -n 1 /srv/raw"); got != "first" {
		t.Errorf("the other container reads %q", got)
	}
	if r := reader.Shell(t, "echo no >/srv/raw"); r.Code == 0 || !strings.Contains(r.Stderr, "Operation not permitted") {
		t.Errorf("write to what may only be read: %s", r)
	}
	if r := other.Shell(t, "ls /dev/xvda /srv/raw"); r.Code == 0 {
		t.Errorf("a container without the volume has it: %s", r)
	}
	remove := func(c *pods.Container) {
		t.Helper()
		c.Stop(t, 0)
		c.Remove(t)
	}
	remove(writer)
	if got := reader.Get(t, "head -n 1 /srv/raw"); got != "first" {
		t.Errorf("the volume that is left has %q", got)
	}
	remove(reader)
	if b, err := os.ReadFile(device); err != nil || !strings.HasPrefix(string(b), "first\n") {
		t.Errorf("on the host: %.10q, %v", b, err)
	}
	again := p.Run(t, pods.Device(device, "/dev/xvda", "mrw"))
	if got := again.Get(t, "head -n 1 /dev/xvda"); got != "first" {
		t.Errorf("added again: %q", got)
	}
	if _, err := p.TryCreate(t, pods.Device("/dev/none", "/dev/xvda", "mrw")); err == nil {
		t.Error("a container has a device that the host has not")
	}
}

// A hostPath of the type BlockDevice: who is privileged can use it, and who is not sees it.
func TestBlockDeviceAsHostPath(t *testing.T) {
	n := pods.For(t)
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	device := node.LoopDevice(t, file)
	p := n.Pod(t, pods.PrivilegedPod)
	privileged := p.Run(t, pods.Mount(device, "/srv/disk"), pods.Privileged)
	if got := privileged.Get(t, "[ -b /srv/disk ] && blockdev --getsize64 /srv/disk; echo first | dd of=/srv/disk bs=512 conv=sync,fsync 2>/dev/null"); got != "1048576" {
		t.Errorf("size %s", got)
	}
	if b, err := os.ReadFile(device); err != nil || !strings.HasPrefix(string(b), "first\n") {
		t.Errorf("on the host: %.10q, %v", b, err)
	}
	ordinary := p.Run(t, pods.Mount(device, "/srv/disk"))
	if r := ordinary.Shell(t, "[ -b /srv/disk ] && cat /srv/disk"); r.Code == 0 || !strings.Contains(r.Stderr, "Operation not permitted") {
		t.Errorf("a container without a rule for it: %s", r)
	}
}

// Two containers write to the same volume, one of them to a directory of it.
func TestSharedVolume(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	a := p.Run(t, pods.Mount(dir, "/all"))
	b := p.Run(t, pods.Mount(filepath.Join(dir, "sub"), "/sub"))
	a.Get(t, "echo from a >/all/sub/file")
	node.Until(t, "one container sees what the other wrote", func() bool { return strings.TrimSpace(b.Shell(t, "cat /sub/file").Stdout) == "from a" })
	b.Get(t, "echo from b >>/sub/file")
	node.Until(t, "and the other way round", func() bool { return strings.HasSuffix(a.Shell(t, "cat /all/sub/file").Stdout, "from b\n") })
	if got := b.Get(t, "ls -A /sub/.. | grep -c file || true"); got != "0" {
		t.Errorf("the parent of a sub-directory mount shows the volume: %q", got)
	}
}

// A file is mounted as that file: its directory does not show.
func TestFileMount(t *testing.T) {
	n := pods.For(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "hosts")
	write(t, file, "one\n")
	write(t, filepath.Join(dir, "secret"), "secret\n")
	c := n.Pod(t).Run(t, pods.Mount(file, "/etc/mine/file"), pods.Mount(file, "/etc/mine/ro", pods.ReadOnly))
	c.Exec(t, "cat", "/etc/mine/file").WantOutput(t, "one\n")
	if got := c.Get(t, "ls -A /etc/mine"); got != "file\nro" {
		t.Errorf("the directory: %q", got)
	}
	c.Get(t, "echo two >/etc/mine/file")
	if b, err := os.ReadFile(file); err != nil || string(b) != "two\n" {
		t.Errorf("on the host: %q, %v", b, err)
	}
	c.Shell(t, "echo three >/etc/mine/ro").WantExit(t, 1)
}

// keptVolume is a volume as the kubelet's pkg/volume/util/atomic_writer.go keeps it: ..data leads to the directory of its present
// version, and key through that to a file.
type keptVolume struct {
	t   *testing.T
	dir string
	now string // the present version's directory
}

func newKeptVolume(t *testing.T, version string) *keptVolume {
	t.Helper()
	v := &keptVolume{t: t, dir: t.TempDir()}
	v.update(version, func() {})
	v.link("..data/key", "key")
	return v
}

func (v *keptVolume) link(target, name string) {
	v.t.Helper()
	if err := os.Symlink(target, filepath.Join(v.dir, name)); err != nil {
		v.t.Fatal(err)
	}
}

// update makes a version current whose key says its name; about is called at the last moment before.
func (v *keptVolume) update(version string, about func()) {
	v.t.Helper()
	before := v.now
	v.now = "..v" + version
	if err := os.Mkdir(filepath.Join(v.dir, v.now), 0o755); err != nil {
		v.t.Fatal(err)
	}
	write(v.t, filepath.Join(v.dir, v.now, "key"), version+"\n")
	v.link(v.now, "..data_tmp")
	about()
	if err := os.Rename(filepath.Join(v.dir, "..data_tmp"), filepath.Join(v.dir, "..data")); err != nil {
		v.t.Fatal(err)
	}
	if before != "" {
		if err := os.RemoveAll(filepath.Join(v.dir, before)); err != nil {
			v.t.Fatal(err)
		}
	}
}

// The kubelet's update of a configMap, secret or token is seen whole, and within a second: who looks ten times a second sees it
// after ten looks at most.
func TestSymlinkSwap(t *testing.T) {
	n := pods.For(t)
	v := newKeptVolume(t, "1")
	// A number and what was seen, in a line for each look.
	looks := filepath.Join(t.TempDir(), "looks")
	write(t, looks, "")
	c := n.Pod(t).Run(t, pods.Mount(v.dir, "/config", pods.ReadOnly), pods.Mount(looks, "/looks"), pods.Shell(`
		n=0
		while :; do
			n=$((n + 1)) seen=nothing
			read -r seen </config/key
			echo $n $seen >>/looks
			sleep 0.1
		done`))
	type look struct {
		number int
		seen   string
	}
	read := func() (all []look) {
		t.Helper()
		b, err := os.ReadFile(looks)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			var l look
			if fields, err := fmt.Sscan(line, &l.number, &l.seen); err == nil && fields == 2 && strings.HasSuffix(line, "\n") {
				all = append(all, l)
			}
		}
		return all
	}
	for i, version := range []string{"2", "3", "4"} {
		node.Until(t, "the pod looks", func() bool { return len(read()) > 20*(i+1) })
		var before int
		v.update(version, func() { before = len(read()) })
		var after []look
		node.Until(t, "version "+version+" is seen", func() bool {
			after = read()[before:]
			return len(after) > 0 && after[len(after)-1].seen == version
		})
		count := 0
		for ; after[count].seen != version; count++ {
			if got := after[count].seen; got != fmt.Sprint(i+1) {
				t.Errorf("look %d, before version %s was there: %q", after[count].number, version, got)
			}
		}
		t.Logf("version %s is seen after %d looks", version, count)
		// Two for what is between our own look and the change.
		if count > 12 {
			t.Errorf("version %s is seen after %d looks", version, count)
		}
	}
	if got := c.Get(t, "readlink /config/key; ls -A /config"); got != "..data/key\n..data\n..v4\nkey" {
		t.Errorf("the volume: %q", got)
	}
}

// Who lists the volume, and so is told anew where its files are but not of these, sees the kubelet's update whole too: not a link
// that still leads to what was removed.
func TestUpdateOfListedVolume(t *testing.T) {
	n := pods.For(t)
	v := newKeptVolume(t, "1")
	looks := filepath.Join(t.TempDir(), "looks")
	write(t, looks, "")
	n.Pod(t).Run(t, pods.Mount(v.dir, "/config", pods.ReadOnly), pods.Mount(looks, "/looks"), pods.Shell(`
		look() { seen=nothing; read -r seen </config/key; echo $seen >>/looks; }
		while :; do
			look
			sleep 0.6
			set -- /config/* /config/.*
			echo now >>/looks
			sleep 0.6
			look
			sleep 2
		done`))
	lines := func(wanted int) (list []string) {
		t.Helper()
		node.Until(t, fmt.Sprintf("there are %d lines", wanted), func() bool {
			b, err := os.ReadFile(looks)
			if err != nil {
				t.Fatal(err)
			}
			list = strings.Fields(string(b))
			return len(list) >= wanted
		})
		return list
	}
	for round, version := range []string{"2", "3", "4", "5"} {
		before := fmt.Sprint(round + 1)
		lines(3*round + 2)
		v.update(version, func() {})
		got := lines(3*round + 3)[3*round:]
		t.Logf("%q", got)
		if got[0] != before || got[1] != "now" || got[2] != before && got[2] != version {
			t.Errorf("seen before the update to version %s, and after: %q", version, got)
		}
	}
}

// watch is what this program does in a pod: it tells of the first change of a directory and of the file key that is in it by
// then, as inotify sees them.
func watch(dir string) int {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	names := map[int32]string{}
	for name, path := range map[string]string{"directory": dir, "file": filepath.Join(dir, "key")} {
		wd, err := unix.InotifyAddWatch(fd, path, unix.IN_ATTRIB|unix.IN_MOVED_TO|unix.IN_DELETE_SELF)
		if err != nil {
			fmt.Println(err)
			return 1
		}
		names[int32(wd)] = name
	}
	fmt.Println("watching")
	buf := make([]byte, 4096)
	for len(names) > 0 {
		n, err := unix.Read(fd, buf)
		if err != nil {
			fmt.Println(err)
			return 1
		}
		for b := buf[:n]; len(b) > 0; b = b[unix.SizeofInotifyEvent+binary.NativeEndian.Uint32(b[12:]):] {
			wd := int32(binary.NativeEndian.Uint32(b))
			if name, ok := names[wd]; ok {
				content, err := os.ReadFile(filepath.Join(dir, "key"))
				fmt.Printf("%s: %q %v\n", name, content, err)
				delete(names, wd)
			}
		}
	}
	return 0
}

// inotify in the pod tells of the kubelet's update of a volume, and who looks then sees the new content.
func TestVolumeInotify(t *testing.T) {
	n := pods.For(t)
	v := newKeptVolume(t, "1")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := n.Pod(t).Run(t, pods.Mount(v.dir, "/config", pods.ReadOnly), pods.Mount(self, "/self", pods.ReadOnly), pods.Command("/self", "watch", "/config"))
	node.Until(t, "the pod watches", func() bool { stdout, _ := c.Output(t); return stdout == "watching\n" })
	v.update("2", func() {})
	if code := c.Wait(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
	stdout, _ := c.Output(t)
	for _, name := range []string{"directory", "file"} {
		if !strings.Contains(stdout, name+": \"2\\n\" <nil>\n") {
			t.Errorf("the watch of the %s: %s", name, stdout)
		}
	}
}

// Recursive read-only: what is mounted below is read-only too. Without it, it is not.
func TestRecursiveReadOnly(t *testing.T) {
	n := pods.For(t)
	dir := t.TempDir()
	node.Tmpfs(t, filepath.Join(dir, "below"), "")
	c := n.Pod(t).Run(t,
		pods.Mount(dir, "/rro", pods.ReadOnly, func(m *cri.Mount) { m.RecursiveReadOnly = true }, propagation(cri.MountPropagation_PROPAGATION_PRIVATE)),
		pods.Mount(dir, "/ro", pods.ReadOnly))
	c.Shell(t, "echo >/ro/file").WantExit(t, 1)
	c.Shell(t, "echo >/rro/file").WantExit(t, 1)
	c.Shell(t, "echo >/ro/below/file").WantExit(t, 0)
	c.Shell(t, "echo >/rro/below/file").WantExit(t, 1)
	if got := c.Get(t, "ls /rro/below"); got != "file" {
		t.Errorf("the file system below: %q", got)
	}
}

// HostToContainer: a file system that is mounted on the host later appears in the pod, and goes with it.
func TestPropagationHostToContainer(t *testing.T) {
	n := pods.For(t)
	// The parent must be a shared mount; the kubelet's directory is.
	parent := t.TempDir()
	node.Tmpfs(t, parent, "")
	if err := unix.Mount("", parent, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	p := n.Pod(t)
	fromHost := propagation(cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER)
	slave := p.Run(t, pods.Mount(parent, "/v", fromHost), pods.Mount(parent, "/ro", pods.ReadOnly, fromHost))
	private := p.Run(t, pods.Mount(parent, "/v"))
	late := filepath.Join(parent, "late")
	if err := os.Mkdir(late, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", late, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	mounted := true
	unmount := func() {
		if mounted {
			// A virtual machine tells after the fact that a file is closed.
			node.Until(t, "the host can unmount it", func() bool { return unix.Unmount(late, 0) == nil })
			mounted = false
		}
	}
	t.Cleanup(unmount)
	write(t, filepath.Join(late, "file"), "late\n")
	node.Until(t, "the pod sees what was mounted later", func() bool { return slave.Shell(t, "cat /v/late/file").Stdout == "late\n" })
	private.Shell(t, "cat /v/late/file").WantExit(t, 1)
	slave.Shell(t, "echo >/ro/file").WantExit(t, 1)
	slave.Shell(t, "echo >/ro/late/new").WantExit(t, 0) // it is read-only if the host says so
	unmount()
	node.Until(t, "the pod sees that it is unmounted", func() bool { return slave.Shell(t, "[ -d /v/late ] && [ ! -e /v/late/file ]").Code == 0 })
}

// An image as a volume: what is in it can be read and run, and not written. Two containers have it at a time.
func TestImageVolume(t *testing.T) {
	n := pods.For(t)
	n.Provide(t, node.Web)
	// containerd makes it for the first one, and keeps it.
	if err := os.MkdirAll(n.Path("state/io.containerd.grpc.v1.cri/image-volumes"), 0o700); err != nil {
		t.Fatal(err)
	}
	n.SetBaseline(t)
	p := n.Pod(t)
	for _, subPath := range []string{"", "usr/sbin"} {
		volume := func(c *cri.ContainerConfig) {
			c.Mounts = append(c.Mounts, &cri.Mount{
				ContainerPath: "/volume", Readonly: true, Image: &cri.ImageSpec{Image: node.Web}, ImageSubPath: subPath,
			})
		}
		c := p.Run(t, volume)
		nginx := strings.TrimPrefix("usr/sbin/nginx", subPath+"/")
		c.Get(t, "[ -x /volume/"+nginx+" ] && [ $(wc -c </volume/"+nginx+") -gt 100000 ]")
		if r := c.Shell(t, "touch /volume/new"); r.Code == 0 || !strings.Contains(r.Stderr, "Read-only file system") {
			t.Errorf("writing to the image: %s", r)
		}
	}
}

// An emptyDir of medium Memory is a tmpfs with a size, shared by the containers.
func TestMemoryEmptyDir(t *testing.T) {
	n := pods.For(t)
	// Where the kubelet has it.
	config := n.PodConfig(t)
	dir := filepath.Join(t.TempDir(), "pods", config.Metadata.Uid, "volumes/kubernetes.io~empty-dir/memory")
	node.Tmpfs(t, dir, "size=8m,mode=2777,gid=4000")
	p, err := n.TryPod(t, config)
	if err != nil {
		t.Fatal(err)
	}
	a, b := p.Run(t, pods.Mount(dir, "/mem")), p.Run(t, pods.Mount(dir, "/mem"))
	if got := a.Get(t, "stat -f -c %T /mem; stat -c '%a %g' /mem"); got != "tmpfs\n2777 4000" {
		t.Errorf("it is %q", got)
	}
	a.Get(t, "echo shared >/mem/file")
	if got := b.Get(t, "cat /mem/file"); got != "shared" {
		t.Errorf("the other container sees %q", got)
	}
	if r := a.Shell(t, "dd if=/dev/zero of=/mem/big bs=1M count=16"); r.Code == 0 || !strings.Contains(r.Stderr, "No space left") {
		t.Errorf("writing more than its size: %s", r)
	}
}

// /dev/shm is there, of the size Kubernetes gives it, and shared by the pod.
func TestSharedMemory(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	a, b := p.Run(t), p.Run(t)
	if got := a.Get(t, "df -k /dev/shm | tail -n 1 | awk '{print $2}'"); got != "65536" {
		t.Errorf("/dev/shm: %q", got)
	}
	a.Get(t, "echo x >/dev/shm/x; [ $(stat -c %a /dev/shm) = 1777 ]")
	if got := b.Get(t, "cat /dev/shm/x"); got != "x" {
		t.Errorf("the other container sees %q", got)
	}
	if x, y := a.Get(t, "readlink /proc/self/ns/ipc"), b.Get(t, "readlink /proc/self/ns/ipc"); x != y {
		t.Errorf("IPC namespaces %s and %s", x, y)
	}
}

// Many files and a large one.
func TestManyFiles(t *testing.T) {
	n := pods.For(t)
	dir := t.TempDir()
	c := n.Pod(t).Run(t, pods.Mount(dir, "/v"))
	c.Get(t, "mkdir /v/many; cd /v/many; for i in $(seq 1000); do echo $i >$i; done; head -c 5000000 /dev/urandom >/v/large; md5sum </v/large >/v/sum")
	entries, err := os.ReadDir(filepath.Join(dir, "many"))
	if err != nil || len(entries) != 1000 {
		t.Errorf("%d files, %v", len(entries), err)
	}
	if got := c.Get(t, "ls /v/many | wc -l; cat /v/many/* | wc -l; md5sum </v/large | cmp - /v/sum && echo same"); got != "1000\n1000\nsame" {
		t.Errorf("in the pod: %q", got)
	}
}

// A volume that is not there is made by containerd, as CRI has it; one that is in the way of a file is an error.
func TestVolumeInTheWay(t *testing.T) {
	n := pods.For(t)
	p := n.Pod(t)
	file := filepath.Join(t.TempDir(), "file")
	write(t, file, "")
	c, err := p.TryCreate(t, pods.Mount(filepath.Join(file, "below"), "/v"))
	if err == nil {
		err = c.TryStart(t)
	}
	if err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("a volume below a file: %v", err)
	}
	p.Run(t).Get(t, "true")
}
