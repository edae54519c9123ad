package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// notDevices are what a container has of its own below /dev.
var notDevices = map[string]bool{"pts": true, "shm": true, "mqueue": true, "fd": true, "console": true, "ptmx": true}

// addDevices adds the guest's devices, which are below dev, to a specification.
func addDevices(spec *specs.Spec, dev string) error {
	have := make(map[string]bool)
	for _, d := range spec.Linux.Devices {
		have[d.Path] = true
	}
	return filepath.WalkDir(dev, func(path string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // a device that has just gone
		}
		if err != nil {
			return fmt.Errorf("list the guest's devices: %w", err)
		}
		if filepath.Dir(path) == dev && notDevices[entry.Name()] {
			if entry.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		info, err := entry.Info()
		if err != nil || info.Mode()&os.ModeDevice == 0 || have[path] {
			return nil
		}
		stat, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return nil
		}
		spec.Linux.Devices = append(spec.Linux.Devices, deviceOf(path, info.Mode(), stat))
		return nil
	})
}

func deviceOf(path string, mode fs.FileMode, stat *syscall.Stat_t) specs.LinuxDevice {
	d := specs.LinuxDevice{
		Path: path, Type: "b",
		Major: int64(unix.Major(stat.Rdev)), Minor: int64(unix.Minor(stat.Rdev)),
		UID: &stat.Uid, GID: &stat.Gid,
	}
	if mode&os.ModeCharDevice != 0 {
		d.Type = "c"
	}
	permissions := mode.Perm()
	d.FileMode = &permissions
	return d
}

// useBlockDevices replaces the numbers of the host's block devices in a
// specification by those that the virtio devices have here.
func useBlockDevices(sys string, spec *specs.Spec, devices []*agentproto.BlockDevice) error {
	here := make(map[[2]int64][2]int64)
	for _, d := range devices {
		name, err := awaitDevice(sys, d.PciAddress, "block", blockPaths, deviceTimeout)
		if err != nil {
			return err
		}
		if here[[2]int64{d.Major, d.Minor}], err = blockNumber(sys, name); err != nil {
			return err
		}
	}
	for i := range spec.Linux.Devices {
		d := &spec.Linux.Devices[i]
		if n, ok := here[[2]int64{d.Major, d.Minor}]; ok && d.Type == "b" {
			d.Major, d.Minor = n[0], n[1]
		}
	}
	if spec.Linux.Resources == nil {
		return nil
	}
	for i := range spec.Linux.Resources.Devices {
		rule := &spec.Linux.Resources.Devices[i]
		if rule.Type != "b" || rule.Major == nil || rule.Minor == nil {
			continue
		}
		if n, ok := here[[2]int64{*rule.Major, *rule.Minor}]; ok {
			rule.Major, rule.Minor = &n[0], &n[1]
		}
	}
	return nil
}

// blockNumber is the device number of a block device, as sysfs has it.
func blockNumber(sys, name string) (n [2]int64, err error) {
	data, err := os.ReadFile(filepath.Join(sys, "class/block", name, "dev"))
	if err != nil {
		return n, fmt.Errorf("number of the device %s: %w", name, err)
	}
	if _, err := fmt.Sscanf(string(data), "%d:%d", &n[0], &n[1]); err != nil {
		return n, fmt.Errorf("number of the device %s: %q: %w", name, data, err)
	}
	return n, nil
}
