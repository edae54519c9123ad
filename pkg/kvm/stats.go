package kvm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
)

// Stats reads a binary statistics descriptor, api.rst 4.133.
type Stats struct {
	file *os.File
	desc []statDesc
	data int64 // offset of the data block
	size int   // its size in bytes
}

type statDesc struct {
	name   string
	offset int
}

// statPeak is the last of the types (the low four bits of a statistic's flags:
// cumulative, instant, peak) that are one number.
const statPeak = 2

// What a statistics descriptor may hold at most: the kernel has about a hundred
// of them, with names of 48 bytes.
const (
	maxStats    = 4096
	maxStatName = 256
)

func getStatsFD(fd int) (*Stats, error) {
	sfd, err := ioctl(fd, reqGetStatsFD, 0)
	if err != nil {
		return nil, fmt.Errorf("KVM_GET_STATS_FD: %w", err)
	}
	s := &Stats{file: os.NewFile(uintptr(sfd), "kvm-stats")}
	if err := s.readDescriptors(); err != nil {
		s.Close()
		return nil, fmt.Errorf("KVM statistics: %w", err)
	}
	return s, nil
}

func (s *Stats) readDescriptors() error {
	var header [24]byte // struct kvm_stats_header
	if _, err := s.file.ReadAt(header[:], 0); err != nil {
		return err
	}
	field := func(i int) int { return int(binary.LittleEndian.Uint32(header[4*i:])) }
	nameSize, n, descOffset, dataOffset := field(1), field(2), field(4), field(5)
	if nameSize < 1 || nameSize > maxStatName || n < 1 || n > maxStats {
		return errors.New("unexpected header")
	}
	size := 16 + nameSize // struct kvm_stats_desc and its name
	raw := make([]byte, n*size)
	if _, err := s.file.ReadAt(raw, int64(descOffset)); err != nil {
		return err
	}
	for ; len(raw) > 0; raw = raw[size:] {
		count := int(binary.LittleEndian.Uint16(raw[6:]))
		offset := int(binary.LittleEndian.Uint32(raw[8:]))
		kind := binary.LittleEndian.Uint32(raw) & 0xf
		if offset < 0 || offset > 1<<20 {
			return errors.New("unexpected descriptor")
		}
		s.size = max(s.size, offset+8*count)
		if kind > statPeak {
			continue // histograms are of no use to us
		}
		name, _, _ := bytes.Cut(raw[16:size], []byte{0})
		s.desc = append(s.desc, statDesc{name: string(name), offset: offset})
	}
	s.data = int64(dataOffset)
	return nil
}

// Read returns the present values by the kernel's names, histograms left out.
func (s *Stats) Read() (map[string]uint64, error) {
	raw := make([]byte, s.size)
	if _, err := s.file.ReadAt(raw, s.data); err != nil {
		return nil, fmt.Errorf("KVM statistics: %w", err)
	}
	values := make(map[string]uint64, len(s.desc))
	for _, d := range s.desc {
		values[d.name] = binary.LittleEndian.Uint64(raw[d.offset:])
	}
	return values, nil
}

// Close closes the descriptor.
func (s *Stats) Close() error { return s.file.Close() }
