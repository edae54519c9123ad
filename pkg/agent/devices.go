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
		spec.Linux.Devices = append(spec.Linux.Devices, device(path, info.Mode(), stat))
		return nil
	})
}

func device(path string, mode fs.FileMode, stat *syscall.Stat_t) specs.LinuxDevice {
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
