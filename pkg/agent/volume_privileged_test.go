//go:build privileged

package agent

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// mountShare mounts a file system in the place of what is shared for a container's
// mount, until the test ends.
func mountShare(t *testing.T, c *container, mount string) string {
	t.Helper()
	dir := filepath.Join(c.shared, "mounts", mount)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// A mount that is read-only, but not recursively, is a file system that is; then
// what is mounted below has its own flags.
func TestReadOnlyShares(t *testing.T) {
	c := &container{shared: t.TempDir()}
	bind := func(source string, options ...string) specs.Mount {
		return specs.Mount{Type: "bind", Source: source, Options: options}
	}
	notMounted := filepath.Join(c.shared, "mounts/4")
	if err := os.MkdirAll(notMounted, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(c.shared, "mounts/5")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		mount specs.Mount
		want  []string // options
		write error
	}{
		{bind(mountShare(t, c, "0"), "rbind", "rprivate", "ro"), []string{"rbind", "rprivate"}, unix.EROFS},
		{bind(mountShare(t, c, "1"), "rbind", "rw"), []string{"rbind", "rw"}, nil},
		{bind(mountShare(t, c, "2"), "rbind", "ro", "rro"), []string{"rbind", "ro", "rro"}, nil},
		{bind(mountShare(t, c, "3"), "ro", "rbind", "rw"), []string{"ro", "rbind", "rw"}, nil},
		{bind(notMounted, "rbind", "ro"), []string{"rbind", "ro"}, nil},
		{bind(file, "bind", "ro"), []string{"bind", "ro"}, unix.ENOTDIR},
		{bind(t.TempDir(), "rbind", "ro"), []string{"rbind", "ro"}, nil}, // of the guest's own
	}
	var mounts []specs.Mount
	for _, test := range tests {
		mounts = append(mounts, test.mount)
	}
	if err := c.openShares(mounts); err != nil {
		t.Fatal(err)
	}
	for i, test := range tests {
		if !slices.Equal(mounts[i].Options, test.want) {
			t.Errorf("%d: options %v, want %v", i, mounts[i].Options, test.want)
		}
		if err := os.WriteFile(filepath.Join(test.mount.Source, "file"), nil, 0o644); !errors.Is(err, test.write) {
			t.Errorf("%d: write: %v, want %v", i, err, test.write)
		}
	}
}

// Events of the kubelet's updates come from a file system that is read-only, too.
func TestVolumeChangedOfReadOnlyShare(t *testing.T) {
	c := &container{shared: t.TempDir()}
	dir := mountShare(t, c, "0")
	update(t, dir, 1)
	if err := c.openShares([]specs.Mount{{Source: dir, Options: []string{"rbind", "ro"}}}); err != nil {
		t.Fatal(err)
	}
	w := newWatcher(t, dir, filepath.Join(dir, "..1/a"))
	for range 2 {
		if err := c.volumeChanged(0); err != nil {
			t.Fatal(err)
		}
	}
	if got := w.events(); got["0"] != 1 || got["a"] != 1 {
		t.Errorf("events %v", got)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("write: %v", err)
	}
	c.closeVolumes()
}
