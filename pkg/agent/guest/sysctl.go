package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// WriteSysctl sets a kernel parameter of the guest, named as sysctl(8) names
// it: a.b.c, or a/b.c/d where an element has a dot.
func WriteSysctl(name, value string) error {
	path, err := sysctlPath(name)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join("/proc/sys", path), []byte(value), 0); err != nil {
		return fmt.Errorf("sysctl %q: %w", name, err)
	}
	return nil
}

// sysctlPath returns the path of a kernel parameter below /proc/sys.
func sysctlPath(name string) (string, error) {
	path := name
	// The first separator decides what the others mean (sysctl.d(5)).
	if i := strings.IndexAny(name, "./"); i >= 0 && name[i] == '.' {
		path = strings.Map(func(r rune) rune {
			switch r {
			case '.':
				return '/'
			case '/':
				return '.'
			}
			return r
		}, name)
	}
	if !filepath.IsLocal(path) || filepath.Clean(path) != path {
		return "", fmt.Errorf("sysctl %q: invalid name", name)
	}
	return path, nil
}
