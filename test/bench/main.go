// Command bench measures microvm beside its neighbours in one run, on one
// machine, and prints ratios: the same kernel and guest image in QEMU's
// microvm machine, the same container under runc, the same pod under runc and
// gVisor. Times on a shared machine are noisy; counts (VM exits, bytes) are not.
//
// `make bench` builds it and runs it where the guest kernel boots.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"

	"golang.org/x/sys/unix"
)

// Result is one measured figure.
type Result struct {
	Group string `json:"group"`
	Name  string `json:"name"`
	// Who was measured: microvm, qemu-microvm, runc, runsc.
	Subject string    `json:"subject"`
	Unit    string    `json:"unit"`
	Median  float64   `json:"median"`
	Samples []float64 `json:"samples"`
}

// Report is what is kept.
type Report struct {
	Machine Machine  `json:"machine"`
	Results []Result `json:"results"`
	// Missing names what could not be measured, with the reason.
	Missing []string `json:"missing,omitempty"`
}

// Machine describes where the figures were taken.
type Machine struct {
	Kernel   string `json:"kernel"`
	CPU      string `json:"cpu"`
	CPUs     int    `json:"cpus"`
	MemoryMB uint64 `json:"memory_mb"`
	// TestBed says that KVM itself was emulated: compare ratios only.
	TestBed bool   `json:"test_bed"`
	QEMU    string `json:"qemu,omitempty"`
}

type bench struct {
	top    string // the checkout
	state  string // scratch directory, short
	runs   int
	groups []string // to measure
	report Report
}

// known are the groups, and then what can be had alone of them.
var known = []string{"machine", "container", "pod", "pod/start", "pod/memory", "pod/network", "pod/nginx", "pod/files"}

// wants says whether a group is to be measured, or a part of it.
func (b *bench) wants(group, part string) bool {
	return slices.ContainsFunc(b.groups, func(g string) bool {
		return g == group || strings.HasPrefix(g, group+"/") && (part == "" || g == group+"/"+part)
	})
}

func main() {
	out := flag.String("out", "", "file for the JSON report")
	runs := flag.Int("runs", 5, "how often each start is measured")
	only := flag.String("only", strings.Join(known[:3], ","), "of "+strings.Join(known, ","))
	flag.Parse()
	if err := run(*out, *runs, strings.Split(*only, ",")); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(out string, runs int, groups []string) error {
	top, err := os.Getwd()
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(top, "bin/microvm-vmm")); err != nil {
		return fmt.Errorf("run from the checkout after make build: %w", err)
	}
	state, err := os.MkdirTemp("/tmp", "mvb")
	if err != nil {
		return err
	}
	defer os.RemoveAll(state)
	if err := os.Setenv("PATH", filepath.Join(cache(), "tools/bin")+":"+os.Getenv("PATH")); err != nil {
		return err
	}
	b := &bench{top: top, state: state, runs: runs, groups: groups, report: Report{Machine: describeMachine()}}
	for _, g := range groups {
		if !slices.Contains(known, g) {
			return fmt.Errorf("there is no group %q: there are %s", g, strings.Join(known, ", "))
		}
	}
	// What was measured before something failed is kept and shown all the same.
	var failed error
	for _, g := range []struct {
		name    string
		measure func() error
	}{{"machine", b.machines}, {"container", b.containers}, {"pod", b.pods}} {
		if !b.wants(g.name, "") {
			continue
		}
		if err := g.measure(); err != nil {
			failed = errors.Join(failed, fmt.Errorf("%s: %w", g.name, err))
			b.missing("the rest of %s: %v", g.name, err)
		}
	}
	b.print()
	if out == "" {
		return failed
	}
	text, err := json.MarshalIndent(b.report, "", "  ")
	if err != nil {
		return err
	}
	return errors.Join(failed, os.WriteFile(out, append(text, '\n'), 0o644))
}

func describeMachine() Machine {
	m := Machine{CPUs: runtime.NumCPU(), TestBed: os.Getenv("MICROVM_TESTBED") != ""}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		m.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		m.MemoryMB = info.Totalram * uint64(info.Unit) >> 20
	}
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				m.CPU = strings.TrimSpace(value)
				break
			}
		}
	}
	if text, err := exec.Command("qemu-system-x86_64", "--version").Output(); err == nil {
		m.QEMU, _, _ = strings.Cut(string(text), "\n")
	}
	return m
}

// add records the samples of one figure, and shows it: a run takes its time.
func (b *bench) add(group, name, subject, unit string, samples ...float64) {
	if len(samples) == 0 {
		return
	}
	sorted := slices.Sorted(slices.Values(samples))
	r := Result{
		Group: group, Name: name, Subject: subject, Unit: unit,
		Median: sorted[len(sorted)/2], Samples: samples,
	}
	b.report.Results = append(b.report.Results, r)
	fmt.Fprintf(os.Stderr, "%s, %s, %s: %.4g %s\n", r.Group, r.Name, r.Subject, r.Median, r.Unit)
}

func (b *bench) missing(format string, args ...any) {
	b.report.Missing = append(b.report.Missing, fmt.Sprintf(format, args...))
}

// print writes a table with a row per figure, and the ratio to microvm's where
// the same figure was taken of another subject.
func (b *bench) print() {
	ours := map[string]float64{}
	for _, r := range b.report.Results {
		if r.Subject == "microvm" {
			ours[r.Group+r.Name] = r.Median
		}
	}
	m := b.report.Machine
	fmt.Printf("%s, %d CPUs, %d MB, Linux %s", m.CPU, m.CPUs, m.MemoryMB, m.Kernel)
	if m.TestBed {
		fmt.Print("; test bed (emulated KVM): compare ratios and counts only")
	}
	fmt.Println()
	w := tabwriter.NewWriter(os.Stdout, 2, 8, 2, ' ', 0)
	fmt.Fprintln(w, "group\tfigure\tsubject\tmedian\tmin\tmax\tunit\tmicrovm / subject")
	for _, r := range b.report.Results {
		ratio := ""
		if o, ok := ours[r.Group+r.Name]; ok && r.Subject != "microvm" && r.Median != 0 {
			ratio = fmt.Sprintf("%.2f", o/r.Median)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%.4g\t%.4g\t%.4g\t%s\t%s\n", r.Group, r.Name, r.Subject,
			r.Median, slices.Min(r.Samples), slices.Max(r.Samples), r.Unit, ratio)
	}
	w.Flush()
	for _, line := range b.report.Missing {
		fmt.Println("not measured:", line)
	}
}
