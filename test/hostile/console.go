package main

import (
	"bytes"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// consoleFlood fills every way to the console, with lines, with what is no line, and with control characters.
func consoleFlood([]string) (attack, error) {
	// All of the kernel's log goes to the console, and all of /dev/kmsg to the log.
	for file, value := range map[string]string{"/proc/sys/kernel/printk": "8", "/proc/sys/kernel/printk_devkmsg": "on\n"} {
		if err := os.WriteFile(file, []byte(value), 0); err != nil {
			return nil, err
		}
	}
	var ways []*os.File
	for _, name := range []string{"/dev/console", "/dev/hvc0", "/dev/kmsg", "/dev/ttyS0"} {
		f, err := os.OpenFile(name, os.O_WRONLY|unix.O_NOCTTY, 0)
		if err != nil {
			continue // not there in every guest
		}
		ways = append(ways, f)
	}
	if len(ways) < 2 {
		return nil, fmt.Errorf("the guest has %d consoles", len(ways))
	}
	lines := bytes.Repeat([]byte("console \x1b[2J\x00\x07 flood\n"), 40)
	noLine := bytes.Repeat([]byte{'x'}, 900)
	return func(int) (string, error) {
		const each = 8 << 10
		written := make([]int, len(ways))
		var all sync.WaitGroup
		for i, f := range ways {
			all.Go(func() {
				for n := 0; written[i] < each && n < each; n++ {
					b := lines
					if n%2 == 1 {
						b = noLine
					}
					w, err := f.Write(b[:min(len(b), 900)]) // the most of a record of /dev/kmsg
					if err != nil {
						return
					}
					written[i] += w
				}
			})
		}
		all.Wait()
		var did string
		for i, f := range ways {
			did += fmt.Sprintf("%s %d KiB ", f.Name(), written[i]>>10)
		}
		return did, nil
	}, nil
}
