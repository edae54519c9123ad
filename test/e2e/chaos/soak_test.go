//go:build e2e

package chaos

import (
	"encoding/csv"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/test/e2e/internal/node"
	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

const (
	// The first cycles fill pools and caches.
	warmUp = 5
	// A Go program makes a thread whenever all it has are in system calls, and keeps it: this many may come late. One that a
	// cycle leaves behind comes with each of them.
	lateThreads = 5
	// What serves a request may be under way, and the workers of a device come when there is something for them to do.
	lateGoroutines = 5
)

// usage of a process at a time. Of containerd the goroutines are not known.
type usage struct{ pssKiB, descriptors, threads, goroutines int }

var usageNames = []string{"PSS (KiB)", "descriptors", "threads", "goroutines"}

func (u usage) values() []int { return []int{u.pssKiB, u.descriptors, u.threads, u.goroutines} }

// Pods come and go, with exec and logs: containerd, and the shim and the VMM of a pod that stays, end up with as many
// descriptors, threads and goroutines as they had. Memory is a figure. E2E_CYCLES says how many pods; a table and a plot
// of all cycles go to the directory E2E_REPORT.
func TestSoak(t *testing.T) {
	n := nodeFor(t)
	var seen []string
	defer func() { promise(t, seen...) }()
	cycles := 30
	if s := os.Getenv("E2E_CYCLES"); s != "" {
		var err error
		if cycles, err = strconv.Atoi(s); err != nil || cycles <= warmUp {
			t.Fatalf("E2E_CYCLES is %q, want a number above %d", s, warmUp)
		}
	}
	report := os.Getenv("E2E_REPORT")
	if report == "" {
		report = t.TempDir()
	}
	other := newBystander(t, n)
	n.Collect(t)
	host := n.Snapshot(t)
	processes := map[string]int{"containerd": n.ContainerdPid(t), "shim": one(t, "shim", other.parts.shims)}
	names := []string{"containerd", "shim"}
	if isVM(n) {
		processes["VMM"] = one(t, "VMM", other.parts.vmms)
		names = append(names, "VMM")
	}
	measure := func() map[string]usage {
		now := map[string]usage{}
		for _, name := range names {
			now[name] = usageOf(t, processes[name])
		}
		if isVM(n) {
			shim, machine := now["shim"], now["VMM"]
			shim.goroutines, machine.goroutines = goroutines(t, n, processes["shim"])
			now["shim"], now["VMM"] = shim, machine
		}
		return now
	}
	series := map[string][]usage{}
	for i := range cycles {
		cycle(t, n, i)
		if t.Failed() {
			break
		}
		for name, u := range measure() {
			series[name] = append(series[name], u)
		}
	}
	// What belongs to the last cycle may be on its way out.
	for _, name := range names {
		s := series[name]
		if len(s) < cycles {
			break
		}
		base := s[warmUp-1]
		for _, u := range s[:warmUp] {
			base.descriptors, base.threads = max(base.descriptors, u.descriptors), max(base.threads, u.threads)
			base.goroutines = max(base.goroutines, u.goroutines)
		}
		var last usage
		if !node.Wait(func() bool { last = measure()[name]; return last.descriptors <= base.descriptors }) {
			t.Errorf("%s has %d descriptors, after the first cycles it had %d", name, last.descriptors, base.descriptors)
		}
		if last.threads > base.threads+lateThreads {
			t.Errorf("%s has %d threads, after the first cycles it had %d", name, last.threads, base.threads)
		}
		if last.goroutines > base.goroutines+lateGoroutines {
			t.Errorf("%s has %d goroutines, after the first cycles it had %d", name, last.goroutines, base.goroutines)
		}
		line := fmt.Sprintf("%s: PSS %d to %d KiB, descriptors %d to %d, threads %d to %d",
			name, s[warmUp-1].pssKiB, last.pssKiB, base.descriptors, last.descriptors, base.threads, last.threads)
		if base.goroutines > 0 {
			line += fmt.Sprintf(", goroutines %d to %d", base.goroutines, last.goroutines)
		}
		seen = append(seen, line)
	}
	if err := writeTable(filepath.Join(report, "soak.csv"), names, series); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(report, "soak.svg"), plot(names, series), 0o644); err != nil {
		t.Error(err)
	}
	n.Collect(t)
	n.WantHost(t, host)
	seen = append(seen, fmt.Sprintf("%d pods", len(series["containerd"])), other.goesOn(t, true), "host as before")
}

// cycle is a pod from its start to its removal.
func cycle(t *testing.T, n *pods.Node, i int) {
	t.Helper()
	p := n.Pod(t)
	c := p.Run(t, pods.Shell(fmt.Sprintf("trap 'exit 3' TERM; echo hello %d; while :; do sleep 1000 & wait; done", i)))
	c.Exec(t, "echo", "from exec").WantOutput(t, "from exec\n")
	node.Until(t, "the log is there", func() bool {
		data, _ := os.ReadFile(c.Log) // not there before the first line
		return strings.HasSuffix(string(data), fmt.Sprintf(" stdout F hello %d\n", i))
	})
	c.Stop(t, 100)
	if code := c.Status(t).ExitCode; code != 3 {
		t.Errorf("exit code %d", code)
	}
	p.Remove(t)
	n.Collect(t)
}

func usageOf(t *testing.T, pid int) usage {
	t.Helper()
	u, err := usageNow(pid)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// usageNow is that of a process which may end meanwhile.
func usageNow(pid int) (usage, error) {
	dir := fmt.Sprintf("/proc/%d/", pid)
	descriptors, err1 := os.ReadDir(dir + "fd")
	threads, err2 := os.ReadDir(dir + "task")
	memory, err3 := os.ReadFile(dir + "smaps_rollup")
	if err := errors.Join(err1, err2, err3); err != nil {
		return usage{}, err
	}
	u := usage{descriptors: len(descriptors), threads: len(threads)}
	for line := range strings.Lines(string(memory)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "Pss:" {
			u.pssKiB, _ = strconv.Atoi(f[1])
		}
	}
	return u, nil
}

var goroutinesLogged = regexp.MustCompile(` goroutines=([0-9]+) .*vmm_goroutines=([0-9]+)\s`)

// goroutines are those of a shim and its VMM, which the shim writes to its log when it is asked.
func goroutines(t *testing.T, n *pods.Node, shim int) (ofShim, ofVMM int) {
	t.Helper()
	from := n.LogSize()
	if err := unix.Kill(shim, unix.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	var found []string
	node.Until(t, "the shim has reported", func() bool {
		found = goroutinesLogged.FindStringSubmatch(n.Log(from))
		return found != nil
	})
	ofShim, _ = strconv.Atoi(found[1])
	ofVMM, _ = strconv.Atoi(found[2])
	return ofShim, ofVMM
}

func writeTable(path string, names []string, series map[string][]usage) error {
	rows := [][]string{{"cycle", "process", "pss_kib", "descriptors", "threads", "goroutines"}}
	for _, name := range names {
		for i, u := range series[name] {
			row := []string{strconv.Itoa(i + 1), name}
			for _, v := range u.values() {
				row = append(row, strconv.Itoa(v))
			}
			rows = append(rows, row)
		}
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return csv.NewWriter(f).WriteAll(rows)
}
