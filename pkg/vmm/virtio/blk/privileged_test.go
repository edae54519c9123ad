//go:build privileged

package blk

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// loopDevice is a block device over a file, with blocks of 4096 bytes.
func loopDevice(t *testing.T, file string) string {
	t.Helper()
	out, err := exec.Command("losetup", "--find", "--show", "--sector-size", "4096", file).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	device := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", device).CombinedOutput(); err != nil {
			t.Errorf("losetup: %v: %s", err, out)
		}
	})
	return device
}

func TestBlockDevice(t *testing.T) {
	const size = 1 << 20
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, repeat('x', size), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(loopDevice(t, path), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d := newDevice(t, Config{File: f})
	if d.Features()&featureTopology == 0 || d.disk.sectors != size/sectorSize || d.disk.blockSize != 4096 {
		t.Errorf("features %#x, %d sectors, blocks of %d", d.Features(), d.disk.sectors, d.disk.blockSize)
	}
	config := make([]byte, 32)
	d.ReadConfig(0, config)
	if exp, minimum := config[24], binary.LittleEndian.Uint16(config[26:]); exp != 0 || minimum != 1 {
		t.Errorf("physical blocks of 2^%d, I/O of at least %d logical ones", exp, minimum)
	}
	if err := d.disk.write([][]byte{repeat('y', 4096)}, 4096, true); err != nil {
		t.Error(err)
	}
	if err := d.disk.discard(size/2, size/2); err != nil {
		t.Error(err)
	}
	if err := d.disk.writeZeroes(0, 4096, true); err != nil {
		t.Error(err)
	}
	if err := d.disk.sync(); err != nil {
		t.Error(err)
	}
	if err := d.disk.discard(512, 512); err == nil {
		t.Error("a part of a block was discarded")
	}
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []struct {
		at   int
		want byte
	}{{0, 0}, {4095, 0}, {4096, 'y'}, {8191, 'y'}, {8192, 'x'}, {size/2 - 1, 'x'}, {size / 2, 0}, {size - 1, 0}} {
		if got := content[part.at]; got != part.want {
			t.Errorf("byte %d is %#x, want %#x", part.at, got, part.want)
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Blocks*512 > size*3/4 {
		t.Errorf("%d bytes are in use after half of them was discarded, %v", st.Blocks*512, err)
	}
}
