package virtiotest

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Initrd makes an initial RAM disk in which the running test program, which has
// to be static, is the first process, /init. Beside it there are the
// directories dev, proc, sys and tmp, and the two devices that Go's runtime and
// the kernel open. The file is closed at the end of the test.
//
// It is a cpio archive: the kernel's
// Documentation/driver-api/early-userspace/buffer-format.rst.
func Initrd(t *testing.T) *os.File {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	var w bytes.Buffer
	pad := func() { w.Write(make([]byte, -w.Len()&3)) }
	entry := func(name string, mode, major, minor uint32, body []byte) {
		fmt.Fprintf(&w, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", 0, mode, 0, 0, 1, 0, len(body), 0, 0, major, minor, len(name)+1, 0)
		w.WriteString(name + "\x00")
		pad()
		w.Write(body)
		pad()
	}
	for _, d := range []string{"dev", "proc", "sys", "tmp"} {
		entry(d, unix.S_IFDIR|0o755, 0, 0, nil)
	}
	entry("dev/null", unix.S_IFCHR|0o666, 1, 3, nil)
	entry("dev/console", unix.S_IFCHR|0o600, 5, 1, nil)
	entry("init", unix.S_IFREG|0o755, 0, 0, program)
	entry("TRAILER!!!", 0, 0, 0, nil)
	file, err := os.Create(filepath.Join(t.TempDir(), "initrd"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	if _, err := file.Write(w.Bytes()); err != nil {
		t.Fatal(err)
	}
	return file
}
