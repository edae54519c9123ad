//go:build e2e

package chaos

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
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
	// Heaps and caches go up and down by as much as this from one third of the cycles to another: a percentage of what there was,
	// and some KiB.
	slackPercent, slackKiB = 10, 4 << 10
	// containerd (2.4.2) itself keeps 8 KiB of each pod that it has had, also of runc's: HeapAlloc of its profiles, after a
	// collection. Go lets the heap grow to twice what is in use. And its PSS goes up or down by 8 MiB now and then, from one cycle to
	// the next.
	daemonKiBPerPod, daemonKiB = 16, 12 << 10
	// The pod that stays is not only looked at: every so many cycles something is executed in it.
	execEvery = 4
	// Hours are long to wait without a word.
	tellEvery = 5
)

// usage of a process at a time. Of runc's shim the goroutines are not known.
type usage struct{ pssKiB, descriptors, threads, goroutines int }

var usageNames = []string{"PSS (KiB)", "descriptors", "threads", "goroutines"}

func (u usage) values() []int { return []int{u.pssKiB, u.descriptors, u.threads, u.goroutines} }

// Pods come and go, with exec and logs: containerd, and the shim and the VMM of a pod that stays, end up with as many
// descriptors, threads and goroutines as they had, and with as much memory: of that the medians of the first and the last third
// of the cycles are compared. E2E_CYCLES says how many pods, and E2E_SIDE_BY_SIDE how many of them a cycle has; a table and a plot of all
// cycles go to the directory E2E_REPORT.
func TestSoak(t *testing.T) {
	n := nodeFor(t)
	var seen []string
	defer func() { promise(t, seen...) }()
	count, sideBySide := number(t, "E2E_CYCLES", 30), number(t, "E2E_SIDE_BY_SIDE", 1)
	cycles := count / sideBySide
	if cycles < warmUp+3 || count%sideBySide != 0 {
		t.Fatalf("%d pods, %d at a time: want %d cycles or more, and none left over", count, sideBySide, warmUp+3)
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
		daemon := now["containerd"]
		daemon.goroutines = goroutinesOfContainerd(t, n)
		now["containerd"] = daemon
		if isVM(n) {
			shim, machine := now["shim"], now["VMM"]
			shim.goroutines, machine.goroutines = goroutinesOfSandbox(t, n, processes["shim"])
			now["shim"], now["VMM"] = shim, machine
		}
		return now
	}
	series := map[string][]usage{}
	for i := range cycles {
		if i%execEvery == 0 {
			other.container.Exec(t, "echo", "still here").WantOutput(t, "still here\n")
		}
		var lanes sync.WaitGroup
		for lane := range sideBySide {
			lanes.Go(func() { podOf(t, n, i*sideBySide+lane) }) // one that fails ends its goroutine
		}
		lanes.Wait()
		n.Collect(t)
		if t.Failed() {
			break
		}
		now := measure()
		for name, u := range now {
			series[name] = append(series[name], u)
		}
		if (i+1)%tellEvery == 0 {
			t.Logf("%d of %d pods: %+v", (i+1)*sideBySide, count, now)
		}
	}
	for _, name := range names {
		s := series[name]
		if len(s) < cycles {
			break
		}
		base := s[0]
		for _, u := range s[:warmUp] {
			base.descriptors, base.threads = max(base.descriptors, u.descriptors), max(base.threads, u.threads)
			base.goroutines = max(base.goroutines, u.goroutines)
		}
		// What belongs to the last cycle may be on its way out, or only wait until its time is over.
		var last usage
		node.Wait(func() bool {
			last = measure()[name]
			return last.descriptors <= base.descriptors && last.goroutines <= base.goroutines+lateGoroutines
		})
		for _, r := range []struct {
			what             string
			had, late, found int
		}{
			{"descriptors", base.descriptors, 0, last.descriptors},
			{"threads", base.threads, lateThreads, last.threads},
			{"goroutines", base.goroutines, lateGoroutines, last.goroutines},
		} {
			if r.found > r.had+r.late {
				t.Errorf("%s has %d %s, after the first cycles it had %d", name, r.found, r.what, r.had)
			}
		}
		third := (cycles - warmUp) / 3
		first, end := medianPSS(s[warmUp:warmUp+third]), medianPSS(s[cycles-third:])
		most := first + first*slackPercent/100 + slackKiB
		if name == "containerd" {
			most += daemonKiB + daemonKiBPerPod*sideBySide*(cycles-warmUp-third) // from one third's middle to the other's
		}
		if end > most {
			t.Errorf("%s has %d KiB of memory, after the first cycles it had %d: at most %d are no leak", name, end, first, most)
		}
		line := fmt.Sprintf("%s: PSS %d to %d KiB, descriptors %d to %d, threads %d to %d",
			name, first, end, base.descriptors, last.descriptors, base.threads, last.threads)
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
	seen = append(seen, fmt.Sprintf("%d pods, %d at a time", len(series["containerd"])*sideBySide, sideBySide), other.goesOn(t, true), "host as before")
}

// podOf is the i-th pod, from its start to its removal.
func podOf(t *testing.T, n *pods.Node, i int) {
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
}

// number is a variable of the environment.
func number(t *testing.T, name string, otherwise int) int {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	i, err := strconv.Atoi(s)
	if err != nil || i < 1 {
		t.Fatalf("%s is %q, want a number from 1 on", name, s)
	}
	return i
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

// medianPSS of some cycles: what a single one of them happens to add, or to have given back, is left out.
func medianPSS(cycles []usage) int {
	var all []int
	for _, u := range cycles {
		all = append(all, u.pssKiB)
	}
	slices.Sort(all)
	return all[len(all)/2]
}

var goroutinesProfiled = regexp.MustCompile(`^goroutine profile: total ([0-9]+)\n`)

// goroutinesOfContainerd asks its debug socket, which has what net/http/pprof serves.
func goroutinesOfContainerd(t *testing.T, n *pods.Node) int {
	t.Helper()
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true, // or the connection's would be among them from the second time on
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", n.Path("containerd.sock.debug"))
		},
	}}
	request, err := http.NewRequestWithContext(n.Context(t), http.MethodGet, "http://containerd/debug/pprof/goroutine?debug=1", nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	profile, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	found := goroutinesProfiled.FindSubmatch(profile)
	if found == nil {
		t.Fatalf("containerd's profile begins with %.100q", profile)
	}
	count, _ := strconv.Atoi(string(found[1]))
	return count
}

var goroutinesLogged = regexp.MustCompile(` goroutines=([0-9]+) .*vmm_goroutines=([0-9]+)\s`)

// goroutinesOfSandbox are those of a shim and its VMM, which the shim writes to its log when it is asked.
func goroutinesOfSandbox(t *testing.T, n *pods.Node, shim int) (ofShim, ofVMM int) {
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
