package shim

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
	"github.com/microvm-runtime/microvm/pkg/shim/guestspec"
	"github.com/microvm-runtime/microvm/pkg/shim/share"
)

// maxRootDisks is how many disks a root file system may have. One of more layers
// is put together on the host: there are 31 places on the bus, for all
// containers of a pod.
const maxRootDisks = 8

// diskTypes are the file systems on disks that the guest's kernel has.
var diskTypes = []string{"ext4", "xfs", "erofs"}

// storage is a file system for the guest to mount; what its disks are there is
// not known yet.
type storage struct {
	request *agentproto.Storage
	disks   []hostDisk
}

// guestRootfs is a root file system that the guest mounts.
type guestRootfs struct {
	storages []storage
	path     string // of the guest's
}

// planGuestRootfs says how the guest mounts a root file system that a
// snapshotter has on block devices or in images of them. It is nil for one that
// is the host's to mount and to share.
func planGuestRootfs(id string, mounts []mount.Mount) (*guestRootfs, error) {
	r := &guestRootfs{}
	var points []string
	disks := 0
	for i, m := range mounts {
		if m.Target != "" {
			return nil, nil
		}
		m, directories, err := share.Resolve(m, points)
		if err != nil {
			return nil, fmt.Errorf("root file system: %w", err)
		}
		point := filepath.Join(guestspec.StorageRoot, id, strconv.Itoa(i))
		points = append(points, point)
		last := i == len(mounts)-1
		r.path = point
		var s *storage
		switch {
		case slices.Contains(diskTypes, m.Type):
			if s, err = diskStorage(m); err != nil {
				return nil, fmt.Errorf("root file system: %w", err)
			}
		case last && m.Type == "overlay" && isGuestOverlay(m.Options):
			s = &storage{request: &agentproto.Storage{Fstype: m.Type, Options: m.Options}}
		case last && m.Type == "bind" && isBelow(m.Source) && len(directories) == 0:
			r.path = m.Source
			continue
		default:
			return nil, nil
		}
		s.request.Mountpoint = point
		for _, d := range directories {
			if !isBelow(d.Path) {
				return nil, nil
			}
			s.request.Directories = append(s.request.Directories, &agentproto.Directory{Path: d.Path, Mode: d.Mode})
		}
		r.storages = append(r.storages, *s)
		disks += len(s.disks)
	}
	if disks == 0 || disks > maxRootDisks {
		return nil, nil
	}
	return r, nil
}

// memoryStorage is the mount of a volume in the guest's memory.
func memoryStorage(v guestspec.MemoryVolume) *agentproto.Storage {
	s := &agentproto.Storage{
		Volume: v.Name, Fstype: "tmpfs", Mountpoint: v.Mountpoint,
		// tmpfs(5); a size of 0 is no limit.
		Options: []string{
			fmt.Sprintf("size=%d", v.Bytes), fmt.Sprintf("mode=%o", v.Mode),
			fmt.Sprintf("uid=%d", v.UID), fmt.Sprintf("gid=%d", v.GID),
		},
	}
	for _, d := range v.Directories {
		s.Directories = append(s.Directories, &agentproto.Directory{Path: d.Path, Mode: d.Mode})
	}
	return s
}

// diskStorage is the mount of an image or a block device, in the guest.
func diskStorage(m mount.Mount) (*storage, error) {
	s := &storage{request: &agentproto.Storage{Fstype: m.Type}}
	readOnly := m.Type == "erofs"
	var blobs []string
	for _, option := range m.Options {
		blob, isBlob := strings.CutPrefix(option, "device=")
		switch {
		case isBlob && m.Type == "erofs":
			blobs = append(blobs, blob)
			continue
		case option == "loop":
			continue // what virtio is for
		case strings.HasPrefix(option, "X-containerd."):
			return nil, fmt.Errorf("mount option %q of %s: %w", option, m.Source, errdefs.ErrNotImplemented)
		case option == "ro":
			readOnly = true
		case option == "rw":
			readOnly = m.Type == "erofs"
		}
		s.request.Options = append(s.request.Options, option)
	}
	if m.Type == "xfs" && !slices.Contains(s.request.Options, "nouuid") {
		// Snapshots of one image have one UUID, and two may be in one guest.
		s.request.Options = append(s.request.Options, "nouuid")
	}
	if m.Type == "erofs" {
		// Without effect where the device, or the image, has no use for it.
		s.request.Options = append(s.request.Options, "dax=always")
	}
	for _, path := range append([]string{m.Source}, blobs...) {
		s.disks = append(s.disks, hostDisk{path: path, readOnly: readOnly, exclusive: !readOnly, pmem: m.Type == "erofs"})
	}
	return s, nil
}

// isGuestOverlay says whether an overlay is made of the guest's file systems
// only, and without what containerd would have to do.
func isGuestOverlay(options []string) bool {
	for _, option := range options {
		key, value, _ := strings.Cut(option, "=")
		switch key {
		case "lowerdir", "upperdir", "workdir":
			for path := range strings.SplitSeq(value, ":") {
				if !isBelow(path) {
					return false
				}
			}
		case "uidmap", "gidmap":
			return false
		}
	}
	return true
}

// isBelow says whether a path is below the place of the guest's file systems on
// disks.
func isBelow(path string) bool {
	rel, err := filepath.Rel(guestspec.StorageRoot, path)
	return err == nil && rel != "." && filepath.IsLocal(rel)
}
