//go:build guestkernel

package net

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	gonet "net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/console"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/rng"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

// The test of this file boots the real guest kernel, whose virtio-net driver and
// TCP are the peers that count; see "make test-guest". The guest's only program
// is this test binary, static, as process 1.

func TestMain(m *testing.M) {
	if os.Getpid() == 1 {
		err := guestInit()
		_ = os.WriteFile("/dev/kmsg", fmt.Appendf(nil, "<1>guest: the end: %v\n", err), 0)
		unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}
	os.Exit(m.Run())
}

// nic is a NIC of the test: its interface in the host's namespace and the
// addresses at both ends.
type nic struct {
	tap         string
	mac         [6]byte
	host, guest string
}

var nics = []nic{
	{"tap0", testMAC, "10.0.0.1/24", "10.0.0.2/24"},
	{"tap1", [6]byte{2, 0, 0, 0, 0, 9}, "10.0.1.1/24", "10.0.1.2/24"},
}

const (
	guestPort = 7
	streamed  = 8 << 20 // bytes in each direction
)

// pattern is what is streamed.
func pattern() io.Reader {
	block := make([]byte, 61<<10)
	for i := range block {
		block[i] = byte(i * 13)
	}
	r, w := io.Pipe()
	go func() {
		for left := streamed; left > 0; left -= len(block) {
			w.Write(block[:min(left, len(block))])
		}
		w.Close()
	}()
	return r
}

// guestInit is process 1 of the guest: it does what connections ask for until
// one says "quit".
func guestInit() error {
	for dir, kind := range map[string]string{"/dev": "devtmpfs", "/proc": "proc", "/sys": "sysfs"} {
		if err := unix.Mount(kind, dir, kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	if err := guestUp(nics[0]); err != nil {
		return err
	}
	listener, err := gonet.Listen("tcp", fmt.Sprintf(":%d", guestPort))
	if err != nil {
		return err
	}
	for {
		c, err := listener.Accept()
		if err != nil {
			return err
		}
		var word [4]byte
		if _, err := io.ReadFull(c, word[:]); err != nil {
			return err
		}
		switch string(word[:]) {
		case "pull":
			io.Copy(c, pattern())
		case "push":
			digest := sha256.New()
			io.Copy(digest, c)
			fmt.Fprintf(c, "%x", digest.Sum(nil))
		case "look":
			fmt.Fprint(c, guestLook())
		case "plug":
			if err := os.WriteFile("/sys/bus/pci/rescan", []byte("1"), 0); err != nil {
				return err
			}
			fmt.Fprint(c, guestUp(nics[1]))
		case "away":
			fmt.Fprint(c, guestRemove(nics[1]))
		case "quit":
			return c.Close()
		}
		c.Close()
	}
}

// guestLink finds a NIC by its address, as the agent does.
func guestLink(n nic) (netlink.Link, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		if bytes.Equal(l.Attrs().HardwareAddr, n.mac[:]) {
			return l, nil
		}
	}
	return nil, fmt.Errorf("no link has the address %x", n.mac)
}

func guestUp(n nic) error {
	l, err := guestLink(n)
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(n.guest)
	if err != nil {
		return err
	}
	return errors.Join(netlink.AddrAdd(l, addr), netlink.LinkSetUp(l))
}

// guestRemove has the kernel let go of a NIC's function.
func guestRemove(n nic) error {
	l, err := guestLink(n)
	if err != nil {
		return err
	}
	function, err := filepath.EvalSymlinks("/sys/class/net/" + l.Attrs().Name + "/device/..")
	if err != nil {
		return err
	}
	return os.WriteFile(function+"/remove", []byte("1"), 0)
}

// guestLook is what the guest says of its first link.
func guestLook() string {
	l, err := guestLink(nics[0])
	if err != nil {
		return err.Error()
	}
	queues, _ := filepath.Glob("/sys/class/net/" + l.Attrs().Name + "/queues/rx-*")
	// The carrier is what the device says; the kernel's operational state comes up to a second after it.
	carrier := "no carrier"
	if l.Attrs().RawFlags&unix.IFF_LOWER_UP != 0 {
		carrier = "carrier"
	}
	return fmt.Sprintf("%s mtu %d queues %d %s gso %d", l.Attrs().Name, l.Attrs().MTU, len(queues), carrier, l.Attrs().GSOMaxSize)
}

// network is the host's namespace.
type network struct {
	t  *testing.T
	do chan func()
}

func newNetwork(t *testing.T) *network {
	n := &network{t: t, do: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread()
		ready <- unix.Unshare(unix.CLONE_NEWNET)
		for f := range n.do {
			f()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { close(n.do) })
	return n
}

func (n *network) in(f func() error) {
	n.t.Helper()
	done := make(chan error)
	n.do <- func() { done <- f() }
	if err := <-done; err != nil {
		n.t.Fatal(err)
	}
}

// device makes a tap with its queues and the device over it.
func (n *network) device(c nic, queues, mtu int) *Device {
	n.t.Helper()
	var device *Device
	n.in(func() error {
		var taps []*os.File
		for range queues {
			tap, err := openTap(c.tap, unix.IFF_TAP|unix.IFF_NO_PI|unix.IFF_VNET_HDR, queues > 1)
			if err != nil {
				return err
			}
			defer tap.Close()
			taps = append(taps, tap)
		}
		l, err := netlink.LinkByName(c.tap)
		if err != nil {
			return err
		}
		addr, err := netlink.ParseAddr(c.host)
		if err != nil {
			return err
		}
		if err := errors.Join(netlink.LinkSetMTU(l, mtu), netlink.AddrAdd(l, addr), netlink.LinkSetUp(l)); err != nil {
			return err
		}
		device, err = New(Config{Taps: taps, MAC: c.mac, MTU: mtu, Log: slog.Default()})
		return err
	})
	return device
}

// dial connects to the guest at a NIC, and says the word.
func (n *network) dial(c nic, word string) *gonet.TCPConn {
	n.t.Helper()
	host, _, _ := strings.Cut(c.guest, "/")
	var conn gonet.Conn
	n.in(func() error {
		var err error
		for range 600 { // the guest has to boot
			if conn, err = gonet.DialTimeout("tcp", fmt.Sprintf("%s:%d", host, guestPort), time.Minute); err == nil {
				_, err = conn.Write([]byte(word))
				return err
			}
			time.Sleep(100 * time.Millisecond)
		}
		return err
	})
	conn.SetDeadline(time.Now().Add(5 * time.Minute)) // lost, not late
	return conn.(*gonet.TCPConn)
}

func (n *network) ask(c nic, word string) string {
	n.t.Helper()
	conn := n.dial(c, word)
	defer conn.Close()
	answer, err := io.ReadAll(conn)
	if err != nil {
		n.t.Fatalf("%s: %v", word, err)
	}
	return string(answer)
}

// stream moves data in both directions and checks it.
func (n *network) stream(c nic) {
	n.t.Helper()
	digest := sha256.New()
	io.Copy(digest, pattern())
	want := fmt.Sprintf("%x", digest.Sum(nil))
	push := n.dial(c, "push")
	defer push.Close()
	if _, err := io.Copy(push, pattern()); err != nil {
		n.t.Fatal(err)
	}
	push.CloseWrite()
	if got, err := io.ReadAll(push); string(got) != want || err != nil {
		n.t.Errorf("the guest received %s, %v; want %s", got, err, want)
	}
	pull := n.dial(c, "pull")
	defer pull.Close()
	digest.Reset()
	if _, err := io.Copy(digest, pull); err != nil {
		n.t.Fatal(err)
	}
	if got := fmt.Sprintf("%x", digest.Sum(nil)); got != want {
		n.t.Errorf("the host received %s, want %s", got, want)
	}
}

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
		kernel = "../../../../bin/vmlinux"
	}
	network := newNetwork(t)
	device := network.device(nics[0], 2, 1400)
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	m, err := vmm.New(vmm.Config{
		KVM: open("/dev/kvm", os.O_RDWR), Kernel: open(kernel, os.O_RDONLY), Initrd: virtiotest.Initrd(t),
		CommandLine: "console=hvc0 panic=-1", MemoryBytes: 512 << 20, VCPUs: 2,
		Devices: []virtio.Device{console.New(os.Stderr), rng.New(rand.Reader), device}, Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		if exit, err := m.Run(); exit.Reason != vmm.ExitPowerOff || err != nil {
			t.Errorf("exit %+v, %v", exit, err)
		}
	})
	defer running.Wait()
	defer m.Stop()

	look := network.ask(nics[0], "look")
	t.Log(look)
	if !strings.Contains(look, "mtu 1400 queues 2 carrier") {
		t.Errorf("the guest's link: %s", look)
	}
	begin := time.Now()
	network.stream(nics[0])
	s := device.Stats()
	t.Logf("streamed in %v: %+v", time.Since(begin), s)
	for way, c := range map[string]Counters{"to": s.RX, "from": s.TX} {
		// The other way's acknowledgements are among them.
		if c.Bytes < streamed || c.Packets > streamed/1360 {
			t.Errorf("%s the guest: %+v: nothing was segmented by the host", way, c)
		}
	}

	for round := range 3 {
		late := network.device(nics[1], 1, 1500)
		at, err := m.Attach(late)
		if err != nil {
			t.Fatal(err)
		}
		if answer := network.ask(nics[0], "plug"); answer != "<nil>" {
			t.Fatalf("round %d: NIC at %s: %s", round, at, answer)
		}
		network.stream(nics[1])
		if s := late.Stats(); s.RX.Bytes < streamed || s.TX.Bytes < streamed {
			t.Errorf("round %d: %+v", round, s)
		}
		if answer := network.ask(nics[0], "away"); answer != "<nil>" {
			t.Fatalf("round %d: %s", round, answer)
		}
		if err := m.Detach(at); err != nil {
			t.Fatal(err)
		}
		if err := late.Close(); err != nil { // the tap goes, too
			t.Fatal(err)
		}
	}
	network.dial(nics[0], "quit").Close()
	running.Wait()
	device.Close()
}
