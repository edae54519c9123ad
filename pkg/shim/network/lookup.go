package network

import (
	"errors"
	"fmt"
	"net"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Indices of the sockets in lookup.sockets.
const (
	socketIPv4 = iota
	socketIPv6
	sockets
)

// maxOwnPorts bounds the ports that are left to their own listeners.
const maxOwnPorts = 1024

// lookup is a program in the namespace that the kernel asks which socket is to
// get a connection for which there is none yet (Linux 5.9,
// Documentation/bpf/prog_sk_lookup.rst). It sends those to the loopback, to any
// port, to the sockets that it was given, if no program has a port of its own.
type lookup struct {
	sockets *ebpf.Map // of listening sockets, by family
	own     *ebpf.Map // ports that are not ours
	program *ebpf.Program
	link    *link.NetNsLink
}

func newLookup(ns *namespace) (_ *lookup, err error) {
	l := &lookup{}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	l.sockets, err = ebpf.NewMap(&ebpf.MapSpec{Name: "microvm_listen", Type: ebpf.SockMap, KeySize: 4, ValueSize: 8, MaxEntries: sockets})
	if err != nil {
		return nil, err
	}
	l.own, err = ebpf.NewMap(&ebpf.MapSpec{Name: "microvm_own", Type: ebpf.Hash, KeySize: 4, ValueSize: 1, MaxEntries: maxOwnPorts})
	if err != nil {
		return nil, err
	}
	l.program, err = ebpf.NewProgram(&ebpf.ProgramSpec{
		Name:         "microvm_lookup",
		Type:         ebpf.SkLookup,
		AttachType:   ebpf.AttachSkLookup,
		License:      "Apache-2.0", // none of its helpers is for GPL programs only
		Instructions: lookupProgram(l.sockets.FD(), l.own.FD()),
	})
	if err != nil {
		return nil, err
	}
	l.link, err = link.AttachNetNs(int(ns.file.Fd()), l.program)
	return l, err
}

// Fields of struct bpf_sk_lookup (include/uapi/linux/bpf.h). Addresses are in
// network byte order, the local port in the host's.
const (
	fieldFamily    = 8
	fieldProtocol  = 12
	fieldLocalIP4  = 40
	fieldLocalIP6  = 44
	fieldLocalPort = 60
)

func lookupProgram(sockets, own int) asm.Instructions {
	const pass = 1 // SK_PASS: go on as without the program, unless it has chosen a socket
	context, index, socket := asm.R6, asm.R7, asm.R8
	field := func(offset int16) asm.Instruction { return asm.LoadMem(asm.R2, context, offset, asm.Word) }
	return asm.Instructions{
		asm.Mov.Reg(context, asm.R1),
		field(fieldProtocol),
		asm.JNE.Imm(asm.R2, unix.IPPROTO_TCP, "pass"),
		field(fieldFamily),
		asm.JEq.Imm(asm.R2, unix.AF_INET6, "ipv6"),
		asm.JNE.Imm(asm.R2, unix.AF_INET, "pass"),

		// 127.0.0.0/8; the first byte is the lowest of x86's.
		field(fieldLocalIP4),
		asm.And.Imm(asm.R2, 0xff),
		asm.JNE.Imm(asm.R2, 127, "pass"),
		asm.Mov.Imm(index, socketIPv4),
		asm.Ja.Label("port"),

		// ::1
		field(fieldLocalIP6).WithSymbol("ipv6"),
		asm.JNE.Imm(asm.R2, 0, "pass"),
		field(fieldLocalIP6 + 4),
		asm.JNE.Imm(asm.R2, 0, "pass"),
		field(fieldLocalIP6 + 8),
		asm.JNE.Imm(asm.R2, 0, "pass"),
		field(fieldLocalIP6 + 12),
		asm.JNE.Imm(asm.R2, 1<<24, "pass"),
		asm.Mov.Imm(index, socketIPv6),

		// A port of somebody else?
		field(fieldLocalPort).WithSymbol("port"),
		asm.StoreMem(asm.RFP, -4, asm.R2, asm.Word),
		asm.LoadMapPtr(asm.R1, own),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JNE.Imm(asm.R0, 0, "pass"),

		asm.StoreMem(asm.RFP, -4, index, asm.Word),
		asm.LoadMapPtr(asm.R1, sockets),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "pass"),
		asm.Mov.Reg(socket, asm.R0),
		asm.Mov.Reg(asm.R1, context),
		asm.Mov.Reg(asm.R2, socket),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnSkAssign.Call(),
		asm.Mov.Reg(asm.R1, socket), // the lookup has taken a reference
		asm.FnSkRelease.Call(),

		asm.Mov.Imm(asm.R0, pass).WithSymbol("pass"),
		asm.Return(),
	}
}

// add has the socket of a listener chosen from now on.
func (l *lookup) add(index uint32, listener *net.TCPListener) error {
	raw, err := listener.SyscallConn()
	if err != nil {
		return err
	}
	putErr := raw.Control(func(fd uintptr) { err = l.sockets.Put(index, uint64(fd)) })
	return errors.Join(putErr, err)
}

// leave sets the ports that are left to others, instead of those before.
func (l *lookup) leave(ports map[uint32]bool) error {
	for port := range ports {
		if err := l.own.Put(port, uint8(1)); err != nil {
			return fmt.Errorf("port %d: %w", port, err)
		}
	}
	var gone []uint32
	var port uint32
	var value uint8
	for i := l.own.Iterate(); i.Next(&port, &value); {
		if !ports[port] {
			gone = append(gone, port)
		}
	}
	for _, port := range gone {
		if err := l.own.Delete(port); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("port %d: %w", port, err)
		}
	}
	return nil
}

// detach takes the program out of the namespace.
func (l *lookup) detach() {
	if l.link != nil {
		l.link.Close()
	}
}

// close frees the program and its maps, which nobody may use meanwhile.
func (l *lookup) close() {
	l.detach()
	for _, c := range []interface{ Close() error }{l.program, l.own, l.sockets} {
		c.Close() // of nil, nothing
	}
}
