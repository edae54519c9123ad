package share

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
)

// A snapshotter may describe a mount by others that come before it: its type has
// the prefixes format/ and mkdir/ then. containerd's mount manager carries that
// out (core/mount/manager) unless the shim has claimed it.

// Directory is to be made before a mount.
type Directory struct {
	Path string
	Mode uint32
}

// option of mkdir/: X-containerd.mkdir.path=PATH[:MODE[:UID:GID]].
const mkdirOption = "X-containerd.mkdir.path="

// IsTemplate says whether Resolve has something to do for a mount.
func IsTemplate(m mount.Mount) bool { return strings.Contains(m.Type, "/") }

// Resolve takes the prefixes off a mount. points are the places of the mounts
// before it.
func Resolve(m mount.Mount, points []string) (mount.Mount, []Directory, error) {
	var format, mkdir bool
	for {
		prefix, rest, ok := strings.Cut(m.Type, "/")
		if !ok {
			break
		}
		switch prefix {
		case "format":
			format = true
		case "mkdir":
			mkdir = true
		default:
			return m, nil, fmt.Errorf("mount of the type %s: %w", m.Type, errdefs.ErrNotImplemented)
		}
		m.Type = rest
	}
	var directories []Directory
	var options []string
	for _, option := range m.Options {
		var err error
		if format {
			if option, err = expand(option, points); err != nil {
				return m, nil, err
			}
		}
		path, ok := strings.CutPrefix(option, mkdirOption)
		if !mkdir || !ok {
			options = append(options, option)
			continue
		}
		d, err := parseDirectory(path)
		if err != nil {
			return m, nil, fmt.Errorf("mount option %q: %w: %w", option, err, errdefs.ErrInvalidArgument)
		}
		directories = append(directories, d)
	}
	m.Options = options
	if format {
		var err error
		if m.Source, err = expand(m.Source, points); err != nil {
			return m, nil, err
		}
	}
	return m, directories, nil
}

func parseDirectory(s string) (Directory, error) {
	path, rest, _ := strings.Cut(s, ":")
	d := Directory{Path: path, Mode: 0o700}
	if rest == "" {
		return d, nil
	}
	mode, owner, owned := strings.Cut(rest, ":")
	if owned && owner != "0:0" {
		return d, fmt.Errorf("owner %s: only root's directories are made", owner)
	}
	n, err := strconv.ParseUint(mode, 8, 32)
	if err != nil || n&^0o777 != 0 {
		return d, fmt.Errorf("mode %q", mode)
	}
	d.Mode = uint32(n)
	return d, nil
}

// placeholder is one of what core/mount/manager/format.go knows: the place of a
// mount, or of several, separated by colons.
var placeholder = regexp.MustCompile(`\{\{ *(mount|overlay) +([0-9]+)(?: +([0-9]+))? *\}\}`)

func expand(s string, points []string) (string, error) {
	var failed error
	s = placeholder.ReplaceAllStringFunc(s, func(found string) string {
		parts := placeholder.FindStringSubmatch(found)
		last := parts[3]
		if (parts[1] == "overlay") != (last != "") {
			return found
		}
		if last == "" {
			last = parts[2]
		}
		from, err := strconv.Atoi(parts[2])
		to, err2 := strconv.Atoi(last)
		if err != nil || err2 != nil || max(from, to) >= len(points) {
			failed = fmt.Errorf("%q: there are %d mounts before it: %w", found, len(points), errdefs.ErrInvalidArgument)
			return ""
		}
		list := []string{points[from]}
		for from != to {
			if from < to {
				from++
			} else {
				from--
			}
			list = append(list, points[from])
		}
		return strings.Join(list, ":")
	})
	if failed == nil && strings.Contains(s, "{{") {
		failed = fmt.Errorf("placeholder in %q: %w", s, errdefs.ErrNotImplemented)
	}
	return s, failed
}
