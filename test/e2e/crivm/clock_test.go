//go:build e2e

package crivm

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/microvm-runtime/microvm/test/e2e/internal/pods"
)

// The guest's clock is the host's, and becomes so again within a minute when it is wrong. That is what a privileged container sees to here,
// and elsewhere that the host's clock is set.
func TestClockFollowsTheHost(t *testing.T) {
	n := pods.For(t)
	c := n.Pod(t, pods.PrivilegedPod).Run(t, pods.Privileged)
	// ahead is how far the clock is from the host's, as far as that is sure: a command takes its time, seconds are whole, and one more
	// is too little to look at.
	ahead := func(script string) time.Duration {
		t.Helper()
		before := time.Now().Add(-2 * time.Second)
		out := c.Get(t, script+"date +%s")
		after := time.Now().Add(time.Second)
		sec, err := strconv.ParseInt(out[strings.LastIndex(out, "\n")+1:], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		switch now := time.Unix(sec, 0); {
		case now.Before(before):
			return now.Sub(before)
		case now.After(after):
			return now.Sub(after)
		}
		return 0
	}
	if off := ahead(""); off != 0 {
		t.Errorf("after its start the guest's clock is %v ahead of the host's", off)
	}
	for _, by := range []int{1000, -1000} {
		if off := ahead(fmt.Sprintf("date -s @$(($(date +%%s) + %d)) >/dev/null; ", by)); off.Abs() < 900*time.Second {
			t.Fatalf("the clock was not set by %d s: it is %v ahead", by, off)
		}
		begin := time.Now()
		var off time.Duration
		for off = ahead(""); off != 0 && time.Since(begin) < 2*time.Minute; off = ahead("") {
			time.Sleep(time.Second)
		}
		if off != 0 {
			t.Fatalf("two minutes later the clock is %v ahead", off)
		}
		t.Logf("set by %d s, the clock is right again after %v", by, time.Since(begin).Round(time.Second))
	}
}
