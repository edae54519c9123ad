package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// fileFlood makes the file server hold names, open files, links and locks by the thousand, and looks for ways out of the share:
// hostile files SHARE SECRET, where SECRET is the path of a file of the host's that has to be out of reach.
func fileFlood(args []string) (attack, error) {
	if len(args) != 2 {
		return nil, errors.New("usage: hostile files SHARE SECRET")
	}
	share, secret := args[0], args[1]
	limit := unix.Rlimit{Cur: 1 << 16, Max: 1 << 16}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil, err
	}
	var open []int
	return func(round int) (string, error) {
		const each = 50
		dir := filepath.Join(share, fmt.Sprint(round))
		if err := os.Mkdir(dir, 0o755); err != nil {
			return "", err
		}
		var made, refused int
		count := func(err error) {
			if err == nil {
				made++
			} else {
				refused++
			}
		}
		long := strings.Repeat("n", 250)
		for i := range each {
			name := filepath.Join(dir, fmt.Sprint(long, i))
			fd, err := unix.Open(name, unix.O_RDWR|unix.O_CREAT, 0o644)
			count(err)
			if err != nil {
				continue
			}
			open = append(open, fd) // for ever
			lock := unix.Flock_t{Type: unix.F_WRLCK, Start: int64(i) << 32, Len: 1}
			count(unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lock))
			count(unix.Link(name, filepath.Join(dir, fmt.Sprint("link", i))))
			count(unix.Setxattr(name, "user."+long, bytes.Repeat([]byte{1}, 2<<10), 0))
		}
		for _, name := range []string{strings.Repeat("n", 256), strings.Repeat("n", 4000), "a\x01b\xff", "-", ". ", ".. "} {
			count(os.WriteFile(filepath.Join(dir, name), nil, 0o644))
		}
		count(deepTree(dir, each))
		count(junkHandles(share, each))
		if err := waysOut(dir, secret); err != nil {
			return "", err
		}
		return fmt.Sprintf("%d of %d requests refused, %d files open", refused, made+refused, len(open)), nil
	}, nil
}

// deepTree makes directories below each other.
func deepTree(dir string, depth int) error {
	at, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	for i := 0; i < depth && err == nil; i++ {
		if err = unix.Mkdirat(at, "d", 0o755); err != nil {
			break
		}
		var below int
		below, err = unix.Openat(at, "d", unix.O_RDONLY|unix.O_DIRECTORY, 0)
		_ = unix.Close(at)
		at = below
	}
	if at >= 0 {
		_ = unix.Close(at)
	}
	return err
}

// junkHandles asks for inodes by numbers that the server may never have given.
func junkHandles(share string, n int) error {
	dir, err := unix.Open(share, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(dir) }()
	for i := range n {
		// FILEID_INO64_GEN of fs/fuse/inode.c: the node's number in halves, and a generation.
		handle := make([]byte, 12)
		binary.NativeEndian.PutUint32(handle[4:], uint32(i))
		if i%2 == 1 {
			binary.NativeEndian.PutUint64(handle, rand.Uint64())
		}
		fd, openErr := unix.OpenByHandleAt(dir, unix.NewFileHandle(0x81, handle), unix.O_RDONLY)
		if openErr == nil {
			_ = unix.Close(fd)
		}
		err = openErr
	}
	return err
}

// waysOut tries to get to a file of the host's.
func waysOut(dir, secret string) error {
	link, up := filepath.Join(dir, "out"), filepath.Join(dir, "up")
	if err := errors.Join(os.Symlink(secret, link), os.Symlink(strings.Repeat("../", 40)+secret, up)); err != nil {
		return err
	}
	for _, path := range []string{secret, link, up, dir + strings.Repeat("/..", 40) + secret, "/proc/1/root" + secret} {
		if b, err := os.ReadFile(path); err == nil {
			return fmt.Errorf("%s leads to the host: %.40q", path, b)
		}
	}
	return nil
}
