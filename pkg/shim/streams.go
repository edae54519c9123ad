package shim

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"net"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
	"github.com/microvm-runtime/microvm/pkg/shim/stdio"
)

// streamHeader is what the connection of a stream begins with.
func streamHeader(id uint64) []byte {
	return binary.BigEndian.AppendUint64(nil, id)
}

// streamID makes an id that a process in the guest cannot guess.
func streamID() uint64 {
	var b [8]byte
	rand.Read(b[:]) // never fails
	return binary.BigEndian.Uint64(b[:]) | 1
}

// connections are a process's streams on their way to the agent.
type connections struct {
	ids   agentproto.Streams
	conns [3]*net.UnixConn
}

// connect opens a connection for each stream that is wanted.
func (s *sandbox) connect(ctx context.Context, streams *stdio.Streams) (_ *connections, err error) {
	c := &connections{}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	stdin, stdout, stderr := streams.Wants()
	for i, stream := range []struct {
		wanted bool
		id     *uint64
	}{{stdin, &c.ids.Stdin}, {stdout, &c.ids.Stdout}, {stderr, &c.ids.Stderr}} {
		if !stream.wanted {
			continue
		}
		*stream.id = streamID()
		if c.conns[i], err = s.dialStream(ctx, *stream.id); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// copy hands the connections over.
func (c *connections) copy(streams *stdio.Streams) {
	var conns [3]stdio.Conn
	for i, conn := range c.conns {
		if conn != nil { // or the interface would not be nil
			conns[i] = conn
		}
	}
	c.conns = [3]*net.UnixConn{}
	streams.Copy(conns[0], conns[1], conns[2])
}

func (c *connections) close() {
	for _, conn := range c.conns {
		if conn != nil {
			conn.Close()
		}
	}
}
