package vmm

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/memory"
	"github.com/microvm-runtime/microvm/pkg/vmm/pci"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/rng"
)

// In the tests of this file pvpanic is device 0, and what is attached first
// device 1. Its BAR comes after pvpanic's, aligned to its size.
const (
	pluggedConfig = ecamAddr + 1<<15
	pluggedBAR    = pciWindowAddr + 0x8000
	pluggedAt     = "0000:00:01.0"
)

// rdiTo loads rdi with addr.
func rdiTo(addr uint64) []byte { return binary.LittleEndian.AppendUint64([]byte{0x48, 0xbf}, addr) }

// copy32 stores the word at from at to.
func copy32(from, to uint64) []byte {
	return bytes.Join([][]byte{rdiTo(from), {0x8b, 0x07}, rdiTo(to), {0x89, 0x07}}, nil) // mov eax, [rdi]; mov [rdi], eax
}

// store16 and store8 store v at addr.
func store16(addr uint64, v uint16) []byte {
	return append(rdiTo(addr), 0x66, 0xc7, 0x07, byte(v), byte(v>>8)) // mov word [rdi], v
}

func store8(addr uint64, v uint8) []byte { return append(rdiTo(addr), 0xc6, 0x07, v) } // mov byte [rdi], v

// waitOnes waits until the word at addr is all ones, or until it is not.
func waitOnes(addr uint64, ones bool) []byte {
	jump := byte(0x74) // je
	if ones {
		jump = 0x75 // jne
	}
	return append(rdiTo(addr), 0x8b, 0x07, 0x83, 0xf8, 0xff, jump, 0xf9) // mov eax, [rdi]; cmp eax, -1; to the mov
}

// driveRNG does what a driver does to start an entropy device and have it fill a
// buffer of its, over and over.
func driveRNG() []byte {
	const common, notify, desc, avail = pluggedBAR, pluggedBAR + 0x3000, 0x40000, 0x41000
	return bytes.Join([][]byte{
		store32(pluggedConfig+4, 2), // memory decoding on
		store8(common+0x14, 0), store8(common+0x14, 1), store8(common+0x14, 3),
		store32(common+0x08, 1), store32(common+0x0c, 1), // VERSION_1
		store8(common+0x14, 0x0b),
		store16(common+0x16, 0), store16(common+0x18, 2),
		store32(common+0x20, desc), store32(common+0x28, avail), store32(common+0x30, avail+0x1000),
		store16(common+0x1c, 1),
		store64(desc, 0x50000), store64(desc+8, 64|2<<32), // 64 bytes, writable
		store64(avail, 1<<16), // index 1: descriptor 0
		store8(common+0x14, 0x0f),
		store16(notify, 0),
	}, nil)
}

// startTiny runs a guest until the test ends, when it must be stopped.
func startTiny(t *testing.T, code ...[]byte) *Machine {
	t.Helper()
	m, err := New(tinyConfig(t, code...))
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		if exit, err := m.Run(); exit.Reason != ExitStopped || err != nil {
			t.Errorf("exit %+v, %v", exit, err)
		}
	})
	t.Cleanup(func() { m.Stop(); running.Wait() })
	return m
}

func word(t *testing.T, m *Machine, addr uint64) uint32 {
	t.Helper()
	b, err := m.memory.Slice(memory.GuestAddress(addr), 4)
	if err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.Uint32(b)
}

// TestHotplug has a guest see a device come and go.
func TestHotplug(t *testing.T) {
	const seen, filled, gone, bar = tinyCounter + 16, 0x50000, tinyCounter + 24, tinyCounter + 32
	m := startTiny(t, mapPCI(),
		waitOnes(pluggedConfig, false), driveRNG(), store32(seen, 1),
		waitOnes(pluggedConfig, true), copy32(pluggedBAR, bar), store32(pluggedBAR+0x3000, 0), store32(gone, 1),
		tinySpin)
	device := rng.New(rand.Reader)
	if at, err := m.Attach(device); at != pluggedAt || err != nil || m.PCIAddress(device) != pluggedAt {
		t.Fatalf("attached at %q, %v", at, err)
	}
	waitFor(t, "the guest to see the device", func() bool { return word(t, m, seen) == 1 })
	waitFor(t, "the device to work", func() bool { return word(t, m, filled) != 0 })
	if err := m.Detach(pluggedAt); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the guest to miss the device", func() bool { return word(t, m, gone) == 1 })
	if v := word(t, m, bar); v != 0xffffffff || m.PCIAddress(device) != "" {
		t.Errorf("where the BAR was the guest read %#x; the device is at %q", v, m.PCIAddress(device))
	}
	for _, address := range []string{pluggedAt, "0000:00:00.0", "0000:00:1f.0", "", "1"} {
		if err := m.Detach(address); err == nil {
			t.Errorf("a device was detached from %q", address)
		}
	}
	if _, err := m.Attach(device); err != nil { // in its old place
		t.Error(err)
	}
}

// TestHotplugHostile attaches and detaches a device while the guest starts it
// and kicks it all the time, whether it is there or not.
func TestHotplugHostile(t *testing.T) {
	drive := driveRNG()
	code := bytes.Join([][]byte{mapPCI(), rdiTo(tinyCounter), {0xff, 0x07}, drive}, nil)
	back := len(drive) + 12 + 5
	code = binary.LittleEndian.AppendUint32(append(code, 0xe9), uint32(-back)) // jmp to the counting
	m := startTiny(t, code)
	var done sync.WaitGroup
	for range 2 {
		done.Go(func() {
			for range 200 {
				before := word(t, m, tinyCounter)
				at, err := m.Attach(rng.New(rand.Reader))
				if err != nil {
					t.Error(err)
					return
				}
				waitFor(t, "the guest", func() bool { return word(t, m, tinyCounter) != before })
				if err := m.Detach(at); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	done.Wait()
	if n := len(m.devices); n != 0 {
		t.Errorf("%d devices are left", n)
	}
}

func TestHotplugFull(t *testing.T) {
	m := startTiny(t, tinySpin)
	var at []string
	for i := range 31 {
		address, err := m.Attach(rng.New(rand.Reader))
		if want := fmt.Sprintf("0000:00:%02x.0", i+1); address != want || err != nil {
			t.Fatalf("device %d at %q, %v", i, address, err)
		}
		at = append(at, address)
	}
	if _, err := m.Attach(rng.New(rand.Reader)); err == nil || !strings.Contains(err.Error(), "full") {
		t.Errorf("one device too many: %v", err)
	}
	for _, i := range []int{7, 30, 0} {
		if err := m.Detach(at[i]); err != nil {
			t.Fatal(err)
		}
		if address, err := m.Attach(rng.New(rand.Reader)); address != at[i] || err != nil {
			t.Errorf("the next device is at %q, %v, want %s", address, err, at[i])
		}
	}
	if _, err := m.Attach(oddDevice{}); err == nil || !strings.Contains(err.Error(), "queues") {
		t.Errorf("a device without queues: %v", err)
	}
}

// TestHotplugAtTheEnd attaches and detaches while the machine ends.
func TestHotplugAtTheEnd(t *testing.T) {
	for range 20 {
		m, err := New(tinyConfig(t, tinySpin))
		if err != nil {
			t.Fatal(err)
		}
		var running sync.WaitGroup
		running.Go(func() {
			if exit, err := m.Run(); exit.Reason != ExitStopped || err != nil {
				t.Errorf("exit %+v, %v", exit, err)
			}
		})
		for i := 0; ; i++ {
			at, err := m.Attach(rng.New(rand.Reader))
			if err == nil {
				err = m.Detach(at)
			}
			if err != nil {
				break
			}
			if i == 5 {
				go m.Stop()
			}
		}
		running.Wait()
		if _, err := m.Attach(rng.New(rand.Reader)); err == nil {
			t.Error("a device was attached to a machine that has ended")
		}
	}
}

// slowDevice has something under way on the host until it is released.
type slowDevice struct {
	*rng.Device
	waits    chan struct{} // gets a value when a reset waits
	released chan struct{}
}

func newSlowDevice() slowDevice {
	return slowDevice{rng.New(rand.Reader), make(chan struct{}, 4), make(chan struct{})}
}

func (d slowDevice) Reset() {
	d.waits <- struct{}{}
	<-d.released
	d.Device.Reset()
}

// inVain is how long the next two tests wait for what may not have to wait.
const inVain = 30 * time.Second

// TestDetachWaits detaches a device that takes its time: whatever else is wanted of
// the machine goes on.
func TestDetachWaits(t *testing.T) {
	for name, code := range map[string][]byte{
		"for the device": {},
		// A vCPU is in the device, then.
		"for the guest's reset": bytes.Join([][]byte{
			mapPCI(), waitOnes(pluggedConfig, false), store32(pluggedConfig+4, 2), store8(pluggedBAR+0x14, 0),
		}, nil),
	} {
		t.Run(name, func(t *testing.T) {
			c := tinyConfig(t, code, tinySpin)
			c.MaxVCPUs = 2
			m := start(t, c)
			slow := newSlowDevice()
			at, err := m.Attach(slow)
			if err != nil || at != pluggedAt {
				t.Fatalf("%s, %v", at, err)
			}
			if len(code) > 0 {
				<-slow.waits
			}
			var detaching sync.WaitGroup
			detaching.Go(func() {
				if err := m.Detach(at); err != nil {
					t.Error(err)
				}
			})
			if len(code) == 0 {
				<-slow.waits
			} else {
				// Its configuration space says that the BAR is no more, but it waits.
				ecam := m.mappings[slices.IndexFunc(m.mappings, func(p *mapping) bool { return len(p.bytes()) == pci.ECAMSize })].bytes()
				waitFor(t, "the device to leave", func() bool { return ecam[pluggedConfig-ecamAddr+4]&2 == 0 })
			}

			others := make(chan error, 1)
			go func() {
				others <- func() error {
					if err := m.StartVCPUs(2); err != nil {
						return err
					}
					if _, err := m.VCPUStats(); err != nil {
						return err
					}
					other, err := m.Attach(rng.New(rand.Reader))
					if err != nil {
						return err
					}
					if other == at {
						t.Errorf("two devices at %s", at)
					}
					file, err := m.AttachPmem(tempFile(t, []byte("contents")))
					return errors.Join(err, m.Detach(other), m.Detach(file))
				}()
			}()
			select {
			case err := <-others:
				if err != nil {
					t.Error(err)
				}
				if err := m.Detach(at); err == nil {
					t.Error("a device was detached twice")
				}
			case <-time.After(inVain):
				t.Error("others wait, too")
			}
			close(slow.released)
			detaching.Wait()
			if next, err := m.Attach(rng.New(rand.Reader)); next != at || err != nil {
				t.Errorf("the next device is at %s, %v", next, err)
			}
		})
	}
}

// TestEndWhileDetachWaits: the machine's end does not wait for a device either, which
// has its memory until it is done.
func TestEndWhileDetachWaits(t *testing.T) {
	m, err := New(tinyConfig(t, tinySpin))
	if err != nil {
		t.Fatal(err)
	}
	slow := newSlowDevice()
	at, err := m.Attach(slow)
	if err != nil {
		t.Fatal(err)
	}
	b, err := m.memory.Slice(memory.GuestAddress(tinyCounter), 1)
	if err != nil {
		t.Fatal(err)
	}
	var detaching, running sync.WaitGroup
	detaching.Go(func() {
		if err := m.Detach(at); err != nil {
			t.Error(err)
		}
	})
	<-slow.waits
	ended := make(chan struct{})
	running.Go(func() {
		defer close(ended)
		if exit, err := m.Run(); exit.Reason != ExitStopped || err != nil {
			t.Errorf("exit %+v, %v", exit, err)
		}
	})
	m.Stop()
	select {
	case <-ended:
		b[0]++
	case <-time.After(inVain):
		t.Error("the end waits, too")
	}
	close(slow.released)
	detaching.Wait()
	running.Wait()
	if err := unix.Madvise(m.mappings[0].bytes(), unix.MADV_NORMAL); !errors.Is(err, unix.ENOMEM) {
		t.Errorf("the machine's memory is still there: %v", err)
	}
}
