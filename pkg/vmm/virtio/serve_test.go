package virtio_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/virtiotest"
	"golang.org/x/sys/unix"
)

// untouched maps n bytes that cost nothing until they are touched.
func untouched(t *testing.T, n int) []byte {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(b) })
	return b
}

// echo is a device that copies what it is sent to the answer: at once, or from
// a pool of workers that finish in any order.
type echo struct {
	workers int
	pool    bool // of ServeConcurrently
	size    uint16

	stopped sync.WaitGroup
	jobs    chan *virtio.Chain
}

func (*echo) Type() uint16               { return virtio.TypeRNG }
func (*echo) Features() uint64           { return 0 }
func (e *echo) QueueSizes() []uint16     { return []uint16{e.size} }
func (*echo) ReadConfig(uint64, []byte)  {}
func (*echo) WriteConfig(uint64, []byte) {}

func (e *echo) Activate(a virtio.Activation) error {
	q := a.Queues[0]
	answer := func(c *virtio.Chain) (written uint32, done bool) {
		var n uint64
		for _, b := range c.Readable {
			n += uint64(c.CopyOut(b, n))
		}
		return uint32(n), true
	}
	if e.pool {
		e.stopped.Go(func() { virtio.ServeConcurrently(q, e.workers, a.Fail, nil, answer) })
		return nil
	}
	jobs := make(chan *virtio.Chain, q.Size())
	e.jobs = jobs
	for range e.workers {
		e.stopped.Go(func() {
			for c := range jobs {
				written, _ := answer(c)
				q.Complete(c, written)
				q.Flush()
			}
		})
	}
	e.stopped.Go(func() {
		defer close(jobs)
		virtio.Serve(q, a.Fail, func(c *virtio.Chain) (uint32, bool) {
			if e.workers == 0 {
				return answer(c)
			}
			jobs <- c
			return 0, false
		})
	})
	return nil
}

func (e *echo) Reset() { e.stopped.Wait() }

func TestServe(t *testing.T) {
	for _, device := range []*echo{{workers: 0}, {workers: 4}, {workers: 4, pool: true}} {
		for name, features := range map[string]uint64{
			"plain": virtio.FeatureVersion1, "event index": virtio.FeatureVersion1 | virtio.FeatureEventIdx,
			"indirect": virtio.FeatureVersion1 | virtio.FeatureIndirectDesc, "both": virtiotest.RingFeatures,
		} {
			t.Run(fmt.Sprintf("%s/%d workers, pool %v", name, device.workers, device.pool), func(t *testing.T) {
				d := virtiotest.NewDriver(t, &echo{workers: device.workers, pool: device.pool, size: 16}, virtiotest.Options{Features: features})
				for range 2 { // before and after a reset
					var senders sync.WaitGroup
					for s := range 4 {
						senders.Go(func() {
							for i := range 150 {
								payload := binary.LittleEndian.AppendUint64(nil, uint64(s)<<32|uint64(i))
								r := d.Send(0, [][]byte{payload[:3], payload[3:]}, []int{1, 9})
								written, out := r.Wait(t)
								if got := bytes.Join(out, nil); written != 8 || !bytes.Equal(got[:8], payload) {
									t.Errorf("sent %x, got %d bytes, %x", payload, written, got)
									return
								}
							}
						})
					}
					senders.Wait()
					t.Logf("%d kicks, %d interrupts for 600 requests", d.Kicks(0), d.Interrupts(0))
					d.Reset()
					d.Activate()
				}
			})
		}
	}
}

func TestServeFailsOnce(t *testing.T) {
	d := virtiotest.NewDriver(t, &echo{size: 16, workers: 3, pool: true}, virtiotest.Options{MayFail: true})
	d.Rings[0].Push(16)
	d.Kick(0)
	if err := d.Failed(); !strings.Contains(err.Error(), "head 16 of 16") {
		t.Fatal(err)
	}
	d.Reset()
	d.Activate()
	if written, _ := d.Send(0, [][]byte{{1}}, []int{1}).Wait(t); written != 1 {
		t.Fatal("the device does not work after a reset")
	}
}

// A reset with requests in flight: Reset returns when the workers are done, and
// the driver (which overwrites all memory then) sees no late access.
func TestResetWithRequestsInFlight(t *testing.T) {
	for _, pool := range []bool{false, true} {
		d := virtiotest.NewDriver(t, &echo{workers: 3, pool: pool, size: 64}, virtiotest.Options{})
		for range 20 {
			for range 50 {
				d.Send(0, [][]byte{make([]byte, 512)}, []int{512})
			}
			d.Reset()
			d.Activate()
		}
	}
}
