//go:build guestkernel

package vsock

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	linuxvsock "github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/console"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

// The tests of this file boot the real guest kernel, whose vsock driver is the
// peer that counts; see "make test-guest". The guest's only program is this
// test binary, static, as process 1.

// Ports that the guest listens at.
const (
	guestEcho   = 10 // sends back what it gets
	guestSum    = 11 // reads to the end and answers with length and checksum
	guestSource = 12 // is told a length, writes as much and closes at once
	guestMute   = 13 // accepts and never reads
	guestClosed = 14 // nobody

	hostReport = 1024 // the guest connects to it and reports on its own calls
	hostClosed = 1025 // is refused
)

func TestMain(m *testing.M) {
	if os.Getpid() == 1 {
		guestInit()
	}
	os.Exit(m.Run())
}

// guestInit is process 1 of the guest.
func guestInit() {
	if err := unix.Mount("devtmpfs", "/dev", "devtmpfs", 0, ""); err != nil {
		panic(err)
	}
	check := func(err error) {
		if err != nil {
			os.WriteFile("/dev/kmsg", []byte("<1>guest: "+err.Error()+"\n"), 0)
			panic(err)
		}
	}
	serve := func(port uint32, handle func(c *linuxvsock.Conn)) {
		l, err := linuxvsock.Listen(port, nil)
		check(err)
		go func() {
			for {
				c, err := l.Accept()
				check(err)
				go handle(c.(*linuxvsock.Conn))
			}
		}()
	}
	serve(guestEcho, func(c *linuxvsock.Conn) {
		copyAll(c, c)
		c.CloseWrite()
		c.Close()
	})
	serve(guestSum, func(c *linuxvsock.Conn) {
		h := crc32.NewIEEE()
		n, _ := copyAll(h, c)
		binary.Write(c, binary.LittleEndian, n)
		binary.Write(c, binary.LittleEndian, h.Sum32())
		c.Close()
	})
	serve(guestSource, func(c *linuxvsock.Conn) {
		var n int64
		binary.Read(c, binary.LittleEndian, &n)
		copyAll(c, stream(7, n))
		c.Close()
	})
	serve(guestMute, func(c *linuxvsock.Conn) {
		defer c.Close() // not collected meanwhile
		select {}
	})

	// The kernel gives up after two seconds, which is little in the test bed.
	dial := func(cid, port uint32) (c *linuxvsock.Conn, err error) {
		for {
			if c, err = linuxvsock.Dial(cid, port, nil); !errors.Is(err, unix.ETIMEDOUT) {
				return c, err
			}
		}
	}
	// What connect(2) says to each of these is the report.
	var report bytes.Buffer
	_, err := dial(hostCID, hostClosed)
	fmt.Fprintf(&report, "closed port: %v\n", errors.Is(err, unix.ECONNRESET))
	_, err = dial(77, hostReport)
	fmt.Fprintf(&report, "other machine: %v\n", errors.Is(err, unix.ECONNRESET))
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_SEQPACKET, 0)
	check(err)
	err = unix.Connect(fd, &unix.SockaddrVM{CID: hostCID, Port: hostReport})
	fmt.Fprintf(&report, "seqpacket: %v\n", err != nil)
	c, err := dial(hostCID, hostReport)
	check(err)
	_, err = c.Write(report.Bytes())
	check(err)
	c.Close()
	select {}
}

// bootLinux runs a guest until the test ends, and returns what it reported.
func bootLinux(t *testing.T) (d *Device, report string) {
	t.Helper()
	open := func(path string, flags int) *os.File {
		f, err := os.OpenFile(path, flags, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	kernel := os.Getenv("MICROVM_KERNEL")
	if kernel == "" {
		kernel = "../../../../bin/vmlinux"
	}
	accept, accepted := listenHost(t)
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	d = New(Config{Log: log, Accept: func(port uint32) (*os.File, error) {
		if port == hostClosed {
			return nil, errors.New("nobody listens")
		}
		return accept(port)
	}})
	m, err := vmm.New(vmm.Config{
		KVM: open("/dev/kvm", os.O_RDWR), Kernel: open(kernel, os.O_RDONLY), Initrd: virtiotest.Initrd(t),
		CommandLine: "earlyprintk=ttyS0 console=hvc0 panic=-1", MemoryBytes: 512 << 20, VCPUs: 2,
		Devices: []virtio.Device{console.New(os.Stderr), d}, DebugConsole: os.Stderr, Log: log, Phase: func(string) {},
	})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan string, 1)
	go func() {
		exit, err := m.Run()
		ended <- fmt.Sprint(exit, err)
	}()
	t.Cleanup(func() {
		m.Stop()
		t.Log("the machine ended: ", <-ended)
	})
	select {
	case f := <-accepted:
		b, err := io.ReadAll(unixConn(t, f))
		if err != nil {
			t.Fatal(err)
		}
		return d, string(b)
	case why := <-ended:
		ended <- why
		t.Fatal("the guest did not connect")
	case <-time.After(5 * time.Minute):
		t.Fatal("the guest hangs")
	}
	return nil, ""
}

func TestLinux(t *testing.T) {
	d, report := bootLinux(t)
	if want := "closed port: true\nother machine: true\nseqpacket: true\n"; report != want {
		t.Errorf("the guest reports:\n%swant:\n%s", report, want)
	}
	call := func(t *testing.T, port uint32) *net.UnixConn {
		f, err := d.Dial(t.Context(), port)
		if err != nil {
			t.Fatal(err)
		}
		return unixConn(t, f)
	}
	g := guest{device: d}
	gone := func(t *testing.T, n int) {
		waitFor(t, "the connections are gone", func() bool { return g.connections() == n })
	}
	const size = 8 << 20

	t.Run("refused", func(t *testing.T) {
		if _, err := d.Dial(t.Context(), guestClosed); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%v", err)
		}
	})
	t.Run("echo", func(t *testing.T) {
		c := call(t, guestEcho)
		go func() {
			copyAll(c, stream(1, size))
			c.CloseWrite()
		}()
		wantStream(t, "echo", c, 1, size)
		c.Close()
		gone(t, 0)
	})
	t.Run("host writes and half-closes", func(t *testing.T) {
		c := call(t, guestSum)
		n, sum := sum(t, stream(2, size))
		go func() {
			copyAll(c, stream(2, size))
			c.CloseWrite()
		}()
		var gotN int64
		var got uint32
		if err := errors.Join(binary.Read(c, binary.LittleEndian, &gotN), binary.Read(c, binary.LittleEndian, &got)); err != nil || gotN != n || got != sum {
			t.Errorf("the guest got %d bytes with %08x, want %d with %08x; %v", gotN, got, n, sum, err)
		}
		c.Close()
		gone(t, 0)
	})
	t.Run("guest writes and closes", func(t *testing.T) {
		for range 50 {
			c := call(t, guestSource)
			binary.Write(c, binary.LittleEndian, int64(size/8))
			time.Sleep(time.Millisecond) // the guest is ahead
			wantStream(t, "source", c, 7, size/8)
			c.Close()
		}
		gone(t, 0)
	})
	t.Run("host closes early", func(t *testing.T) {
		for range 20 {
			c := call(t, guestSource)
			binary.Write(c, binary.LittleEndian, int64(1<<40))
			io.CopyN(io.Discard, c, 300000)
			c.Close()
		}
		gone(t, 0)
	})
	t.Run("many at once", func(t *testing.T) {
		var wg sync.WaitGroup
		mute := call(t, guestMute)
		go copyAll(mute, stream(1, size))
		for i := range 100 {
			wg.Go(func() {
				c := call(t, guestEcho)
				const size = 100000
				go func() {
					copyAll(c, stream(uint64(i), size))
					c.CloseWrite()
				}()
				wantStream(t, "echo", c, uint64(i), size)
				c.Close()
			})
		}
		wg.Wait()
		gone(t, 1)
	})

	// Nothing is asserted of how long it takes.
	c := call(t, guestEcho)
	p := make([]byte, 1)
	const trips = 50
	begin := time.Now()
	for range trips {
		c.Write(p)
		io.ReadFull(c, p)
	}
	t.Logf("round trip: %v", time.Since(begin)/trips)
	c.Close()
	begin = time.Now()
	for range trips {
		c := call(t, guestEcho)
		c.Close()
	}
	t.Logf("dial: %v", time.Since(begin)/trips)
	const much = 16 << 20
	c = call(t, guestSource)
	begin = time.Now()
	binary.Write(c, binary.LittleEndian, int64(much))
	n, _ := copyAll(io.Discard, c)
	t.Logf("guest to host: %.1f MB/s", float64(n)/1e6/time.Since(begin).Seconds())
	c = call(t, guestSum)
	begin = time.Now()
	copyAll(c, io.LimitReader(zeros{}, much))
	c.CloseWrite()
	io.ReadAll(c)
	t.Logf("host to guest: %.1f MB/s", much/1e6/time.Since(begin).Seconds())
}
