package config

import (
	"maps"
	"path/filepath"
	"strings"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/control"
	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit"
)

func TestRateLimits(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.toml")
	write(t, path, `disk_bytes_per_second = "100MiB"
disk_operations_per_second = "1000 burst 5000"
network_receive_bytes_per_second = "1g burst 1.5 GiB"
network_receive_packets_per_second = "10"
network_transmit_bytes_per_second = "65536burst65536"
`)
	write(t, filepath.Join(filepath.Dir(path), "config.d", "10-off.toml"), `network_receive_packets_per_second = ""`)
	c, err := Load(Sources{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	want := control.RateLimits{
		Disk:            ratelimit.Limits{Bytes: ratelimit.Rate{PerSecond: 100 << 20, Burst: 100 << 20}, Operations: ratelimit.Rate{PerSecond: 1000, Burst: 5000}},
		NetworkReceive:  ratelimit.Limits{Bytes: ratelimit.Rate{PerSecond: 1 << 30, Burst: 3 << 29}},
		NetworkTransmit: ratelimit.Limits{Bytes: ratelimit.Rate{PerSecond: 1 << 16, Burst: 1 << 16}},
	}
	if c.RateLimits != want {
		t.Errorf("got  %+v\nwant %+v", c.RateLimits, want)
	}
}

// badRates are of bytes and of operations, with what the error has to say.
var badRates = map[bool][]struct{ text, want string }{
	true: {
		{" ", "no rate like"},
		{"fast", "invalid size"},
		{"-1MiB", "invalid size"},
		{"100Mbit", "invalid suffix"},
		{"100MiB/s", "invalid suffix"},
		{"0", "0 per second is not between 65536"},
		{"63KiB", "64512 per second is not between"},
		{"2TiB", "per second is not between"},
		{"99999999999999999999999GiB", "absurd"},
		{"1e999", "out of range"},
		{"burst 1MiB", "invalid size"},
		{"1MiB burst", "no rate with a burst"},
		{"1MiB burst 0", "burst of 0"},
		{"1MiB burst 10000", "burst of 10000 is not between 10485"},
		{"1MiB burst 4TiB", "burst of 4398046511104"},
		{"1MiB burst 1MiB burst 1MiB", "no rate with a burst"},
		{"1MiB 2MiB", "invalid syntax"},
		{strings.Repeat("1", 101), "too long"},
	},
	false: {
		{" ", `" " is no rate like "1000 burst 5000"`},
		{"many", "invalid syntax"},
		{"-10", "invalid syntax"},
		{"1k", "invalid syntax"},
		{"10.5", "invalid syntax"},
		{"0", "0 per second is not between 10"},
		{"9", "9 per second is not between"},
		{"18446744073709551615", "is not between"},
		{"18446744073709551616", "out of range"},
		{"1000 burst 9", "burst of 9 is not between 10"},
		{"10 burst 36001", "burst of 36001"},
		{"10 burst -1", "no rate with a burst"},
	},
}

func TestBadRates(t *testing.T) {
	for _, l := range limits {
		for _, test := range badRates[l.bytes] {
			path := filepath.Join(t.TempDir(), "config.toml")
			write(t, path, l.key+" = '"+test.text+"'")
			if _, err := Load(Sources{Path: path}); err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), l.key) {
				t.Errorf("%s = %q: error %v does not say %q", l.key, test.text, err, test.want)
			}
			_, err := (&Config{}).RateLimitsFor(map[string]string{l.annotation(): test.text})
			if err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), l.annotation()) {
				t.Errorf("annotation %s %q: error %v does not say %q", l.annotation(), test.text, err, test.want)
			}
		}
	}
}

func TestAnnotations(t *testing.T) {
	rate := func(perSecond, burst uint64) ratelimit.Limits {
		return ratelimit.Limits{Operations: ratelimit.Rate{PerSecond: perSecond, Burst: burst}}
	}
	const (
		disk     = "io.microvm.disk-operations-per-second"
		receive  = "io.microvm.network-receive-packets-per-second"
		transmit = "io.microvm.network-transmit-packets-per-second"
	)
	for _, test := range []struct {
		name        string
		configured  control.RateLimits
		annotations map[string]string
		want        control.RateLimits
		err         string
	}{
		{name: "nothing"},
		{name: "others'", annotations: map[string]string{"io.kubernetes.cri.sandbox-id": "x", "io.microvm": "x", "example.com/io.microvm.x": "x"}},
		{name: "as configured", configured: control.RateLimits{Disk: rate(100, 50)}, want: control.RateLimits{Disk: rate(100, 50)}},
		{
			name: "where nothing is configured", annotations: map[string]string{disk: "100", receive: "200 burst 300", transmit: "10"},
			want: control.RateLimits{Disk: rate(100, 100), NetworkReceive: rate(200, 300), NetworkTransmit: rate(10, 10)},
		},
		{
			name: "stricter", configured: control.RateLimits{Disk: rate(100, 50), NetworkReceive: rate(100, 50)},
			annotations: map[string]string{disk: "20 burst 10"}, want: control.RateLimits{Disk: rate(20, 10), NetworkReceive: rate(100, 50)},
		},
		{
			name: "the same", configured: control.RateLimits{Disk: rate(100, 50)},
			annotations: map[string]string{disk: "100 burst 50"}, want: control.RateLimits{Disk: rate(100, 50)},
		},
		{
			name: "no burst where the configured one is small", configured: control.RateLimits{Disk: rate(100, 5)},
			annotations: map[string]string{disk: "50"}, want: control.RateLimits{Disk: rate(50, 5)},
		},
		{
			name: "faster", configured: control.RateLimits{Disk: rate(100, 50)}, annotations: map[string]string{disk: "101 burst 50"},
			err: `"101 burst 50" is more than the configuration allows (key disk_operations_per_second): 100 per second with a burst of 50`,
		},
		{
			name: "a larger burst", configured: control.RateLimits{Disk: rate(100, 50)}, annotations: map[string]string{disk: "50 burst 51"},
			err: "more than the configuration allows",
		},
		{name: "empty", annotations: map[string]string{disk: ""}, err: disk},
		{name: "unknown", annotations: map[string]string{"io.microvm.disk-iops": "1"}, err: `"io.microvm.disk-iops" is not known; there are io.microvm.disk-bytes-per-second, io.microvm.disk-op`},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := Config{RateLimits: test.configured}
			before := maps.Clone(test.annotations)
			got, err := c.RateLimitsFor(test.annotations)
			if (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
				t.Errorf("error %v, want %q", err, test.err)
			}
			if got != test.want {
				t.Errorf("got  %+v\nwant %+v", got, test.want)
			}
			if c.RateLimits != test.configured || !maps.Equal(before, test.annotations) {
				t.Error("the configuration or the annotations have changed")
			}
		})
	}
}

// FuzzRate: whatever a pod says, there is an error, or a limit that the VMM
// takes and that is not above the configured one. Errors are short.
func FuzzRate(f *testing.F) {
	for name, tests := range badRates {
		for _, test := range tests {
			f.Add(test.text, name, uint64(0))
		}
	}
	f.Add("100MiB burst 1GiB", true, uint64(1<<20))
	f.Add("1000", false, uint64(500))
	f.Fuzz(func(t *testing.T, text string, bytes bool, configured uint64) {
		l := limits[1]
		if bytes {
			l = limits[0]
		}
		var c Config
		ceiling := ratelimit.Rate{PerSecond: configured, Burst: configured}
		if ceiling.Check() == nil {
			*l.rate(&c.RateLimits) = ceiling
		} else {
			ceiling = ratelimit.Rate{}
		}
		got, err := c.RateLimitsFor(map[string]string{l.annotation(): text})
		if err != nil {
			if len(err.Error()) > 2000 {
				t.Fatalf("an error of %d bytes", len(err.Error()))
			}
			return
		}
		rate := *l.rate(&got)
		if rate == (ratelimit.Rate{}) || rate.Check() != nil {
			t.Fatalf("%q gives %+v: %v", text, rate, rate.Check())
		}
		if ceiling != (ratelimit.Rate{}) && (rate.PerSecond > ceiling.PerSecond || rate.Burst > ceiling.Burst) {
			t.Fatalf("%q gives %+v, above %+v", text, rate, ceiling)
		}
	})
}
