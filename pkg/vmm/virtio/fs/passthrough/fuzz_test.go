package passthrough

import (
	"bytes"
	"encoding/binary"
	"os"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/internal/alloctest"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse/fusetest"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

// fuzzer makes requests of bytes. It knows what the server has told, so that
// the requests get far.
type fuzzer struct {
	*trap
	input   virtiotest.Script
	nodes   []uint64
	handles []uint64
	// succeeded are the operations that were answered without an error.
	succeeded map[fuse.Opcode]bool
}

func pick(from []uint64, i byte) uint64 {
	if int(i) < len(from) {
		return from[i]
	}
	return uint64(i) * 0x0101_0101_0101_0101
}

var fuzzNames = []string{"file", "dir", "link", "up", "fifo", "new", "other", "..", "a/b", "",
	"relative", "bind", "inner", "fd", "0", "3", "swap", "swapped", "secret", "exported", ".", "../secret"}

// request takes a request from the input: operation, node, handle, name, where
// its argument differs from a well-formed one, room for the reply, and what is
// odd about its shape.
func (f *fuzzer) request() {
	op, node, fh := fuse.Opcode(f.input.Byte()), pick(f.nodes, f.input.Byte()), pick(f.handles, f.input.Byte())
	name := fuzzNames[int(f.input.Byte())%len(fuzzNames)]
	args := sample(op, fh, node, name)
	at, length := int(f.input.Byte()), int(f.input.Byte())
	change := f.input.Bytes(length)
	if at >= 128 { // the argument is all the input's
		args = append([]byte(nil), change...)
	} else if at < len(args) {
		copy(args[at:], change)
	}
	room := int(f.input.Byte()) * 64
	whole := append(f.Header(op, node, f.Unique(), fuse.InHeaderSize+len(args)), args...)
	odd := f.input.Byte()
	if odd&1 != 0 {
		binary.LittleEndian.PutUint32(whole, uint32(f.input.Byte())|uint32(f.input.Byte())<<24)
	}
	if odd&2 != 0 {
		binary.LittleEndian.PutUint16(whole[36:], uint16(f.input.Byte()))
	}
	readable := [][]byte{whole}
	if cut := int(odd>>2&0x1f) * 3; cut > 0 && cut < len(whole) {
		readable = [][]byte{whole[:cut], whole[cut:]}
	}
	out := make([]byte, room)
	writable := [][]byte{out}
	if room > 70 {
		writable = [][]byte{out[:7], out[7:70], out[70:]}
	}
	if odd&0x80 != 0 { // the host renames while the server looks names up
		swapped := make(chan struct{})
		defer func() { <-swapped }()
		go func() {
			defer close(swapped)
			f.swap()
		}()
	}
	later := make(chan uint32, 1)
	written, done := f.server.Handle(0, readable, writable, func(n uint32) { later <- n })
	if !done {
		f.server.Cancel()
		written = <-later
	}
	f.reply(op, out, int(written))
	f.look()
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
	if errno == 0 {
		f.succeeded[op] = true
	}
	switch {
	case errno != 0:
	case op == fuse.Readdirplus:
		for len(body) >= fuse.EntryOutSize+fuse.DirentSize {
			if id := binary.LittleEndian.Uint64(body); id != 0 {
				f.nodes = append(f.nodes, id)
			}
			length := fuse.DirentSize + int(binary.LittleEndian.Uint32(body[fuse.EntryOutSize+16:]))
			body = body[fuse.EntryOutSize+(length+7)&^7:]
		}
	case len(body) >= fuse.EntryOutSize && (op == fuse.Lookup || op == fuse.Mkdir || op == fuse.Mknod || op == fuse.Symlink || op == fuse.Link):
		f.nodes = append(f.nodes, binary.LittleEndian.Uint64(body))
	case len(body) == fuse.EntryOutSize+fuse.OpenOutSize:
		f.nodes = append(f.nodes, binary.LittleEndian.Uint64(body))
		f.handles = append(f.handles, binary.LittleEndian.Uint64(body[fuse.EntryOutSize:]))
	case op == fuse.Open || op == fuse.Opendir:
		f.handles = append(f.handles, binary.LittleEndian.Uint64(body))
	}
}

// seed is a request as request takes it from its input.
func seed(op fuse.Opcode, node, fh, name, at byte, change ...byte) []byte {
	return append(append([]byte{byte(op), node, fh, name, at, byte(len(change))}, change...), 255, 0)
}

// Indices of fuzzNames, of nodes and of handles after seedPrologue.
const (
	nameFile, nameDir, nameLink, nameNew, nameDots = 0, 1, 2, 5, 7
	nodeRoot, nodeFile, nodeLink, nodeBind, nodeFD = 0, 1, 2, 3, 4
	handleFile, handleRoot                         = 0, 1
)

// seedPrologue looks things up and opens them.
func seedPrologue() []byte {
	return bytes.Join([][]byte{
		seed(fuse.Lookup, nodeRoot, 0, nameFile, 0), seed(fuse.Lookup, nodeRoot, 0, nameLink, 0),
		seed(fuse.Lookup, nodeRoot, 0, 11, 0), seed(fuse.Lookup, nodeRoot, 0, 13, 0),
		seed(fuse.Open, nodeFile, 0, 0, 0, unix.O_RDWR), seed(fuse.Opendir, nodeRoot, 0, 0, 0),
	}, nil)
}

// seeds are inputs for every operation: as the first of all; with what it needs
// to succeed; and on what leads out of the share.
func seeds() (all [][]byte) {
	id2 := binary.LittleEndian.AppendUint64(nil, 2) // of the file, the first node that is looked up
	good := map[fuse.Opcode][]byte{
		fuse.Init:          seed(fuse.Init, nodeRoot, 0, 0, 0),
		fuse.Readlink:      seed(fuse.Readlink, nodeLink, 0, 0, 0),
		fuse.Rename2:       seed(fuse.Rename2, nodeRoot, 0, nameFile, 0),
		fuse.Rename:        seed(fuse.Rename, nodeRoot, 0, nameFile, 0),
		fuse.Link:          seed(fuse.Link, nodeRoot, 0, nameNew, 0, id2...),
		fuse.Unlink:        seed(fuse.Unlink, nodeRoot, 0, nameFile, 0),
		fuse.Rmdir:         seed(fuse.Rmdir, nodeRoot, 0, nameDir, 0),
		fuse.Lookup:        seed(fuse.Lookup, nodeRoot, 0, nameDir, 0),
		fuse.Open:          seed(fuse.Open, nodeFile, 0, 0, 0),
		fuse.Syncfs:        seed(fuse.Syncfs, nodeRoot, 0, 0, 0),
		fuse.Destroy:       seed(fuse.Destroy, nodeRoot, 0, 0, 0),
		fuse.Getxattr:      append(seed(fuse.Setxattr, nodeFile, 0, nameNew, 0), seed(fuse.Getxattr, nodeFile, 0, nameNew, 0)...),
		fuse.Removexattr:   append(seed(fuse.Setxattr, nodeFile, 0, nameNew, 0), seed(fuse.Removexattr, nodeFile, 0, nameNew, 0)...),
		fuse.CopyFileRange: seed(fuse.CopyFileRange, nodeFile, handleFile, 0, 32, binary.LittleEndian.AppendUint64(nil, 4096)...),
	}
	for _, op := range []fuse.Opcode{fuse.Symlink, fuse.Mknod, fuse.Mkdir, fuse.Create, fuse.Tmpfile} {
		good[op] = seed(op, nodeRoot, 0, nameNew, 0)
	}
	for _, op := range []fuse.Opcode{fuse.Opendir, fuse.Readdir, fuse.Readdirplus, fuse.Releasedir, fuse.Fsyncdir} {
		good[op] = seed(op, nodeRoot, handleRoot, 0, 0)
	}
	served(func(op fuse.Opcode, _ operation) {
		all = append(all, seed(op, nodeRoot, 0, 0, 0))
		g, ok := good[op]
		if !ok {
			g = seed(op, nodeFile, handleFile, nameNew, 0)
		}
		all = append(all, append(seedPrologue(), g...))
		// On links, magic ones, a bind mount, and by names that lead up.
		traps := seedPrologue()
		for _, node := range []byte{nodeLink, nodeBind, nodeFD} {
			traps = append(traps, seed(op, node, handleFile, 14, 0)...)
		}
		for _, name := range []byte{nameDots, 8, 18, 20, 21} {
			traps = append(traps, seed(op, nodeBind, handleRoot, name, 0)...)
		}
		all = append(all, traps)
		// While the host renames.
		swap := seed(op, nodeRoot, handleRoot, 16, 0)
		swap[len(swap)-1] = 0x80
		all = append(all, bytes.Repeat(swap, 4))
	})
	return all
}

// play runs an input on a share of its own. Whatever it is: the server does not
// panic, answers or drops each request, opens, changes and tells of nothing
// outside of the share, keeps nothing, and allocates nothing in proportion to a
// length that it was told.
func play(t *testing.T, input []byte) map[fuse.Opcode]bool {
	tr := newTrap(t)
	fz := &fuzzer{trap: tr, input: input, nodes: []uint64{root}, succeeded: map[fuse.Opcode]bool{}}
	checkAllocated := alloctest.Limit(t, 8<<20)
	for range 64 {
		if len(fz.input) == 0 {
			break
		}
		fz.request()
	}
	for i, n := range fz.nodes {
		if i == 64 { // most are the same, and were looked at
			break
		}
		for _, name := range fuzzNames {
			if b, errno := tr.Call(fuse.Lookup, n, fusetest.Pack(name), fuse.EntryOutSize); errno == 0 && binary.LittleEndian.Uint64(b[40:]) == tr.outside.ino {
				t.Fatalf("node %d has %q, which is the secret", n, name)
			}
		}
	}
	checkAllocated()
	tr.check()
	tr.server.Reset()
	if n := tr.server.inodes.open; n != 1 {
		t.Errorf("%d descriptors are left", n)
	}
	if list, err := os.ReadDir(scratch); err != nil || len(list) != 2 {
		t.Errorf("beside the share: %v, %v", list, err)
	}
	return fz.succeeded
}

// TestSeedsReachEverything: a fuzzer that starts where nothing works finds
// little.
func TestSeedsReachEverything(t *testing.T) {
	succeeded := map[fuse.Opcode]bool{}
	for i, input := range seeds() {
		t.Run(strconv.Itoa(i), func(t *testing.T) {
			for op := range play(t, input) {
				succeeded[op] = true
			}
		})
	}
	served(func(op fuse.Opcode, o operation) {
		if !succeeded[op] && o.flags&noReply == 0 && op != fuse.Ioctl { // which is refused, all of it
			t.Errorf("no seed has %v succeed", op)
		}
	})
}

// FuzzRequests sends requests made of the input.
func FuzzRequests(f *testing.F) {
	for _, input := range seeds() {
		f.Add(input)
	}
	f.Fuzz(func(t *testing.T, input []byte) { play(t, input) })
}
