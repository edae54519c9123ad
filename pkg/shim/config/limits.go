package config

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/go-units"

	"github.com/microvm-runtime/microvm/pkg/vmm/control"
	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit"
)

// annotationPrefix is that of the annotations by which a pod speaks to the shim.
const annotationPrefix = "io.microvm."

const (
	// With less than minBytes or minOperations per second a container does not
	// start before somebody loses patience.
	minBytes      = 64 << 10
	minOperations = 10

	// maxQuoted is how much of a pod's text an error repeats.
	maxQuoted = 100
)

// limit is one of those that can be set.
type limit struct {
	key   string // in the file
	text  func(*file) string
	rate  func(*control.RateLimits) *ratelimit.Rate
	bytes bool // or operations
}

var limits = []limit{
	{"disk_bytes_per_second", func(f *file) string { return f.DiskBytes }, func(r *control.RateLimits) *ratelimit.Rate { return &r.Disk.Bytes }, true},
	{"disk_operations_per_second", func(f *file) string { return f.DiskOperations }, func(r *control.RateLimits) *ratelimit.Rate { return &r.Disk.Operations }, false},
	{"network_receive_bytes_per_second", func(f *file) string { return f.ReceiveBytes }, func(r *control.RateLimits) *ratelimit.Rate { return &r.NetworkReceive.Bytes }, true},
	{"network_receive_packets_per_second", func(f *file) string { return f.ReceivePackets }, func(r *control.RateLimits) *ratelimit.Rate { return &r.NetworkReceive.Operations }, false},
	{"network_transmit_bytes_per_second", func(f *file) string { return f.TransmitBytes }, func(r *control.RateLimits) *ratelimit.Rate { return &r.NetworkTransmit.Bytes }, true},
	{"network_transmit_packets_per_second", func(f *file) string { return f.TransmitPackets }, func(r *control.RateLimits) *ratelimit.Rate { return &r.NetworkTransmit.Operations }, false},
}

// annotation is the limit's name there: io.microvm.disk-bytes-per-second.
func (l limit) annotation() string { return annotationPrefix + strings.ReplaceAll(l.key, "_", "-") }

// checkLimits takes over the rate limits.
func (f *file) checkLimits(c *Config) error {
	for _, l := range limits {
		text := l.text(f)
		if text == "" {
			continue
		}
		rate, err := parseRate(text, l.bytes, 0)
		if err != nil {
			return fmt.Errorf("configuration: %s: %w", l.key, err)
		}
		*l.rate(&c.RateLimits) = rate
	}
	return nil
}

// RateLimitsFor are those of a sandbox with these annotations, which may limit
// what the configuration does not, or limit it further, but not allow more. An
// annotation of the shim's that does not exist is an error.
func (c *Config) RateLimitsFor(annotations map[string]string) (control.RateLimits, error) {
	rates := c.RateLimits
	for _, name := range slices.Sorted(maps.Keys(annotations)) {
		if !strings.HasPrefix(name, annotationPrefix) {
			continue
		}
		i := slices.IndexFunc(limits, func(l limit) bool { return l.annotation() == name })
		if i < 0 {
			var known []string
			for _, l := range limits {
				known = append(known, l.annotation())
			}
			return control.RateLimits{}, fmt.Errorf("annotation %.*q is not known; there are %s", maxQuoted, name, strings.Join(known, ", "))
		}
		l := limits[i]
		configured := *l.rate(&c.RateLimits)
		rate, err := parseRate(annotations[name], l.bytes, configured.Burst)
		if err != nil {
			return control.RateLimits{}, fmt.Errorf("annotation %s: %w", name, err)
		}
		if configured != (ratelimit.Rate{}) && (rate.PerSecond > configured.PerSecond || rate.Burst > configured.Burst) {
			return control.RateLimits{}, fmt.Errorf("annotation %s: %q is more than the configuration allows (key %s): %d per second with a burst of %d",
				name, annotations[name], l.key, configured.PerSecond, configured.Burst)
		}
		*l.rate(&rates) = rate
	}
	return rates, nil
}

// parseRate reads "RATE" or "RATE burst BURST", of bytes (with units, 100MiB) or
// of operations. The burst is what comes in a second if none is given, but no
// more than maxBurst if that is not zero.
func parseRate(text string, bytes bool, maxBurst uint64) (ratelimit.Rate, error) {
	if len(text) > maxQuoted {
		return ratelimit.Rate{}, fmt.Errorf("%.*q… is too long", maxQuoted, text)
	}
	number, least, example := parseOperations, uint64(minOperations), "1000 burst 5000"
	if bytes {
		number, least, example = parseBytes, minBytes, "100MiB burst 1GiB"
	}
	first, second, hasBurst := strings.Cut(text, "burst")
	var rate ratelimit.Rate
	var err error
	if rate.PerSecond, err = number(strings.TrimSpace(first)); err != nil {
		return ratelimit.Rate{}, fmt.Errorf("%q is no rate like %q: %w", text, example, err)
	}
	if rate.PerSecond < least || rate.PerSecond > ratelimit.MaxPerSecond {
		return ratelimit.Rate{}, fmt.Errorf("%q: %d per second is not between %d and %d", text, rate.PerSecond, least, uint64(ratelimit.MaxPerSecond))
	}
	rate.Burst = rate.PerSecond
	if maxBurst > 0 {
		rate.Burst = min(rate.Burst, maxBurst)
	}
	if hasBurst {
		if rate.Burst, err = number(strings.TrimSpace(second)); err != nil {
			return ratelimit.Rate{}, fmt.Errorf("%q is no rate with a burst like %q: %w", text, example, err)
		}
	}
	if err := rate.Check(); err != nil {
		return ratelimit.Rate{}, fmt.Errorf("%q: %w", text, err)
	}
	return rate, nil
}

func parseBytes(text string) (uint64, error) {
	n, err := units.RAMInBytes(text)
	if err != nil {
		return 0, err
	}
	if n < 0 { // it has wrapped around
		return 0, errors.New("the number is absurd")
	}
	return uint64(n), nil
}

func parseOperations(text string) (uint64, error) { return strconv.ParseUint(text, 10, 64) }
