package state

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
)

func TestChooseID(t *testing.T) {
	root := t.TempDir()
	sandbox := func(name string) Dir {
		dir, err := At(root, "ns", name)
		if err != nil {
			t.Fatal(err)
		}
		held, err := dir.Hold(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		held.Release()
		return dir
	}
	const first, n = 1000, 20
	choose := func(dir Dir) (id uint32, err error) {
		err = ChooseID(t.Context(), root, first, n, func(free uint32) error {
			id = free
			return dir.Store(Record{ID: free})
		})
		return id, err
	}

	// All at the same time, each gets another one.
	var dirs []Dir
	for i := range n {
		dirs = append(dirs, sandbox(fmt.Sprint("s", i)))
	}
	ids := make([]uint32, n)
	var choosing sync.WaitGroup
	for i, dir := range dirs {
		choosing.Go(func() {
			var err error
			if ids[i], err = choose(dir); err != nil {
				t.Error(err)
			}
		})
	}
	choosing.Wait()
	sorted := slices.Sorted(slices.Values(ids))
	for i, id := range sorted {
		if id != first+uint32(i) {
			t.Fatalf("ids %v", sorted)
		}
	}

	late := sandbox("late")
	if _, err := choose(late); err == nil || !strings.Contains(err.Error(), "vmm_first_id") {
		t.Errorf("one too many: %v", err)
	}
	if err := dirs[7].Remove(); err != nil {
		t.Fatal(err)
	}
	failed := errors.New("disk full")
	if err := ChooseID(t.Context(), root, first, n, func(uint32) error { return failed }); !errors.Is(err, failed) {
		t.Errorf("record fails: %v", err)
	}
	if id, err := choose(late); id != ids[7] || err != nil {
		t.Errorf("after one was freed: %d, %v; want %d", id, err, ids[7])
	}
}
