package network

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/jail"
)

const (
	// tapPrefix begins the name of every tap of ours.
	tapPrefix = "mvtap"
	// headerSize is that of struct virtio_net_hdr_v1 (virtio 1.3, 5.1.6),
	// which is before every frame.
	headerSize = 12
)

// openTap makes a tap with a descriptor for each queue pair. It is gone when
// the last of these is closed. The caller is in the namespace.
func openTap(pairs int) (name string, files []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(files)
			files = nil
		}
	}()
	name = tapPrefix + "%d" // the kernel finds a number that is free
	handle, err := jail.Isolate("/dev/net/tun")
	if err != nil {
		return "", nil, tunError(err)
	}
	defer unix.Close(handle)
	for range pairs {
		fd, err := jail.Reopen(handle, unix.O_RDWR|unix.O_NONBLOCK)
		if err != nil {
			return "", files, tunError(err)
		}
		if name, err = attachQueue(fd, name, pairs > 1); err != nil {
			unix.Close(fd)
			return "", files, fmt.Errorf("make a tap: %w", err)
		}
		// Not sooner: the runtime finds that it cannot poll what is no tap yet.
		files = append(files, os.NewFile(uintptr(fd), "tap"))
	}
	if err := jail.Protect(handle); err != nil {
		return "", files, fmt.Errorf("/dev/net/tun: %w", err)
	}
	return name, files, nil
}

func tunError(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("open /dev/net/tun: %w: this host has no tap devices: load the module tun", err)
	}
	return fmt.Errorf("open /dev/net/tun: %w", err)
}

func attachQueue(fd int, name string, multiQueue bool) (string, error) {
	request, err := unix.NewIfreq(name)
	if err != nil {
		return "", err
	}
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if multiQueue {
		flags |= unix.IFF_MULTI_QUEUE
	}
	request.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return "", fmt.Errorf("TUNSETIFF: %w", err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, headerSize); err != nil {
		return "", fmt.Errorf("TUNSETVNETHDRSZ: %w", err)
	}
	return request.Name(), nil
}

// raiseTap brings a tap up that the host itself says nothing on: no IPv6, thus
// no router solicitation or multicast report, and no ARP.
func raiseTap(name string, mtu int) (index int, err error) {
	path := filepath.Join("/proc/sys/net/ipv6/conf", name, "disable_ipv6")
	if err := os.WriteFile(path, []byte("1"), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("tap: %w", err)
	}
	link, err := netlink.LinkByName(name)
	if err != nil {
		return 0, fmt.Errorf("tap %s: %w", name, err)
	}
	if err := netlink.LinkSetMTU(link, mtu); err != nil {
		return 0, fmt.Errorf("tap %s: set the MTU to %d: %w", name, mtu, err)
	}
	if err := netlink.LinkSetARPOff(link); err != nil {
		return 0, fmt.Errorf("tap %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return 0, fmt.Errorf("tap %s: bring it up: %w", name, err)
	}
	return link.Attrs().Index, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
