package shim

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/microvm-runtime/microvm/pkg/shim/config"
)

// What is wrong with the configured files is said before a VMM is started, and
// names the file.
func TestOpenFile(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := file("good", "\x7fELFabc")
	f, err := openFile("kernel", good, 0, "\x7fELF", "a kernel")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if all, err := io.ReadAll(f); err != nil || len(all) != 7 {
		t.Errorf("it is not at its start: %q, %v", all, err)
	}
	for path, want := range map[string]string{
		filepath.Join(dir, "absent"): "absent: no such file",
		file("short", "\x7fE"):       "short is not a kernel",
		file("empty", ""):            "empty is not a kernel",
		file("text", "hello"):        "text is not a kernel",
		dir:                          "is a directory",
	} {
		_, err := openFile("kernel", path, 0, "\x7fELF", "a kernel")
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "configuration key kernel") {
			t.Errorf("%s: error %v does not say %q", path, err, want)
		}
	}
}

// launch closes what it was given whatever happens.
func TestLaunchClosesThePipes(t *testing.T) {
	logs, console, vmm, err := openLogs(false)
	if err != nil {
		t.Fatal(err)
	}
	_, err = launch(context.Background(), launchRequest{
		config: &config.Config{Kernel: "/nonexistent", Image: "/nonexistent", VMM: "/nonexistent"}, console: console, log: vmm,
	})
	if err == nil {
		t.Error("launched nothing")
	}
	<-logs.console.done
	<-logs.vmm.done
}

// People know a machine by its pod, or else by containerd's namespace.
func TestMachineName(t *testing.T) {
	for want, annotations := range map[string]map[string]string{
		"default/web": {"io.kubernetes.cri.sandbox-namespace": "default", "io.kubernetes.cri.sandbox-name": "web"},
		"ns":          {"io.kubernetes.cri.sandbox-namespace": "default"},
	} {
		f := newFixture(t)
		bundle := f.bundle(func(s *specs.Spec) { s.Annotations = annotations }, "sleep")
		if _, err := f.Create(t.Context(), &taskapi.CreateTaskRequest{ID: "c1", Bundle: bundle}); err != nil {
			t.Fatal(err)
		}
		if name := f.requests[0].name; !slices.Equal(name, []string{want, "c1"}) {
			t.Errorf("it is called %q, want %s", name, want)
		}
		f.delete("c1", "")
	}
}

func TestLineLog(t *testing.T) {
	r, w := io.Pipe()
	var all []string
	l := readLines(r, func(line string) { all = append(all, line) })
	io.WriteString(w, "first\r\n\nsecond \x1b[0m\n"+strings.Repeat("x", 2*maxLine+10)+"\nlast without end")
	w.Close()
	<-l.done
	want := []string{"first", "second ?[0m", strings.Repeat("x", maxLine), strings.Repeat("x", maxLine), strings.Repeat("x", 10), "last without end"}
	if strings.Join(all, "|") != strings.Join(want, "|") {
		t.Errorf("lines %q", all)
	}
	if last := l.last(2); len(last) != 2 || last[1] != "last without end" {
		t.Errorf("last %q", last)
	}
	for range 3 * keepLines {
		l.add("more")
	}
	if last := l.last(10 * keepLines); len(last) != keepLines {
		t.Errorf("%d lines kept", len(last))
	}
	err := (&machineLogs{console: l, vmm: &lineLog{}}).describe(errors.New("it failed"))
	if text := err.Error(); !strings.HasPrefix(text, "it failed; ") || strings.Count(text, "more") != describeLines {
		t.Errorf("described as %q", text)
	}
}

// FuzzLines: whatever a guest writes to its console, what is kept of it is
// bounded and printable.
func FuzzLines(f *testing.F) {
	f.Add([]byte("line\nline\x00\xff\n"))
	f.Add([]byte(strings.Repeat("long", 1000)))
	f.Fuzz(func(t *testing.T, data []byte) {
		l := readLines(io.NopCloser(strings.NewReader(string(data))), func(string) {})
		<-l.done
		for _, line := range l.last(10 * keepLines) {
			if len(line) > maxLine+3 || strings.ContainsAny(line, "\n\x00\x1b") {
				t.Errorf("line %q", line)
			}
		}
		if n := len(l.last(10 * keepLines)); n > keepLines {
			t.Errorf("%d lines", n)
		}
	})
}
