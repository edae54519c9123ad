// Command tsckhz prints the frequency of this host's time stamp counter in kHz.
//
// QEMU's emulated processors have the host's counter. The kernel in there measures it against an emulated timer, and gets
// it wrong by a large factor when the host is so busy that QEMU does not run for seconds; so it is told.
package main

import (
	"fmt"
	"time"
)

func rdtsc() uint64

// sample reads clock and counter at nearly the same moment: of many attempts the one that took least.
func sample() (at time.Time, counter uint64) {
	best := time.Hour
	for range 1000 {
		before := time.Now()
		c := rdtsc()
		if took := time.Since(before); took < best {
			best, at, counter = took, before.Add(took/2), c
		}
	}
	return at, counter
}

func main() {
	at1, counter1 := sample()
	time.Sleep(100 * time.Millisecond)
	at2, counter2 := sample()
	fmt.Println(uint64(float64(counter2-counter1) / float64(at2.Sub(at1).Nanoseconds()) * 1e6))
}
