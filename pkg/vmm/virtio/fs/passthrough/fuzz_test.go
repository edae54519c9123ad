package passthrough

import (
	"encoding/binary"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse/fusetest"
)

// fuzzer makes requests of bytes. It knows what the server has told, so that
// the requests get far.
type fuzzer struct {
	*share
	input   []byte
	nodes   []uint64
	handles []uint64
}

func (f *fuzzer) byte() byte {
	if len(f.input) == 0 {
		return 0
	}
	b := f.input[0]
	f.input = f.input[1:]
	return b
}

func (f *fuzzer) bytes(n int) []byte {
	n = min(n, len(f.input))
	b := f.input[:n]
	f.input = f.input[n:]
	return b
}

func pick(from []uint64, i byte) uint64 {
	if int(i) < len(from) {
		return from[i]
	}
	return uint64(i) * 0x0101_0101_0101_0101
}

var fuzzNames = []string{"file", "dir", "link", "up", "fifo", "new", "other", "..", "a/b", ""}

// request takes a request from the input: operation, node, handle, name, where
// its argument differs from a well-formed one, room for the reply, and what is
// odd about its shape.
func (f *fuzzer) request() {
	op, node, fh := fuse.Opcode(f.byte()), pick(f.nodes, f.byte()), pick(f.handles, f.byte())
	name := fuzzNames[int(f.byte())%len(fuzzNames)]
	args := sample(op, fh, node, name)
	at, length := int(f.byte()), int(f.byte())
	change := f.bytes(length)
	if at >= 128 { // the argument is all the input's
		args = append([]byte(nil), change...)
	} else if at < len(args) {
		copy(args[at:], change)
	}
	room := int(f.byte()) * 64
	whole := append(f.Header(op, node, f.Unique(), fuse.InHeaderSize+len(args)), args...)
	odd := f.byte()
	if odd&1 != 0 {
		binary.LittleEndian.PutUint32(whole, uint32(f.byte())|uint32(f.byte())<<24)
	}
	if odd&2 != 0 {
		binary.LittleEndian.PutUint16(whole[36:], uint16(f.byte()))
	}
	readable := [][]byte{whole}
	if cut := int(odd>>2) * 3; cut > 0 && cut < len(whole) {
		readable = [][]byte{whole[:cut], whole[cut:]}
	}
	out := make([]byte, room)
	writable := [][]byte{out}
	if room > 70 {
		writable = [][]byte{out[:7], out[7:70], out[70:]}
	}
	later := make(chan uint32, 1)
	written, done := f.server.Handle(readable, writable, func(n uint32) { later <- n })
	if !done {
		f.server.Cancel()
		written = <-later
	}
	f.reply(op, out, int(written))
}

// reply checks a reply and learns from it.
func (f *fuzzer) reply(op fuse.Opcode, out []byte, written int) {
	if written == 0 {
		return
	}
	if written < fuse.OutHeaderSize || written > len(out) || int(binary.LittleEndian.Uint32(out)) != written {
		panic("the reply's length is wrong")
	}
	errno := int32(binary.LittleEndian.Uint32(out[4:]))
	if errno > 0 || errno <= -512 || errno != 0 && written != fuse.OutHeaderSize {
		panic("the reply's error is wrong")
	}
	body := out[fuse.OutHeaderSize:written]
	switch {
	case errno != 0:
	case len(body) >= fuse.EntryOutSize && (op == fuse.Lookup || op == fuse.Mkdir || op == fuse.Mknod || op == fuse.Symlink || op == fuse.Link):
		f.nodes = append(f.nodes, binary.LittleEndian.Uint64(body))
	case len(body) == fuse.EntryOutSize+fuse.OpenOutSize:
		f.nodes = append(f.nodes, binary.LittleEndian.Uint64(body))
		f.handles = append(f.handles, binary.LittleEndian.Uint64(body[fuse.EntryOutSize:]))
	case op == fuse.Open || op == fuse.Opendir:
		f.handles = append(f.handles, binary.LittleEndian.Uint64(body))
	}
}

// FuzzRequests sends requests made of the input. Whatever they are: the server
// does not panic, answers or drops each, and nothing outside of the share
// changes or is told of.
func FuzzRequests(f *testing.F) {
	whole := func(op fuse.Opcode, node, fh, name byte, change ...byte) []byte {
		return append(append([]byte{byte(op), node, fh, name, 0, byte(len(change))}, change...), 255, 0)
	}
	served(func(op fuse.Opcode, _ operation) {
		f.Add(whole(op, 0, 0, 0))
		// After something was looked up, opened and listed.
		seed := whole(fuse.Lookup, 0, 0, 0)
		seed = append(seed, whole(fuse.Open, 1, 0, 0, unix.O_RDWR)...)
		seed = append(seed, whole(fuse.Opendir, 0, 0, 0)...)
		seed = append(seed, whole(op, 1, 0, 5)...)
		f.Add(append(seed, whole(op, 0, 1, 7)...))
	})
	f.Fuzz(func(t *testing.T, input []byte) {
		o := newOutside(t)
		s := newShare(t, few)
		writeFile(t, s.path("file"), "contents")
		must(t, os.Mkdir(s.path("dir"), 0o755))
		must(t, os.Symlink(o.dir, s.path("link")))
		must(t, os.Symlink("..", s.path("up")))
		must(t, unix.Mkfifo(s.path("fifo"), 0o666))
		fz := &fuzzer{share: s, input: input, nodes: []uint64{root}}
		for range 64 {
			if len(fz.input) == 0 {
				break
			}
			fz.request()
		}
		for _, n := range fz.nodes {
			for _, name := range fuzzNames {
				if b, errno := s.Call(fuse.Lookup, n, fusetest.Pack(name), fuse.EntryOutSize); errno == 0 && binary.LittleEndian.Uint64(b[40:]) == o.ino {
					t.Fatalf("node %d has %q, which is the secret", n, name)
				}
			}
		}
		s.server.Reset()
		if n := s.server.inodes.open; n != 1 {
			t.Errorf("%d descriptors are left", n)
		}
		o.check(t)
		if list, err := os.ReadDir(scratch); err != nil || len(list) != 2 {
			t.Errorf("beside the share: %v, %v", list, err)
		}
	})
}
