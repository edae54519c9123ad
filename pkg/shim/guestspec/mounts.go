package guestspec

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Mount is one to be made in the shared directory on the host, from where it is
// bound to its place in the guest.
type Mount struct {
	// Destination in the container, for messages.
	Destination string
	// Source is absolute; links in it are followed.
	Source string
	// File says that it is not a directory.
	File bool
	// Recursive includes what is mounted below.
	Recursive bool
	// ReadOnly applies to the mount itself, RecursiveReadOnly to all below.
	ReadOnly, RecursiveReadOnly bool
	// Private says that what the host mounts below later does not appear, and what
	// it unmounts stays; RecursivePrivate the same of all mounts below.
	Private, RecursivePrivate bool
	// UIDs and GIDs map the ids of files; RecursiveIDs those of all below as
	// well.
	UIDs, GIDs   []specs.LinuxIDMapping
	RecursiveIDs bool

	// Type and Options are set for a file system that has to be mounted on the
	// host; the fields above do not apply then.
	Type    string
	Options []string
}

// guestTypes are file systems that the guest's kernel makes itself.
var guestTypes = []string{
	"proc", "sysfs", "tmpfs", "ramfs", "devpts", "mqueue", "cgroup", "cgroup2",
	"bpf", "debugfs", "tracefs", "securityfs", "hugetlbfs",
}

// mountFlags are the options that are of a mount and not of its file system, in
// libcontainer's words (specconv/spec_linux.go), where with an r in front they are
// of all mounts below as well. The value says whether the host's mount is to have
// the flag too; containerd, which makes it, would take the others for the file
// system's (core/mount/mount_linux.go).
var mountFlags = map[string]bool{
	"ro": true, "rw": true,
	"suid": true, "nosuid": true,
	"dev": true, "nodev": true,
	"exec": true, "noexec": true,
	"atime": true, "noatime": true,
	"diratime": true, "nodiratime": true,
	"relatime": true, "norelatime": true,
	"strictatime": true, "nostrictatime": true,
	"symfollow": false, "nosymfollow": false, // the file server follows no link
}

// propagations are options of a mount, too. One that the host has just made is
// nobody else's.
var propagations = []string{
	"private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable",
}

// kernelTypes are those that show the kernel's own state: through a share, a
// container would see another kernel's than the one it runs on.
var kernelTypes = []int64{
	unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC,
	unix.DEBUGFS_MAGIC, unix.TRACEFS_MAGIC, unix.SECURITYFS_MAGIC, unix.BPF_FS_MAGIC,
}

func mounts(r *Result, in Input) error {
	for i := range r.Spec.Mounts {
		if err := r.mount(&r.Spec.Mounts[i], in); err != nil {
			return err
		}
	}
	r.Spec.Mounts = slices.DeleteFunc(r.Spec.Mounts, func(m specs.Mount) bool { return m.Type == asDevice })
	return nil
}

// asDevice is the type of a mount that has become a device of the container.
const asDevice = "microvm-device"

func (r *Result) mount(m *specs.Mount, in Input) error {
	if isBind(m) {
		return r.bind(m, in)
	}
	if len(m.UIDMappings) > 0 || len(m.GIDMappings) > 0 || slices.ContainsFunc(m.Options, isIDMap) {
		return unsupported("mount %s: ids can be mapped in bind mounts only", m.Destination)
	}
	if m.Type == "tmpfs" && m.Destination == shmPath && in.Pod {
		// Where the caller keeps no /dev/shm for the sandbox, its default would
		// give each container one of its own.
		m.Type, m.Source = "bind", shmPath
		m.Options = append([]string{"rbind"}, slices.DeleteFunc(m.Options, func(option string) bool {
			return strings.Contains(option, "=")
		})...)
		return nil
	}
	if slices.Contains(guestTypes, m.Type) {
		return nil
	}
	// Any other file system is on a device, a server or files of the host's.
	host, guest := divide(m.Options)
	r.share(m, in, Mount{Destination: m.Destination, Source: m.Source, Type: m.Type, Options: host})
	m.Options = guest
	return nil
}

// divide says which options are for a file system that the host mounts, and which
// for the guest's bind mount of that. What a program that is executed may do, which
// devices there are and where a link leads is the guest's kernel's to say, and
// what is read-only or notes no times of access also the host's.
func divide(options []string) (host, guest []string) {
	guest = []string{"rbind"}
	for _, option := range options {
		flag, recursive := strings.CutPrefix(option, "r")
		if _, known := mountFlags[flag]; !recursive || !known {
			flag = option
		}
		hosts, known := mountFlags[flag]
		switch {
		case slices.Contains(propagations, option):
			guest = append(guest, option)
		case !known:
			host = append(host, option)
		default:
			guest = append(guest, option)
			// Below a new mount there is nothing; what rrw would undo is the
			// file system's.
			if hosts && option != "rrw" {
				host = append(host, flag)
			}
		}
	}
	return host, guest
}

func isBind(m *specs.Mount) bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}

func isIDMap(option string) bool { return option == "idmap" || option == "ridmap" }

// share has the mount made on the host and points m there.
func (r *Result) share(m *specs.Mount, in Input, mount Mount) {
	m.Type = "bind"
	m.Source = filepath.Join(SharedRoot, in.ID, MountsName, strconv.Itoa(len(r.Mounts)))
	r.Mounts = append(r.Mounts, mount)
}

func (r *Result) bind(m *specs.Mount, in Input) error {
	source := m.Source
	if !filepath.IsAbs(source) {
		source = filepath.Join(in.Bundle, source)
	}
	target, err := filepath.EvalSymlinks(source)
	if err != nil {
		return invalid("mount %s: source %s: %w", m.Destination, source, err)
	}
	info, err := os.Stat(target)
	if err != nil {
		return invalid("mount %s: source %s: %w", m.Destination, source, err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(target, &fs); err != nil {
		return invalid("mount %s: source %s: %w", m.Destination, source, err)
	}

	if mode := info.Mode(); mode&os.ModeDevice != 0 && mode&os.ModeCharDevice == 0 {
		if !isOnDev(info) {
			return unsupported("mount %s: %s is a node of a block device, but not in the host's /dev: it may have been made by a container", m.Destination, source)
		}
		r.bindDisk(m, info)
		return nil
	}
	if in.First && m.Destination == shmPath {
		r.Shm = shmAt(target)
		in.Shm = r.Shm.Path
	}
	own, err := guestsOwn(m, target, info, fs, in.Shm)
	if err != nil {
		return err
	}
	if own != "" {
		m.Type, m.Source = "bind", own
		m.UIDMappings, m.GIDMappings = nil, nil
		return nil
	}
	volume, err := memoryVolume(r.Spec, target, fs)
	if err != nil {
		return invalid("mount %s: source %s: %w", m.Destination, source, err)
	}
	if volume != nil {
		// Ids are mapped by the guest.
		r.inMemory(m, in, volume)
		return nil
	}
	if info.Mode()&os.ModeSocket != 0 {
		// The name can be shared, but not the kernel that connects the two ends.
		r.Remarks = append(r.Remarks, "mount "+m.Destination+": "+source+" is a socket: a program of the host cannot be reached through it")
	}
	mount := Mount{
		Destination: m.Destination, Source: source, File: !info.IsDir(),
		UIDs: m.UIDMappings, GIDs: m.GIDMappings,
	}
	m.UIDMappings, m.GIDMappings = nil, nil
	mapped := len(mount.UIDs) > 0 || len(mount.GIDs) > 0
	for _, option := range m.Options { // mostly the last word counts
		switch option {
		case "bind":
			mount.Recursive = false
		case "rbind":
			mount.Recursive = true
		case "ro", "rw":
			mount.ReadOnly = option == "ro"
		case "rro", "rrw":
			mount.RecursiveReadOnly = option == "rro"
		case "private", "unbindable": // for good: there is nothing to be a slave of any more
			mount.Private = true
		case "rprivate", "runbindable":
			mount.RecursivePrivate = true
		case "shared", "rshared":
			// The guest's kernel mounts what it has, and the host's what that has.
			return unsupported("mount %s: what is mounted in a virtual machine cannot appear on the host (the mount option %s, or the mount propagation Bidirectional)", m.Destination, option)
		case "idmap", "ridmap":
			if !mapped && hasNamespace(r.Spec.Linux.Namespaces, specs.UserNamespace) {
				// As runc has it (libcontainer/specconv/spec_linux.go).
				mount.UIDs, mount.GIDs = r.Spec.Linux.UIDMappings, r.Spec.Linux.GIDMappings
			}
			mapped, mount.RecursiveIDs = true, option == "ridmap"
		}
	}
	if mapped && (len(mount.UIDs) == 0 || len(mount.GIDs) == 0) {
		return invalid("mount %s: ids are to be mapped, but neither the mount nor a user namespace of the container says how, of users and of groups", m.Destination)
	}
	m.Options = slices.DeleteFunc(m.Options, isIDMap)
	if _, _, place := ofPod(r.Spec, target); isEmptyDir(place) && (mount.ReadOnly || mount.RecursiveReadOnly) {
		// What is the pod's own anyhow is the same mount for those of its
		// containers that may only read: they are kept from writing by the guest.
		mount.ReadOnly, mount.RecursiveReadOnly = false, false
		m.Options = append(m.Options, "rro")
	}
	r.share(m, in, mount)
	return nil
}

// isOnDev says whether a node is on the host's /dev. Elsewhere, on a volume, a
// container may have made it, of any number, and the kubelet binds what it finds
// at a subPath.
func isOnDev(info os.FileInfo) bool {
	node, ok := info.Sys().(*syscall.Stat_t)
	var dev unix.Stat_t
	return ok && unix.Stat("/dev", &dev) == nil && node.Dev == dev.Dev
}

// bindDisk gives the container a node of a block device where it wants the
// host's bound. Whether it may open that is up to its device rules, as on a host,
// where a mount that is read-only does not keep anybody from writing to a device
// either.
func (r *Result) bindDisk(m *specs.Mount, info os.FileInfo) {
	number, mode := deviceNumber(info), info.Mode().Perm()
	d := specs.LinuxDevice{Path: filepath.Clean(m.Destination), Type: "b", Major: number[0], Minor: number[1], FileMode: &mode}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		d.UID, d.GID = &stat.Uid, &stat.Gid
	}
	r.bound = append(r.bound, d)
	m.Type = asDevice
}

// guestsOwn says which path of the guest takes the place of the host's, if one
// does: kernel file systems, devices, and the memory file system that a pod's
// containers share, which is at shm on the host.
func guestsOwn(m *specs.Mount, target string, info os.FileInfo, fs unix.Statfs_t, shm string) (string, error) {
	if info.Mode()&os.ModeDevice != 0 {
		if info.Mode()&os.ModeCharDevice != 0 && guestDevices[deviceNumber(info)] {
			return target, nil
		}
		return "", unsupported("mount %s: %s is a device of the host: a virtual machine cannot use it", m.Destination, m.Source)
	}
	if m.Destination == shmPath && target == shm {
		return shmPath, nil
	}
	if fs.Type == unix.HUGETLBFS_MAGIC {
		return "", unsupported("mount %s: %s are huge pages of the host: a virtual machine cannot share them", m.Destination, m.Source)
	}
	if target == "/dev" || strings.HasPrefix(target, "/dev/") || slices.Contains(kernelTypes, fs.Type) {
		return target, nil
	}
	return "", nil
}
