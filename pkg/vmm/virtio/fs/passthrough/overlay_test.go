package passthrough

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio/fs/fuse"
)

// overlayShare serves a directory in which rootfs is an overlay: dir has its directories
// lower, upper and work, and share. With two, lower and upper are on different file
// systems.
func overlayShare(t *testing.T, two bool, lower func(dir string), change ...func(*Config)) *share {
	t.Helper()
	dir := tempDir(t)
	for _, d := range []string{"lower", "top", "share/rootfs"} {
		must(t, os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	if two {
		must(t, unix.Mount("tmpfs", dir+"/top", "tmpfs", 0, "mode=755"))
		t.Cleanup(func() { must(t, unix.Unmount(dir+"/top", unix.MNT_DETACH)) })
	}
	must(t, os.Mkdir(dir+"/top/upper", 0o755))
	must(t, os.Mkdir(dir+"/top/work", 0o755))
	lower(dir + "/lower")
	must(t, unix.Mount("overlay", dir+"/share/rootfs", "overlay", 0, fmt.Sprintf("lowerdir=%[1]s/lower,upperdir=%[1]s/top/upper,workdir=%[1]s/top/work,xino=off", dir)))
	t.Cleanup(func() { must(t, unix.Unmount(dir+"/share/rootfs", unix.MNT_DETACH)) })
	return newShareOf(t, dir+"/share", change...)
}

// closeDescriptors uses other files, of which there can be few.
func (s *share) closeDescriptors(t *testing.T) {
	t.Helper()
	for i := range 20 {
		name := fmt.Sprint("other", i)
		writeFile(t, s.path(name), "")
		_, errno := s.Getattr(s.mustLookup(t, root, name).NodeID)
		must(t, errno)
	}
}

// hostForgets makes the host forget of the overlay what nobody has open, as it does when
// its memory is short.
func (s *share) hostForgets(t *testing.T) {
	t.Helper()
	s.closeDescriptors(t)
	must(t, unix.Mount("", s.path("rootfs"), "", unix.MS_REMOUNT, ""))
}

func number(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(path, &st))
	return st.Ino
}

// TestRestlessNumbers uses an overlay whose directories get other inode numbers: they
// are the same nodes all the same, or the guest's kernel would unmount what is mounted
// below.
func TestRestlessNumbers(t *testing.T) {
	for _, list := range []bool{false, true} {
		t.Run(fmt.Sprintf("listed first %v", list), func(t *testing.T) {
			s := overlayShare(t, true, func(dir string) {
				for _, d := range []string{"data/deep/deeper", "moved/deep", "removed"} {
					must(t, os.MkdirAll(filepath.Join(dir, d), 0o755))
				}
				writeFile(t, dir+"/file", "")
			}, few)
			rootfs := s.mustLookup(t, root, "rootfs").NodeID
			if list {
				_, errno := s.List(rootfs, true)
				must(t, errno)
			}
			at := func(path string) uint64 { return s.mustLookup(t, rootfs, strings.Split(path, "/")...).NodeID }
			known := map[string]uint64{}
			for _, path := range []string{"file", "data", "data/deep", "data/deep/deeper", "moved", "moved/deep", "removed"} {
				known[path] = at(path)
			}
			check := func(what string) {
				t.Helper()
				for path, node := range known {
					if _, errno := s.Getattr(node); errno != 0 {
						t.Errorf("%s: %s, for who has it as a working directory: GETATTR: %v", what, path, errno)
					}
					if now := at(path); now != node {
						t.Errorf("%s: %s was node %d, and is %d", what, path, node, now)
					}
				}
			}
			before := number(t, s.path("rootfs/data"))
			s.hostForgets(t)
			if now := number(t, s.path("rootfs/data")); now == before {
				t.Fatal("the directory has its inode number as before")
			}
			for path, node := range known { // the way there is the node's
				if _, errno := s.Getattr(node); errno != 0 {
					t.Errorf("%s: GETATTR: %v", path, errno)
				}
			}
			s.hostForgets(t)
			check("the host has forgotten them")

			// What the guest moves is where it has moved it.
			s.hostForgets(t)
			_, errno := s.Mkdir(rootfs, "new", 0o755, 0) // of the upper layer: lower ones are not renamed
			must(t, errno)
			known["new"] = at("new")
			s.hostForgets(t)
			must(t, s.Rename(rootfs, "new", known["data"], "renamed"))
			known["data/renamed"] = known["new"]
			delete(known, "new")
			s.hostForgets(t)
			check("one was moved")

			// What it has removed is gone.
			s.hostForgets(t)
			must(t, s.Rmdir(rootfs, "removed"))
			s.hostForgets(t)
			_, errno = s.Mkdir(rootfs, "removed", 0o755, 0)
			must(t, errno)
			s.hostForgets(t)
			if now := at("removed"); now == known["removed"] {
				t.Errorf("what was removed, and what was made in its place, are node %d", now)
			}
		})
	}
}

// A directory that the host has replaced is another one, where numbers last.
func TestReplacedInOverlay(t *testing.T) {
	s := overlayShare(t, false, func(dir string) {
		must(t, os.Mkdir(dir+"/data", 0o755))
		writeFile(t, dir+"/file", "")
	}, few)
	rootfs := s.mustLookup(t, root, "rootfs").NodeID
	s.mustLookup(t, rootfs, "file")
	before := s.mustLookup(t, rootfs, "data").NodeID
	s.hostForgets(t)
	if now := s.mustLookup(t, rootfs, "data").NodeID; now != before {
		t.Errorf("it is node %d, and was %d", now, before)
	}
	s.hostForgets(t)
	must(t, os.Remove(s.path("rootfs/data")))
	must(t, os.Mkdir(s.path("rootfs/data"), 0o755))
	if now := s.mustLookup(t, rootfs, "data").NodeID; now == before {
		t.Errorf("it is node %d as before", now)
	}
}

// TestCopiedUpLink changes a file of an image that has two names there. On overlayfs it
// is another file from then on, with one of the names; in the guest it stays the node
// that it is, of which others may have it open.
func TestCopiedUpLink(t *testing.T) {
	for name, change := range map[string]func(t *testing.T, s *share, rootfs, node uint64){
		"OPEN": func(t *testing.T, s *share, _, node uint64) {
			fh, errno := s.Open(node, unix.O_RDWR)
			must(t, errno)
			_, errno = s.Write(node, fh, 0, []byte("new"))
			must(t, errno)
		},
		"OPEN with O_TRUNC": func(t *testing.T, s *share, _, node uint64) {
			_, errno := s.Open(node, unix.O_TRUNC)
			must(t, errno)
		},
		"SETATTR": func(t *testing.T, s *share, _, node uint64) {
			a, errno := s.Setattr(node, fuse.SetattrIn{Valid: fuse.FattrMode, Mode: 0o600})
			must(t, errno)
			if want := number(t, s.path("rootfs/db")); a.Ino != want {
				t.Errorf("SETATTR tells of inode %d, it is %d", a.Ino, want)
			}
		},
		"SETATTR of which only a part can be done": func(t *testing.T, s *share, _, node uint64) {
			_, errno := s.Setattr(node, fuse.SetattrIn{Valid: fuse.FattrUID | fuse.FattrSize, UID: 7, Size: 1 << 63})
			want(t, "negative size", errno, unix.EINVAL)
		},
		"SETXATTR": func(t *testing.T, s *share, _, node uint64) {
			must(t, s.Setxattr(node, "trusted.x", []byte("v"), 0, 0))
		},
		"LINK": func(t *testing.T, s *share, rootfs, node uint64) {
			e, errno := s.Link(node, rootfs, "third")
			must(t, errno)
			if e.NodeID != node {
				t.Errorf("its new name is node %d", e.NodeID)
			}
		},
		"RENAME": func(t *testing.T, s *share, rootfs, node uint64) {
			must(t, s.Rename(rootfs, "db", rootfs, "db.new"))
			if now := s.mustLookup(t, rootfs, "db.new").NodeID; now != node {
				t.Errorf("with its new name it is node %d", now)
			}
			must(t, s.Rename(rootfs, "db.new", rootfs, "db"))
		},
		"RENAME2 with RENAME_EXCHANGE": func(t *testing.T, s *share, rootfs, node uint64) {
			must(t, s.Rename2(rootfs, "file", rootfs, "db", unix.RENAME_EXCHANGE))
			if now := s.mustLookup(t, rootfs, "file").NodeID; now != node {
				t.Errorf("with its new name it is node %d", now)
			}
			must(t, s.Rename2(rootfs, "file", rootfs, "db", unix.RENAME_EXCHANGE))
		},
	} {
		for _, first := range []string{"db", "db.orig"} {
			t.Run(name+", found first as "+first, func(t *testing.T) {
				s := overlayShare(t, false, func(dir string) {
					writeFile(t, dir+"/db", "old")
					writeFile(t, dir+"/file", "")
					must(t, os.Link(dir+"/db", dir+"/db.orig"))
				})
				rootfs := s.mustLookup(t, root, "rootfs").NodeID
				orig := s.mustLookup(t, rootfs, first).NodeID
				// What is changed is what the guest has found last.
				node := s.mustLookup(t, rootfs, "db").NodeID
				if node != orig {
					t.Fatalf("its names are nodes %d and %d", node, orig)
				}
				before := number(t, s.path("rootfs/db"))
				change(t, s, rootfs, node)
				if number(t, s.path("rootfs/db")) == before {
					t.Error("it has its inode number as before")
				}
				if now := number(t, s.path("rootfs/db.orig")); now != before {
					t.Errorf("its other name has inode number %d, had %d", now, before)
				}
				if now := s.mustLookup(t, rootfs, "db").NodeID; now != node {
					t.Errorf("it was node %d, and is %d", node, now)
				}
				if now := s.mustLookup(t, rootfs, "db.orig").NodeID; now == node {
					t.Error("its other name, on the host of another file, is still its own")
				}
			})
		}
	}
}

// Of a file with two names that the guest knows as one node, it removes one and changes
// the other.
func TestRemovedLink(t *testing.T) {
	s := overlayShare(t, false, func(dir string) {
		writeFile(t, dir+"/db", "old")
		must(t, os.Link(dir+"/db", dir+"/db.orig"))
	})
	rootfs := s.mustLookup(t, root, "rootfs").NodeID
	s.mustLookup(t, rootfs, "db")
	s.mustLookup(t, rootfs, "db.orig")
	must(t, s.Unlink(rootfs, "db"))
	node := s.mustLookup(t, rootfs, "db.orig").NodeID
	fh, errno := s.Open(node, unix.O_RDWR)
	must(t, errno)
	_, errno = s.Write(node, fh, 0, []byte("new"))
	must(t, errno)
	if got, err := os.ReadFile(s.path("rootfs/db.orig")); err != nil || string(got) != "new" {
		t.Errorf("on the host it is %q, %v", got, err)
	}
}
