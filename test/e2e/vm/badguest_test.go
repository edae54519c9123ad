//go:build e2e

package vm

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/boot/boottest"
	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

// Each of these keeps a machine from starting: ctr says why, in time, and nothing is left.
func TestGuestDoesNotStart(t *testing.T) {
	n := node.For(t)
	kernel, image := filepath.Join(node.Top(), "bin/vmlinux"), filepath.Join(node.Top(), "bin/guest.erofs")
	dir := t.TempDir()
	file := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	head := func(path string, bytes int) []byte {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return b[:min(bytes, len(b))]
	}
	// The EROFS superblock stays, so that only the kernel notices.
	damaged := append([]byte{}, head(image, 4096)...)
	damaged = append(damaged, make([]byte, 1<<20)...)

	key := func(name, value string) string { return fmt.Sprintf("%s = '%s'\n", name, value) }
	for _, c := range []struct {
		name   string
		config string
		flags  []string
		words  []string
	}{
		{name: "missing kernel", config: key("kernel", "/no/such/vmlinux"), words: []string{"/no/such/vmlinux", "no such file"}},
		{name: "missing image", config: key("image", "/no/such/image"), words: []string{"/no/such/image", "no such file"}},
		{name: "missing VMM", config: key("vmm", "/no/such/vmm"), words: []string{"/no/such/vmm", "no such file"}},
		{name: "kernel is text", config: key("kernel", file("text", []byte("not a kernel\n"))), words: []string{"text", "kernel"}},
		{name: "kernel is empty", config: key("kernel", file("empty", nil)), words: []string{"empty", "kernel"}},
		{name: "kernel is cut off", config: key("kernel", file("cut", head(kernel, 1<<20))), words: []string{"kernel"}},
		{name: "image is text", config: key("image", file("imagetext", []byte("not an image\n"))), words: []string{"imagetext", "image"}},
		{name: "image is damaged", config: key("image", file("damaged", damaged)), words: []string{"panic"}},
		{name: "VMM is another program", config: key("vmm", "/bin/false"), words: []string{"VMM"}},
		{name: "unknown key", config: key("kernal", kernel), words: []string{"kernal", "unknown"}},
		{name: "too little memory configured", config: key("default_memory", "16MiB"), words: []string{"default_memory", "16MiB"}},
		{name: "panic at boot", config: key("kernel_params", "init=/nothing"), words: []string{"panic", "Requested init /nothing failed"}},
		{
			name:   "kernel hangs",
			config: key("kernel", file("hang", hangingKernel())) + key("boot_timeout", "3s"),
			words:  []string{"did not start within", "boot_timeout"},
		},
		{
			name:   "kernel waits for a device that does not come",
			config: key("kernel_params", "root=/dev/nothing rootwait loglevel=7") + key("boot_timeout", "30s"),
			words:  []string{"did not start within", "Waiting for root device /dev/nothing"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := node.For(t)
			n.Configure(t, c.config)
			n.Run(t, c.flags, "true").WantError(t, c.words...)
		})
	}
	n.MustRun(t, nil, "true")
}

// A limit below what a kernel needs must not stop the machine: the limit is the container's.
func TestSmallMemoryLimit(t *testing.T) {
	n := node.For(t)
	n.Run(t, []string{"--memory-limit", fmt.Sprint(16 << 20)}, "echo", "small").WantOutput(t, "small\n")
}

// hangingKernel is a kernel of three instructions, at the address where kernels are loaded: cli; hlt; jump back to hlt.
func hangingKernel() []byte {
	return boottest.Kernel(0x1000000, []byte{0xfa, 0xf4, 0xeb, 0xfd})
}
