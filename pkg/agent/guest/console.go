package guest

import (
	"bytes"
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	// maxLine bounds a line of the log.
	maxLine = 1024
	// lineBurst lines may come at once, and one more each lineInterval:
	// containers can make the agent log, and the console is slow and read by
	// the host.
	lineBurst    = 100
	lineInterval = 100 * time.Millisecond
)

// Console is the agent's log on the guest's console: short lines and not too
// many of them. Each Write is one record. It may be used by several goroutines.
type Console struct {
	w   io.Writer
	now func() time.Time

	mu      sync.Mutex
	full    time.Time // when there is room for lineBurst lines again
	skipped int
}

// NewConsole returns a Console which writes to w.
func NewConsole(w io.Writer) *Console {
	return &Console{w: w, now: time.Now}
}

// Write writes a record as one line, or leaves it out.
func (c *Console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	if c.full.Before(now) {
		c.full = now
	}
	if c.full.Sub(now) > (lineBurst-1)*lineInterval {
		c.skipped++
		return len(p), nil
	}
	c.full = c.full.Add(lineInterval)
	var line bytes.Buffer
	if c.skipped > 0 {
		fmt.Fprintf(&line, "agent: %d lines left out\n", c.skipped)
		c.skipped = 0
	}
	record := bytes.TrimRight(p, "\n")
	if len(record) > maxLine {
		record = append(record[:maxLine:maxLine], " ..."...)
	}
	line.WriteString("agent: ")
	line.Write(bytes.ReplaceAll(record, []byte("\n"), []byte(`\n`)))
	line.WriteByte('\n')
	if _, err := c.w.Write(line.Bytes()); err != nil {
		return 0, err
	}
	return len(p), nil
}
