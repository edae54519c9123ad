// Package config is the shim's configuration: a TOML file with drop-ins.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/docker/go-units"

	"github.com/microvm-runtime/microvm/pkg/vmm/control"
)

// DefaultPath is read when nothing else is named, and may be absent.
const DefaultPath = "/etc/microvm/config.toml"

// installDir is where packages put the guest and the VMM.
const installDir = "/usr/lib/microvm"

const (
	// MaxVCPUs is what the VMM can give a machine.
	MaxVCPUs = 32
	// MinMemory is the least a machine boots with and still runs a container.
	MinMemory = 128 << 20

	// The ids lie between those that systemd gives containers, which end below
	// 1879048192, and the next that it uses, 2147352576.
	defaultFirstID = 2000000000
	defaultIDs     = 65536

	maxFile         = 1 << 20
	maxKernelParams = 1024 // the kernel's own limit is 2048 for all of them
)

// Config is valid when Load returned it.
type Config struct {
	// Kernel is the uncompressed vmlinux, Image the guest's root file system,
	// VMM the program that runs the machine. Absolute paths.
	Kernel, Image, VMM string
	// DefaultVCPUs and DefaultMemory (bytes) are what a machine gets at least.
	DefaultVCPUs  int
	DefaultMemory uint64
	// MaxVCPUs and MaxMemory (bytes) are what it may grow to; zero: to what the
	// host has.
	MaxVCPUs  int
	MaxMemory uint64
	// BootTimeout bounds the time from the VMM's start to the agent's first
	// word.
	BootTimeout time.Duration
	// VMMFirstID is the first of VMMIDs numbers, of which each running VMM has one
	// for itself as its user and group id.
	VMMFirstID, VMMIDs uint32
	// RateLimits are those of each sandbox.
	RateLimits control.RateLimits
	// KernelParams are added to the guest's command line.
	KernelParams string
	// Debug logs more, the guest's console included.
	Debug bool
}

// file is the TOML form.
type file struct {
	Kernel        string `toml:"kernel"`
	Image         string `toml:"image"`
	VMM           string `toml:"vmm"`
	DefaultVCPUs  int    `toml:"default_vcpus"`
	DefaultMemory string `toml:"default_memory"`
	MaxVCPUs      int    `toml:"max_vcpus"`
	MaxMemory     string `toml:"max_memory"`
	BootTimeout   string `toml:"boot_timeout"`
	VMMFirstID    uint32 `toml:"vmm_first_id"`
	VMMIDs        uint32 `toml:"vmm_ids"`
	KernelParams  string `toml:"kernel_params"`
	Debug         bool   `toml:"debug"`

	DiskBytes       string `toml:"disk_bytes_per_second"`
	DiskOperations  string `toml:"disk_operations_per_second"`
	ReceiveBytes    string `toml:"network_receive_bytes_per_second"`
	ReceivePackets  string `toml:"network_receive_packets_per_second"`
	TransmitBytes   string `toml:"network_transmit_bytes_per_second"`
	TransmitPackets string `toml:"network_transmit_packets_per_second"`
}

// Sources say where the configuration comes from.
type Sources struct {
	// Path of the file; empty means DefaultPath, which may be absent. The
	// drop-ins are the files config.d/*.toml beside it, in the order of their
	// names; a later file overrides single keys of earlier ones.
	Path string
	// Body is read last.
	Body string
	// ProgramDir is the directory of the running program: the kernel, the
	// image and the VMM are looked for in there before installDir.
	ProgramDir string
}

// Load reads and checks the configuration.
func Load(s Sources) (*Config, error) {
	f := file{
		Kernel:        defaultFile(s.ProgramDir, "vmlinux"),
		Image:         defaultFile(s.ProgramDir, "guest.erofs"),
		VMM:           defaultFile(s.ProgramDir, "microvm-vmm"),
		DefaultVCPUs:  1,
		DefaultMemory: "512MiB",
		BootTimeout:   "60s",
		VMMFirstID:    defaultFirstID,
		VMMIDs:        defaultIDs,
	}
	path, optional := s.Path, false
	if path == "" {
		path, optional = DefaultPath, true
	}
	if err := readFile(path, &f); err != nil && !(optional && errors.Is(err, fs.ErrNotExist)) {
		return nil, err
	}
	dropIns, err := filepath.Glob(filepath.Join(globEscape(filepath.Dir(path)), "config.d", "*.toml"))
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	for _, name := range dropIns { // Glob sorts
		if err := readFile(name, &f); err != nil {
			return nil, err
		}
	}
	if err := parse(strings.NewReader(s.Body), "runtime options", &f); err != nil {
		return nil, err
	}
	return f.check()
}

// defaultFile prefers a file that lies beside the program.
func defaultFile(dir, name string) string {
	if dir != "" {
		beside := filepath.Join(dir, name)
		if _, err := os.Stat(beside); err == nil {
			return beside
		}
	}
	return filepath.Join(installDir, name)
}

func globEscape(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}

func readFile(path string, f *file) error {
	r, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	defer r.Close()
	info, err := r.Stat()
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	if info.Size() > maxFile {
		return fmt.Errorf("configuration %s: larger than %d bytes", path, maxFile)
	}
	return parse(r, path, f)
}

func (f *file) check() (*Config, error) {
	c := &Config{
		Kernel: f.Kernel, Image: f.Image, VMM: f.VMM,
		DefaultVCPUs: f.DefaultVCPUs,
		VMMFirstID:   f.VMMFirstID, VMMIDs: f.VMMIDs,
		KernelParams: f.KernelParams,
		Debug:        f.Debug,
	}
	for _, p := range []struct{ key, value string }{
		{"kernel", f.Kernel}, {"image", f.Image}, {"vmm", f.VMM},
	} {
		if !filepath.IsAbs(p.value) {
			return nil, fmt.Errorf("configuration: %s: %q is not an absolute path", p.key, p.value)
		}
	}
	if c.DefaultVCPUs < 1 || c.DefaultVCPUs > MaxVCPUs {
		return nil, fmt.Errorf("configuration: default_vcpus: %d is not between 1 and %d", c.DefaultVCPUs, MaxVCPUs)
	}
	memory, err := units.RAMInBytes(f.DefaultMemory)
	if err != nil {
		return nil, fmt.Errorf("configuration: default_memory: %w", err)
	}
	if memory < MinMemory || memory > math.MaxInt64/2 {
		return nil, fmt.Errorf("configuration: default_memory: %q is less than %s or absurd",
			f.DefaultMemory, units.BytesSize(MinMemory))
	}
	c.DefaultMemory = uint64(memory)
	if err := f.checkMax(c); err != nil {
		return nil, err
	}
	if err := f.checkLimits(c); err != nil {
		return nil, err
	}
	// The last number is -1, which is no id.
	if c.VMMFirstID == 0 || c.VMMIDs == 0 || c.VMMIDs > math.MaxUint32-c.VMMFirstID {
		return nil, fmt.Errorf("configuration: vmm_first_id, vmm_ids: the %d numbers from %d on are no user ids, or have 0 among them", c.VMMIDs, c.VMMFirstID)
	}
	c.BootTimeout, err = time.ParseDuration(f.BootTimeout)
	if err != nil {
		return nil, fmt.Errorf("configuration: boot_timeout: %w", err)
	}
	if c.BootTimeout < time.Second || c.BootTimeout > time.Hour {
		return nil, fmt.Errorf("configuration: boot_timeout: %q is not between 1s and 1h", f.BootTimeout)
	}
	if len(c.KernelParams) > maxKernelParams {
		return nil, fmt.Errorf("configuration: kernel_params: longer than %d bytes", maxKernelParams)
	}
	for _, r := range c.KernelParams {
		if r < ' ' || r > '~' {
			return nil, fmt.Errorf("configuration: kernel_params: %q has a character that a command line cannot hold", c.KernelParams)
		}
	}
	return c, nil
}

// checkMax takes over how large a machine may become.
func (f *file) checkMax(c *Config) error {
	c.MaxVCPUs = f.MaxVCPUs
	if c.MaxVCPUs != 0 && (c.MaxVCPUs < c.DefaultVCPUs || c.MaxVCPUs > MaxVCPUs) {
		return fmt.Errorf("configuration: max_vcpus: %d is not between default_vcpus and %d", c.MaxVCPUs, MaxVCPUs)
	}
	if f.MaxMemory == "" {
		return nil
	}
	memory, err := units.RAMInBytes(f.MaxMemory)
	if err != nil {
		return fmt.Errorf("configuration: max_memory: %w", err)
	}
	if memory < 0 || uint64(memory) < c.DefaultMemory || memory > math.MaxInt64/2 {
		return fmt.Errorf("configuration: max_memory: %q is less than default_memory or absurd", f.MaxMemory)
	}
	c.MaxMemory = uint64(memory)
	return nil
}
