package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestLoad(t *testing.T) {
	defaults := Config{
		Kernel: "/usr/lib/microvm/vmlinux", Image: "/usr/lib/microvm/guest.erofs", VMM: "/usr/lib/microvm/microvm-vmm",
		DefaultVCPUs: 1, DefaultMemory: 512 << 20, BootTimeout: time.Minute,
		VMMFirstID: 2000000000, VMMIDs: 65536,
	}
	with := func(change func(*Config)) Config { c := defaults; change(&c); return c }

	for _, test := range []struct {
		name    string
		file    string
		dropIns map[string]string
		body    string
		want    Config
	}{
		{name: "empty", want: defaults},
		{
			name: "every key",
			file: `kernel = "/a/k"
image = "/a/i"
vmm = "/a/v"
default_vcpus = 4
default_memory = "2GiB"
max_vcpus = 8
max_memory = "16GiB"
boot_timeout = "90s"
vmm_first_id = 3000000000
vmm_ids = 100
kernel_params = "quiet lockdown=integrity"
debug = true`,
			want: Config{Kernel: "/a/k", Image: "/a/i", VMM: "/a/v", DefaultVCPUs: 4, DefaultMemory: 2 << 30, MaxVCPUs: 8, MaxMemory: 16 << 30,
				BootTimeout: 90 * time.Second, VMMFirstID: 3000000000, VMMIDs: 100, KernelParams: "quiet lockdown=integrity", Debug: true},
		},
		{
			name:    "drop-ins override single keys, in order",
			file:    "default_vcpus = 2\nkernel = \"/a/k\"",
			dropIns: map[string]string{"20-b.toml": "default_vcpus = 4", "10-a.toml": "default_vcpus = 3\ndebug = true", "x.conf": "nonsense ="},
			want:    with(func(c *Config) { c.DefaultVCPUs = 4; c.Debug = true; c.Kernel = "/a/k" }),
		},
		{
			name:    "runtime options come last",
			dropIns: map[string]string{"10-a.toml": `default_memory = "1GiB"`},
			body:    `default_memory = "256MiB"`,
			want:    with(func(c *Config) { c.DefaultMemory = 256 << 20 }),
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "with[odd]*name") // a directory's name is no pattern
			path := filepath.Join(dir, "config.toml")
			write(t, path, test.file)
			for name, content := range test.dropIns {
				write(t, filepath.Join(dir, "config.d", name), content)
			}
			got, err := Load(Sources{Path: path, Body: test.body})
			if err != nil {
				t.Fatal(err)
			}
			if *got != test.want {
				t.Errorf("got  %+v\nwant %+v", *got, test.want)
			}
		})
	}
}

func TestFilesBesideTheProgram(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "vmlinux"), "")
	write(t, filepath.Join(dir, "config.toml"), "")
	c, err := Load(Sources{Path: filepath.Join(dir, "config.toml"), ProgramDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(dir, "vmlinux"); c.Kernel != want {
		t.Errorf("kernel %s, want %s", c.Kernel, want)
	}
	if want := "/usr/lib/microvm/guest.erofs"; c.Image != want {
		t.Errorf("image %s, want %s", c.Image, want)
	}
}

func TestNamedFileMustExist(t *testing.T) {
	path := filepath.Join(t.TempDir(), "absent.toml")
	if _, err := Load(Sources{Path: path}); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("error %v does not name %s", err, path)
	}
}

func TestBadConfiguration(t *testing.T) {
	for _, test := range []struct{ content, want string }{
		{"frobnicate = 1\n[section]\nkey = 1", "frobnicate (line 1), section"},
		{"debug = 1", "line 1"},
		{"debug = ", "line 1"},
		{`kernel = "relative/vmlinux"`, `kernel: "relative/vmlinux" is not an absolute path`},
		{`image = ""`, "image"},
		{`vmm = "./v"`, "vmm"},
		{"default_vcpus = 0", "default_vcpus: 0"},
		{"default_vcpus = 33", "default_vcpus: 33"},
		{`default_memory = "1MiB"`, "default_memory"},
		{`default_memory = "-1GiB"`, "default_memory"},
		{`default_memory = "lots"`, "default_memory"},
		{`default_memory = "99999999999GiB"`, "default_memory"},
		{"max_vcpus = 33", "max_vcpus: 33"},
		{"default_vcpus = 4\nmax_vcpus = 3", "max_vcpus: 3"},
		{"max_vcpus = -1", "max_vcpus: -1"},
		{`max_memory = "511MiB"`, "max_memory"},
		{`max_memory = "-1GiB"`, "max_memory"},
		{`max_memory = "all"`, "max_memory"},
		{"vmm_first_id = 0", "vmm_first_id"},
		{"vmm_first_id = -1", "line 1"},
		{"vmm_ids = 0", "vmm_ids"},
		{"vmm_first_id = 4294967000\nvmm_ids = 296", "vmm_ids"},
		{`boot_timeout = "soon"`, "boot_timeout"},
		{`boot_timeout = "0s"`, "boot_timeout"},
		{`boot_timeout = "-5s"`, "boot_timeout"},
		{`kernel_params = "a\nb"`, "kernel_params"},
		{`kernel_params = "` + strings.Repeat("a", maxKernelParams+1) + `"`, "kernel_params"},
		{"# " + strings.Repeat("a", maxFile), "larger than"},
	} {
		path := filepath.Join(t.TempDir(), "config.toml")
		write(t, path, test.content)
		_, err := Load(Sources{Path: path})
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%.60q: error %v does not say %q", test.content, err, test.want)
		}
	}
}

// FuzzParse: no content makes the parser panic, and what passes is usable.
func FuzzParse(f *testing.F) {
	f.Add(`default_memory = "512MiB"`)
	f.Add(`disk_bytes_per_second = "1MiB burst 2MiB"`)
	f.Add("kernel = \"/k\"\n[a]\nb = [1, 2]")
	f.Fuzz(func(t *testing.T, body string) {
		c, err := Load(Sources{Body: body})
		if err != nil {
			return
		}
		if c.DefaultVCPUs < 1 || c.DefaultVCPUs > MaxVCPUs || c.DefaultMemory < MinMemory || c.RateLimits.Disk.Check() != nil {
			t.Fatalf("%q gives %+v", body, *c)
		}
	})
}
