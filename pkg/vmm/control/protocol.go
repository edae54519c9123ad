// Package control is the socket between the shim and the VMM it started: a
// SOCK_SEQPACKET pair that carries one JSON message a packet, and descriptors
// beside it (SCM_RIGHTS). Client is the shim's end, Server the VMM's.
//
// The VMM opens nothing by name: kernel, images and disks arrive as descriptors
// with the boot request, the shared directory is its root directory, and a vsock
// connection leaves as the end of a socketpair.
package control

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit"
)

// Descriptors that the VMM is started with.
const (
	// SocketFD is its end of the control socket.
	SocketFD = 3
	// RootFD is Options.Root.
	RootFD = 4
)

// NameArgument is the VMM's first argument where it has any: those that follow are
// for people who look at `ps`, see Options.Name.
const NameArgument = "sandbox"

// Methods of requests (shim to VMM), each answered by a reply with its id.
const (
	methodBoot   = "boot"
	methodDial   = "dial"
	methodPause  = "pause"
	methodResume = "resume"
	methodStats  = "stats"
	methodStop   = "stop"
	methodAttach = "attach" // with the device's descriptors
	methodDetach = "detach"
)

// Notifications (VMM to shim), not answered.
const (
	notePhase    = "phase"
	noteAccepted = "accepted"
	noteExit     = "exit"
)

// Roles of the descriptors that come with the boot request.
const (
	FileKVM     = "kvm"     // /dev/kvm
	FileKernel  = "kernel"  // vmlinux
	FileImage   = "image"   // the guest's root file system
	FileConsole = "console" // where the guest's console goes
)

// FileDisk is the role of the n-th of Config.Disks.
func FileDisk(n int) string { return fmt.Sprintf("disk%d", n) }

// FileTap is the role of the tap queue behind a queue pair of the n-th of
// Config.NICs.
func FileTap(nic, pair int) string { return fmt.Sprintf("tap%d.%d", nic, pair) }

const (
	// maxMessage bounds a packet. The largest is the boot request.
	maxMessage = 64 << 10
	// maxFiles is the kernel's SCM_MAX_FD.
	maxFiles = 253
	// readPatience is how long the other end may take to make room for a message.
	readPatience = 30 * time.Second
)

// errUnread is about an end that does not read: one that is stopped, or hostile.
var errUnread = fmt.Errorf("the other end of the control socket does not read: %w", context.DeadlineExceeded)

// Config describes the machine that a boot request asks for.
type Config struct {
	VCPUs       int    `json:"vcpus"`
	MemoryBytes uint64 `json:"memory_bytes"`
	// MaxVCPUs and MaxMemoryBytes are up to where Resize goes; zero: it does not.
	MaxVCPUs       int    `json:"max_vcpus,omitempty"`
	MaxMemoryBytes uint64 `json:"max_memory_bytes,omitempty"`
	// CommandLine is added to the kernel parameters that the VMM itself needs.
	CommandLine string `json:"command_line,omitempty"`
	// SharedTag names the virtio-fs device that carries the VMM's root directory;
	// empty when there is none.
	SharedTag string `json:"shared_tag,omitempty"`
	Disks     []Disk `json:"disks,omitempty"`
	NICs      []NIC  `json:"nics,omitempty"`
	// RateLimits are for the devices of the start and those that come later.
	RateLimits RateLimits `json:"rate_limits,omitzero"`
	// ListenPorts are the host vsock ports that the guest may connect to.
	ListenPorts []uint32 `json:"listen_ports,omitempty"`
	// DebugConsole turns the serial port on and sends early kernel messages to
	// it; it ends where the console ends.
	DebugConsole bool `json:"debug_console,omitempty"`
}

// RateLimits are each shared by all devices that they are for. The zero value is
// none.
type RateLimits struct {
	// Disk is for virtio-blk disks and the shared directory. What a guest reads
	// from persistent memory nobody sees.
	Disk ratelimit.Limits `json:"disk,omitzero"`
	// NetworkReceive and NetworkTransmit are for NICs, from the guest's side: what
	// it receives and what it sends. An operation is a frame.
	NetworkReceive  ratelimit.Limits `json:"network_receive,omitzero"`
	NetworkTransmit ratelimit.Limits `json:"network_transmit,omitzero"`
}

// Disk is a virtio-blk device over a FileDisk descriptor.
type Disk struct {
	ReadOnly bool `json:"read_only,omitempty"`
	// Serial is what the guest reads as the device's id, at most 20 bytes.
	Serial string `json:"serial,omitempty"`
	// Pmem makes it a virtio-pmem device instead, over a regular file that is not
	// large, does not shrink, and is read only. It is for AttachDisk.
	Pmem bool `json:"pmem,omitempty"`
}

// NIC is a virtio-net device over tap descriptors: one FileTap for each queue
// pair. The taps were opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, with
// IFF_MULTI_QUEUE if there are several, and are non-blocking.
type NIC struct {
	// MAC is the guest's address, "02:00:00:00:00:01".
	MAC string `json:"mac"`
	// MTU is what the guest takes as its link's MTU, in bytes; zero leaves it to
	// the guest.
	MTU int `json:"mtu,omitempty"`
	// QueuePairs is the number of the taps.
	QueuePairs int `json:"queue_pairs"`
}

// checkTaps says whether there is a tap for each queue pair.
func (n NIC) checkTaps(taps []*os.File) error {
	if n.QueuePairs < 1 || len(taps) != n.QueuePairs {
		return fmt.Errorf("%d queue pairs, %d taps", n.QueuePairs, len(taps))
	}
	return nil
}

// Reasons of an Exit.
const (
	ReasonPowerOff    = "poweroff"     // the guest powered itself off
	ReasonReset       = "reset"        // the guest asked for a reset
	ReasonPanic       = "panic"        // the guest's kernel panicked
	ReasonTripleFault = "triple-fault" // a vCPU shut down
	ReasonStopped     = "stopped"      // the shim's end of the socket was closed
	ReasonError       = "error"        // the VMM or KVM failed
	ReasonKilled      = "killed"       // the VMM process was killed by a signal
)

// Exit says how a machine ended.
type Exit struct {
	Reason string `json:"reason"`
	// Detail is for people; it may hold bytes of the guest's choosing.
	Detail string `json:"detail,omitempty"`
}

func (e Exit) String() string {
	if e.Detail == "" {
		return e.Reason
	}
	return e.Reason + ": " + e.Detail
}

// Stats are counters of a running machine.
type Stats struct {
	// Exits counts returns from KVM_RUN to the VMM by reason, over all vCPUs.
	Exits map[string]uint64 `json:"exits"`
	// KVM are the kernel's own counters of the vCPUs, added up, by the
	// kernel's names; empty where it keeps none.
	KVM map[string]uint64 `json:"kvm,omitempty"`
	// NICs are those on the bus now, by PCI address.
	NICs map[string]NICStats `json:"nics,omitempty"`
	// Size is what the guest has now.
	Size Size `json:"size"`
	// Goroutines are the VMM's.
	Goroutines int `json:"goroutines"`
}

// NICStats are the counters of a NIC, from the guest's side: what it received
// and what it sent.
type NICStats struct {
	MAC string      `json:"mac"`
	RX  LinkTraffic `json:"rx"`
	TX  LinkTraffic `json:"tx"`
}

// LinkTraffic counts frames that went through in one direction, and their bytes;
// a segmented frame counts as the one that it was in the guest. Dropped frames
// are those that the VMM or the tap refused.
type LinkTraffic struct {
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
	Dropped uint64 `json:"dropped"`
}

// Phase is a step of a machine's start.
type Phase struct {
	Name string `json:"name"`
	// Monotonic is CLOCK_MONOTONIC in nanoseconds, so that it can be compared
	// with another process's.
	Monotonic int64 `json:"monotonic"`
}

type message struct {
	ID     uint64          `json:"id,omitempty"`
	Method string          `json:"method,omitempty"`
	Error  string          `json:"error,omitempty"`
	Body   json.RawMessage `json:"body,omitempty"`

	noRoom bool // it came with descriptors, for which this process had no room
}

type bootBody struct {
	Config Config `json:"config"`
	// Files are the roles of the descriptors that came along, in order.
	Files []string `json:"files"`
}

type portBody struct {
	Port uint32 `json:"port"`
}

// attachBody has exactly one device. A NIC comes with its taps, in the order of
// the queue pairs, a disk with its file.
type attachBody struct {
	NIC  *NIC  `json:"nic,omitempty"`
	Disk *Disk `json:"disk,omitempty"`
}

// addressBody is a PCI address, "0000:00:07.0".
type addressBody struct {
	Address string `json:"address"`
}

// errNoRoom says which of the two processes should be allowed more.
func errNoRoom(process string) error {
	return fmt.Errorf("the %s has no room for the descriptors that came with the message: %w", process, unix.EMFILE)
}

// conn sends and receives messages with descriptors. send may be called
// concurrently, receive by one goroutine.
type conn struct {
	unix     *net.UnixConn
	writing  chan struct{} // has room for whoever writes; for the deadline is the socket's
	patience time.Duration
}

// newConn takes over fd, one end of a SOCK_SEQPACKET pair.
func newConn(file *os.File) (*conn, error) {
	c, err := net.FileConn(file) // duplicates the descriptor
	file.Close()
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errors.New("control socket is not a unix socket")
	}
	return &conn{unix: u, writing: make(chan struct{}, 1), patience: readPatience}, nil
}

// send writes one packet. The files stay the caller's. It waits for room, and for
// other writers, until ctx ends, and no longer than c.patience.
func (c *conn) send(ctx context.Context, m message, body any, files ...*os.File) error {
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return fmt.Errorf("control message %s: %w", m.Method, err)
		}
		m.Body = b
	}
	packet, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("control message %s: %w", m.Method, err)
	}
	if len(packet) > maxMessage || len(files) > maxFiles {
		return fmt.Errorf("control message %s is too large: %d bytes, %d files", m.Method, len(packet), len(files))
	}
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			// SyscallConn, not Fd: Fd would make the file blocking.
			raw, err := f.SyscallConn()
			if err != nil {
				return fmt.Errorf("control message %s: %w", m.Method, err)
			}
			if err := raw.Control(func(fd uintptr) { fds[i] = int(fd) }); err != nil {
				return fmt.Errorf("control message %s: %w", m.Method, err)
			}
		}
		oob = unix.UnixRights(fds...)
	}
	if err := c.write(ctx, packet, oob); err != nil {
		return fmt.Errorf("control message %s: %w", m.Method, err)
	}
	return nil
}

func (c *conn) write(ctx context.Context, packet, oob []byte) error {
	ctx, cancel := context.WithTimeoutCause(ctx, c.patience, errUnread)
	defer cancel()
	select {
	case c.writing <- struct{}{}:
		defer func() { <-c.writing }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if err := c.unix.SetWriteDeadline(time.Time{}); err != nil {
		return err
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		c.unix.SetWriteDeadline(time.Unix(1, 0)) // has passed
	})
	_, _, err := c.unix.WriteMsgUnix(packet, oob, nil)
	if !stop() {
		<-ended // else it would be the next writer's deadline
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = context.Cause(ctx)
	}
	return err
}

// receive reads one packet; the caller owns the files. buf and oob are scratch
// space of at least maxMessage+1 and rightsSpace bytes. io.EOF when the peer is
// gone.
func (c *conn) receive(buf, oob []byte) (message, []*os.File, error) {
	n, oobn, flags, _, err := c.unix.ReadMsgUnix(buf, oob)
	// A packet without a byte is io.EOF, too, and may have come with descriptors.
	files, rightsErr := parseRights(oob[:oobn])
	if err = cmp.Or(err, rightsErr); err != nil {
		closeAll(files)
		return message{}, nil, err
	}
	if flags&syscall.MSG_TRUNC != 0 || n > maxMessage {
		closeAll(files)
		return message{}, nil, errors.New("control message was truncated")
	}
	var m message
	if err := json.Unmarshal(buf[:n], &m); err != nil {
		closeAll(files)
		return message{}, nil, fmt.Errorf("control message: %w", err)
	}
	if flags&syscall.MSG_CTRUNC != 0 {
		// Of descriptors that find no room in this process the kernel drops the
		// rest (unix(7)). The socket is as good as before.
		closeAll(files)
		m.noRoom, files = true, nil
	}
	return m, files, nil
}

// scratch is what receive needs.
func scratch() (buf, oob []byte) {
	return make([]byte, maxMessage+1), make([]byte, unix.CmsgSpace(maxFiles*4))
}

func parseRights(oob []byte) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	cmsgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("control message descriptors: %w", err)
	}
	var files []*os.File
	for _, cmsg := range cmsgs {
		fds, err := unix.ParseUnixRights(&cmsg)
		if err != nil {
			closeAll(files)
			return nil, fmt.Errorf("control message descriptors: %w", err)
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "passed"))
		}
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// Socketpair makes a connected pair of stream sockets, close-on-exec and
// non-blocking, for one vsock connection: a for the VMM, b for the shim.
func Socketpair() (a, b *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "vsock"), os.NewFile(uintptr(fds[1]), "vsock"), nil
}

func monotonic() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0 // cannot fail for this clock on Linux
	}
	return ts.Nano()
}
