package main

import (
	"bytes"
	"fmt"
	"os"
	"sort"
	"sync"

	"golang.org/x/sys/unix"
)

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*31 + i>>8)
	}
	return b
}

// truncateChecks are those of truncate and ftruncate.
var truncateChecks = []check{
	{"truncate/sizes", func(t *T) {
		p := t.file("file", "0123456789", 0o600)
		fd := t.open(p, unix.O_RDWR, 0)
		for _, size := range []int64{5, 0, 100, 4096, 1 << 33, 7} {
			t.want("ftruncate", unix.Ftruncate(fd, size), 0)
			if st := t.stat(p); st.Size != size {
				t.failf("size %d, want %d", st.Size, size)
			}
			t.must(unix.Truncate(p, size+1))
			if st := t.fstat(fd); st.Size != size+1 {
				t.failf("size %d, want %d", st.Size, size+1)
			}
		}
	}},
	{"truncate/zeroes", func(t *T) {
		p := t.file("file", "0123456789", 0o600)
		t.must(unix.Truncate(p, 3))
		t.must(unix.Truncate(p, 8))
		t.wantContents(p, "012\x00\x00\x00\x00\x00")
	}},
	{"truncate/errors", func(t *T) {
		p := t.file("file", "", 0o600)
		t.want("negative", unix.Truncate(p, -1), unix.EINVAL)
		t.want("directory", unix.Truncate(t.mkdir("dir", 0o700), 0), unix.EISDIR)
		t.want("descriptor for reading", unix.Ftruncate(t.open(p, unix.O_RDONLY, 0), 0), unix.EINVAL)
		t.must(unix.Chmod(p, 0o444))
		t.as(1000, 1000, nil, func() { t.want("no right", unix.Truncate(p, 0), unix.EACCES) })
	}},
	{"truncate/clears-set-id-bits", func(t *T) {
		p := t.file("file", "x", 0o6777)
		t.as(1000, 1000, nil, func() { t.want("truncate", unix.Truncate(p, 0), 0) })
		t.wantMode(p, 0o777)
	}},
	{"truncate/O_TRUNC", func(t *T) {
		p := t.file("file", "contents", 0o6777)
		t.as(1000, 1000, nil, func() {
			t.want("open", ignoreFD(unix.Open(p, unix.O_WRONLY|unix.O_TRUNC|unix.O_CLOEXEC, 0)), 0)
		})
		t.wantContents(p, "")
		t.wantMode(p, 0o777)
	}},
}

// openChecks are open's.
var openChecks = []check{
	{"open/EXCL", func(t *T) {
		p := t.file("file", "x", 0o600)
		t.want("open", ignoreFD(unix.Open(p, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_CLOEXEC, 0o600)), unix.EEXIST)
		t.want("without EXCL", ignoreFD(unix.Open(p, unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC, 0o600)), 0)
		t.wantContents(p, "x")
	}},
	{"open/EXCL-once", func(t *T) {
		for i := range 50 {
			p := t.path(fmt.Sprint(i))
			var won sync.Map
			var all sync.WaitGroup
			for j := range 4 {
				all.Go(func() {
					fd, err := unix.Open(p, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
					if err == nil {
						_ = unix.Close(fd)
						won.Store(j, true)
					}
				})
			}
			all.Wait()
			n := 0
			won.Range(func(any, any) bool { n++; return true })
			if n != 1 {
				t.failf("%d opens succeeded", n)
			}
		}
	}},
	{"open/directory", func(t *T) {
		d := t.mkdir("dir", 0o700)
		t.want("for writing", ignoreFD(unix.Open(d, unix.O_WRONLY|unix.O_CLOEXEC, 0)), unix.EISDIR)
		t.want("O_CREAT", ignoreFD(unix.Open(d, unix.O_CREAT|unix.O_RDONLY|unix.O_CLOEXEC, 0)), unix.EISDIR)
		t.want("O_DIRECTORY of a file", ignoreFD(unix.Open(t.file("file", "", 0o600), unix.O_DIRECTORY|unix.O_CLOEXEC, 0)), unix.ENOTDIR)
	}},
	{"open/O_NOFOLLOW", func(t *T) {
		t.file("file", "", 0o600)
		t.must(unix.Symlink("file", t.path("link")))
		t.want("open", ignoreFD(unix.Open(t.path("link"), unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)), unix.ELOOP)
	}},
	{"open/create-through-link", func(t *T) {
		t.must(unix.Symlink("target", t.path("link")))
		t.want("open", ignoreFD(unix.Open(t.path("link"), unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)), 0)
		t.wantContents(t.path("target"), "")
		t.want("O_EXCL", ignoreFD(unix.Open(t.path("link"), unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)), unix.EEXIST)
	}},
	{"open/fifo-without-reader", func(t *T) {
		t.must(unix.Mkfifo(t.path("fifo"), 0o600))
		t.want("open", ignoreFD(unix.Open(t.path("fifo"), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)), unix.ENXIO)
	}},
	{"open/rights", func(t *T) {
		p := t.file("file", "", 0o640)
		t.must(unix.Chown(p, 1000, 2000))
		open := func(flags int) error { return ignoreFD(unix.Open(p, flags|unix.O_CLOEXEC, 0)) }
		t.as(1000, 1, nil, func() { t.want("owner", open(unix.O_RDWR), 0) })
		t.as(1001, 2000, nil, func() {
			t.want("group reads", open(unix.O_RDONLY), 0)
			t.want("group writes", open(unix.O_WRONLY), unix.EACCES)
		})
		t.as(1001, 1, []int{2000}, func() { t.want("supplementary group reads", open(unix.O_RDONLY), 0) })
		t.as(1001, 1, nil, func() { t.want("other reads", open(unix.O_RDONLY), unix.EACCES) })
	}},
	{"open/O_TMPFILE", func(t *T) {
		fd, err := unix.Open(t.dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o640)
		t.optional("O_TMPFILE", err)
		t.must(err)
		defer unix.Close(fd)
		_, err = unix.Write(fd, []byte("tmp"))
		t.must(err)
		if st := t.fstat(fd); st.Nlink != 0 || st.Mode != unix.S_IFREG|0o640 || st.Size != 3 {
			t.failf("links %d, mode %#o, size %d", st.Nlink, st.Mode, st.Size)
		}
		if list, err := os.ReadDir(t.dir); err != nil || len(list) != 0 {
			t.failf("it has a name: %v, %v", list, err)
		}
		t.want("linkat", unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, t.path("named"), unix.AT_SYMLINK_FOLLOW), 0)
		t.wantContents(t.path("named"), "tmp")
	}},
	{"open/O_TMPFILE-EXCL", func(t *T) {
		fd, err := unix.Open(t.dir, unix.O_TMPFILE|unix.O_EXCL|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		t.optional("O_TMPFILE", err)
		t.must(err)
		defer unix.Close(fd)
		t.want("linkat", unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, t.path("named"), unix.AT_SYMLINK_FOLLOW), unix.ENOENT)
	}},
	{"open/1000-at-once", func(t *T) {
		var fds []int
		for i := range 1000 {
			fds = append(fds, t.open(t.path(fmt.Sprint(i)), unix.O_CREAT|unix.O_RDWR, 0o600))
		}
		for i, fd := range fds {
			_, err := unix.Pwrite(fd, []byte(fmt.Sprint(i)), 0)
			t.must(err)
		}
		for i := range fds {
			t.wantContents(t.path(fmt.Sprint(i)), fmt.Sprint(i))
		}
	}},
}

// ioChecks are about reading and writing.
var ioChecks = []check{
	{"io/sizes", func(t *T) {
		data := pattern(3<<20 + 17)
		fd := t.open(t.path("file"), unix.O_CREAT|unix.O_RDWR, 0o600)
		for off := 0; off < len(data); {
			n, err := unix.Pwrite(fd, data[off:min(off+70_001, len(data))], int64(off))
			t.must(err)
			off += n
		}
		t.must(unix.Fsync(fd))
		got, err := os.ReadFile(t.path("file"))
		if err != nil || !bytes.Equal(got, data) {
			t.failf("%d bytes differ, %v", len(got), err)
		}
		part := make([]byte, 5000)
		if n, err := unix.Pread(fd, part, int64(len(data)-100)); err != nil || !bytes.Equal(part[:n], data[len(data)-100:]) {
			t.failf("at the end: %d, %v", n, err)
		}
		if n, err := unix.Pread(fd, part, int64(len(data))); err != nil || n != 0 {
			t.failf("past the end: %d, %v", n, err)
		}
	}},
	{"io/large-requests", func(t *T) {
		data := pattern(9 << 20)
		fd := t.open(t.path("file"), unix.O_CREAT|unix.O_RDWR, 0o600)
		n, err := unix.Write(fd, data)
		if err != nil || n != len(data) {
			t.failf("write: %d, %v", n, err)
		}
		got := make([]byte, len(data))
		if n, err := unix.Pread(fd, got, 0); err != nil || n != len(got) || !bytes.Equal(got, data) {
			t.failf("read: %d, %v", n, err)
		}
	}},
	{"io/past-4GiB", func(t *T) {
		fd := t.open(t.path("file"), unix.O_CREAT|unix.O_RDWR, 0o600)
		const at = 5<<30 + 123
		_, err := unix.Pwrite(fd, []byte("far"), at)
		t.must(err)
		if st := t.fstat(fd); st.Size != at+3 || st.Blocks > 1000 {
			t.failf("size %d, blocks %d", st.Size, st.Blocks)
		}
		buf := make([]byte, 10)
		if n, err := unix.Pread(fd, buf, at); err != nil || string(buf[:n]) != "far" {
			t.failf("read %q, %v", buf[:n], err)
		}
	}},
	{"io/append", func(t *T) {
		p := t.path("file")
		a := t.open(p, unix.O_CREAT|unix.O_WRONLY|unix.O_APPEND, 0o600)
		b := t.open(p, unix.O_WRONLY|unix.O_APPEND, 0)
		want := ""
		for i := range 100 {
			fd := []int{a, b}[i%2]
			s := fmt.Sprint(i, ",")
			_, err := unix.Write(fd, []byte(s))
			t.must(err)
			want += s
		}
		t.wantContents(p, want)
	}},
	{"io/append-concurrently", func(t *T) {
		p := t.path("file")
		var all sync.WaitGroup
		for w := range 4 {
			fd := t.open(p, unix.O_CREAT|unix.O_WRONLY|unix.O_APPEND, 0o600)
			all.Go(func() {
				for range 100 {
					_, _ = unix.Write(fd, bytes.Repeat([]byte{byte('a' + w)}, 10))
				}
			})
		}
		all.Wait()
		got, err := os.ReadFile(p)
		if err != nil || len(got) != 4000 {
			t.failf("%d bytes, %v", len(got), err)
		}
		for i := 0; i+10 <= len(got); i += 10 {
			if !bytes.Equal(got[i:i+10], bytes.Repeat(got[i:i+1], 10)) {
				t.failf("a record is torn at %d", i)
				break
			}
		}
	}},
	{"io/direct", func(t *T) {
		p := t.file("file", "", 0o600)
		fd, err := unix.Open(p, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
		if err == unix.EINVAL {
			t.skipped = "O_DIRECT"
			return
		}
		t.must(err)
		defer unix.Close(fd)
		m, err := unix.Mmap(-1, 0, 64<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		t.must(err)
		defer unix.Munmap(m)
		copy(m, pattern(len(m)))
		n, err := unix.Pwrite(fd, m, 0)
		if err != nil || n != len(m) {
			t.failf("write: %d, %v", n, err)
		}
		clear(m)
		if n, err := unix.Pread(fd, m, 0); err != nil || !bytes.Equal(m[:n], pattern(64<<10)) {
			t.failf("read: %d, %v", n, err)
		}
		t.wantContents(p, string(pattern(64<<10)))
	}},
	{"io/sync", func(t *T) {
		for _, flag := range []int{unix.O_SYNC, unix.O_DSYNC} {
			fd := t.open(t.path("file"), unix.O_CREAT|unix.O_RDWR|flag, 0o600)
			_, err := unix.Pwrite(fd, []byte("x"), 0)
			t.want("write", err, 0)
			t.want("fsync", unix.Fsync(fd), 0)
			t.want("fdatasync", unix.Fdatasync(fd), 0)
			t.want("syncfs", unix.Syncfs(fd), 0)
		}
		t.want("fsync of a directory", unix.Fsync(t.open(t.dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)), 0)
	}},
	{"io/clears-set-id-bits", func(t *T) {
		p := t.file("file", "x", 0o6777)
		t.as(1000, 1000, nil, func() {
			fd, err := unix.Open(p, unix.O_WRONLY|unix.O_CLOEXEC, 0)
			t.want("open", err, 0)
			_, err = unix.Write(fd, []byte("y"))
			t.want("write", err, 0)
			_ = unix.Close(fd)
		})
		t.wantMode(p, 0o777)
	}},
	{"io/seek-holes", func(t *T) {
		fd := t.open(t.path("file"), unix.O_CREAT|unix.O_RDWR, 0o600)
		const mib = 1 << 20
		_, err := unix.Pwrite(fd, pattern(mib), 4*mib)
		t.must(err)
		t.must(unix.Ftruncate(fd, 8*mib))
		data, err := unix.Seek(fd, 0, unix.SEEK_DATA)
		t.want("SEEK_DATA", err, 0)
		hole, err := unix.Seek(fd, 0, unix.SEEK_HOLE)
		t.want("SEEK_HOLE", err, 0)
		// A file system may know no holes: then all is data.
		if !(data == 4*mib && hole == 0 || data == 0 && hole == 8*mib) {
			t.failf("data at %d, hole at %d", data, hole)
		}
		_, err = unix.Seek(fd, 9*mib, unix.SEEK_DATA)
		t.want("past the end", err, unix.ENXIO)
	}},
	{"io/fallocate", func(t *T) {
		fd := t.open(t.path("file"), unix.O_CREAT|unix.O_RDWR, 0o600)
		err := unix.Fallocate(fd, 0, 0, 1<<20)
		t.optional("fallocate", err)
		t.want("allocate", err, 0)
		if st := t.fstat(fd); st.Size != 1<<20 || st.Blocks < 2048 {
			t.failf("size %d, blocks %d", st.Size, st.Blocks)
		}
		t.want("keep size", unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, 1<<20, 1<<20), 0)
		if st := t.fstat(fd); st.Size != 1<<20 {
			t.failf("size %d", st.Size)
		}
		_, err = unix.Pwrite(fd, pattern(1<<20), 0)
		t.must(err)
		t.want("punch", unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 4096, 8192), 0)
		want := pattern(1 << 20)
		clear(want[4096:12288])
		got, err := os.ReadFile(t.path("file"))
		if err != nil || !bytes.Equal(got, want) {
			t.failf("contents differ, %v", err)
		}
	}},
	{"io/copy_file_range", func(t *T) {
		from := t.file("from", string(pattern(1<<20)), 0o600)
		in, out := t.open(from, unix.O_RDONLY, 0), t.open(t.path("to"), unix.O_CREAT|unix.O_RDWR, 0o600)
		for copied := 0; copied < 1<<20; {
			n, err := unix.CopyFileRange(in, nil, out, nil, 1<<20-copied, 0)
			t.optional("copy_file_range", err)
			if err != nil || n == 0 {
				t.failf("after %d: %d, %v", copied, n, err)
				return
			}
			copied += n
		}
		t.wantContents(t.path("to"), string(pattern(1<<20)))
	}},
	{"io/statfs", func(t *T) {
		var st unix.Statfs_t
		t.must(unix.Statfs(t.dir, &st))
		if st.Blocks == 0 || st.Namelen != 255 || st.Bsize == 0 {
			t.failf("%+v", st)
		}
	}},
}

// dirChecks are about reading directories.
var dirChecks = []check{
	{"dir/entries", func(t *T) {
		var names []string
		for i := range min(3000, t.entries) {
			n := fmt.Sprintf("entry-%05d-with-a-longer-name", i)
			t.must(os.WriteFile(t.path(n), nil, 0o600))
			names = append(names, n)
		}
		f, err := os.Open(t.dir)
		t.must(err)
		defer f.Close()
		for range 2 { // the second after a rewind
			got, err := f.Readdirnames(-1)
			t.must(err)
			sort.Strings(got)
			if fmt.Sprint(got) != fmt.Sprint(names) {
				t.failf("%d entries of %d, or others", len(got), len(names))
			}
			_, err = f.Seek(0, 0)
			t.must(err)
		}
	}},
	{"dir/types", func(t *T) {
		t.file("file", "", 0o600)
		t.mkdir("dir", 0o700)
		t.must(unix.Mkfifo(t.path("fifo"), 0o600))
		t.must(unix.Symlink("x", t.path("link")))
		list, err := os.ReadDir(t.dir)
		t.must(err)
		want := map[string]os.FileMode{"file": 0, "dir": os.ModeDir, "fifo": os.ModeNamedPipe, "link": os.ModeSymlink}
		for _, e := range list {
			if e.Type() != want[e.Name()] {
				t.failf("%s: type %v", e.Name(), e.Type())
			}
			info, err := e.Info()
			if err != nil || info.Mode().Type() != e.Type() {
				t.failf("%s: %v, %v", e.Name(), info, err)
			}
		}
		if len(list) != len(want) {
			t.failf("%d entries", len(list))
		}
	}},
	{"dir/inode-numbers", func(t *T) {
		t.file("file", "", 0o600)
		buf := make([]byte, 4096)
		n, err := unix.Getdents(t.open(t.dir, unix.O_RDONLY|unix.O_DIRECTORY, 0), buf)
		t.must(err)
		found := false
		for b := buf[:n]; len(b) > 0; {
			length := int(b[16]) | int(b[17])<<8
			if name := string(bytes.TrimRight(b[19:length], "\x00")); name == "file" {
				found = true
				ino := uint64(0)
				for i := range 8 {
					ino |= uint64(b[i]) << (8 * i)
				}
				if st := t.stat(t.path("file")); st.Ino != ino {
					t.failf("readdir says inode %d, stat %d", ino, st.Ino)
				}
			}
			b = b[length:]
		}
		if !found {
			t.failf("the entry is missing")
		}
	}},
	{"dir/removing-while-reading", func(t *T) {
		for i := range min(1000, t.entries) {
			t.must(os.WriteFile(t.path(fmt.Sprintf("entry-%04d", i)), nil, 0o600))
		}
		f, err := os.Open(t.dir)
		t.must(err)
		defer f.Close()
		for {
			names, err := f.Readdirnames(50)
			if len(names) == 0 {
				break
			}
			t.must(err)
			for _, n := range names {
				t.want("unlink "+n, unix.Unlink(t.path(n)), 0)
			}
		}
		if list, err := os.ReadDir(t.dir); err != nil || len(list) != 0 {
			t.failf("%d entries are left, %v", len(list), err)
		}
	}},
	{"dir/new-entries-show", func(t *T) {
		for i := range 20 {
			t.must(os.WriteFile(t.path(fmt.Sprint(i)), nil, 0o600))
			if list, err := os.ReadDir(t.dir); err != nil || len(list) != i+1 {
				t.failf("%d entries after %d creations, %v", len(list), i+1, err)
			}
		}
	}},
	{"dir/many-entries", func(t *T) {
		fd := t.open(t.dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		for i := range t.entries {
			t.must(unix.Mknodat(fd, fmt.Sprintf("%06d", i), unix.S_IFREG|0o600, 0))
		}
		list, err := os.ReadDir(t.dir)
		if err != nil || len(list) != t.entries {
			t.failf("%d entries, %v", len(list), err)
		}
		for _, e := range list {
			if _, err := e.Info(); err != nil {
				t.failf("lstat %s: %v", e.Name(), err)
				break
			}
		}
	}},
	{"dir/read-of-directory", func(t *T) {
		_, err := unix.Read(t.open(t.dir, unix.O_RDONLY|unix.O_DIRECTORY, 0), make([]byte, 10))
		t.want("read", err, unix.EISDIR)
	}},
}

// mmapChecks are about mappings and their coherence with reads and writes.
var mmapChecks = []check{
	{"mmap/private", func(t *T) {
		p := t.file("file", string(pattern(10_000)), 0o600)
		m, err := unix.Mmap(t.open(p, unix.O_RDONLY, 0), 0, 10_000, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
		t.must(err)
		defer unix.Munmap(m)
		if !bytes.Equal(m, pattern(10_000)) {
			t.failf("contents differ")
		}
		m[0]++
		t.wantContents(p, string(pattern(10_000)))
	}},
	{"mmap/shared-write-is-read", func(t *T) {
		p := t.file("file", string(make([]byte, 20_000)), 0o600)
		fd := t.open(p, unix.O_RDWR, 0)
		m, err := unix.Mmap(fd, 0, 20_000, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		t.must(err)
		copy(m[5000:], "mapped")
		buf := make([]byte, 6)
		if _, err := unix.Pread(fd, buf, 5000); err != nil || string(buf) != "mapped" {
			t.failf("read %q, %v", buf, err)
		}
		t.want("msync", unix.Msync(m, unix.MS_SYNC), 0)
		t.want("munmap", unix.Munmap(m), 0)
		got, err := os.ReadFile(p)
		if err != nil || string(got[5000:5006]) != "mapped" || len(got) != 20_000 {
			t.failf("%d bytes, %v", len(got), err)
		}
	}},
	{"mmap/write-is-seen", func(t *T) {
		p := t.file("file", string(make([]byte, 8192)), 0o600)
		fd := t.open(p, unix.O_RDWR, 0)
		m, err := unix.Mmap(t.open(p, unix.O_RDONLY, 0), 0, 8192, unix.PROT_READ, unix.MAP_SHARED)
		t.must(err)
		defer unix.Munmap(m)
		for i := range 100 {
			_, err := unix.Pwrite(fd, []byte{byte(i + 1)}, int64(i*80))
			t.must(err)
			if m[i*80] != byte(i+1) {
				t.failf("the mapping has %d at %d, want %d", m[i*80], i*80, i+1)
				break
			}
		}
	}},
	{"mmap/after-close-and-unlink", func(t *T) {
		p := t.file("file", string(make([]byte, 4096)), 0o600)
		fd, err := unix.Open(p, unix.O_RDWR|unix.O_CLOEXEC, 0)
		t.must(err)
		m, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		t.must(err)
		t.must(unix.Close(fd))
		t.must(unix.Link(p, t.path("other")))
		t.must(unix.Unlink(p))
		copy(m, "late")
		t.want("msync", unix.Msync(m, unix.MS_SYNC), 0)
		t.must(unix.Munmap(m))
		got, err := os.ReadFile(t.path("other"))
		if err != nil || string(got[:4]) != "late" {
			t.failf("%q, %v", got[:4], err)
		}
	}},
	{"mmap/append-descriptor", func(t *T) {
		p := t.file("file", string(make([]byte, 4096)), 0o600)
		fd := t.open(p, unix.O_RDWR|unix.O_APPEND, 0)
		m, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		t.must(err)
		copy(m, "start")
		t.want("msync", unix.Msync(m, unix.MS_SYNC), 0)
		t.must(unix.Munmap(m))
		if st := t.stat(p); st.Size != 4096 {
			t.failf("the page was appended: size %d", st.Size)
		}
	}},
	{"mmap/truncate-and-extend", func(t *T) {
		p := t.file("file", string(pattern(8192)), 0o600)
		fd := t.open(p, unix.O_RDWR, 0)
		m, err := unix.Mmap(fd, 0, 8192, unix.PROT_READ, unix.MAP_SHARED)
		t.must(err)
		defer unix.Munmap(m)
		t.must(unix.Ftruncate(fd, 100))
		t.must(unix.Ftruncate(fd, 8192))
		if !bytes.Equal(m[100:200], make([]byte, 100)) || !bytes.Equal(m[:100], pattern(100)) {
			t.failf("the mapping has old data")
		}
	}},
	{"mmap/execute", func(t *T) {
		self, err := os.ReadFile("/proc/self/exe")
		t.must(err)
		p := t.path("program")
		t.must(os.WriteFile(p, self, 0o755))
		proc, err := os.StartProcess(p, []string{p}, &os.ProcAttr{Env: []string{helperEnv + "=exit"}})
		t.must(err)
		state, err := proc.Wait()
		if err != nil || !state.Success() {
			t.failf("%v, %v", state, err)
		}
	}},
}
