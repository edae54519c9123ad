package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// update replaces the content of a volume, as the kubelet does, and removes the
// one before.
func update(t *testing.T, dir string, generation int) {
	t.Helper()
	data, before := fmt.Sprintf("..%d", generation), fmt.Sprintf("..%d", generation-1)
	if err := os.MkdirAll(filepath.Join(dir, data), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "b"} {
		if err := os.WriteFile(filepath.Join(dir, data, name), []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(data, filepath.Join(dir, "..tmp")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "..tmp"), filepath.Join(dir, "..data")); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(dir, before)); err != nil {
		t.Fatal(err)
	}
}

// watcher counts the IN_ATTRIB events of paths.
type watcher struct {
	t    *testing.T
	fd   int
	name map[int32]string
}

func newWatcher(t *testing.T, paths ...string) *watcher {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	w := &watcher{t: t, fd: fd, name: map[int32]string{}}
	for _, p := range paths {
		wd, err := unix.InotifyAddWatch(fd, p, unix.IN_ATTRIB)
		if err != nil {
			t.Fatal(err)
		}
		w.name[int32(wd)] = filepath.Base(p)
	}
	return w
}

// events are those until now, by the name of the path, without those of names in
// a directory.
func (w *watcher) events() map[string]int {
	w.t.Helper()
	counts := map[string]int{}
	buf := make([]byte, 64<<10)
	n, err := unix.Read(w.fd, buf)
	if err != nil && !errors.Is(err, unix.EAGAIN) {
		w.t.Fatal(err)
	}
	for b := buf[:max(n, 0)]; len(b) > 0; {
		wd, mask, length := int32(binary.NativeEndian.Uint32(b)), binary.NativeEndian.Uint32(b[4:]), binary.NativeEndian.Uint32(b[12:])
		if mask&unix.IN_ATTRIB != 0 && length == 0 {
			counts[w.name[wd]]++
		}
		b = b[unix.SizeofInotifyEvent+length:]
	}
	return counts
}

func TestVolumeChanged(t *testing.T) {
	c := &container{shared: t.TempDir()}
	dir := filepath.Join(c.shared, "mounts/3")
	update(t, dir, 1)
	if err := os.Mkdir(filepath.Join(dir, "..1", "subdirectory"), 0o755); err != nil {
		t.Fatal(err)
	}
	w := newWatcher(t, dir, filepath.Join(dir, "..1/a"), filepath.Join(dir, "..1/b"))
	if err := c.volumeChanged(3); err != nil {
		t.Fatal(err)
	}
	if got := w.events(); len(got) != 0 {
		t.Errorf("events of a volume that is new: %v", got)
	}
	update(t, dir, 2)
	w.events() // that the files have lost their names
	second := newWatcher(t, filepath.Join(dir, "..2/a"))
	if err := c.volumeChanged(3); err != nil {
		t.Fatal(err)
	}
	if got := w.events(); got["3"] != 1 || got["a"] != 1 || got["b"] != 1 {
		t.Errorf("events %v", got)
	}
	if got := second.events(); len(got) != 0 {
		t.Errorf("events of a file that was not there before: %v", got)
	}
	update(t, dir, 3)
	second.events()
	if err := c.volumeChanged(3); err != nil {
		t.Fatal(err)
	}
	if got := second.events(); got["a"] != 1 {
		t.Errorf("events %v", got)
	}
	if n := len(c.volumes[3].files); n != 2 {
		t.Errorf("%d files are remembered", n)
	}
	c.closeVolumes()
	if n := len(c.volumes[3].files); n != 0 {
		t.Errorf("%d files are open", n)
	}
	if err := c.volumeChanged(3); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
}

func TestVolumeThatIsNone(t *testing.T) {
	outside := t.TempDir()
	for name, make := range map[string]func(dir string) error{
		"nothing":    func(string) error { return nil },
		"a file":     func(dir string) error { return os.WriteFile(dir, nil, 0o644) },
		"a link":     func(dir string) error { return os.Symlink(outside, dir) },
		"no ..data":  func(dir string) error { return os.Mkdir(dir, 0o755) },
		"a loop":     func(dir string) error { return errors.Join(os.Mkdir(dir, 0o755), os.Symlink("..data", dir+"/..data")) },
		"up":         func(dir string) error { return errors.Join(os.Mkdir(dir, 0o755), os.Symlink("..", dir+"/..data")) },
		"itself":     func(dir string) error { return errors.Join(os.Mkdir(dir, 0o755), os.Symlink(".", dir+"/..data")) },
		"a path":     func(dir string) error { return errors.Join(os.Mkdir(dir, 0o755), os.Symlink(outside, dir+"/..data")) },
		"no link":    func(dir string) error { return os.MkdirAll(dir+"/..data", 0o755) },
		"to nothing": func(dir string) error { return errors.Join(os.Mkdir(dir, 0o755), os.Symlink("..1", dir+"/..data")) },
	} {
		c := &container{shared: t.TempDir()}
		if err := os.Mkdir(filepath.Join(c.shared, "mounts"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := make(filepath.Join(c.shared, "mounts/0")); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := c.volumeChanged(0); err == nil {
				t.Errorf("%s: no error", name)
			}
		}
		c.closeVolumes()
	}
}

func TestVolumeOfManyFiles(t *testing.T) {
	c := &container{shared: t.TempDir()}
	dir := filepath.Join(c.shared, "mounts/0")
	update(t, dir, 1)
	for i := range 2 * maxVolumeFiles {
		if err := os.WriteFile(filepath.Join(dir, "..1", fmt.Sprint(i)), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.volumeChanged(0); err != nil {
		t.Fatal(err)
	}
	if n := len(c.volumes[0].files); n != maxVolumeFiles {
		t.Errorf("%d files are remembered", n)
	}
	c.closeVolumes()
}
