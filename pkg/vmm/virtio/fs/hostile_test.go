package fs

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse/fusetest"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/passthrough"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

// smallRoot is an empty file system of 4 MiB, mounted nowhere, so that a hostile
// driver fills no disk.
func smallRoot(t testing.TB) *os.File {
	t.Helper()
	fsfd, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fsfd)
	for key, value := range map[string]string{"size": "4m", "nr_inodes": "1000"} {
		if err := unix.FsconfigSetString(fsfd, key, value); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.FsconfigCreate(fsfd); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	root := os.NewFile(uintptr(fd), "tmpfs")
	t.Cleanup(func() { _ = root.Close() })
	return root
}

// hostileRequest packs a request, of a node that a guest knows who has created a
// file (node 2, handle 1).
func hostileRequest(queue int, op fuse.Opcode, node uint64, room int, args ...any) virtiotest.HostileRequest {
	body := fusetest.Pack(args...)
	header := fusetest.Pack(fuse.InHeaderSize+len(body), uint32(op), uint64(7), node, 0, 0, 0, uint16(0), uint16(0))
	return virtiotest.HostileRequest{Queue: queue, Readable: append(header, body...), Room: fuse.OutHeaderSize + room}
}

func newSmallDevice(t testing.TB, root *os.File, log *slog.Logger) virtio.Device {
	return newDevice(t, Config{
		Root: root, Queues: 2, Workers: 4, Log: log,
		Limits: passthrough.Limits{Inodes: 64, Descriptors: 128, LockWaits: 8, Threads: 4},
	})
}

var victim = virtiotest.Victim{
	New: func(t testing.TB, log *slog.Logger) virtio.Device { return newSmallDevice(t, smallRoot(t), log) },
	Requests: []virtiotest.HostileRequest{
		hostileRequest(firstQueue, fuse.Init, 0, fuse.InitOutSize, 7, 41, 1<<20, 0),
		hostileRequest(firstQueue, fuse.Create, 1, fuse.EntryOutSize+fuse.OpenOutSize, unix.O_RDWR, unix.S_IFREG|0o644, 0, 0, "file"),
		hostileRequest(firstQueue, fuse.Lookup, 1, fuse.EntryOutSize, "file"),
		hostileRequest(firstQueue, fuse.Mkdir, 1, fuse.EntryOutSize, 0o755, 0, "dir"),
		hostileRequest(firstQueue+1, fuse.Opendir, 1, fuse.OpenOutSize, 0, 0),
		hostileRequest(firstQueue+1, fuse.Readdirplus, 1, 4096, uint64(2), uint64(0), 4096, 0, uint64(0), 0, 0),
		hostileRequest(firstQueue, fuse.Write, 2, fuse.WriteOutSize, uint64(1), uint64(0), 4096, 0, uint64(0), 0, 0, make([]byte, 4096)),
		hostileRequest(firstQueue+1, fuse.Read, 2, 4096, uint64(1), uint64(0), 4096, 0, uint64(0), 0, 0),
		hostileRequest(firstQueue+1, fuse.Setlkw, 2, 0, uint64(1), uint64(1), uint64(0), uint64(10), unix.F_WRLCK, 1, 0, 0),
		hostileRequest(firstQueue+1, fuse.Setlkw, 2, 0, uint64(1), uint64(2), uint64(0), uint64(10), unix.F_WRLCK, 1, 0, 0),
		hostileRequest(firstQueue, fuse.Rename, 1, 0, uint64(1), "file", "other"),
		hostileRequest(firstQueue, fuse.Setxattr, 2, 0, 4, 0, "user.x", "value"),
		hostileRequest(firstQueue, fuse.Symlink, 1, fuse.EntryOutSize, "link", "/etc"),
		hostileRequest(firstQueue, fuse.Unlink, 1, 0, "file"),
		hostileRequest(hiprioQueue, fuse.Forget, 2, 0, uint64(1)),
		hostileRequest(hiprioQueue, fuse.BatchForget, 0, 0, 2, 0, uint64(2), uint64(1), uint64(3), uint64(1)),
		hostileRequest(hiprioQueue, fuse.Interrupt, 0, 0, uint64(7)),
		hostileRequest(firstQueue, fuse.Destroy, 0, 0),
	},
	Works: func(t testing.TB, d *virtiotest.Driver) {
		guest := guestOn(t, d, firstQueue)
		guest.Init()
		guest.Unlink(fuse.RootID, "mine") // of the time before
		e, fh, errno := guest.Create(fuse.RootID, "mine", unix.O_RDWR, 0o600, 0)
		if errno != 0 {
			t.Fatal(errno)
		}
		if n, errno := guest.Write(e.NodeID, fh, 0, []byte("data")); errno != 0 || n != 4 {
			t.Errorf("WRITE: %d, %v", n, errno)
		}
		guest.Release(e.NodeID, fh)
		guest.Forget(e.NodeID, 1)
	},
	MaxLines: 3, // numComplaints of package passthrough, which are logged once
}

func TestHostileDriver(t *testing.T) { virtiotest.TestHostile(t, &victim) }

// FuzzHostileDriver has one file system, emptied each time: to let go of one is
// slow.
func FuzzHostileDriver(f *testing.F) {
	root := smallRoot(f)
	same := victim
	same.New = func(t testing.TB, log *slog.Logger) virtio.Device {
		path := fmt.Sprintf("/proc/self/fd/%d", root.Fd())
		entries, err := os.ReadDir(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if err := os.RemoveAll(filepath.Join(path, e.Name())); err != nil {
				t.Fatal(err)
			}
		}
		return newSmallDevice(t, root, log)
	}
	virtiotest.FuzzHostile(f, &same)
}
