package vsock

import "encoding/binary"

// A packet is a header and, for opRW, a payload: section 5.10.6, "Device
// Operation". The numbers are those of struct virtio_vsock_hdr in Linux's
// include/uapi/linux/virtio_vsock.h.
const (
	headerSize = 44

	// maxPayload is the most that is put into one packet and taken from one:
	// Linux's VIRTIO_VSOCK_MAX_PKT_BUF_SIZE.
	maxPayload = 64 << 10

	typeStream = 1

	// hostCID is the well-known context id of the host, section 5.10.4.
	hostCID = 2
)

// Operations.
const (
	opRequest       = 1
	opResponse      = 2
	opReset         = 3
	opShutdown      = 4
	opRW            = 5
	opCreditUpdate  = 6
	opCreditRequest = 7
)

// Flags of opShutdown: the sender will receive, or send, no more.
const (
	shutdownReceive = 1 << 0
	shutdownSend    = 1 << 1
	shutdownBoth    = shutdownReceive | shutdownSend
)

// header is struct virtio_vsock_hdr.
type header struct {
	srcCID, dstCID   uint64
	srcPort, dstPort uint32
	length           uint32 // of the payload
	kind             uint16 // "type"
	op               uint16
	flags            uint32
	bufAlloc         uint32 // size of the sender's receive buffer
	fwdCnt           uint32 // bytes the sender has taken out of it so far, modulo 2^32
}

func parseHeader(b *[headerSize]byte) header {
	le := binary.LittleEndian
	return header{
		srcCID:   le.Uint64(b[0:]),
		dstCID:   le.Uint64(b[8:]),
		srcPort:  le.Uint32(b[16:]),
		dstPort:  le.Uint32(b[20:]),
		length:   le.Uint32(b[24:]),
		kind:     le.Uint16(b[28:]),
		op:       le.Uint16(b[30:]),
		flags:    le.Uint32(b[32:]),
		bufAlloc: le.Uint32(b[36:]),
		fwdCnt:   le.Uint32(b[40:]),
	}
}

func (h *header) format(b *[headerSize]byte) {
	le := binary.LittleEndian
	le.PutUint64(b[0:], h.srcCID)
	le.PutUint64(b[8:], h.dstCID)
	le.PutUint32(b[16:], h.srcPort)
	le.PutUint32(b[20:], h.dstPort)
	le.PutUint32(b[24:], h.length)
	le.PutUint16(b[28:], h.kind)
	le.PutUint16(b[30:], h.op)
	le.PutUint32(b[32:], h.flags)
	le.PutUint32(b[36:], h.bufAlloc)
	le.PutUint32(b[40:], h.fwdCnt)
}
