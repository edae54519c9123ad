package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"

	"github.com/microvm-runtime/microvm/pkg/vmm/control"
	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/blk"
	virtionet "github.com/microvm-runtime/microvm/pkg/vmm/virtio/net"
)

// plugged is a device that can be detached: a NIC, a disk or persistent memory.
type plugged struct {
	// device is nil for persistent memory, which is the machine's.
	device virtio.Device
	// traffic is what a NIC counts; nil for a disk.
	traffic func() control.NICStats
	// close gives back the files, once the machine does not use them.
	close func() error
}

// limiters are shared by the devices that they are for; nil is no limit.
type limiters struct{ disk, receive, transmit *ratelimit.Limiter }

func newLimiters(limits control.RateLimits, clock ratelimit.Clock) (l limiters, err error) {
	for _, part := range []struct {
		name    string
		limits  ratelimit.Limits
		limiter **ratelimit.Limiter
	}{
		{"disk", limits.Disk, &l.disk},
		{"network receive", limits.NetworkReceive, &l.receive},
		{"network transmit", limits.NetworkTransmit, &l.transmit},
	} {
		if *part.limiter, err = ratelimit.New(part.limits, clock); err != nil {
			return limiters{}, fmt.Errorf("rate limits: %s: %w", part.name, err)
		}
	}
	return l, nil
}

// newNIC makes a NIC over the taps, which it closes: the device has copies.
func (l limiters) newNIC(nic control.NIC, taps []*os.File, log *slog.Logger) (plugged, error) {
	defer func() {
		for _, tap := range taps {
			tap.Close()
		}
	}()
	mac, err := net.ParseMAC(nic.MAC)
	if err != nil || len(mac) != 6 {
		return plugged{}, fmt.Errorf("NIC: %q is no MAC address", nic.MAC)
	}
	device, err := virtionet.New(virtionet.Config{
		Taps: taps, MAC: [6]byte(mac), MTU: nic.MTU, RXLimit: l.receive, TXLimit: l.transmit, Log: log.With("mac", nic.MAC),
	})
	if err != nil {
		return plugged{}, fmt.Errorf("NIC %s: %w", nic.MAC, err)
	}
	traffic := func() control.NICStats {
		s := device.Stats()
		return control.NICStats{MAC: nic.MAC, RX: control.LinkTraffic(s.RX), TX: control.LinkTraffic(s.TX)}
	}
	return plugged{device: device, traffic: traffic, close: device.Close}, nil
}

// newDisk makes a disk over the file, which belongs to it.
func (l limiters) newDisk(disk control.Disk, file *os.File, log *slog.Logger) (plugged, error) {
	if disk.Pmem {
		file.Close()
		return plugged{}, errors.New("persistent memory can only be attached to a machine that runs")
	}
	device, err := blk.New(blk.Config{File: file, ReadOnly: disk.ReadOnly, Serial: disk.Serial, Limit: l.disk, Log: log})
	if err != nil {
		file.Close()
		return plugged{}, err
	}
	return plugged{device: device, close: file.Close}, nil
}

// bootDevices makes the disks and NICs that config has from the start.
func (l limiters) bootDevices(config control.Config, files map[string]*os.File, log *slog.Logger) ([]plugged, error) {
	var devices []plugged
	for i, disk := range config.Disks {
		file := files[control.FileDisk(i)]
		if file == nil {
			return nil, fmt.Errorf("disk %d has no file", i)
		}
		p, err := l.newDisk(disk, file, log)
		if err != nil {
			return nil, fmt.Errorf("disk %d: %w", i, err)
		}
		devices = append(devices, p)
	}
	for i, nic := range config.NICs {
		var taps []*os.File
		for pair := range nic.QueuePairs {
			tap := files[control.FileTap(i, pair)]
			if tap == nil {
				return nil, fmt.Errorf("NIC %d has no tap for queue pair %d", i, pair)
			}
			taps = append(taps, tap)
		}
		p, err := l.newNIC(nic, taps, log)
		if err != nil {
			return nil, err
		}
		devices = append(devices, p)
	}
	return devices, nil
}

func (m *machine) attachNIC(nic control.NIC, taps []*os.File) (address string, err error) {
	p, err := m.limiters.newNIC(nic, taps, m.log)
	if err != nil {
		return "", err
	}
	return m.attach(p)
}

func (m *machine) attachDisk(disk control.Disk, file *os.File) (address string, err error) {
	if disk.Pmem {
		return m.attachPmem(disk, file)
	}
	p, err := m.limiters.newDisk(disk, file, m.log)
	if err != nil {
		return "", err
	}
	return m.attach(p)
}

// attachPmem maps the file, which is not needed open any more then.
func (m *machine) attachPmem(disk control.Disk, file *os.File) (address string, err error) {
	defer file.Close()
	if !disk.ReadOnly || disk.Serial != "" {
		return "", errors.New("persistent memory is read only, and has no serial")
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if address, err = m.AttachPmem(file); err != nil {
		return "", err
	}
	m.plugged[address] = plugged{close: func() error { return nil }}
	return address, nil
}

func (m *machine) attach(p plugged) (address string, err error) {
	m.mu.Lock() // so that nobody detaches it before it is listed
	defer m.mu.Unlock()
	address, err = m.Attach(p.device)
	if err != nil {
		return "", errors.Join(err, p.close())
	}
	m.plugged[address] = p
	return address, nil
}

func (m *machine) detach(address string) error {
	m.mu.Lock()
	p, ok := m.plugged[address]
	delete(m.plugged, address)
	m.mu.Unlock()
	if !ok {
		return fmt.Errorf("there is no NIC or disk at %q", address)
	}
	// It waits for the device, which may have requests with the host. It fails
	// only when the machine has ended, and then nobody asks for the device again.
	if err := m.Detach(address); err != nil {
		return err
	}
	return p.close()
}

// traffic is what the NICs count, by PCI address.
func (m *machine) traffic() map[string]control.NICStats {
	m.mu.Lock()
	defer m.mu.Unlock()
	stats := make(map[string]control.NICStats)
	for address, p := range m.plugged {
		if p.traffic != nil {
			stats[address] = p.traffic()
		}
	}
	return stats
}
