package state

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
)

// ChooseID finds a user id among the n from first on that no sandbox below root
// has, and has record store it in the record of its own, before anybody else
// chooses. It is free again when that record is gone, or has another one.
func ChooseID(ctx context.Context, root string, first, n uint32, record func(id uint32) error) error {
	f, err := os.Open(root)
	if err != nil {
		return fmt.Errorf("user id for the VMM: %w", err)
	}
	defer f.Close()
	if err := flock(ctx, f); err != nil {
		return fmt.Errorf("user id for the VMM: lock %s: %w", root, err)
	}
	taken := map[uint32]bool{}
	records, err := filepath.Glob(filepath.Join(root, "*", "*"))
	if err != nil {
		return err // the pattern is right unless root is no path of ours
	}
	for _, path := range records {
		if r, err := (Dir{Path: path}).Load(); err == nil {
			taken[r.ID] = true
		}
	}
	for i := range n {
		if id := first + i; !taken[id] {
			return record(id)
		}
	}
	return fmt.Errorf("user id for the VMM: all %d from %d on are in use (configuration keys vmm_first_id, vmm_ids)", n, first)
}
