//go:build e2e

package task

import (
	"crypto/sha256"
	"encoding/csv"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
)

const pythonScript = `
import hashlib, json, os, sys, threading
rows = [json.loads(line) for line in open("/work/in.json")]
results = []
def digest(r):
    results.append((r["name"], hashlib.sha256(r["name"].encode() * r["times"]).hexdigest()))
threads = [threading.Thread(target=digest, args=(r,)) for r in rows]
for t in threads: t.start()
for t in threads: t.join()
with open("/work/out.json", "w") as out:
    json.dump(sorted(results), out)
print(len(results), os.uname().sysname, file=sys.stdout)
print("done", file=sys.stderr)
`

func TestPython(t *testing.T) {
	n := node.For(t)
	n.Import(t, node.Debian, "overlayfs")
	dir := t.TempDir()
	write(t, filepath.Join(dir, "script.py"), pythonScript)
	var in strings.Builder
	for i := range 20 {
		in.WriteString(`{"name": "n` + strconv.Itoa(i) + `", "times": ` + strconv.Itoa(i*1000) + "}\n")
	}
	write(t, filepath.Join(dir, "in.json"), in.String())
	id := n.ID(t)
	n.RemoveIfFailed(t, id)
	r := n.Ctr(t, n.RunArgs(node.Debian, id, []string{"--rm", "--mount", "type=bind,src=" + dir + ",dst=/work,options=rbind:rw"},
		"python3", "/work/script.py")...)
	if r.Code != 0 || r.Stdout != "20 Linux\n" || r.Stderr != "done\n" {
		t.Errorf("python3: %s", r)
	}
	want := fmt.Sprintf(`["n3", "%x"]`, sha256.Sum256([]byte(strings.Repeat("n3", 3000))))
	if out, err := os.ReadFile(filepath.Join(dir, "out.json")); err != nil || !strings.Contains(string(out), want) {
		t.Errorf("the script's result: %s, %v; want %s in it", out, err, want)
	}
}

func TestRedis(t *testing.T) {
	n := node.For(t)
	n.Import(t, node.Debian, "overlayfs")
	id := n.DetachImage(t, node.Debian, nil, "redis-server", "--save", "", "--appendonly", "no")
	node.Until(t, "redis answers", func() bool { return n.Exec(t, id, nil, "redis-cli", "ping").Stdout == "PONG\n" })
	n.MustExec(t, id, nil, "redis-cli", "set", "key", "value")
	r := n.MustExec(t, id, nil, "redis-benchmark", "--csv", "-t", "set,get", "-n", "2000", "-c", "10", "-d", "100")
	rows, err := csv.NewReader(strings.NewReader(r.Stdout)).ReadAll()
	if err != nil || len(rows) != 3 {
		t.Fatalf("redis-benchmark: %v: %s", err, r)
	}
	for _, row := range rows[1:] {
		if rate, err := strconv.ParseFloat(row[1], 64); err != nil || rate <= 0 {
			t.Errorf("redis-benchmark %s: %s requests a second", row[0], row[1])
		}
	}
	n.Exec(t, id, nil, "redis-cli", "get", "key").WantOutput(t, "value\n")
	n.Exec(t, id, nil, "redis-cli", "shutdown", "nosave") // the container ends, and perhaps redis-cli with it
	node.Until(t, "redis-server has ended", func() bool { return n.Status(t, id) == "STOPPED" })
}
