package blk

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

// modelRequest does to the disk what a good device does, and returns the
// status and the data.
func modelRequest(disk, readable []byte, room int, ro bool) (status byte, in []byte) {
	if len(readable) < 16 {
		return statusIOError, nil
	}
	le := binary.LittleEndian
	kind, sector, data := le.Uint32(readable), le.Uint64(readable[8:]), readable[16:]
	sectors := uint64(len(disk) / 512)
	fits := func(sector uint64, n int) bool {
		return n%512 == 0 && sector <= sectors && uint64(n/512) <= sectors-sector
	}
	switch kind {
	case typeIn:
		if len(data) > 0 || !fits(sector, room) {
			return statusIOError, nil
		}
		return statusOK, disk[sector*512:][:room]
	case typeGetID:
		if len(data) > 0 || room < 20 {
			return statusIOError, nil
		}
		return statusOK, append([]byte("fuzz"), make([]byte, 16)...)
	case typeFlush:
		if room > 0 {
			return statusIOError, nil
		}
		return statusOK, nil
	case typeOut:
		if room > 0 || ro || !fits(sector, len(data)) {
			return statusIOError, nil
		}
		copy(disk[sector*512:], data)
		return statusOK, nil
	case typeDiscard, typeWriteZeroes:
		limit, known := 32, uint32(0)
		if kind == typeWriteZeroes {
			limit, known = 1, 1
		}
		switch {
		case room > 0:
			return statusIOError, nil
		case ro:
			return statusUnsupported, nil // not offered
		case len(data) == 0 || len(data)%16 != 0 || len(data)/16 > limit:
			return statusIOError, nil
		}
		for s := data; len(s) > 0; s = s[16:] {
			if le.Uint32(s[12:])&^known != 0 {
				return statusUnsupported, nil
			}
			if n := uint64(le.Uint32(s[8:])); n > sectors || !fits(le.Uint64(s), int(n)*512) {
				return statusIOError, nil
			}
		}
		for s := data; len(s) > 0; s = s[16:] {
			clear(disk[le.Uint64(s)*512:][:le.Uint32(s[8:])*512])
		}
		return statusOK, nil
	}
	return statusUnsupported, nil
}

// FuzzRequest sends one request of the fuzzer's bytes, cut into descriptors as
// it likes, and compares answer and disk with the model's.
func FuzzRequest(f *testing.F) {
	const sectors = 8
	add := func(room uint16, parts ...[]byte) { f.Add(bytes.Join(parts, nil), room, uint8(16), uint8(1), false) }
	add(512, header(typeIn, 7))
	add(0, header(typeOut, 7), make([]byte, 512))
	add(0, header(typeFlush, 0))
	add(20, header(typeGetID, 0))
	add(0, header(typeDiscard, 0), segment(1, 2, 0), segment(7, 1, 0))
	add(0, header(typeWriteZeroes, 0), segment(0, 8, 1))
	f.Add(header(typeOut, 0), uint16(512), uint8(3), uint8(9), true)
	f.Fuzz(func(t *testing.T, readable []byte, room uint16, split1, split2 uint8, ro bool) {
		disk := pattern(sectors * 512)
		file := memoryFile(t, disk)
		device := newDevice(t, Config{File: file, Serial: "fuzz", ReadOnly: ro})
		d := virtiotest.NewDriver(t, device, virtiotest.Options{Memory: virtiotest.NewMemory(t, 1<<20, 1<<20)})
		readable = readable[:min(len(readable), 64<<10)]
		at := min(int(split1), len(readable))
		first := min(int(split2), int(room)+1)
		written, out := d.Send(0, [][]byte{readable[:at], readable[at:]}, []int{first, int(room) + 1 - first}).Wait(t)
		all := bytes.Join(out, nil)
		status, in := modelRequest(disk, readable, int(room), ro)
		if got := all[room]; got != status {
			t.Fatalf("status %d, want %d", got, status)
		}
		if !bytes.Equal(all[:len(in)], in) {
			t.Fatalf("read %x, want %x", all[:len(in)], in)
		}
		wantWritten := len(in)
		if len(in) == int(room) {
			wantWritten++
		}
		if int(written) != wantWritten {
			t.Fatalf("used length %d, want %d", written, wantWritten)
		}
		if !bytes.Equal(contentOf(t, file), disk) {
			t.Fatal("the disk's content is wrong")
		}
	})
}

func BenchmarkDisk(b *testing.B) {
	file := memoryFile(b, make([]byte, 16<<20))
	for _, op := range []uint32{typeIn, typeOut} {
		for _, size := range []int{4 << 10, 128 << 10} {
			for _, inFlight := range []int{1, 16} {
				b.Run(fmt.Sprintf("%s/%dK/inflight=%d", map[uint32]string{typeIn: "read", typeOut: "write"}[op], size>>10, inFlight), func(b *testing.B) {
					d := virtiotest.NewDriver(b, newDevice(b, Config{File: file}), virtiotest.Options{Memory: virtiotest.NewMemory(b, 1<<20, 8<<20)})
					var requests []*virtiotest.Request
					for i := range inFlight {
						readable, writable := [][]byte{header(op, uint64(i*size/512))}, []int{1}
						for range size / 4096 { // a page to a descriptor, as Linux does
							if op == typeOut {
								readable = append(readable, make([]byte, 4096))
							} else {
								writable = append([]int{4096}, writable...)
							}
						}
						r := d.Prepare(0, readable, writable)
						r.Submit()
						requests = append(requests, r)
					}
					b.SetBytes(int64(size))
					b.ReportAllocs()
					b.ResetTimer()
					for i := range b.N {
						r := requests[i%inFlight]
						r.Join()
						r.Submit()
					}
				})
			}
		}
	}
}
