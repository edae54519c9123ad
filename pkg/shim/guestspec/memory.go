package guestspec

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// sandboxUID is the annotation that containerd's CRI plugin gives containers for
// their pod's uid (internal/cri/annotations/annotations.go).
const sandboxUID = "io.kubernetes.cri.sandbox-uid"

// MemoryVolume is (a part of) an emptyDir of medium Memory, which is the
// guest's: a tmpfs that the pod's containers share, in the guest's memory.
type MemoryVolume struct {
	// Name is the volume's in its pod.
	Name string
	// Mountpoint is where the container gets it from, in the guest.
	Mountpoint string
	// Bytes is its size, 0 if that has no limit.
	Bytes uint64
	// Mode, UID and GID are those of the volume's root.
	Mode, UID, GID uint32
	// Directories lead to the part of it that the container has (subPath).
	Directories []Directory
}

// Directory of a volume, as the kubelet has made it.
type Directory struct {
	Path string // relative to the volume's root
	Mode uint32
}

// memoryVolume recognises a volume that the kubelet has in memory, by the places
// that it has for the volumes of the container's pod
// (pkg/volume/emptydir/empty_dir.go, pkg/volume/util/subpath/subpath_linux.go),
// and returns nil for anything else. What is on the host in such a volume stays
// there: at the start it is empty.
func memoryVolume(spec *specs.Spec, target string, fs unix.Statfs_t) (*MemoryVolume, error) {
	if fs.Type != unix.TMPFS_MAGIC {
		return nil, nil
	}
	pods, uid, place := ofPod(spec, target)
	switch {
	case isEmptyDir(place):
	case len(place) == 4 && place[0] == "volume-subpaths":
	default:
		return nil, nil
	}
	v := &MemoryVolume{Name: place[len(place)-1]}
	if place[0] == "volume-subpaths" {
		v.Name = place[1]
	}
	volume := filepath.Join(pods, "pods", uid, "volumes/kubernetes.io~empty-dir", v.Name)
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.Mountpoint != volume && m.Mountpoint != target, false
	})
	if err != nil {
		return nil, err
	}
	// The last one of a place is on top.
	at := map[string]*mountinfo.Info{}
	for _, m := range mounts {
		at[m.Mountpoint] = m
	}
	whole, part := at[volume], at[target]
	if whole == nil || part == nil || whole.Root != "/" || whole.Major != part.Major || whole.Minor != part.Minor {
		return nil, nil // on the host's disk, or a subPath of another volume
	}
	v.Bytes = fs.Blocks * uint64(fs.Bsize)
	var st unix.Stat_t
	if err := unix.Lstat(volume, &st); err != nil {
		return nil, &os.PathError{Op: "lstat", Path: volume, Err: err}
	}
	v.Mode, v.UID, v.GID = st.Mode&0o7777, st.Uid, st.Gid
	path := ""
	for name := range strings.SplitSeq(strings.Trim(part.Root, "/"), "/") {
		if name == "" {
			break // the root itself
		}
		path = filepath.Join(path, name)
		if err := unix.Lstat(filepath.Join(volume, path), &st); err != nil {
			return nil, &os.PathError{Op: "lstat", Path: filepath.Join(volume, path), Err: err}
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return nil, nil // somebody on the host has put a file there
		}
		v.Directories = append(v.Directories, Directory{Path: path, Mode: st.Mode & 0o7777})
	}
	return v, nil
}

// ofPod cuts a path below the kubelet's directory for the container's pod: what
// that of all pods is below, the pod's uid, and the elements that follow, of which
// there are none for any other path.
func ofPod(spec *specs.Spec, target string) (pods, uid string, place []string) {
	uid = spec.Annotations[sandboxUID]
	pods, rest, ok := strings.Cut(target, "/pods/"+uid+"/")
	if uid == "" || !ok {
		return "", "", nil
	}
	return pods, uid, strings.Split(rest, "/")
}

// isEmptyDir recognises the root of an emptyDir.
func isEmptyDir(place []string) bool {
	return len(place) == 3 && place[0] == "volumes" && place[1] == "kubernetes.io~empty-dir"
}

// inMemory gives the container a volume in the guest's memory.
func (r *Result) inMemory(m *specs.Mount, in Input, v *MemoryVolume) {
	v.Mountpoint = filepath.Join(StorageRoot, in.ID, "memory", strconv.Itoa(len(r.Memory)))
	r.Memory = append(r.Memory, *v)
	m.Type, m.Source = "bind", v.Mountpoint
}
