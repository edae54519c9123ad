package net

import (
	"bytes"
	"fmt"
	"os"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
)

// The driver is goroutines of the same process, and the host's stack is a packet
// socket: what is measured is the device, the tap, the driver's model and the
// socket together.

// systemCalls is how many reading or writing system calls the process has made:
// the device's are all of these kinds, the packet socket's are of neither.
func systemCalls(b *testing.B) (reads, writes float64) {
	b.Helper()
	io, err := os.ReadFile("/proc/self/io")
	if err != nil {
		b.Fatal(err)
	}
	var skip float64
	if _, err := fmt.Fscanf(bytes.NewReader(io), "rchar: %f\nwchar: %f\nsyscr: %f\nsyscw: %f\n", &skip, &skip, &reads, &writes); err != nil {
		b.Fatal(err)
	}
	return reads, writes
}

func measure(b *testing.B, frame int, run func()) {
	b.SetBytes(int64(frame))
	b.ReportAllocs()
	reads, writes := systemCalls(b)
	b.ResetTimer()
	run()
	b.StopTimer()
	r, w := systemCalls(b)
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "packets/s")
	b.ReportMetric((r-reads+w-writes)/float64(b.N), "syscalls/packet")
}

func benchmarkTransmit(b *testing.B, packet []byte) {
	l := newLink(b, 1)
	if err := l.ignoreAll(); err != nil {
		b.Fatal(err)
	}
	g := newGuest(b, newDevice(b, l, Config{}), virtiotest.Options{}, 0, 0)
	var requests []*virtiotest.Request
	for range 64 {
		pieces := [][]byte{packet[:headerSize]}
		for rest := packet[headerSize:]; len(rest) > 0; {
			n := min(len(rest), 4096) // a page to a descriptor, as Linux does
			pieces, rest = append(pieces, rest[:n]), rest[n:]
		}
		r := g.Prepare(1, pieces, nil)
		r.Submit()
		requests = append(requests, r)
	}
	measure(b, len(packet)-headerSize, func() {
		for i := range b.N {
			r := requests[i%len(requests)]
			r.Join()
			r.Submit()
		}
	})
	if s := g.device.Stats().TX; s.Dropped > 0 {
		b.Errorf("stats %+v", s)
	}
}

func BenchmarkTransmitSmall(b *testing.B) { benchmarkTransmit(b, plain(ethernet(1, 64))) }
func BenchmarkTransmitMTU(b *testing.B)   { benchmarkTransmit(b, plain(ethernet(1, 1514))) }
func BenchmarkTransmitSegmented(b *testing.B) {
	benchmarkTransmit(b, tcp(1, 60000, 1448, headerSize))
}

func benchmarkReceive(b *testing.B, packet []byte, size int) {
	l := newLink(b, 1)
	g := newGuest(b, newDevice(b, l, Config{}), virtiotest.Options{}, 0, 0)
	var requests []*virtiotest.Request
	for range queueSize {
		r := g.Prepare(0, nil, []int{size})
		r.Submit()
		requests = append(requests, r)
	}
	// A tap whose queue is full drops frames: no more than this are on their way.
	window := make(chan struct{}, 128)
	measure(b, len(packet)-hostHeader, func() {
		go func() {
			for range b.N {
				window <- struct{}{}
				l.send(packet)
			}
		}()
		buffers := (len(packet) + headerSize - hostHeader + size - 1) / size
		for i := range b.N * buffers {
			r := requests[i%len(requests)]
			r.Join()
			r.Submit()
			if i%buffers == 0 {
				<-window
			}
		}
	})
}

func BenchmarkReceiveSmall(b *testing.B) {
	benchmarkReceive(b, append(make([]byte, hostHeader), ethernet(1, 64)...), 1536)
}
func BenchmarkReceiveMTU(b *testing.B) {
	benchmarkReceive(b, append(make([]byte, hostHeader), ethernet(1, 1514)...), 1536)
}
func BenchmarkReceiveSegmented(b *testing.B) {
	benchmarkReceive(b, tcp(1, 60000, 1448, hostHeader), 4096)
}
