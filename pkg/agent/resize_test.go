package agent

import (
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// fakeSize has a directory of processors in the given states, "1" on line, "0"
// not and "-" with nothing to choose; its memory is what the slice says, one
// value each time that it is looked at, and then the last for ever.
func fakeSize(t *testing.T, cpus string, memory ...uint64) *guestSize {
	t.Helper()
	dir := t.TempDir()
	writeBelow(t, dir, "present", "0-"+strconv.Itoa(len(cpus)-1)+"\n")
	for i, state := range cpus {
		if state != '-' {
			writeBelow(t, dir, "cpu"+strconv.Itoa(i)+"/online", string(state)+"\n")
		}
	}
	return &guestSize{
		log: slog.New(slog.NewTextHandler(io.Discard, nil)), dir: dir, booted: 1000,
		memory: func() (uint64, error) {
			now := memory[0]
			if len(memory) > 1 {
				memory = memory[1:]
			}
			return now, nil
		},
		stall:   func(bool) time.Duration { return 20 * memoryPoll },
		sockets: &socketMemory{proc: dir},
	}
}

// writeBelow writes a file below dir, and makes the directories on the way.
func writeBelow(t *testing.T, dir, name, text string) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (s *guestSize) states(t *testing.T, n int) string {
	t.Helper()
	var b strings.Builder
	for i := range n {
		state, err := os.ReadFile(s.onlineFile(i))
		if err != nil {
			state = []byte("-")
		}
		b.WriteByte(state[0])
	}
	return b.String()
}

func TestSetCPUs(t *testing.T) {
	for _, tc := range []struct {
		name, cpus string
		want       int
		reached    int
		after      string
	}{
		{"more", "-000", 3, 3, "-110"},
		{"all", "-010", 4, 4, "-111"},
		{"the lowest first", "-010", 3, 3, "-110"},
		{"more than there are", "-00", 9, 3, "-11"},
		{"less", "-111", 2, 2, "-100"},
		{"the highest first", "-011", 2, 2, "-010"},
		{"one", "-111", 1, 1, "-000"},
		{"one that cannot go", "-1-1", 1, 2, "-0-0"},
		{"as it is", "-10", 2, 2, "-10"},
		{"one processor", "-", 2, 1, "-"},
	} {
		s := fakeSize(t, tc.cpus, 1000)
		got, err := s.setCPUs(tc.want)
		if err != nil || got != tc.reached || s.states(t, len(tc.cpus)) != tc.after {
			t.Errorf("%s: %d on line, %v, %s; want %d, %s", tc.name, got, err, s.states(t, len(tc.cpus)), tc.reached, tc.after)
		}
	}
}

func TestSetCPUsFails(t *testing.T) {
	s := fakeSize(t, "-0", 1000)
	if err := os.WriteFile(filepath.Join(s.dir, "present"), []byte("what\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.setCPUs(1); err == nil {
		t.Error("a list that is none was understood")
	}
	s.dir = filepath.Join(s.dir, "nothing")
	if _, err := s.setCPUs(1); err == nil {
		t.Error("processors were found in a directory that is not there")
	}
}

func TestLastOfList(t *testing.T) {
	for list, want := range map[string]int{"0\n": 0, "0-3": 3, "0-3,5\n": 5, "0,2-11": 11, "": -1, "x": -1, "3-": -1, "-": -1} {
		got, err := lastOfList(list)
		if want < 0 && err == nil || want >= 0 && (err != nil || got != want) {
			t.Errorf("%q: %d, %v", list, got, err)
		}
	}
}

func TestAwaitMemory(t *testing.T) {
	for _, tc := range []struct {
		name   string
		memory []uint64
		want   uint64
		got    uint64
	}{
		{"there", []uint64{1000}, 0, 0},
		{"grows", []uint64{1000, 1100, 1100, 1200, 1300, 1400}, 300, 300},
		{"grows beyond", []uint64{1000, 1100, 1400}, 300, 400},
		{"does not grow all the way", []uint64{1000, 1100, 1200}, 300, 200},
		{"shrinks", []uint64{1400, 1300, 1300, 1200, 1100}, 200, 200},
		{"does not shrink all the way", []uint64{1400, 1300}, 200, 300},
		{"less than it booted with", []uint64{900}, 0, 0},
	} {
		got, err := fakeSize(t, "-", tc.memory...).awaitMemory(t.Context(), tc.want)
		if err != nil || got != tc.got {
			t.Errorf("%s: %d, %v; want %d", tc.name, got, err, tc.got)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s := fakeSize(t, "-", 1000)
	s.stall = func(bool) time.Duration { return time.Hour }
	if got, err := s.awaitMemory(ctx, 100); got != 0 || err != nil {
		t.Errorf("given up by the caller: %d, %v", got, err)
	}
}

func TestResizeSandbox(t *testing.T) {
	a := &Agent{size: fakeSize(t, "-00", 1000, 1500)}
	r, err := a.ResizeSandbox(t.Context(), &agentproto.ResizeSandboxRequest{Cpus: 2, PluggedBytes: 500})
	if err != nil || r.GetCpus() != 2 || r.GetPluggedBytes() != 500 {
		t.Errorf("%v, %v", r, err)
	}
	if _, err := a.ResizeSandbox(t.Context(), &agentproto.ResizeSandboxRequest{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no processors: %v", err)
	}
}
