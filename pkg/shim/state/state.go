// Package state is what a sandbox leaves in the host's file system while it
// runs: a directory of its own with a lock, which says whether its shim lives,
// and a record of what has to be cleaned up if it does not.
package state

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/pkg/identifiers"
	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/shim/network"
)

// Root is where the directories of all sandboxes are: Root/namespace/sandbox.
const Root = "/run/microvm"

// ErrLocked says that a shim serves the sandbox.
var ErrLocked = errors.New("the sandbox's shim is running")

// Dir is the directory of one sandbox.
type Dir struct {
	Path string
}

// At names the directory of a sandbox. It fails for names that are no
// identifiers of containerd's, so a Dir is always below root.
func At(root, namespace, sandbox string) (Dir, error) {
	for _, id := range []string{namespace, sandbox} {
		if err := identifiers.Validate(id); err != nil {
			return Dir{}, fmt.Errorf("sandbox %q in namespace %q: %w", sandbox, namespace, err)
		}
	}
	return Dir{Path: filepath.Join(root, namespace, sandbox)}, nil
}

// Shared is the mount point of the tree that the guest sees. It is only ever
// mounted in the shim's own mount namespace.
func (d Dir) Shared() string { return filepath.Join(d.Path, "shared") }

func (d Dir) lock() string   { return filepath.Join(d.Path, "lock") }
func (d Dir) record() string { return filepath.Join(d.Path, "state.json") }

// Held is a directory that its holder has for itself among those who hold it.
type Held struct {
	dir  Dir
	file *os.File
}

// Release lets the next one hold the directory.
func (h *Held) Release() { h.file.Close() }

// Gone says that the directory was removed, by the shim it belonged to. What
// its path names now, if anything, is another one.
func (h *Held) Gone() bool { return !same(h.file, h.dir.Path) }

// Hold makes the directory if need be and keeps other callers of Hold out
// until it is released. A shim does not hold its directory while it runs, it
// locks it, and may remove it while others hold it.
func (d Dir) Hold(ctx context.Context) (*Held, error) {
	for {
		if err := os.MkdirAll(d.Path, 0o711); err != nil {
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrExist) {
				continue // another sandbox's shim removes a parent meanwhile
			}
			return nil, fmt.Errorf("sandbox directory: %w", err)
		}
		f, err := os.Open(d.Path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("sandbox directory: %w", err)
		}
		if err := flock(ctx, f); err != nil {
			f.Close()
			return nil, fmt.Errorf("hold %s: %w", d.Path, err)
		}
		if same(f, d.Path) {
			return &Held{dir: d, file: f}, nil
		}
		f.Close() // held what has been removed meanwhile
	}
}

// Lock marks the sandbox as served, until the file is closed in every process
// that has inherited it. The error is ErrLocked when another shim serves it.
func (d Dir) Lock() (*os.File, error) {
	for {
		f, err := os.OpenFile(d.lock(), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, fmt.Errorf("lock sandbox: %w", err)
		}
		switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
		case errors.Is(err, unix.EWOULDBLOCK):
			f.Close()
			return nil, ErrLocked
		case err != nil:
			f.Close()
			return nil, fmt.Errorf("lock sandbox: %w", err)
		case same(f, d.lock()):
			return f, nil
		}
		f.Close()
	}
}

// LockWait is Lock, but waits for another shim to end.
func (d Dir) LockWait(ctx context.Context) (*os.File, error) {
	for {
		f, err := d.Lock()
		if !errors.Is(err, ErrLocked) {
			return f, err
		}
		if err := sleep(ctx); err != nil {
			return nil, ErrLocked
		}
	}
}

// flock locks f exclusively. It asks again and again because flock(2) cannot
// be given up on.
func flock(ctx context.Context, f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		if err := sleep(ctx); err != nil {
			return err
		}
	}
}

func sleep(ctx context.Context) error {
	select {
	case <-time.After(5 * time.Millisecond):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// same says whether path still names the open file.
func same(f *os.File, path string) bool {
	open, err1 := f.Stat()
	named, err2 := os.Stat(path)
	return err1 == nil && err2 == nil && os.SameFile(open, named)
}

// Record is what outlives a shim that was killed.
type Record struct {
	Shim Process `json:"shim"`
	// VMM is zero before it runs.
	VMM Process `json:"vmm,omitzero"`
	// ID is the VMM's user and group id, which no other sandbox has; zero before
	// one was chosen.
	ID uint32 `json:"id,omitempty"`
	// Socket is the path that the shim serves its API on.
	Socket string `json:"socket,omitempty"`
	// Cgroups are the directories that the shim has made, parents first.
	Cgroups []string `json:"cgroups,omitempty"`
	// Network is what was done in the pod's network namespace.
	Network network.Record `json:"network,omitzero"`
}

// Store replaces the record.
func (d Dir) Store(r Record) error {
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("sandbox record: %w", err)
	}
	if err := WriteFile(d.record(), data); err != nil {
		return fmt.Errorf("sandbox record: %w", err)
	}
	return nil
}

// Load reads the record; there being none is an fs.ErrNotExist.
func (d Dir) Load() (Record, error) {
	var r Record
	data, err := os.ReadFile(d.record())
	if err != nil {
		return r, fmt.Errorf("sandbox record: %w", err)
	}
	if err := json.Unmarshal(data, &r); err != nil {
		return r, fmt.Errorf("sandbox record: %w", err)
	}
	return r, nil
}

// Cgroups are the cgroup directories that sandboxes below root have made.
func Cgroups(root string) []string {
	var dirs []string
	records, err := filepath.Glob(filepath.Join(root, "*", "*"))
	if err != nil {
		return nil // the pattern is right unless root is no path of ours
	}
	for _, path := range records {
		if r, err := (Dir{Path: path}).Load(); err == nil {
			dirs = append(dirs, r.Cgroups...)
		}
	}
	return dirs
}

// Remove takes the directory away, and its parents if they are empty. It
// removes nothing but what this package and the shim made: if something were
// mounted here after all, it has to stay whole.
func (d Dir) Remove() error {
	var errs []error
	// The temporary file is there if the shim was killed while it wrote.
	for _, path := range []string{d.Shared(), d.record(), temporary(d.record()), d.lock(), d.Path} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	namespace := filepath.Dir(d.Path)
	if os.Remove(namespace) == nil { // fails while others are in there
		os.Remove(filepath.Dir(namespace))
	}
	return errors.Join(errs...)
}

// WriteFile replaces a file in one step, so that a reader sees the old
// content or the new one, even if the writer is killed.
func WriteFile(path string, data []byte) error {
	if err := os.WriteFile(temporary(path), data, 0o600); err != nil {
		os.Remove(temporary(path)) // the disk is full: it is there, and empty
		return err
	}
	return os.Rename(temporary(path), path)
}

func temporary(path string) string { return path + ".new" }
