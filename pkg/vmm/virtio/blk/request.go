package blk

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/buffers"
)

// Requests, section 5.2.6: struct virtio_blk_req begins with le32 type, le32
// reserved, le64 sector and ends with the status byte.
const (
	typeIn          = 0
	typeOut         = 1
	typeFlush       = 4
	typeGetID       = 8
	typeDiscard     = 11
	typeWriteZeroes = 13

	statusOK          = 0
	statusIOError     = 1
	statusUnsupported = 2

	headerSize = 16
)

// A segment of a discard or write zeroes request: le64 sector, le32
// num_sectors, le32 flags.
const (
	segmentSize = 16
	flagUnmap   = 1 << 0
)

var (
	errUnsupported = errors.New("not supported")
	errBadRequest  = errors.New("bad request")
	errReset       = errors.New("the device is being reset")
)

// session is the device as one driver activated it. Its methods run
// concurrently.
type session struct {
	disk     *disk
	readOnly bool
	serial   [serialSize]byte
	features uint64
}

// handle serves a request, which may be split into descriptors in any way
// (section 2.7.4.1). The header is copied out of guest memory before it is
// checked, the data is not touched.
func (s *session) handle(c *virtio.Chain) (used uint32, done bool) {
	if len(c.Writable) == 0 {
		return 0, true // nowhere to put a status
	}
	// The status is the very last byte; the data is what is left.
	last := &c.Writable[len(c.Writable)-1]
	at := len(*last) - 1
	status := &(*last)[at]
	*last = (*last)[:at]
	dataIn := c.WritableLen() - 1
	written, err := s.serve(c, dataIn)
	switch {
	case err == nil:
		*status = statusOK
	case errors.Is(err, errUnsupported):
		*status = statusUnsupported
	default:
		*status = statusIOError
	}
	// The used length counts from the first byte (section 2.7.8.2): the status
	// counts only when all before it was written.
	if written < dataIn {
		return uint32(written), true
	}
	return uint32(dataIn) + 1, true
}

// serve does what the request asks for, and returns how many bytes it wrote to
// the dataIn writable ones.
func (s *session) serve(c *virtio.Chain, dataIn uint64) (uint64, error) {
	var header [headerSize]byte
	if c.CopyIn(header[:], 0) != headerSize {
		return 0, errBadRequest
	}
	sector := binary.LittleEndian.Uint64(header[8:])
	dataOut := c.ReadableLen() - headerSize
	kind := binary.LittleEndian.Uint32(header[:])
	switch kind {
	case typeIn:
		if dataOut != 0 {
			return 0, errBadRequest
		}
		offset, err := s.disk.extent(sector, dataIn)
		if err == nil {
			err = s.disk.pay(1, dataIn)
		}
		if err != nil {
			return 0, err
		}
		if err := s.disk.read(c.Writable, offset); err != nil {
			return 0, err
		}
		return dataIn, nil
	case typeGetID:
		if dataOut != 0 || dataIn < serialSize {
			return 0, errBadRequest
		}
		return uint64(c.CopyOut(s.serial[:], 0)), nil
	case typeFlush, typeOut, typeDiscard, typeWriteZeroes:
		if dataIn != 0 {
			return 0, errBadRequest // the status is the whole answer
		}
		return 0, s.change(kind, c, sector, dataOut)
	}
	return 0, errUnsupported
}

// change serves the requests that change the disk or make changes durable.
// After the header come dataOut readable bytes.
func (s *session) change(kind uint32, c *virtio.Chain, sector, dataOut uint64) error {
	switch kind {
	case typeOut:
		offset, err := s.writable(sector, dataOut)
		if err == nil {
			err = s.disk.pay(1, dataOut)
		}
		if err != nil {
			return err
		}
		return s.disk.write(buffers.Skip(c.Readable, headerSize), offset, s.writeThrough())
	case typeDiscard:
		return s.segments(c, dataOut, featureDiscard, maxDiscardSegments, maxDiscardSectors, 0, func(offset, length int64, _ uint32) error {
			return s.disk.discard(offset, length)
		})
	case typeWriteZeroes:
		return s.segments(c, dataOut, featureWriteZeroes, maxWriteZeroesSegs, maxWriteZeroesSectors, flagUnmap, func(offset, length int64, flags uint32) error {
			return s.disk.writeZeroes(offset, length, flags&flagUnmap != 0)
		})
	default: // typeFlush
		if err := s.disk.pay(1, 0); err != nil {
			return err
		}
		return s.disk.sync()
	}
}

// writable checks a range that is to be changed.
func (s *session) writable(sector, length uint64) (offset int64, err error) {
	if s.readOnly {
		return 0, fmt.Errorf("write to a read-only disk: %w", errBadRequest)
	}
	return s.disk.extent(sector, length)
}

// writeThrough says whether a write has to be on stable storage when it is
// completed: then the driver sends no flushes (section 5.2.6.2).
func (s *session) writeThrough() bool { return s.features&featureFlush == 0 }

// segments checks the segments of a discard or write zeroes request, all before
// it calls do for each.
func (s *session) segments(c *virtio.Chain, length uint64, feature uint64, maxSegments int, maxSectors, knownFlags uint32, do func(offset, length int64, flags uint32) error) error {
	if s.features&feature == 0 {
		return errUnsupported
	}
	if length == 0 || length%segmentSize != 0 || length > uint64(maxSegments*segmentSize) {
		return errBadRequest
	}
	var copied [maxDiscardSegments * segmentSize]byte
	data := copied[:length]
	if c.CopyIn(data, headerSize) != len(data) {
		return errBadRequest
	}
	le := binary.LittleEndian
	for at := 0; at < len(data); at += segmentSize {
		segment := data[at:]
		if le.Uint32(segment[12:])&^knownFlags != 0 {
			return errUnsupported
		}
		sectors := le.Uint32(segment[8:])
		if sectors > maxSectors {
			return errBadRequest
		}
		if _, err := s.writable(le.Uint64(segment), uint64(sectors)*sectorSize); err != nil {
			return err
		}
	}
	for at := 0; at < len(data); at += segmentSize {
		segment := data[at:]
		sectors := le.Uint32(segment[8:])
		if sectors == 0 {
			continue // fallocate(2) takes no empty range
		}
		if err := s.disk.pay(1, 0); err != nil {
			return err
		}
		if err := do(int64(le.Uint64(segment))*sectorSize, int64(sectors)*sectorSize, le.Uint32(segment[12:])); err != nil {
			return err
		}
	}
	if s.writeThrough() {
		return s.disk.sync()
	}
	return nil
}
