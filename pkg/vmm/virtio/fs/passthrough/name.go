package passthrough

import (
	"bytes"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	nameMax   = 255  // NAME_MAX
	targetMax = 4095 // PATH_MAX without the NUL
)

// cutString takes a string and its NUL from the start of p.
func cutString(p []byte, limit int) (s string, rest []byte, errno unix.Errno) {
	i := bytes.IndexByte(p[:min(len(p), limit+1)], 0)
	switch {
	case i >= 0:
		return string(p[:i]), p[i+1:], 0
	case len(p) > limit:
		return "", nil, unix.ENAMETOOLONG
	}
	return "", nil, unix.EINVAL
}

// cutName takes the name of a directory entry from the start of p. The guest's
// VFS never sends one that is refused here.
func cutName(p []byte) (name string, rest []byte, errno unix.Errno) {
	name, rest, errno = cutString(p, nameMax)
	if errno != 0 {
		return "", nil, errno
	}
	if name == "" || name == "." || name == ".." || strings.IndexByte(name, '/') >= 0 {
		return "", nil, unix.EINVAL
	}
	return name, rest, 0
}

// oneName is cutName for arguments that end with the name.
func oneName(p []byte) (string, unix.Errno) {
	name, rest, errno := cutName(p)
	if errno == 0 && len(rest) != 0 {
		errno = unix.EINVAL
	}
	return name, errno
}
