// Package alloctest bounds what tests may allocate: what a guest claims of a
// length must not make a parser allocate as much.
package alloctest

import (
	"runtime/metrics"
	"testing"
)

// allocated is how many bytes the process has allocated on its heap since it began,
// whether they are in use or not.
func allocated() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// Limit returns a function that fails the test if the process has allocated more
// bytes than that in between.
func Limit(t testing.TB, most uint64) (check func()) {
	before := allocated()
	return func() {
		t.Helper()
		if n := allocated() - before; n > most {
			t.Errorf("%d bytes were allocated, at most %d are fine", n, most)
		}
	}
}
