package vsock

import (
	"io"
	"testing"
)

// The guest is a goroutine of the same process: what is measured is the device
// and the guest model together.

func benchmarkStream(b *testing.B, w io.WriteCloser, r io.Reader, block int) {
	p := make([]byte, block)
	b.SetBytes(int64(block))
	b.ReportAllocs()
	go func() {
		for b.Loop() {
			if _, err := w.Write(p); err != nil {
				b.Error(err)
				break
			}
		}
		w.Close()
	}()
	io.CopyBuffer(plainWriter{io.Discard}, plainReader{r}, make([]byte, 64<<10))
}

func BenchmarkGuestToHost(b *testing.B) {
	g := newGuest(b, Config{})
	host, s := dial(b, g, 1, g.listen(1))
	benchmarkStream(b, s, host, 64<<10)
}

func BenchmarkGuestToHostSmall(b *testing.B) {
	g := newGuest(b, Config{})
	host, s := dial(b, g, 1, g.listen(1))
	benchmarkStream(b, s, host, 512)
}

func BenchmarkHostToGuest(b *testing.B) {
	g := newGuest(b, Config{})
	host, s := dial(b, g, 1, g.listen(1))
	benchmarkStream(b, host, s, 64<<10)
}

func BenchmarkHostToGuestSmall(b *testing.B) {
	g := newGuest(b, Config{})
	host, s := dial(b, g, 1, g.listen(1))
	benchmarkStream(b, host, s, 512)
}

// BenchmarkRoundTrip sends a byte to the guest, which sends it back.
func BenchmarkRoundTrip(b *testing.B) {
	benchmarkRoundTrip(b, newGuest(b, Config{}))
}

// BenchmarkRoundTripBusy does so beside connections that send all they can in
// each direction.
func BenchmarkRoundTripBusy(b *testing.B) {
	g := newGuest(b, Config{})
	for i := range uint32(2) {
		host, s := dial(b, g, 2+i, g.listen(2+i))
		go copyAll(io.Discard, host)
		go copyAll(io.Discard, s)
		go copyAll(host, zeros{})
		go copyAll(s, zeros{})
	}
	benchmarkRoundTrip(b, g)
	g.reset()
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

func benchmarkRoundTrip(b *testing.B, g *guest) {
	host, s := dial(b, g, 1, g.listen(1))
	go copyAll(s, s)
	p := make([]byte, 1)
	b.ReportAllocs()
	for b.Loop() {
		host.Write(p)
		io.ReadFull(host, p)
	}
	host.Close()
}

// BenchmarkDial connects, and closes again.
func BenchmarkDial(b *testing.B) {
	g := newGuest(b, Config{})
	accept := g.listen(1)
	b.ReportAllocs()
	for b.Loop() {
		f, err := g.device.Dial(b.Context(), 1)
		if err != nil {
			b.Fatal(err)
		}
		<-accept
		f.Close()
	}
}
