package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
	"github.com/microvm-runtime/microvm/pkg/shim/agentclient"
	"github.com/microvm-runtime/microvm/pkg/shim/agenttest"
)

// lies are what an agent may do with the connection that the shim listens for.
var lies = map[string]func(conn net.Conn) error{
	// It reads, and that is all.
	"silent": func(conn net.Conn) error {
		_, err := io.Copy(io.Discard, conn)
		return err
	},
	"garbage": func(conn net.Conn) error {
		b := make([]byte, 64<<10)
		for {
			for i := range b {
				b[i] = byte(rand.Uint32())
			}
			if _, err := conn.Write(b); err != nil {
				return err
			}
		}
	},
	// Answers to the first request that grow when they are parsed: a status (field 1 of ttrpc's Response) with empty details (3).
	"huge": func(conn net.Conn) error {
		const details = 1 << 20
		status := bytes.Repeat([]byte{0x1a, 0}, details)
		return repeat(conn, frame(1, append(binary.AppendUvarint([]byte{0x0a}, 2*details), status...)))
	},
	// Answers that nobody has asked for, before one that somebody has.
	"unasked": func(conn net.Conn) error {
		var b []byte
		for range 1000 {
			b = append(b, frame(3+2*rand.Uint32N(1<<20), bytes.Repeat([]byte{0x12, 0}, 8))...)
		}
		return repeat(conn, b)
	},
	"liar": liar,
}

// beAgent is the guest's first process. It does not return.
func beAgent(lie string) {
	err := func() error {
		if lies[lie] == nil {
			return fmt.Errorf("no such lie: %s", lie)
		}
		conn, err := vsock.Dial(vsock.Host, agentclient.ControlPort, nil)
		if err != nil {
			return err
		}
		return lies[lie](conn)
	}()
	fmt.Printf("hostile agent: %s: %v\n", lie, err)
	for { // were there nothing to wait for, Go would take it for a deadlock and end the guest
		time.Sleep(time.Hour)
	}
}

func repeat(conn net.Conn, b []byte) error {
	for {
		if _, err := conn.Write(b); err != nil {
			return err
		}
	}
}

// frame is a ttrpc message of the type response: its header, big endian, has the length, the stream, type and flags.
func frame(stream uint32, payload []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(payload)))
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(append(b, 2, 0), payload...)
}

// liar has a guest start, and containers, as far as the shim can tell. Then nothing is true: processes run and end as nobody has
// asked, what they write does not end, and all there is to hear are kills for want of memory.
func liar(conn net.Conn) error {
	streams, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, agentclient.StreamPort, nil)
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := streams.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = c.Write(bytes.Repeat([]byte("nobody has said this\n"), 50000))
				_, _ = io.Copy(io.Discard, c) // it is not closed from here
			}()
		}
	}()
	noise := strings.Repeat("\x1b[2J\x00\n", 10000)
	a := agenttest.New()
	a.SetIntercept(func(method string, request any) (any, error) {
		switch method {
		case "Info":
			return &agentproto.InfoResponse{Protocol: 1, Version: noise, KernelRelease: noise, CpusOnline: 1<<32 - 1, ReadyNanoseconds: 1<<64 - 1}, nil
		case "CreateContainer":
			id := request.(*agentproto.CreateContainerRequest).GetId()
			go func() {
				for {
					a.OOM(id)
					a.OOM(noise)
				}
			}()
			return &agentproto.CreateProcessResponse{Pid: 1}, nil
		case "StartProcess":
			return &agentproto.StartProcessResponse{Pid: 1}, nil
		case "WaitProcess":
			if request.(*agentproto.ProcessRequest).GetExecId() == "" {
				select {} // it runs for ever
			}
			return &agentproto.WaitProcessResponse{ExitStatus: 1<<32 - 1}, nil
		case "ListProcesses":
			return &agentproto.ListProcessesResponse{Processes: []*agentproto.ProcessEntry{{Pid: 1<<32 - 1, ExecId: noise}}}, nil
		case "ContainerStats", "SandboxStats":
			return &agentproto.ContainerStatsResponse{Metrics: &anypb.Any{TypeUrl: noise, Value: []byte(noise)}}, nil
		case "ResizeSandbox":
			return &agentproto.ResizeSandboxResponse{Cpus: 1<<32 - 1, PluggedBytes: 1<<64 - 1}, nil
		}
		return &emptypb.Empty{}, nil // yes to all else, and to the machine's end
	})
	return a.Serve(conn)
}
