package buffers

import (
	"bytes"
	"testing"
)

// cut cuts p into buffers of the given lengths, and one for the rest.
func cut(p []byte, lengths []byte) [][]byte {
	var buffers [][]byte
	for _, n := range lengths {
		m := min(int(n), len(p))
		buffers = append(buffers, p[:m:m])
		p = p[m:]
	}
	return append(buffers, p)
}

// FuzzBuffers: a list of buffers is what it is in one piece.
func FuzzBuffers(f *testing.F) {
	f.Add([]byte("some bytes"), []byte{3, 0, 4}, uint64(2), uint64(5))
	f.Add([]byte("some bytes"), []byte{10}, uint64(10), uint64(0))
	f.Add([]byte("some bytes"), []byte{0, 0, 1}, uint64(3), uint64(1<<63))
	f.Add([]byte{}, []byte{0}, uint64(0), uint64(1))
	f.Add([]byte("some bytes"), []byte{1, 1, 1, 1}, uint64(1<<64-1), uint64(1<<64-1))
	f.Fuzz(func(t *testing.T, whole, lengths []byte, off, n uint64) {
		begin := min(off, uint64(len(whole)))
		end := begin + min(n, uint64(len(whole))-begin)
		want := bytes.Clone(whole[begin:end])
		room := int(min(n, 1<<10))

		list := cut(whole, lengths)
		if got := Len(list); got != uint64(len(whole)) {
			t.Errorf("length %d of %d", got, len(whole))
		}
		p := make([]byte, room)
		if got := CopyFrom(list, p, off); got != min(room, len(want)) || !bytes.Equal(p[:got], want[:got]) {
			t.Errorf("CopyFrom: %q, want %q", p[:got], want)
		}
		parts := Slice(nil, list, off, n)
		if got := bytes.Join(parts, nil); !bytes.Equal(got, want) {
			t.Errorf("Slice: %q, want %q", got, want)
		}
		for _, part := range parts {
			if len(part) == 0 {
				t.Error("Slice has an empty part")
			}
		}
		left := Skip(cut(whole, lengths), off)
		if got := bytes.Join(left, nil); !bytes.Equal(got, whole[begin:]) {
			t.Errorf("Skip: %q, want %q", got, whole[begin:])
		}
		if len(left) > 0 && len(left[0]) == 0 {
			t.Error("Skip left an empty buffer in front")
		}
		written := bytes.Clone(whole)
		x := bytes.Repeat([]byte{'x'}, room)
		got := CopyTo(cut(written, lengths), x, off)
		if got != min(room, len(want)) || !bytes.Equal(written[begin:int(begin)+got], x[:got]) ||
			!bytes.Equal(written[:begin], whole[:begin]) || !bytes.Equal(written[int(begin)+got:], whole[int(begin)+got:]) {
			t.Errorf("CopyTo: %d bytes, %q", got, written)
		}
	})
}
