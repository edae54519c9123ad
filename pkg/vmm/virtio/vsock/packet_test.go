package vsock

import (
	"encoding/binary"
	"io"
	"testing"
)

func TestBacklog(t *testing.T) {
	var b backlog
	var want []byte
	data, _ := io.ReadAll(stream(1, 1<<20))
	for i, step := range []struct{ write, discard int }{
		{1, 0}, {0, 1}, {chunkSize, 0}, {0, chunkSize - 1}, {5, 6}, {3 * chunkSize, 1}, {10, chunkSize},
		{chunkSize, 2 * chunkSize}, {100, 50}, {2*chunkSize + 1, chunkSize - 1}, {0, 1}, {7, 0},
	} {
		p := data[:step.write]
		data = data[step.write:]
		b.write([][]byte{p[:len(p)/2], p[len(p)/2:]})
		want = append(want, p...)
		b.discard(step.discard)
		want = want[step.discard:]
		var got []byte
		for _, p := range b.buffers(nil) {
			got = append(got, p...)
		}
		if b.size != len(want) || string(got) != string(want) {
			t.Fatalf("step %d: %d bytes, want %d", i, len(got), len(want))
		}
		if held := len(b.chunks) * chunkSize; held >= b.size+2*chunkSize {
			t.Errorf("step %d: holds %d bytes for %d", i, held, b.size)
		}
	}
	b.discard(b.size)
	if len(b.chunks) != 0 {
		t.Errorf("%d chunks are left", len(b.chunks))
	}
}

func TestHeader(t *testing.T) {
	var raw [headerSize]byte
	for i := range raw {
		raw[i] = byte(i)
	}
	h := parseHeader(&raw)
	if want := uint16(0x1d1c); h.kind != want || h.op != 0x1f1e || h.fwdCnt != binary.LittleEndian.Uint32(raw[40:]) {
		t.Errorf("%+v", h)
	}
	var again [headerSize]byte
	h.format(&again)
	if again != raw {
		t.Errorf("% x", again)
	}
}
