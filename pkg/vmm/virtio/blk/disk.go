package blk

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/bits"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/buffers"
)

// disk is the host's side. Its methods run concurrently.
type disk struct {
	file        *os.File // keeps fd open
	fd          int
	sectors     uint64 // capacity in units of 512 bytes
	blockSize   uint32 // bytes
	discardUnit uint32 // bytes
	topology    topology
	device      bool // a block device
	gate        *ratelimit.Gate
	errors      errorLog
}

// topology is of a block device what its readers and writers should know for
// speed, in units of struct virtio_blk_topology, section 5.2.4: as the host has
// it, or zero.
type topology struct {
	physicalBlockExp uint8  // logical blocks in a physical one, as a power of two
	alignmentOffset  uint8  // of the first physical block, in logical ones
	minIOSize        uint16 // in logical blocks
	optIOSize        uint32 // in logical blocks
}

// openDisk finds out what file is.
func openDisk(file *os.File, readOnly bool, log *slog.Logger) (*disk, error) {
	d := &disk{file: file, fd: int(file.Fd()), errors: errorLog{log: log, name: file.Name()}}
	flags, err := unix.FcntlInt(uintptr(d.fd), unix.F_GETFL, 0)
	if err != nil {
		return nil, fmt.Errorf("fcntl: %w", err)
	}
	if flags&unix.O_ACCMODE == unix.O_WRONLY || !readOnly && flags&unix.O_ACCMODE != unix.O_RDWR {
		return nil, errors.New("file is not open for what the guest may do")
	}
	if flags&unix.O_APPEND != 0 {
		return nil, errors.New("file is open for appending: pwritev(2) would ignore the offset")
	}
	var st unix.Stat_t
	if err := unix.Fstat(d.fd, &st); err != nil {
		return nil, fmt.Errorf("stat: %w", err)
	}
	var size uint64
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		size = uint64(st.Size)
		d.blockSize = sectorSize
		d.discardUnit = max(sectorSize, uint32(st.Blksize))
	case unix.S_IFBLK:
		// The device's last byte is where it can be sought to.
		end, err := unix.Seek(d.fd, 0, io.SeekEnd)
		if err != nil {
			return nil, fmt.Errorf("size: %w", err)
		}
		block, err := unix.IoctlGetInt(d.fd, unix.BLKSSZGET)
		if err != nil {
			return nil, fmt.Errorf("logical block size: %w", err)
		}
		size = uint64(end)
		d.device = true
		d.blockSize = uint32(block)
		d.discardUnit = uint32(block)
		if d.blockSize < sectorSize || d.blockSize&(d.blockSize-1) != 0 {
			return nil, fmt.Errorf("logical block size of %d bytes", d.blockSize)
		}
		if d.topology, err = readTopology(d.fd, d.blockSize); err != nil {
			return nil, err
		}
	default:
		return nil, errors.New("neither a regular file nor a block device")
	}
	if size == 0 || size%uint64(d.blockSize) != 0 {
		return nil, fmt.Errorf("size of %d bytes is not a multiple of %d", size, d.blockSize)
	}
	d.sectors = size / sectorSize
	return d, nil
}

// readTopology asks a block device.
func readTopology(fd int, blockSize uint32) (t topology, err error) {
	var values [4]uint32
	for i, request := range []uint{unix.BLKPBSZGET, unix.BLKALIGNOFF, unix.BLKIOMIN, unix.BLKIOOPT} {
		// All of them write an int, of which BLKALIGNOFF may be -1: misaligned.
		value, err := unix.IoctlGetUint32(fd, request)
		if err != nil {
			return t, fmt.Errorf("topology of the block device: %w", err)
		}
		values[i] = value
	}
	if n := values[0] / blockSize; n > 1 {
		t.physicalBlockExp = uint8(bits.Len32(n) - 1)
	}
	if n := values[1] / blockSize; n <= math.MaxUint8 {
		t.alignmentOffset = uint8(n)
	}
	if n := values[2] / blockSize; n <= math.MaxUint16 {
		t.minIOSize = uint16(n)
	}
	t.optIOSize = values[3] / blockSize
	return t, nil
}

// extent checks that length bytes at the sector are whole sectors on the disk,
// and returns their offset.
func (d *disk) extent(sector, length uint64) (offset int64, err error) {
	if length%sectorSize != 0 || sector > d.sectors || length/sectorSize > d.sectors-sector {
		return 0, fmt.Errorf("%d bytes at sector %d of %d: %w", length, sector, d.sectors, errBadRequest)
	}
	return int64(sector * sectorSize), nil
}

// pay waits until the limit allows so much. Each operation is counted once, and
// of bytes those that are read or written.
func (d *disk) pay(operations, bytes uint64) error {
	if !d.gate.Take(operations, bytes) {
		return errReset
	}
	return nil
}

// read fills the buffers, which it uses up.
func (d *disk) read(data [][]byte, offset int64) error {
	return d.transfer("read", data, offset, func(b [][]byte, offset int64) (int, error) {
		return unix.Preadv(d.fd, b, offset)
	})
}

// write writes the buffers, which it uses up; to stable storage if through.
func (d *disk) write(data [][]byte, offset int64, through bool) error {
	flags := 0
	if through {
		flags = unix.RWF_DSYNC
	}
	return d.transfer("write", data, offset, func(b [][]byte, offset int64) (int, error) {
		return unix.Pwritev2(d.fd, b, offset, flags)
	})
}

// transfer repeats a preadv or pwritev until everything is done: one call
// moves at most 2 GiB, and less when an error comes after some success.
func (d *disk) transfer(what string, data [][]byte, offset int64, call func([][]byte, int64) (int, error)) error {
	for data = buffers.Skip(data, 0); len(data) > 0; {
		n, err := call(data, offset)
		if err == unix.EINTR {
			continue
		}
		if err == nil && n == 0 {
			err = io.ErrUnexpectedEOF // the file has become shorter
		}
		if err != nil {
			return d.errors.report(what, err)
		}
		data = buffers.Skip(data, uint64(n))
		offset += int64(n)
	}
	return nil
}

// sync puts what was written on stable storage.
func (d *disk) sync() error {
	return d.errors.report("fdatasync", retry(func() error { return unix.Fdatasync(d.fd) }))
}

// discard gives the range back to the host. Not every file system can.
func (d *disk) discard(offset, length int64) error {
	var err error
	if d.device {
		// To punch a hole in one is to write zeroes, which not all do that can
		// discard (block/fops.c, blkdev_fallocate).
		err = retry(func() error { return discardBlocks(d.fd, uint64(offset), uint64(length)) })
	} else {
		err = d.fallocate(unix.FALLOC_FL_PUNCH_HOLE, offset, length)
	}
	if errors.Is(err, unix.EOPNOTSUPP) {
		return errUnsupported
	}
	return d.errors.report("discard", err)
}

// writeZeroes makes the range read as zeroes, by the cheapest means there is.
// If unmap, the range may lose its space on the host.
func (d *disk) writeZeroes(offset, length int64, unmap bool) error {
	err := error(unix.EOPNOTSUPP)
	if unmap {
		err = d.fallocate(unix.FALLOC_FL_PUNCH_HOLE, offset, length)
	}
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = d.fallocate(unix.FALLOC_FL_ZERO_RANGE, offset, length)
	}
	if !errors.Is(err, unix.EOPNOTSUPP) {
		return d.errors.report("write zeroes", err)
	}
	for length > 0 {
		n := min(length, int64(len(zeroes)))
		if err := d.pay(0, uint64(n)); err != nil {
			return err
		}
		if err := d.write([][]byte{zeroes[:n]}, offset, false); err != nil {
			return err
		}
		offset += n
		length -= n
	}
	return nil
}

var zeroes [64 << 10]byte

func (d *disk) fallocate(mode uint32, offset, length int64) error {
	return retry(func() error { return unix.Fallocate(d.fd, mode|unix.FALLOC_FL_KEEP_SIZE, offset, length) })
}

func retry(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}

// errorLog tells the operator of errors of the host's disk. A guest can have
// any number of them.
type errorLog struct {
	log  *slog.Logger
	name string

	mu      sync.Mutex
	count   uint64
	silence time.Time // until then
}

// report logs err, if it is one and none was logged lately, and returns it.
func (l *errorLog) report(what string, err error) error {
	if err == nil {
		return nil
	}
	err = fmt.Errorf("%s: %w", what, err)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.count++
	if now := time.Now(); l.log != nil && now.After(l.silence) {
		l.silence = now.Add(10 * time.Second)
		l.log.Error("I/O error on a disk of the guest's", "disk", l.name, "error", err, "count", l.count)
	}
	return err
}
