package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// processMemory is the memory that a process has for itself at the moment, in
// KiB, without the guest's. What is mapped from a file is another process's too as
// soon as that maps it.
type processMemory struct {
	anonymous float64 // heap, stacks, changed data: every process has its own
	program   float64 // the program's file
	image     float64 // the guest's image, which the guest has as DAX
}

// addMemory records what a process has. The image is apart: it is in the page
// cache, whoever maps it.
func (b *bench) addMemory(process, subject string, samples ...processMemory) {
	for _, f := range []struct {
		name  string
		value func(processMemory) float64
	}{
		{"private (USS)", func(m processMemory) float64 { return m.anonymous + m.program }},
		{"private beside another of its kind", func(m processMemory) float64 { return m.anonymous }},
		{"guest image that only it has mapped", func(m processMemory) float64 { return m.image }},
	} {
		values := make([]float64, len(samples))
		for i, m := range samples {
			values[i] = f.value(m) / 1024
		}
		b.add("memory", process+" "+f.name, subject, "MiB", values...)
	}
}

func memoryOf(pid int) (processMemory, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return processMemory{}, err
	}
	m, err := parseMemory(string(text))
	if err != nil {
		return m, fmt.Errorf("smaps of %d: %w", pid, err)
	}
	return m, nil
}

// parseMemory reads smaps, proc(5): for each mapping a line with its addresses and
// its file, and then lines of the form "key: value kB".
func parseMemory(smaps string) (m processMemory, err error) {
	var ignored float64
	sum := &ignored
	for line := range strings.Lines(smaps) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		if first, last, ok := strings.Cut(fields[0], "-"); ok && !strings.HasSuffix(fields[0], ":") {
			from, err1 := strconv.ParseUint(first, 16, 64)
			to, err2 := strconv.ParseUint(last, 16, 64)
			if err1 != nil || err2 != nil || len(fields) < 5 {
				return m, fmt.Errorf("mapping %q", line)
			}
			constant := fields[4] != "0" && !strings.Contains(fields[1], "w") // a file's
			switch {
			case to-from >= machineMemory/2: // the guest's memory
				sum = &ignored
			case constant && filepath.Base(fields[len(fields)-1]) == "guest.erofs":
				sum = &m.image
			case constant:
				sum = &m.program
			default:
				sum = &m.anonymous
			}
			continue
		}
		if fields[0] != "Private_Clean:" && fields[0] != "Private_Dirty:" {
			continue
		}
		kb, err := strconv.ParseFloat(fields[1], 64)
		if err != nil {
			return m, err
		}
		*sum += kb
	}
	return m, nil
}
