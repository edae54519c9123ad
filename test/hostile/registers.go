package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The virtio devices by PCI id: 0x1040 and the type, virtio 1.2, section 4.1.2.1.
var deviceNames = map[uint16]string{
	0x1041: "net", 0x1042: "blk", 0x1043: "console", 0x1044: "rng", 0x1045: "balloon",
	0x1053: "vsock", 0x1058: "mem", 0x105a: "fs", 0x105b: "pmem",
}

// needed are the devices without which the guest, or what it has to say, ends. The balloon is one: it takes as free, and from the
// guest, whatever memory it is told of.
var needed = map[string]bool{"console": true, "vsock": true, "fs": true, "pmem": true, "balloon": true}

// A device is one of the guest's, taken from its driver's hands.
type device struct {
	name   string
	config *os.File // PCI configuration space
	bar    []byte   // BAR 0, mapped; registers_unsafe.go has how to get at it
}

// Where pkg/vmm/virtio/virtiopci has what in the BAR: a page each. The attack need not ask the capabilities.
const (
	commonPage = 0x0000
	// In there from queue_desc to behind queue_device: virtio 1.2, section 4.1.4.3.
	queueAddresses, queueAddressesEnd = 0x20, 0x38
	notifyPage                        = 0x3000
	tablePage                         = 0x4000
	barSize                           = 0x8000
)

// registers attacks the devices from below their drivers: as a driver with rings full of junk, then with junk in every register.
// First come those that the guest can do without. When it has said "the end" it goes for all of them, until nothing is left.
func registers([]string) (attack, error) {
	devices, err := findDevices()
	if err != nil {
		return nil, err
	}
	mem, err := newPages()
	if err != nil {
		return nil, err
	}
	fmt.Println("prepared:", devices)
	return func(round int) (string, error) {
		if round < 3 {
			var some []*device
			for _, d := range devices {
				if !needed[d.name] {
					some = append(some, d)
					d.drive(mem, 200)
					fmt.Println("driven:", d)
					d.junk(mem, 200, false)
					fmt.Println("filled with junk:", d)
				}
			}
			if err := junkPorts(200); err != nil {
				return "", fmt.Errorf("I/O ports: %w", err)
			}
			return fmt.Sprintf("200 ports, 200 requests and 200 writes to registers of each of %v", some), nil
		}
		if round == 3 {
			fmt.Println("the end")
			time.Sleep(time.Second) // for the line to get out
		}
		// The later in this list, the sooner the guest ends.
		for _, name := range []string{"net", "blk", "rng", "mem", "fs", "pmem", "console", "vsock", "balloon"} {
			for _, d := range devices {
				if d.name == name {
					d.drive(mem, 200)
					d.junk(mem, 1000, true)
				}
			}
		}
		return "", nil
	}, nil
}

func (d *device) String() string { return d.name }

func findDevices() ([]*device, error) {
	dirs, err := filepath.Glob("/sys/bus/pci/devices/*")
	if err != nil {
		return nil, err
	}
	var found []*device
	for _, dir := range dirs {
		b, err := os.ReadFile(filepath.Join(dir, "device"))
		if err != nil {
			return nil, err
		}
		var id uint16
		if _, err := fmt.Sscanf(strings.TrimSpace(string(b)), "0x%x", &id); err != nil {
			return nil, err
		}
		d := &device{name: deviceNames[id]}
		if d.name == "" {
			continue
		}
		if d.config, err = os.OpenFile(filepath.Join(dir, "config"), os.O_RDWR, 0); err != nil {
			return nil, err
		}
		f, err := os.OpenFile(filepath.Join(dir, "resource0"), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		d.bar, err = unix.Mmap(int(f.Fd()), 0, barSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return nil, fmt.Errorf("map the registers of %s: %w", d.name, err)
		}
		found = append(found, d)
	}
	if len(found) == 0 {
		return nil, errors.New("no virtio device")
	}
	return found, nil
}

// Pages of this program's, at addresses of the guest's that are known.
type pages struct {
	desc, avail, used, indirect, payload page
}

type page struct {
	bytes   []byte
	address uint64 // physical
}

const pageSize = 4096

func newPages() (*pages, error) {
	m := &pages{}
	for _, p := range []*page{&m.desc, &m.avail, &m.used, &m.indirect, &m.payload} {
		var err error
		if p.bytes, err = unix.Mmap(-1, 0, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
			return nil, err
		}
		clear(p.bytes)
		if err := unix.Mlock(p.bytes); err != nil {
			return nil, err
		}
		if p.address, err = physical(p.bytes); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// physical looks a page up in /proc/self/pagemap: Documentation/admin-guide/mm/pagemap.rst.
func physical(b []byte) (uint64, error) {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var entry [8]byte
	if _, err := f.ReadAt(entry[:], int64(virtual(b)/pageSize*8)); err != nil {
		return 0, err
	}
	v := binary.NativeEndian.Uint64(entry[:])
	number := v & (1<<55 - 1)
	if v>>63 == 0 || number == 0 {
		return 0, errors.New("the kernel does not tell where a page is")
	}
	return number * pageSize, nil
}

// drive is the driver of a device, one that means no good: it sets the device up by the rules, and puts junk into the rings, with
// resets while requests are in flight. What the device may write to is this program's own, or nowhere.
func (d *device) drive(m *pages, steps int) {
	var queues uint16
	for step := range steps {
		if step%20 == 0 {
			queues = d.start(m)
		}
		m.junk()
		d.set16(notifyPage+4*uint32(rand.N(max(queues, 1))), uint16(rand.Uint32()))
	}
	d.set8(0x14, 0) // the status: a reset
}

// Queues are of this size: small, so that indices wrap around.
const queueSize = 16

// start does what virtio 1.2, section 3.1.1, says, with all queues in the same place, and returns how many there are.
func (d *device) start(m *pages) (queues uint16) {
	const status, queueSelect, size, enable = 0x14, 0x16, 0x18, 0x1c
	d.set8(status, 0)
	clear(m.avail.bytes)
	d.set8(status, 1)
	d.set8(status, 3)
	for half := range uint32(2) {
		d.set32(0x00, half)
		d.set32(0x08, half)
		d.set32(0x0c, d.get32(0x04)) // the driver takes what the device offers
	}
	d.set8(status, 0xb)
	queues = min(uint16(d.get32(0x10)>>16), 8) // behind config_msix_vector, which may not be read by itself here
	for i := range queues {
		d.set16(queueSelect, i)
		d.set16(size, queueSize)
		for offset, address := range map[uint32]uint64{0x20: m.desc.address, 0x28: m.avail.address, 0x30: m.used.address} {
			d.set32(offset, uint32(address))
			d.set32(offset+4, uint32(address>>32))
		}
		d.set16(enable, 1)
	}
	d.set8(status, 0xf)
	return queues
}

// nowhere are addresses without memory: the PCI window, configuration space, beyond everything, where sums overflow.
var nowhere = []uint64{0xc0000000, 0xe0000000, 0xfee00000, 1 << 45, 1<<64 - 16, 1<<63 - 1}

// junk fills the rings.
func (m *pages) junk() {
	le := binary.LittleEndian
	for i := range m.payload.bytes[:256] {
		m.payload.bytes[i] = byte(rand.Uint32())
	}
	le.PutUint32(m.payload.bytes, rand.Uint32N(16)) // a request's type, where it begins with one
	le.PutUint32(m.payload.bytes[4:], rand.Uint32N(60))
	for _, table := range []page{m.desc, m.indirect} {
		for i := range queueSize {
			at := rand.Uint64N(pageSize)
			address, length := m.payload.address+at, rand.Uint32N(uint32(pageSize-at)+1)
			flags := uint16(rand.Uint32N(4)) // next, and to be written
			switch rand.IntN(8) {
			case 0:
				address, length = nowhere[rand.IntN(len(nowhere))], rand.Uint32()>>rand.IntN(32)
			case 1:
				length, flags = rand.Uint32(), flags&^2 // too long, to be read
			case 2:
				address, length, flags = m.indirect.address, rand.Uint32N(300)*4, flags&1|4
			case 3:
				flags = uint16(rand.Uint32())
			}
			d := table.bytes[16*i:]
			le.PutUint64(d, address)
			le.PutUint32(d[8:], length)
			le.PutUint16(d[12:], flags)
			le.PutUint16(d[14:], uint16(rand.Uint32N(queueSize+2)))
		}
	}
	for i := range queueSize {
		le.PutUint16(m.avail.bytes[4+2*i:], uint16(rand.Uint32N(queueSize+1)))
	}
	index := le.Uint16(m.avail.bytes[2:]) + uint16(rand.Uint32N(4))
	if rand.IntN(16) == 0 { // more than there is room for
		index += 30000
	}
	le.PutUint16(m.avail.bytes[2:], index)
}

// junk writes to registers. Unless everything may break, it leaves alone what would: interrupts, where the BAR is, and where queues
// are, of which a part that is overwritten makes an address in the guest's memory that is not this program's.
func (d *device) junk(m *pages, writes int, everything bool) {
	for range writes {
		offset := [...]uint32{
			commonPage + rand.Uint32N(0x40), commonPage + rand.Uint32N(0x40), commonPage + 0x14, rand.Uint32N(barSize), notifyPage + 4*rand.Uint32N(16),
		}[rand.IntN(5)]
		if !everything && offset >= queueAddresses && offset < queueAddressesEnd {
			continue
		}
		values := []uint32{0, 1, 3, 0xb, 0xf, 0x80, 0xff, 1 << 31, 1<<32 - 1, uint32(m.desc.address), rand.Uint32() | 0xc0000000}
		if everything {
			values = append(values, rand.Uint32(), rand.Uint32N(1<<16))
			if rand.IntN(4) == 0 {
				d.junkConfig(0)
			}
		} else if offset >= tablePage && offset < tablePage+pageSize {
			d.junkConfig(0x40)
			continue
		}
		v := values[rand.IntN(len(values))]
		switch rand.IntN(4) {
		case 0:
			d.set8(offset, uint8(v))
		case 1:
			d.set16(offset&^1, uint16(v))
		case 2:
			d.set32(offset&^3, v)
		case 3:
			_ = d.get32(offset &^ 3)
		}
	}
}

// junkConfig writes to PCI configuration space, from an offset on.
func (d *device) junkConfig(from int64) {
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], rand.Uint32())
	n := 1 << rand.IntN(3)
	_, _ = d.config.WriteAt(b[:n], from+rand.Int64N(0x100-from)&^3)
}
