package shim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
	"github.com/microvm-runtime/microvm/pkg/vmm/control"
	"github.com/microvm-runtime/microvm/pkg/vmm/jail"
)

// diskTime bounds the coming and going of a disk.
const diskTime = time.Minute

// hostDisk is what the guest is to have as a disk.
type hostDisk struct {
	// path of an image or a block device; empty for the block device of these
	// numbers.
	path         string
	major, minor int64
	readOnly     bool
	// exclusive keeps the host from mounting a block device meanwhile. Images
	// have no such thing.
	exclusive bool
	// pmem is for a read-only image whose file system can do with persistent
	// memory: guests then have the host's pages of it. It may be a disk after all.
	pmem bool
}

func (d hostDisk) String() string {
	if d.path != "" {
		return d.path
	}
	return fmt.Sprintf("block device %d:%d", d.major, d.minor)
}

// maxPmem is the size of the largest image that becomes persistent memory: the
// guest has a page structure, of 64 bytes, for each page of it.
const maxPmem = 512 << 20

// diskKey tells what is the same disk: a block device by its number, an image
// by its inode.
type diskKey struct {
	block       bool
	device, ino uint64
}

// openDisk opens what the guest is to have. The file is that and nothing else,
// whatever its path leads to by now. A block device that the host has write-
// protected is read-only, as it would be for a process of the host. sys and dev
// are the host's /sys and /dev.
func openDisk(sys, dev string, d hostDisk) (file *os.File, key diskKey, readOnly bool, err error) {
	path := d.path
	if path == "" {
		name, err := blockDeviceName(sys, d.major, d.minor)
		if err != nil {
			return nil, key, false, err
		}
		path = filepath.Join(dev, name)
	}
	// First without any effect: opening a FIFO waits, a tape rewinds.
	handle, err := jail.Isolate(path)
	if err != nil {
		return nil, key, false, diskError(path, err)
	}
	defer unix.Close(handle)
	var st unix.Stat_t
	if err := unix.Fstat(handle, &st); err != nil {
		return nil, key, false, diskError(path, err)
	}
	flags := unix.O_NOCTTY
	switch kind := st.Mode & unix.S_IFMT; {
	case kind == unix.S_IFBLK && (d.path != "" || st.Rdev == unix.Mkdev(uint32(d.major), uint32(d.minor))):
		key = diskKey{block: true, device: st.Rdev}
		if d.exclusive {
			flags |= unix.O_EXCL
		}
	case kind == unix.S_IFREG && d.path != "":
		key = diskKey{device: st.Dev, ino: st.Ino}
	case d.path == "":
		return nil, key, false, fmt.Errorf("%s is not the block device %d:%d: %w", path, d.major, d.minor, errdefs.ErrFailedPrecondition)
	default:
		return nil, key, false, fmt.Errorf("%s is neither a regular file nor a block device: %w", path, errdefs.ErrInvalidArgument)
	}
	readOnly = d.readOnly
	fd := -1
	if !readOnly {
		fd, err = jail.Reopen(handle, flags|unix.O_RDWR)
		if key.block && isProtected(fd, err) {
			readOnly = true
			if err == nil {
				unix.Close(fd)
			}
		}
	}
	if readOnly {
		fd, err = jail.Reopen(handle, flags|unix.O_RDONLY)
	}
	if err != nil {
		return nil, key, false, diskError(path, err)
	}
	file = os.NewFile(uintptr(fd), path)
	// An image that is written cannot be protected, see docs/threat-model.md.
	if key.block || readOnly {
		if err := jail.Protect(handle); err != nil {
			file.Close()
			return nil, key, false, diskError(path, err)
		}
	}
	return file, key, readOnly, nil
}

// isProtected says whether a block device, which was opened to be written, cannot
// be. With some drivers that shows when it is opened, with others not before it
// is written.
func isProtected(fd int, openError error) bool {
	if openError != nil {
		return errors.Is(openError, unix.EACCES) || errors.Is(openError, unix.EROFS)
	}
	protected, err := unix.IoctlGetInt(fd, unix.BLKROGET)
	return err == nil && protected != 0
}

func diskError(path string, err error) error {
	wrapped := error(&os.PathError{Op: "open", Path: path, Err: err})
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return fmt.Errorf("%w: %w", wrapped, errdefs.ErrNotFound)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w (the host uses it): %w", wrapped, errdefs.ErrFailedPrecondition)
	}
	return wrapped
}

// blockDeviceName is what the kernel calls a block device, and so its node.
func blockDeviceName(sys string, major, minor int64) (string, error) {
	data, err := os.ReadFile(filepath.Join(sys, "dev/block", fmt.Sprintf("%d:%d", major, minor), "uevent"))
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("the host has no block device %d:%d: %w", major, minor, errdefs.ErrNotFound)
	}
	if err != nil {
		return "", fmt.Errorf("block device %d:%d: %w", major, minor, err)
	}
	for line := range strings.Lines(string(data)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); ok && filepath.IsLocal(name) {
			return name, nil
		}
	}
	return "", fmt.Errorf("block device %d:%d has no name in sysfs: %w", major, minor, errdefs.ErrNotFound)
}

// disk is one that the guest has.
type disk struct {
	key      diskKey
	readOnly bool
	address  string
	users    int
}

// disks are those that were attached for containers. A disk is there once, how
// many containers ever use it, unless one that was attached read-only has to be
// written to.
type disks struct {
	mu   sync.Mutex // held while disks come and go
	list []*disk
	// users are the disks of each container, by its id, once for each use.
	users map[string][]*disk
}

// attachDisk gives a container a disk and returns its PCI address. It stays until
// releaseDisks, which follows an error, too.
func (s *sandbox) attachDisk(ctx context.Context, id string, h hostDisk) (string, error) {
	file, key, readOnly, err := openDisk("/sys", "/dev", h)
	if err != nil {
		return "", err
	}
	defer file.Close()
	s.disks.mu.Lock()
	defer s.disks.mu.Unlock()
	var found *disk
	for _, d := range s.disks.list {
		if d.key == key && (readOnly || !d.readOnly) {
			found = d
		}
	}
	if found == nil {
		// To the end, even if nobody waits for it: else there would be a disk
		// of which nobody knows.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), diskTime)
		defer cancel()
		found = &disk{key: key, readOnly: readOnly}
		if found.address, err = s.plugDisk(ctx, h, file, readOnly); err != nil {
			return "", fmt.Errorf("%s: %w", h, err)
		}
		s.disks.list = append(s.disks.list, found)
	}
	found.users++
	if s.disks.users == nil {
		s.disks.users = map[string][]*disk{}
	}
	s.disks.users[id] = append(s.disks.users[id], found)
	return found.address, nil
}

// plugDisk attaches what was opened as the best kind of device for it.
func (s *sandbox) plugDisk(ctx context.Context, h hostDisk, file *os.File, readOnly bool) (string, error) {
	if h.pmem && readOnly {
		info, err := file.Stat()
		if err != nil {
			return "", err
		}
		if info.Mode().IsRegular() && info.Size() <= maxPmem {
			address, err := s.vm.AttachDisk(ctx, control.Disk{ReadOnly: true, Pmem: true}, file)
			if err == nil {
				return address, nil
			}
			log.L.WithError(err).Debugf("%s cannot be persistent memory", h)
		}
	}
	return s.vm.AttachDisk(ctx, control.Disk{ReadOnly: readOnly}, file)
}

// attachDisks gives a container the disks of its plan, and tells the agent of
// them in the plan's request.
func (s *sandbox) attachDisks(ctx context.Context, id string, p *plan) error {
	for _, d := range p.disks {
		address, err := s.attachDisk(ctx, id, hostDisk{major: d.Major, minor: d.Minor, readOnly: d.ReadOnly})
		if err != nil {
			return fmt.Errorf("device %s: %w", d.Path, err)
		}
		p.request.BlockDevices = append(p.request.BlockDevices, &agentproto.BlockDevice{
			Major: d.Major, Minor: d.Minor, PciAddress: address,
		})
	}
	for _, storage := range p.storages {
		for _, d := range storage.disks {
			address, err := s.attachDisk(ctx, id, d)
			if err != nil {
				return fmt.Errorf("root file system: %w", err)
			}
			storage.request.PciAddresses = append(storage.request.PciAddresses, address)
		}
		p.request.Storages = append(p.request.Storages, storage.request)
	}
	return nil
}

// releaseDisks takes away the disks that no container but this one, which is not
// in the guest any more, uses.
func (s *sandbox) releaseDisks(id string) {
	s.disks.mu.Lock()
	defer s.disks.mu.Unlock()
	for _, d := range s.disks.users[id] {
		if d.users--; d.users == 0 {
			s.detachDisk(d)
		}
	}
	delete(s.disks.users, id)
}

// detachDisk takes a disk from the guest, whether it lets go of it or not.
func (s *sandbox) detachDisk(d *disk) {
	for i := range s.disks.list {
		if s.disks.list[i] == d {
			s.disks.list = append(s.disks.list[:i], s.disks.list[i+1:]...)
			break
		}
	}
	if s.alive() != nil {
		return // they went with the machine
	}
	ctx, cancel := context.WithTimeout(context.Background(), diskTime)
	defer cancel()
	if err := s.agent.RemoveDevice(ctx, d.address); err != nil {
		log.L.WithError(err).Warnf("the guest does not let go of its disk at %s", d.address)
	}
	if err := s.vm.Detach(ctx, d.address); err != nil && s.alive() == nil {
		log.L.WithError(err).Errorf("the disk at %s stays with the virtual machine", d.address)
	}
}
