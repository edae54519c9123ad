package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// testXattr ends the check as skipped if user xattrs are not supported.
func testXattr(t *T) string {
	p := t.file("file", "", 0o644)
	err := unix.Setxattr(p, "user.test", []byte("value"), 0)
	t.optional("user xattrs", err)
	t.must(err)
	return p
}

func getXattr(p, name string) ([]byte, error) {
	buf := make([]byte, 70_000)
	n, err := unix.Lgetxattr(p, name, buf)
	return buf[:max(n, 0)], err
}

var xattrChecks = []check{
	{"xattr/set-get-remove", func(t *T) {
		p := testXattr(t)
		if v, err := getXattr(p, "user.test"); err != nil || string(v) != "value" {
			t.failf("%q, %v", v, err)
		}
		if n, err := unix.Getxattr(p, "user.test", nil); err != nil || n != 5 {
			t.failf("length %d, %v", n, err)
		}
		_, err := unix.Getxattr(p, "user.test", make([]byte, 3))
		t.want("into too little", err, unix.ERANGE)
		t.want("empty value", unix.Setxattr(p, "user.empty", nil, 0), 0)
		if v, err := getXattr(p, "user.empty"); err != nil || len(v) != 0 {
			t.failf("%q, %v", v, err)
		}
		t.want("remove", unix.Removexattr(p, "user.test"), 0)
		_, err = getXattr(p, "user.test")
		t.want("get after remove", err, unix.ENODATA)
		t.want("remove again", unix.Removexattr(p, "user.test"), unix.ENODATA)
	}},
	{"xattr/flags", func(t *T) {
		p := testXattr(t)
		t.want("create", unix.Setxattr(p, "user.test", nil, unix.XATTR_CREATE), unix.EEXIST)
		t.want("replace", unix.Setxattr(p, "user.absent", nil, unix.XATTR_REPLACE), unix.ENODATA)
	}},
	{"xattr/list", func(t *T) {
		p := testXattr(t)
		want := []string{"user.test"}
		for i := range 10 {
			n := fmt.Sprintf("user.attribute-%d", i)
			t.must(unix.Setxattr(p, n, []byte(n), 0))
			want = append(want, n)
		}
		buf := make([]byte, 4096)
		n, err := unix.Listxattr(p, buf)
		t.must(err)
		var got []string
		for _, name := range strings.Split(strings.TrimRight(string(buf[:n]), "\x00"), "\x00") {
			if strings.HasPrefix(name, "user.") {
				got = append(got, name)
			}
		}
		sort.Strings(got)
		sort.Strings(want)
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.failf("%v, want %v", got, want)
		}
	}},
	{"xattr/rights", func(t *T) {
		p := testXattr(t)
		t.as(1000, 1000, nil, func() {
			t.want("set", unix.Setxattr(p, "user.x", nil, 0), unix.EACCES)
			_, err := getXattr(p, "user.test")
			t.want("get", err, 0)
			t.want("trusted", unix.Setxattr(p, "trusted.x", nil, 0), unix.EPERM)
		})
	}},
	{"xattr/kinds", func(t *T) {
		testXattr(t)
		t.want("directory", unix.Setxattr(t.mkdir("dir", 0o700), "user.x", []byte("v"), 0), 0)
		t.must(unix.Symlink("file", t.path("link")))
		t.want("symbolic link", unix.Lsetxattr(t.path("link"), "user.x", []byte("v"), 0), unix.EPERM)
		t.must(unix.Mkfifo(t.path("fifo"), 0o600))
		t.want("fifo", unix.Setxattr(t.path("fifo"), "user.x", []byte("v"), 0), unix.EPERM)
	}},
	{"xattr/names", func(t *T) {
		p := testXattr(t)
		t.want("too long", unix.Setxattr(p, "user."+strings.Repeat("n", 251), nil, 0), unix.ERANGE)
		t.want("long", unix.Setxattr(p, "user."+strings.Repeat("n", 250), nil, 0), 0)
		t.want("no such namespace", unix.Setxattr(p, "nonsense", nil, 0), unix.EOPNOTSUPP)
	}},
	{"xattr/large", func(t *T) {
		p := testXattr(t)
		value := bytes.Repeat([]byte("x"), 3000)
		t.want("3000 bytes", unix.Setxattr(p, "user.large", value, 0), 0)
		if v, err := getXattr(p, "user.large"); err != nil || !bytes.Equal(v, value) {
			t.failf("%d bytes, %v", len(v), err)
		}
		t.want("too large", unix.Setxattr(p, "user.large", make([]byte, 65537), 0), unix.E2BIG)
	}},
	{"xattr/capability", func(t *T) {
		p := t.file("file", "x", 0o755)
		// struct vfs_cap_data, revision 2: CAP_NET_RAW, permitted and effective.
		value := []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
		err := unix.Setxattr(p, "security.capability", value, 0)
		t.optional("file capabilities", err)
		t.want("set", err, 0)
		if v, err := getXattr(p, "security.capability"); err != nil || !bytes.Equal(v, value) {
			t.failf("%v, %v", v, err)
		}
		fd := t.open(p, unix.O_WRONLY, 0)
		_, err = unix.Write(fd, []byte("y"))
		t.must(err)
		_, err = getXattr(p, "security.capability")
		t.want("after a write", err, unix.ENODATA)
	}},
	{"xattr/open-unlinked", func(t *T) {
		p := testXattr(t)
		fd := t.open(p, unix.O_RDWR, 0)
		t.must(unix.Unlink(p))
		t.want("set", unix.Fsetxattr(fd, "user.late", []byte("v"), 0), 0)
		buf := make([]byte, 10)
		if n, err := unix.Fgetxattr(fd, "user.late", buf); err != nil || string(buf[:n]) != "v" {
			t.failf("%q, %v", buf[:max(n, 0)], err)
		}
	}},
}

// An ACL as an xattr: version 2, then tag, permissions and id of each entry
// (include/uapi/linux/posix_acl_xattr.h).
const (
	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
)

type aclEntry struct {
	tag, perm uint16
	id        uint32
}

const noID = 1<<32 - 1

func acl(entries ...aclEntry) []byte {
	b := []byte{2, 0, 0, 0}
	for _, e := range entries {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return b
}

// setACL ends the check as skipped if ACLs are not supported.
func (t *T) setACL(p, kind string, value []byte) {
	err := unix.Setxattr(p, "system.posix_acl_"+kind, value, 0)
	t.optional("ACLs", err)
	t.must(err)
}

var aclChecks = []check{
	{"acl/user-entry", func(t *T) {
		p := t.file("file", "", 0o600)
		t.setACL(p, "access", acl(aclEntry{aclUserObj, 6, noID}, aclEntry{aclUser, 4, 1000}, aclEntry{aclGroupObj, 0, noID},
			aclEntry{aclMask, 4, noID}, aclEntry{aclOther, 0, noID}))
		t.wantMode(p, 0o640) // the group bits are the mask
		open := func(flags int) error { return ignoreFD(unix.Open(p, flags|unix.O_CLOEXEC, 0)) }
		t.as(1000, 1000, nil, func() {
			t.want("read", open(unix.O_RDONLY), 0)
			t.want("write", open(unix.O_WRONLY), unix.EACCES)
		})
		t.as(1001, 1001, nil, func() { t.want("another's read", open(unix.O_RDONLY), unix.EACCES) })
	}},
	{"acl/mask", func(t *T) {
		p := t.file("file", "", 0o600)
		t.setACL(p, "access", acl(aclEntry{aclUserObj, 6, noID}, aclEntry{aclUser, 6, 1000}, aclEntry{aclGroupObj, 0, noID},
			aclEntry{aclMask, 6, noID}, aclEntry{aclOther, 0, noID}))
		t.must(unix.Chmod(p, 0o640)) // sets the mask
		t.as(1000, 1000, nil, func() {
			t.want("write", ignoreFD(unix.Open(p, unix.O_WRONLY|unix.O_CLOEXEC, 0)), unix.EACCES)
			t.want("read", ignoreFD(unix.Open(p, unix.O_RDONLY|unix.O_CLOEXEC, 0)), 0)
		})
	}},
	{"acl/group-entry", func(t *T) {
		p := t.file("file", "", 0o600)
		t.setACL(p, "access", acl(aclEntry{aclUserObj, 6, noID}, aclEntry{aclGroupObj, 0, noID}, aclEntry{aclGroup, 4, 2000},
			aclEntry{aclMask, 4, noID}, aclEntry{aclOther, 0, noID}))
		t.as(1000, 1, []int{2000}, func() {
			t.want("read", ignoreFD(unix.Open(p, unix.O_RDONLY|unix.O_CLOEXEC, 0)), 0)
		})
	}},
	{"acl/default", func(t *T) {
		d := t.mkdir("dir", 0o777)
		def := acl(aclEntry{aclUserObj, 7, noID}, aclEntry{aclUser, 7, 1000}, aclEntry{aclGroupObj, 5, noID},
			aclEntry{aclMask, 7, noID}, aclEntry{aclOther, 0, noID})
		t.setACL(d, "default", def)
		defer unix.Umask(unix.Umask(0o077)) // does not count here
		t.must(unix.Mkdir(d+"/sub", 0o777))
		t.open(d+"/file", unix.O_CREAT|unix.O_RDWR, 0o666)
		t.must(unix.Mkfifo(d+"/fifo", 0o666))
		t.wantMode(d+"/sub", 0o770)
		t.wantMode(d+"/file", 0o660)
		t.wantMode(d+"/fifo", 0o660)
		if v, err := getXattr(d+"/sub", "system.posix_acl_default"); err != nil || !bytes.Equal(v, def) {
			t.failf("default ACL of a new directory: %v, %v", v, err)
		}
		if v, err := getXattr(d+"/file", "system.posix_acl_access"); err != nil || len(v) != len(def) {
			t.failf("ACL of a new file: %v, %v", v, err)
		}
		t.as(1000, 1000, nil, func() {
			t.want("write", ignoreFD(unix.Open(d+"/file", unix.O_WRONLY|unix.O_CLOEXEC, 0)), 0)
		})
	}},
	{"acl/remove", func(t *T) {
		p := t.file("file", "", 0o600)
		t.setACL(p, "access", acl(aclEntry{aclUserObj, 6, noID}, aclEntry{aclUser, 6, 1000}, aclEntry{aclGroupObj, 0, noID},
			aclEntry{aclMask, 6, noID}, aclEntry{aclOther, 0, noID}))
		t.want("remove", unix.Removexattr(p, "system.posix_acl_access"), 0)
		_, err := getXattr(p, "system.posix_acl_access")
		t.want("get", err, unix.ENODATA)
	}},
	{"acl/minimal-is-mode", func(t *T) {
		p := t.file("file", "", 0o600)
		t.setACL(p, "access", acl(aclEntry{aclUserObj, 6, noID}, aclEntry{aclGroupObj, 4, noID}, aclEntry{aclOther, 4, noID}))
		t.wantMode(p, 0o644)
	}},
	{"acl/default-of-a-file", func(t *T) {
		p := t.file("file", "", 0o600)
		t.setACL(p, "access", acl(aclEntry{aclUserObj, 6, noID}, aclEntry{aclGroupObj, 4, noID}, aclEntry{aclOther, 4, noID}))
		err := unix.Setxattr(p, "system.posix_acl_default", acl(aclEntry{aclUserObj, 6, noID}, aclEntry{aclGroupObj, 4, noID}, aclEntry{aclOther, 4, noID}), 0)
		t.want("set", err, unix.EACCES)
	}},
	{"acl/rights", func(t *T) {
		p := t.file("file", "", 0o666)
		t.setACL(p, "access", acl(aclEntry{aclUserObj, 6, noID}, aclEntry{aclGroupObj, 6, noID}, aclEntry{aclOther, 6, noID}))
		t.as(1000, 1000, nil, func() {
			err := unix.Setxattr(p, "system.posix_acl_access", acl(aclEntry{aclUserObj, 7, noID}, aclEntry{aclGroupObj, 7, noID}, aclEntry{aclOther, 7, noID}), 0)
			t.want("set", err, unix.EPERM)
		})
	}},
	{"acl/sgid-cleared-for-outsider", func(t *T) {
		p := t.file("file", "", 0o755)
		t.must(unix.Chown(p, 1000, 2000))
		t.must(unix.Chmod(p, 0o2755))
		t.as(1000, 1000, nil, func() {
			err := unix.Setxattr(p, "system.posix_acl_access", acl(aclEntry{aclUserObj, 7, noID}, aclEntry{aclGroupObj, 5, noID}, aclEntry{aclOther, 5, noID}), 0)
			t.optional("ACLs", err)
			t.want("set", err, 0)
		})
		t.wantMode(p, 0o755)
	}},
}
