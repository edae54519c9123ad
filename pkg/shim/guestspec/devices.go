package guestspec

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Disk is a block device of the host that a container is to have.
type Disk struct {
	// Path in the container, for messages.
	Path         string
	Major, Minor int64
	// ReadOnly says that no rule lets the container write to it.
	ReadOnly bool
}

// guestDevices are the device nodes, by number, that the guest kernel has a
// driver for and that mean the same in there.
var guestDevices = map[[2]int64]bool{
	{1, 3}:    true, // null
	{1, 5}:    true, // zero
	{1, 7}:    true, // full
	{1, 8}:    true, // random
	{1, 9}:    true, // urandom
	{1, 11}:   true, // kmsg
	{5, 0}:    true, // tty
	{5, 1}:    true, // console
	{5, 2}:    true, // ptmx
	{10, 200}: true, // net/tun
	{10, 229}: true, // fuse
}

// devices: a block device becomes a disk of the guest's. Of other devices there
// are those that the guest has. A container that may use all devices gets those
// of the guest, whether its specification lists what the host has or nothing, and
// only the disks that it asks for by name.
func devices(r *Result, in Input) error {
	linux := r.Spec.Linux
	all := allDevicesAllowed(linux.Resources)
	var kept []specs.LinuxDevice
	for _, d := range linux.Devices {
		character := d.Type == "c" || d.Type == "u"
		switch {
		case d.Type == "p" || character && guestDevices[[2]int64{d.Major, d.Minor}]:
			kept = append(kept, d)
		case d.Type == "b" && (!all || hasRule(linux.Resources, d) || !isHostsOwn(d)):
			kept = append(kept, d)
			r.addDisk(d)
		case all:
			r.Remarks = append(r.Remarks, fmt.Sprintf("device %s left out: it is the host's", d.Path))
		default:
			return unsupported("container %s is to have the device %s (%s %d:%d) of the host: a virtual machine cannot",
				in.ID, d.Path, d.Type, d.Major, d.Minor)
		}
	}
	r.AllDevices = all
	for _, d := range r.bound {
		// A mount would be on top of a device of that name.
		kept = slices.DeleteFunc(kept, func(other specs.LinuxDevice) bool { return filepath.Clean(other.Path) == d.Path })
		kept = append(kept, d)
		r.addDisk(d)
	}
	linux.Devices = kept
	if linux.Resources != nil {
		r.dropRules(linux.Resources)
	}
	return nil
}

// addDisk notes a block device, which may be there under several paths.
func (r *Result) addDisk(d specs.LinuxDevice) {
	if r.disk(d.Major, d.Minor) {
		return
	}
	r.Disks = append(r.Disks, Disk{
		Path: d.Path, Major: d.Major, Minor: d.Minor, ReadOnly: !mayWrite(r.Spec.Linux.Resources, d),
	})
}

func (r *Result) disk(major, minor int64) bool {
	return slices.ContainsFunc(r.Disks, func(d Disk) bool { return d.Major == major && d.Minor == minor })
}

// dropRules takes out rules about block devices that the container does not
// have: in the guest their numbers are those of other disks.
func (r *Result) dropRules(res *specs.LinuxResources) {
	res.Devices = slices.DeleteFunc(res.Devices, func(rule specs.LinuxDeviceCgroup) bool {
		if rule.Type != "b" || rule.Major == nil {
			return false
		}
		if rule.Minor != nil && r.disk(*rule.Major, *rule.Minor) {
			return false
		}
		r.Remarks = append(r.Remarks, fmt.Sprintf("device rule for the host's block devices of major number %d left out", *rule.Major))
		return true
	})
}

// hasRule says whether a rule is about this block device and no other one.
func hasRule(res *specs.LinuxResources, d specs.LinuxDevice) bool {
	return slices.ContainsFunc(res.Devices, func(rule specs.LinuxDeviceCgroup) bool {
		return rule.Allow && rule.Type == "b" && rule.Major != nil && *rule.Major == d.Major && rule.Minor != nil && *rule.Minor == d.Minor
	})
}

// isHostsOwn says whether the device is there under the path that it has on the
// host, as it is where all devices of the host are listed; or has gone since.
func isHostsOwn(d specs.LinuxDevice) bool {
	if _, err := os.Stat(fmt.Sprintf("/sys/dev/block/%d:%d", d.Major, d.Minor)); err != nil {
		return true
	}
	info, err := os.Lstat(d.Path)
	return err == nil && info.Mode()&os.ModeDevice != 0 && deviceNumber(info) == [2]int64{d.Major, d.Minor}
}

// mayWrite says what the rules say about writing to a block device: the last one
// that matches counts.
func mayWrite(res *specs.LinuxResources, d specs.LinuxDevice) (allowed bool) {
	if res == nil {
		return false
	}
	for _, rule := range res.Devices {
		matches := (rule.Type == "" || rule.Type == "a" || rule.Type == "b") &&
			(rule.Major == nil || *rule.Major == d.Major) && (rule.Minor == nil || *rule.Minor == d.Minor)
		if matches && (strings.Contains(rule.Access, "w") || rule.Access == "") {
			allowed = rule.Allow
		}
	}
	return allowed
}

// allDevicesAllowed is how a privileged container shows.
func allDevicesAllowed(res *specs.LinuxResources) bool {
	if res == nil {
		return false
	}
	return slices.ContainsFunc(res.Devices, func(d specs.LinuxDeviceCgroup) bool {
		return d.Allow && (d.Type == "" || d.Type == "a") && d.Major == nil && d.Minor == nil && d.Access == "rwm"
	})
}

func deviceNumber(info os.FileInfo) [2]int64 {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return [2]int64{}
	}
	return [2]int64{int64(unix.Major(stat.Rdev)), int64(unix.Minor(stat.Rdev))}
}
