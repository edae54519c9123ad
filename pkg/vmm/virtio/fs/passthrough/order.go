package passthrough

import (
	"encoding/binary"
	"sync"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/buffers"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

// order knows which requests are under way of those that others must come after.
// Its methods may be called concurrently.
type order struct {
	mu       sync.Mutex
	last     uint64                   // ticket
	underWay map[uint64]chan struct{} // by ticket; closed at the end
}

func (o *order) begin() (ticket uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.underWay == nil {
		o.underWay = map[uint64]chan struct{}{}
	}
	o.last++
	o.underWay[o.last] = make(chan struct{})
	return o.last
}

// end may be called again, and with 0, which is no ticket.
func (o *order) end(ticket uint64) {
	if ticket == 0 {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if ended := o.underWay[ticket]; ended != nil {
		close(ended)
		delete(o.underWay, ticket)
	}
}

// await returns when all that are under way now have ended.
func (o *order) await() {
	o.mu.Lock()
	var now []chan struct{}
	for _, ended := range o.underWay {
		now = append(now, ended)
	}
	o.mu.Unlock()
	for _, ended := range now {
		<-ended
	}
}

// Arrive is told of a request before it is handled, in the order in which the
// guest has sent it. Its ticket, 0 for most, is for Handle.
func (s *Server) Arrive(readable [][]byte) (ticket uint64) {
	// The length comes before. The guest may make another request of it yet: see
	// serve.
	var opcode [4]byte
	if buffers.CopyFrom(readable, opcode[:], 4) < len(opcode) || fuse.Opcode(binary.LittleEndian.Uint32(opcode[:])) != fuse.Release {
		return 0
	}
	return s.releases.begin()
}
