package virtiopci

import (
	"fmt"
	"slices"
	"testing"

	"github.com/microvm-runtime/microvm/pkg/vmm/virtio"
)

func TestStatusMachine(t *testing.T) {
	const a, d, f, ok, failed = statusAcknowledge, statusDriver, statusFeaturesOK, statusDriverOK, statusFailed
	for name, tc := range map[string]struct {
		writes []uint8
		want   uint8
	}{
		"in order":                 {[]uint8{a, a | d, a | d | f, a | d | f | ok}, ready},
		"needs_reset written back": {[]uint8{a | statusNeedsReset, a | d | statusNeedsReset}, a | d},
		"driver first":             {[]uint8{d}, 0},
		"two at once":              {[]uint8{a | d}, 0},
		"straight to driver_ok":    {[]uint8{ok}, 0},
		"everything":               {[]uint8{ready}, 0},
		"features_ok too early":    {[]uint8{a, a | f}, a},
		"driver_ok too early":      {[]uint8{a, a | d, a | d | ok}, a | d},
		"a bit taken back":         {[]uint8{a, a | d, a}, a | d},
		"another bit instead":      {[]uint8{a, d}, a},
		"unknown bits":             {[]uint8{a, a | 16, a | 32}, a},
		"failed":                   {[]uint8{a, a | failed, a | failed | d}, a | failed},
		"failed after driver_ok":   {[]uint8{a, a | d, a | d | f, ready, ready | failed}, ready | failed},
		"driver_ok twice":          {[]uint8{a, a | d, a | d | f, ready, ready}, ready},
		"reset":                    {[]uint8{a, a | d, 0}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			for _, v := range tc.writes {
				if v&f != 0 {
					m.setFeatures(virtio.FeatureVersion1)
				}
				m.write(offStatus, 1, uint64(v))
			}
			if m.status() != tc.want || (m.device.activation != nil) != (tc.want&ok != 0) {
				t.Errorf("status %#x, want %#x", m.status(), tc.want)
			}
		})
	}
}

func TestFeatureNegotiation(t *testing.T) {
	for name, tc := range map[string]struct {
		features uint64
		ok       bool
	}{
		"legacy driver":    {deviceFeature, false},
		"nothing":          {0, false},
		"not offered":      {virtio.FeatureVersion1 | 1<<6, false},
		"high not offered": {virtio.FeatureVersion1 | 1<<63, false},
		"plain":            {virtio.FeatureVersion1, true},
		"all":              {virtio.FeatureVersion1 | deviceFeature | virtio.FeatureIndirectDesc | virtio.FeatureEventIdx, true},
	} {
		m := newMachine(t)
		if m.negotiate(tc.features); m.status()&statusFeaturesOK != 0 != tc.ok {
			t.Errorf("%s: status %#x", name, m.status())
		}
	}

	m := newMachine(t)
	m.setFeatures(virtio.FeatureVersion1) // before DRIVER
	m.write(offStatus, 1, statusAcknowledge)
	m.write(offStatus, 1, statusAcknowledge|statusDriver)
	m.write(offStatus, 1, statusAcknowledge|statusDriver|statusFeaturesOK)
	if m.status()&statusFeaturesOK != 0 {
		t.Error("features written before DRIVER count")
	}
	m.negotiate(virtio.FeatureVersion1)
	m.setFeatures(virtio.FeatureVersion1 | deviceFeature) // after FEATURES_OK
	m.write(offStatus, 1, ready)
	if m.device.activation.Features != virtio.FeatureVersion1 {
		t.Errorf("features changed after FEATURES_OK: %#x", m.device.activation.Features)
	}
}

// TestQueueSetup writes queue registers when and as they must not be written.
func TestQueueSetup(t *testing.T) {
	m := newMachine(t)
	untouched := func(when string) {
		t.Helper()
		if m.read(offQueueSize, 2) != queueMax || m.read(offQueueDesc, 8) != 0 || m.read(offQueueEnable, 2) != 0 {
			t.Errorf("%s: queue 0 was set up", when)
		}
	}
	m.setQueue(0, 16, 0x1000, 0x2000, 0x3000)
	untouched("before FEATURES_OK")
	m.negotiate(virtio.FeatureVersion1)
	for _, size := range []uint64{0, 3, queueMax + 1, 2 * queueMax, 0xffff} {
		m.write(offQueueSize, 2, size)
		untouched(fmt.Sprintf("size %d", size))
	}
	for _, enable := range []uint64{0, 2, 0x101} {
		m.write(offQueueEnable, 2, enable)
		untouched(fmt.Sprintf("enable %#x", enable))
	}
	for _, w := range []struct {
		offset uint64
		n      int
	}{{offQueueSize, 1}, {offQueueSize, 4}, {offQueueDesc, 2}, {offQueueDesc + 1, 4}, {offQueueDesc + 2, 8}, {offQueueEnable, 1}, {offQueueEnable, 4}, {offQueueEnable, 8}} {
		m.write(w.offset, w.n, 0x0101010101010101)
		untouched(fmt.Sprintf("%d bytes at %#x", w.n, w.offset))
	}
	m.write(offQueueSelect, 2, 2) // there is no queue 2
	m.write(offQueueDesc, 8, 0x1000)
	m.write(offQueueEnable, 2, 1)
	if m.read(offQueueSize, 2) != 0 || m.read(offQueueDesc, 8) != 0 {
		t.Error("queue 2 exists")
	}

	m.setQueue(0, 16, 0x1000, 0x2000, 0x3000)
	changed := func() bool {
		m.write(offQueueSelect, 2, 0)
		m.write(offQueueSize, 2, 32)
		m.write(offQueueDesc, 8, 0x8000)
		m.write(offQueueEnable, 2, 0)
		return m.read(offQueueSize, 2) != 16 || m.read(offQueueDesc, 8) != 0x1000 || m.read(offQueueEnable, 2) != 1
	}
	if changed() {
		t.Error("an enabled queue was changed")
	}
	m.write(offStatus, 1, ready)
	if changed() {
		t.Error("a queue was changed after DRIVER_OK")
	}
	m.setQueue(1, 128, 0x4000, 0x5000, 0x6000)
	if m.read(offQueueEnable, 2) != 0 {
		t.Error("a queue was enabled after DRIVER_OK")
	}
}

func TestBadQueues(t *testing.T) {
	for name, q := range map[string][3]uint64{
		"unaligned table":    {0x1008, 0x2000, 0x3000},
		"unaligned driver":   {0x1000, 0x2001, 0x3000},
		"unaligned device":   {0x1000, 0x2000, 0x3002},
		"outside of memory":  {0x100000, 0x2000, 0x3000},
		"over the end":       {0xfff0, 0x2000, 0x3000},
		"address wraps":      {1<<64 - 16, 0x2000, 0x3000},
		"used ring is a BAR": {0x1000, 0x2000, windowStart},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.negotiate(virtio.FeatureVersion1)
			m.enableMSIX()
			m.write(offConfigVector, 2, 0)
			m.setQueue(1, 128, 0x4000, 0x5000, 0x6000)
			m.setQueue(0, 16, q[0], q[1], q[2])
			m.write(offStatus, 1, ready)
			if m.status()&statusNeedsReset == 0 || m.device.activation != nil || len(m.doorbells) != 0 {
				t.Errorf("status %#x, %d doorbells", m.status(), len(m.doorbells))
			}
			if !slices.Equal(m.messages, []uint32{0x40}) {
				t.Errorf("messages %#x, want the configuration vector's", m.messages)
			}
			m.start()
			if m.status() != ready {
				t.Errorf("status %#x after a reset and a good start", m.status())
			}
		})
	}
}
