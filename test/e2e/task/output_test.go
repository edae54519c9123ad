//go:build e2e

package task

import (
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

// What a process wrote just before its end arrives, all of it: 8 MiB and then the exit, 50 times.
func TestLastOutput(t *testing.T) {
	n := node.For(t)
	dir := t.TempDir()
	data := make([]byte, 8<<20)
	_, _ = rand.NewChaCha8([32]byte{2}).Read(data)
	write(t, filepath.Join(dir, "data"), string(data))
	want := crc32.ChecksumIEEE(data)
	flags := []string{"--mount", "type=bind,src=" + dir + ",dst=/dir,options=rbind:ro"}

	check := func(what string, r node.Result) {
		t.Helper()
		if got := crc32.ChecksumIEEE([]byte(r.Stdout)); got != want || r.Code != 3 {
			t.Errorf("%s: %d bytes with checksum %08x, exit code %d; want %d bytes, %08x, 3", what, len(r.Stdout), got, r.Code, len(data), want)
		}
	}
	script := []string{"sh", "-c", "cat /dir/data; exit 3"}
	id := n.Detach(t, flags, "sleep", "1000")
	for i := range 45 {
		check(fmt.Sprint("exec ", i), n.Exec(t, id, nil, script...))
	}
	for i := range 5 {
		check(fmt.Sprint("container ", i), n.Run(t, flags, script...))
	}
}

func TestLogFile(t *testing.T) {
	n := node.For(t)
	log := filepath.Join(t.TempDir(), "log")
	n.MustRun(t, []string{"--log-uri", "file://" + log}, "sh", "-c", "echo out; echo err >&2")
	got, err := os.ReadFile(log)
	if err != nil || !strings.Contains(string(got), "out\n") || !strings.Contains(string(got), "err\n") {
		t.Errorf("log file: %q, %v; want both lines", got, err)
	}
}

// A logging program as containerd defines it: stdout on descriptor 3, stderr on 4, 5 closed when it is ready.
const logger = `#!/bin/sh
cd "$(dirname "$0")"
echo "$CONTAINER_NAMESPACE $CONTAINER_ID $*" >arguments
cat <&3 >stdout 5>&- & cat <&4 >stderr 5>&- &
exec 5>&-
wait
`

func TestLogProgram(t *testing.T) {
	n := node.For(t)
	dir := t.TempDir()
	program := filepath.Join(dir, "logger")
	if err := os.WriteFile(program, []byte(logger), 0o755); err != nil {
		t.Fatal(err)
	}
	id := n.ID(t)
	n.RemoveIfFailed(t, id)
	r := n.Ctr(t, n.RunArgs(node.Busybox, id, []string{"--rm", "--log-uri", "binary://" + program + "?--level=info"},
		"sh", "-c", "seq 10000; echo err >&2; exit 6")...)
	r.WantExit(t, 6)
	for name, want := range map[string]string{
		"arguments": node.Namespace + " " + id + " --level info\n",
		"stdout":    sequence(10000),
		"stderr":    "err\n",
	} {
		node.Until(t, name+" is complete", func() bool {
			got, err := os.ReadFile(filepath.Join(dir, name))
			return err == nil && string(got) == want
		})
	}
}

func sequence(to int) string {
	var b strings.Builder
	for i := range to {
		fmt.Fprintln(&b, i+1)
	}
	return b.String()
}
