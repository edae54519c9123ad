package agent

import (
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// drainPoll is how often drain looks at an output that has not ended with
	// its process.
	drainPoll = 10 * time.Millisecond
	// drainGrace is how long an output stays open after a process has ended,
	// and all it wrote was delivered, for others that still hold the output:
	// what an exec has put into the background. containerd waits up to 2 s, but
	// after it has told the exit; here the exit itself waits.
	drainGrace = 500 * time.Millisecond
	// drainStall is how long a reader on the host may take nothing while the
	// exit of the process waits for it.
	drainStall = 30 * time.Second
)

// terminalBuffers is more than a pseudo terminal holds of what was written to
// it: 64 KiB of the driver's (drivers/tty/tty_buffer.c, TTYB_DEFAULT_MEM_LIMIT)
// and 4 KiB of the line discipline's. TIOCINQ sees the latter only.
const terminalBuffers = 128 << 10

// output carries stdout, stderr or a terminal's output from its process to its
// stream.
type output struct {
	dst streamConn // nil: thrown away
	src *os.File
	// hidden is how many bytes src may hold that TIOCINQ (FIONREAD) does not show.
	hidden int64

	taken tally
	// delivered counts bytes that dst has, or that were thrown away because
	// dst is broken.
	delivered atomic.Int64
	done      chan struct{}
}

func newOutput(dst streamConn, src *os.File, hidden int64) *output {
	return &output{dst: dst, src: src, hidden: hidden, done: make(chan struct{})}
}

// run carries the output until its end: all who could write have closed it, or
// drain cut it.
func (o *output) run() {
	broken := o.dst == nil
	for {
		buf, n, err := readReady(o.src, &o.taken)
		if n == 0 || err != nil {
			// A terminal ends with EIO when its last user is gone, stdio's peer
			// among them.
			break
		}
		if !broken {
			// A container must not notice that nobody listens any more: it
			// would be killed by SIGPIPE.
			_, err := o.dst.Write((*buf)[:n])
			broken = err != nil
		}
		o.delivered.Add(int64(n))
		copyBuffers.Put(buf)
	}
	o.src.Close()
	if o.dst != nil {
		o.dst.CloseWrite()
		go finish(o.dst)
	}
	close(o.done)
}

// drain waits until the stream has all that the process, which has ended, had
// written, and ends the stream.
func (o *output) drain() {
	// What was written before the process ended, but for hidden bytes. Someone
	// else may go on writing without an end.
	o.taken.Lock()
	limit := o.taken.n + o.pending()
	o.taken.Unlock()

	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	delivered, progress := o.delivered.Load(), time.Now()
	var complete time.Time
	for {
		select {
		case <-o.done:
			return
		case now := <-tick.C:
			if n := o.delivered.Load(); n != delivered {
				delivered, progress = n, now
			}
			if complete.IsZero() && delivered >= limit+o.hidden {
				complete = now
			}
			switch {
			case !complete.IsZero() && now.Sub(complete) > drainGrace,
				delivered >= limit && now.Sub(progress) > drainGrace,
				now.Sub(progress) > drainStall:
				o.cut()
			}
		}
	}
}

// cut ends the output although someone could still write to it.
func (o *output) cut() {
	o.src.SetReadDeadline(longPast)
	if o.dst != nil {
		o.dst.SetWriteDeadline(longPast)
	}
}

// pending returns how many bytes wait to be taken from src.
func (o *output) pending() int64 {
	raw, err := o.src.SyscallConn()
	if err != nil {
		return 0
	}
	var n int
	raw.Control(func(fd uintptr) {
		n, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ)
	})
	return int64(n)
}
