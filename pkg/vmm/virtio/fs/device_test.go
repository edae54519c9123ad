package fs

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit"
	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit/ratelimittest"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse/fusetest"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/passthrough"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

func newDevice(t testing.TB, c Config) *Device {
	t.Helper()
	if c.Root == nil {
		root, err := os.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = root.Close() })
		c.Root = root
	}
	if c.Tag == "" {
		c.Tag = "shared"
	}
	d, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	return d
}

// guestOn makes a client whose requests go through a queue of the driver's.
func guestOn(t testing.TB, d *virtiotest.Driver, queue int) *fusetest.Client {
	return fusetest.New(t, func(readable, writable [][]byte) uint32 {
		var lens []int
		for _, b := range writable {
			lens = append(lens, len(b))
		}
		written, out := d.Send(queue, readable, lens).Wait(t)
		for i, b := range out {
			copy(writable[i], b)
		}
		return written
	})
}

// guestWithFile makes a client with a session and a file of its own, open for
// reading and writing.
func guestWithFile(t testing.TB, d *virtiotest.Driver) (guest *fusetest.Client, e fuse.EntryOut, fh uint64) {
	t.Helper()
	guest = guestOn(t, d, firstQueue)
	guest.Init()
	e, fh, errno := guest.Create(fuse.RootID, "file", unix.O_RDWR, 0o644, 0)
	if errno != 0 {
		t.Fatal(errno)
	}
	return guest, e, fh
}

func newDriver(t testing.TB, d *Device) *virtiotest.Driver {
	return virtiotest.NewDriver(t, d, virtiotest.Options{Memory: virtiotest.NewMemory(t, 1<<20, 32<<20)})
}

func TestConfigSpace(t *testing.T) {
	d := newDevice(t, Config{Tag: "my share", Queues: 3})
	var all [48]byte
	for i := range all {
		all[i] = 0xff
	}
	d.ReadConfig(0, all[:])
	if string(bytes.TrimRight(all[:36], "\x00")) != "my share" || binary.LittleEndian.Uint32(all[36:]) != 3 {
		t.Errorf("%q", all)
	}
	if !bytes.Equal(all[40:], make([]byte, 8)) {
		t.Errorf("bytes past the end: %v", all[40:])
	}
	for _, offset := range []uint64{35, 39, 40, 1 << 40, ^uint64(0)} {
		p := []byte{0xff, 0xff}
		d.ReadConfig(offset, p)
		d.WriteConfig(offset, p)
	}
	if n := len(d.QueueSizes()); n != 4 {
		t.Errorf("%d queues", n)
	}
	if d.Type() != virtio.TypeFS || d.Features() != 0 {
		t.Errorf("type %d, features %#x", d.Type(), d.Features())
	}
}

func TestNewRefuses(t *testing.T) {
	file, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for name, c := range map[string]Config{
		"no tag":            {Root: dir},
		"long tag":          {Root: dir, Tag: strings.Repeat("x", 37)},
		"tag with a NUL":    {Root: dir, Tag: "a\x00b"},
		"tag with newline":  {Root: dir, Tag: "a\n"},
		"tag not UTF-8":     {Root: dir, Tag: "\xff"},
		"no root":           {Tag: "x"},
		"root is a file":    {Root: file, Tag: "x"},
		"proc is not /proc": {Root: dir, Tag: "x", ProcSelfFD: dir},
		"too many queues":   {Root: dir, Tag: "x", Queues: 65},
		"negative workers":  {Root: dir, Tag: "x", Workers: -1},
		"tiny limits":       {Root: dir, Tag: "x", Limits: passthrough.Limits{Descriptors: 3}},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestThroughQueues(t *testing.T) {
	dir := t.TempDir()
	root, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	d := newDriver(t, newDevice(t, Config{Root: root, Queues: 2}))
	guest, e, fh := guestWithFile(t, d)
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB: 256 pages each way
	if n, errno := guest.Write(e.NodeID, fh, 0, data); errno != 0 || n != len(data) {
		t.Fatalf("WRITE: %d, %v", n, errno)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("on the host: %d bytes, %v", len(got), err)
	}
	other := guestOn(t, d, firstQueue+1)
	if got, errno := other.Read(e.NodeID, fh, 0, len(data)); errno != 0 || !bytes.Equal(got, data) {
		t.Fatalf("READ through the other queue: %d bytes, %v", len(got), errno)
	}
	guestOn(t, d, hiprioQueue).Forget(e.NodeID, 1)
}

func TestConcurrentRequests(t *testing.T) {
	d := newDriver(t, newDevice(t, Config{}))
	guest := guestOn(t, d, firstQueue)
	guest.Init()
	var done sync.WaitGroup
	for i := range 32 {
		done.Go(func() {
			name := "file" + string(rune('a'+i))
			for range 20 {
				e, fh, errno := guest.Create(fuse.RootID, name, unix.O_RDWR|unix.O_EXCL, 0o644, 0)
				if errno != 0 {
					t.Errorf("CREATE: %v", errno)
					return
				}
				data := bytes.Repeat([]byte{byte(i)}, 10_000)
				if n, errno := guest.Write(e.NodeID, fh, 0, data); errno != 0 || n != len(data) {
					t.Errorf("WRITE: %d, %v", n, errno)
				}
				if got, errno := guest.Read(e.NodeID, fh, 0, 20_000); errno != 0 || !bytes.Equal(got, data) {
					t.Errorf("READ: %d bytes, %v", len(got), errno)
				}
				if errno := guest.Unlink(fuse.RootID, name); errno != 0 {
					t.Errorf("UNLINK: %v", errno)
				}
				if errno := guest.Release(e.NodeID, fh); errno != 0 {
					t.Errorf("RELEASE: %v", errno)
				}
				guest.Forget(e.NodeID, 1)
			}
		})
	}
	done.Wait()
}

// Linux does not wait for the answer to RELEASE, with which flock and OFD locks
// end: who asks for the lock behind it must get it, whichever worker is faster.
func TestLocksEndInOrder(t *testing.T) {
	d := newDriver(t, newDevice(t, Config{}))
	guest, e, b := guestWithFile(t, d)
	lock := fuse.FileLock{End: 1<<63 - 1, Type: unix.F_WRLCK}
	unlock := fuse.FileLock{End: 1<<63 - 1, Type: unix.F_UNLCK}
	for i := range 500 {
		// By turns a flock and an OFD lock: the owner of that is the open file.
		flags, released := uint32(fuse.LkFlock), uint32(fuse.ReleaseFlockUnlock)
		if i%2 == 1 {
			flags, released = 0, 0
		}
		a, errno := guest.Open(e.NodeID, unix.O_RDWR)
		if errno != 0 {
			t.Fatal(errno)
		}
		if errno := guest.Setlk(e.NodeID, a, 1, lock, flags); errno != 0 {
			t.Fatal(errno)
		}
		args := fusetest.Pack(a, 0, released, uint64(0))
		release := d.Send(firstQueue, [][]byte{guest.Header(fuse.Release, e.NodeID, guest.Unique(), fuse.InHeaderSize+len(args)), args}, []int{fuse.OutHeaderSize})
		if i%4 == 3 {
			if found, errno := guest.Getlk(e.NodeID, b, 2, lock); errno != 0 || found.Type != unix.F_UNLCK {
				t.Fatalf("round %d: GETLK: %+v, %v", i, found, errno)
			}
		}
		if errno := guest.Setlk(e.NodeID, b, 2, lock, flags); errno != 0 {
			t.Fatalf("round %d: %v", i, errno)
		}
		release.Wait(t)
		if errno := guest.Setlk(e.NodeID, b, 2, unlock, flags); errno != 0 {
			t.Fatal(errno)
		}
	}
}

func TestResetEndsLockWaits(t *testing.T) {
	d := newDriver(t, newDevice(t, Config{Workers: 1}))
	guest, e, fh := guestWithFile(t, d)
	lock := fuse.FileLock{End: 1<<63 - 1, Type: unix.F_WRLCK}
	if errno := guest.Setlk(e.NodeID, fh, 1, lock, 0); errno != 0 {
		t.Fatal(errno)
	}
	// Another owner waits. The only worker goes on.
	args := fusetest.Pack(fh, uint64(2), lock.Start, lock.End, lock.Type, uint32(0), uint32(0), uint32(0))
	header := guest.Header(fuse.Setlkw, e.NodeID, guest.Unique(), fuse.InHeaderSize+len(args))
	waiting := d.Send(firstQueue, [][]byte{header, args}, []int{fuse.OutHeaderSize})
	if _, errno := guest.Getattr(e.NodeID); errno != 0 {
		t.Fatal(errno)
	}
	d.Reset()
	if _, ok := waiting.Join(); ok {
		t.Error("the wait was completed, to a driver that had reset the device")
	}
	// The next driver starts from nothing.
	d.Activate()
	if _, errno := guest.Getattr(fuse.RootID); errno != unix.EIO {
		t.Errorf("GETATTR before INIT: %v", errno)
	}
	guest.Init()
	if _, errno := guest.Getattr(e.NodeID); errno != unix.ESTALE {
		t.Errorf("GETATTR of a node of before: %v", errno)
	}
	if _, errno := guest.Read(e.NodeID, fh, 0, 10); errno != unix.EBADF {
		t.Errorf("READ of a handle of before: %v", errno)
	}
	e, errno := guest.Lookup(fuse.RootID, "file")
	if errno != 0 {
		t.Fatal(errno)
	}
	fh, errno = guest.Open(e.NodeID, unix.O_RDWR)
	if errno != 0 {
		t.Fatal(errno)
	}
	if errno := guest.Setlkw(guest.Unique(), e.NodeID, fh, 3, lock, 0); errno != 0 {
		t.Errorf("the lock of before is still held: %v", errno)
	}
}

// TestResetEndsLimitWaits resets a device all of whose workers wait for time that
// does not pass.
func TestResetEndsLimitWaits(t *testing.T) {
	clock := ratelimittest.New()
	limit, err := ratelimit.New(ratelimit.Limits{Bytes: ratelimit.Rate{PerSecond: 4096, Burst: 4096}}, clock)
	if err != nil {
		t.Fatal(err)
	}
	d := newDriver(t, newDevice(t, Config{Limit: limit}))
	guest := guestOn(t, d, firstQueue)
	guest.Init()
	readable, writable := readRequest(4096)(guest) // which writes all that the limit allows
	for range 2 * defaultWorkers {
		d.Send(firstQueue, readable, writable)
	}
	clock.AwaitTimer()
	d.Reset()
	d.Activate()
	guest.Init()
	if _, errno := guest.Lookup(fuse.RootID, "file"); errno != 0 {
		t.Errorf("LOOKUP after the reset: %v", errno)
	}
}

func TestBrokenRing(t *testing.T) {
	device := newDevice(t, Config{})
	d := virtiotest.NewDriver(t, device, virtiotest.Options{MayFail: true})
	d.Rings[firstQueue].SetAvail(0, 0xffff)
	d.Rings[firstQueue].SetAvailIdx(1)
	d.Kick(firstQueue)
	if err := d.Failed(); err == nil {
		t.Error("no error")
	}
}

// TestOddChains sends requests cut into pieces as no kernel does.
func TestOddChains(t *testing.T) {
	d := newDriver(t, newDevice(t, Config{}))
	guest, e, fh := guestWithFile(t, d)
	// WRITE with a byte in each buffer, the header too.
	data := []byte("some bytes")
	whole := append(guest.Header(fuse.Write, e.NodeID, 77, fuse.InHeaderSize+fuse.WriteInSize+len(data)),
		fusetest.Pack(fh, uint64(0), len(data), 0, uint64(0), 0, 0, data)...)
	var bytewise [][]byte
	for i := range whole {
		bytewise = append(bytewise, whole[i:i+1])
	}
	ones := make([]int, fuse.OutHeaderSize+fuse.WriteOutSize)
	for i := range ones {
		ones[i] = 1
	}
	written, out := d.Send(firstQueue, bytewise, ones).Wait(t)
	reply := bytes.Join(out, nil)
	if written != uint32(len(reply)) || binary.LittleEndian.Uint32(reply[4:]) != 0 || binary.LittleEndian.Uint32(reply[16:]) != uint32(len(data)) {
		t.Errorf("%d bytes: %v", written, reply)
	}
	if got, errno := guest.Read(e.NodeID, fh, 0, 100); errno != 0 || !bytes.Equal(got, data) {
		t.Errorf("READ: %q, %v", got, errno)
	}
	// No header, and no room for a reply: completed with nothing written.
	for name, r := range map[string]*virtiotest.Request{
		"short header": d.Send(firstQueue, [][]byte{whole[:39]}, []int{100}),
		"no header":    d.Send(firstQueue, nil, []int{100}),
		"no room":      d.Send(firstQueue, [][]byte{whole}, nil),
		"little room":  d.Send(firstQueue, [][]byte{whole}, []int{15}),
	} {
		if written, _ := r.Wait(t); written != 0 {
			t.Errorf("%s: %d bytes written", name, written)
		}
	}
}

func benchmark(b *testing.B, requests int, bytesEach int64, prepare func(guest *fusetest.Client) (readable [][]byte, writable []int)) {
	d := newDriver(b, newDevice(b, Config{}))
	guest := guestOn(b, d, firstQueue)
	guest.Init()
	readable, writable := prepare(guest)
	var all []*virtiotest.Request
	for range requests {
		all = append(all, d.Prepare(firstQueue, readable, writable))
	}
	b.SetBytes(bytesEach)
	b.ReportAllocs()
	for b.Loop() {
		for _, r := range all {
			r.Submit()
		}
		for _, r := range all {
			r.Join()
		}
	}
	b.ReportMetric(float64(b.N*requests)/b.Elapsed().Seconds(), "requests/s")
}

func getattrRequest(guest *fusetest.Client) ([][]byte, []int) {
	args := make([]byte, fuse.GetattrInSize)
	return [][]byte{guest.Header(fuse.Getattr, fuse.RootID, 1, fuse.InHeaderSize+len(args)), args}, []int{fuse.OutHeaderSize, fuse.AttrOutSize}
}

func readRequest(size int) func(guest *fusetest.Client) ([][]byte, []int) {
	return func(guest *fusetest.Client) ([][]byte, []int) {
		e, fh, _ := guest.Create(fuse.RootID, "file", unix.O_RDWR, 0o644, 0)
		guest.Write(e.NodeID, fh, 0, make([]byte, size))
		args := fusetest.Pack(fh, uint64(0), size, 0, uint64(0), 0, 0)
		writable := []int{fuse.OutHeaderSize}
		for range size / 4096 {
			writable = append(writable, 4096)
		}
		return [][]byte{guest.Header(fuse.Read, e.NodeID, 1, fuse.InHeaderSize+len(args)), args}, writable
	}
}

func BenchmarkGetattr(b *testing.B)       { benchmark(b, 1, 0, getattrRequest) }
func BenchmarkGetattrDepth8(b *testing.B) { benchmark(b, 8, 0, getattrRequest) }
func BenchmarkRead4K(b *testing.B)        { benchmark(b, 1, 4096, readRequest(4096)) }
func BenchmarkRead1M(b *testing.B)        { benchmark(b, 1, 1<<20, readRequest(1<<20)) }
func BenchmarkRead1MDepth4(b *testing.B)  { benchmark(b, 4, 4<<20, readRequest(1<<20)) }
