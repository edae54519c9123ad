package state

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func dir(t *testing.T) Dir {
	t.Helper()
	d, err := At(filepath.Join(t.TempDir(), "microvm"), "default", "s1")
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestNamesStayBelowRoot(t *testing.T) {
	for _, bad := range []string{"", "..", ".", "a/b", "/a", "a\x00b", "-a"} {
		if d, err := At("/run/microvm", "default", bad); err == nil {
			t.Errorf("sandbox %q is at %s", bad, d.Path)
		}
		if d, err := At("/run/microvm", bad, "s1"); err == nil {
			t.Errorf("namespace %q is at %s", bad, d.Path)
		}
	}
}

func TestLock(t *testing.T) {
	d := dir(t)
	held, err := d.Hold(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer held.Release()
	lock, err := d.Lock()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Lock(); !errors.Is(err, ErrLocked) {
		t.Errorf("second lock: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if _, err := d.LockWait(ctx); !errors.Is(err, ErrLocked) {
		t.Errorf("waiting for a lock that is not given up: %v", err)
	}
	waited := make(chan error)
	go func() {
		f, err := d.LockWait(context.Background())
		if err == nil {
			f.Close()
		}
		waited <- err
	}()
	lock.Close()
	if err := <-waited; err != nil {
		t.Errorf("lock after it was given up: %v", err)
	}
}

// A shim that ends removes its lock file while another one waits for it: the
// other one must not believe it has locked what is gone.
func TestLockOfRemovedFile(t *testing.T) {
	d := dir(t)
	held, err := d.Hold(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	held.Release()
	first, err := d.Lock()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(d.lock()); err != nil {
		t.Fatal(err)
	}
	second, err := d.Lock()
	if err != nil {
		t.Fatal(err)
	}
	first.Close()
	if _, err := d.Lock(); !errors.Is(err, ErrLocked) {
		t.Errorf("the second shim's lock does not hold: %v", err)
	}
	second.Close()
}

// Holders come and go while sandboxes' directories are removed.
func TestHoldAgainstRemoval(t *testing.T) {
	d := dir(t)
	var wg sync.WaitGroup
	var inside, times atomic.Int32
	for range 8 {
		wg.Go(func() {
			for range 20 {
				held, err := d.Hold(context.Background())
				if err != nil {
					t.Error(err)
					return
				}
				if n := inside.Add(1); n != 1 {
					t.Errorf("%d holders at once", n)
				}
				times.Add(1)
				inside.Add(-1) // whoever removes the directory gives it up
				if held.Gone() {
					t.Error("gone while held")
				}
				if err := d.Remove(); err != nil {
					t.Error(err)
				}
				if !held.Gone() {
					t.Error("not gone after removal")
				}
				held.Release()
			}
		})
	}
	wg.Wait()
	if n := times.Load(); n != 8*20 {
		t.Errorf("held %d times", n)
	}
	if _, err := os.Stat(filepath.Dir(filepath.Dir(d.Path))); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the root is left: %v", err)
	}
}

func TestRecord(t *testing.T) {
	d := dir(t)
	held, err := d.Hold(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer held.Release()
	if _, err := d.Load(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no record: %v", err)
	}
	want := Record{Shim: Process{Pid: 1, StartTime: 2}, VMM: Process{Pid: 3, StartTime: 4}, Socket: "/s", Cgroups: []string{"/a", "/a/b"}}
	if err := d.Store(want); err != nil {
		t.Fatal(err)
	}
	got, err := d.Load()
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
	if cgroups := Cgroups(filepath.Dir(filepath.Dir(d.Path))); !reflect.DeepEqual(cgroups, want.Cgroups) {
		t.Errorf("cgroups %v", cgroups)
	}
}

// What is not ours is not removed.
// A shim may have been killed while it wrote its record, or found the disk full.
func TestRemoveWithHalfARecord(t *testing.T) {
	d := dir(t)
	held, err := d.Hold(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer held.Release()
	if err := os.WriteFile(d.record()+".new", []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.Remove(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(d.Path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory is left: %v", err)
	}
}

func TestWriteFileFails(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.Symlink("/dev/full", path+".new"); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(path, []byte("x")); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("on a full disk: %v", err)
	}
	if _, err := os.Lstat(path + ".new"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("half a file is left: %v", err)
	}
}

func TestRemoveKeepsForeignFiles(t *testing.T) {
	d := dir(t)
	precious := filepath.Join(d.Shared(), "c1", "rootfs", "precious")
	if err := os.MkdirAll(precious, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := d.Remove(); err == nil {
		t.Error("no error for a directory that is not empty")
	}
	if _, err := os.Stat(precious); err != nil {
		t.Error(err)
	}
}

func TestKill(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()

	p, err := Identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	// The same process id with another start time is another process.
	if err := (Process{Pid: p.Pid, StartTime: p.StartTime - 1}).Kill(ctx); err != nil {
		t.Error(err)
	}
	select {
	case <-ended:
		t.Fatal("a foreign process was killed")
	default:
	}
	if err := p.Kill(ctx); err != nil {
		t.Error(err)
	}
	<-ended
	if err := p.Kill(ctx); err != nil {
		t.Errorf("killing it again: %v", err)
	}
	if err := (Process{}).Kill(ctx); err != nil {
		t.Errorf("killing no process: %v", err)
	}
}

func TestParseStartTime(t *testing.T) {
	for _, test := range []struct {
		stat string
		want uint64
		ok   bool
	}{
		{"12 (cat) S 1 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4711 1 2 3", 4711, true},
		{"12 (a) b) (c) S 1 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 42", 42, true},
		{"12 (cat) S 1", 0, false},
		{"", 0, false},
		{"no parentheses", 0, false},
	} {
		got, err := parseStartTime([]byte(test.stat))
		if got != test.want || (err == nil) != test.ok {
			t.Errorf("%q: %d, %v", test.stat, got, err)
		}
	}
}
