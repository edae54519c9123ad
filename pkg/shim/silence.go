package shim

import (
	"context"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/containerd/log"

	"github.com/microvm-runtime/microvm/pkg/internal/printable"
	"github.com/microvm-runtime/microvm/pkg/vmm/control"
)

// silenceSpan is how long the counters of a guest that does not answer are
// watched, so that the log tells one that waits from one that goes in circles.
const silenceSpan = time.Second

// silent notes in the log what the machine does while its agent does not
// answer. One look at a time is enough: requests time out together. Of one that
// is on its way to its end nothing is noted.
func (s *sandbox) silent() {
	s.mu.Lock()
	stopping := s.stopping
	s.mu.Unlock()
	if stopping || s.alive() != nil || !s.asking.TryLock() {
		return
	}
	go func() {
		defer s.asking.Unlock()
		before, err := s.machineStats()
		if err != nil {
			log.L.WithError(err).Warn("neither the guest nor its VMM answers")
			return
		}
		time.Sleep(silenceSpan)
		after, err := s.machineStats()
		if err != nil {
			return // it has ended
		}
		log.L.WithFields(log.Fields{
			"exits":   changed(before.Exits, after.Exits),
			"kvm":     changed(before.KVM, after.KVM),
			"halted":  after.KVM["blocking"], // vCPUs in HLT: their gauge, added up
			"console": s.logs.console.last(2),
		}).Warnf("the guest does not answer; this is what its machine did in %v", silenceSpan)
	}()
}

// report notes in the log how many goroutines this process and its VMM have, for
// those who look for something that grows.
func (s *service) report() {
	var machine *sandbox
	s.mu.Lock()
	if s.pod != nil {
		machine = s.pod.sandbox
	}
	for _, c := range s.containers {
		machine = c.sandbox
	}
	s.mu.Unlock()
	entry := log.L.WithField("goroutines", runtime.NumGoroutine())
	if machine != nil {
		if stats, err := machine.machineStats(); err != nil {
			entry = entry.WithError(err)
		} else {
			entry = entry.WithField("vmm_goroutines", stats.Goroutines)
		}
	}
	entry.Info("SIGUSR1: a report was asked for")
}

func (s *sandbox) machineStats() (control.Stats, error) {
	ctx, cancel := context.WithTimeout(context.Background(), s.host.patience)
	defer cancel()
	return s.vm.Stats(ctx)
}

// changed lists the counters that are not what they were.
func changed(before, after map[string]uint64) string {
	var list []string
	for _, name := range slices.Sorted(maps.Keys(after)) {
		if n := int64(after[name] - before[name]); n != 0 { // a gauge may go down
			list = append(list, fmt.Sprintf("%s %+d", name, n))
		}
	}
	if list == nil {
		return "none"
	}
	return printable.String(strings.Join(list, ", "), 2*maxLine) // the VMM's words
}
