package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// socketMemory keeps the limits of what all sockets of a protocol may hold in
// proportion to the memory: the kernel sets them at its start only, so that a
// guest that has grown from 512 MiB to 8 GiB would have 45 MiB for all of TCP.
type socketMemory struct {
	proc string // /proc
	// set are the limits as the kernel or we have set them. Where there is
	// something else, somebody wants it.
	set map[string]string
}

// socketShares say of which part of the memory a limit is a page for a page:
// tcp_init_mem in net/ipv4/tcp.c, udp_init in net/ipv4/udp.c.
var socketShares = map[string]uint64{"tcp_mem": 16, "udp_mem": 8}

func newSocketMemory(proc string) (*socketMemory, error) {
	m := &socketMemory{proc: proc, set: map[string]string{}}
	for name := range socketShares {
		now, err := m.read(name)
		if err != nil {
			return nil, fmt.Errorf("limits of sockets: %w", err)
		}
		m.set[name] = now
	}
	return m, nil
}

func (m *socketMemory) file(name string) string {
	return filepath.Join(m.proc, "sys/net/ipv4", name)
}

// read returns a limit's three numbers, with a space between them.
func (m *socketMemory) read(name string) (string, error) {
	text, err := os.ReadFile(m.file(name))
	return strings.Join(strings.Fields(string(text)), " "), err
}

// follow sets the limits for the memory that there is now.
func (m *socketMemory) follow() error {
	pages, err := m.pages()
	if err != nil {
		return err
	}
	var failed error
	for name, share := range socketShares {
		now, err := m.read(name)
		if err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		if now != m.set[name] {
			continue
		}
		// Below the first nothing is limited, at the second sockets get less,
		// and there is no more than the third.
		limit := max(pages/share, 128)
		low := limit / 4 * 3
		value := fmt.Sprint(low, limit, 2*low)
		if err := os.WriteFile(m.file(name), []byte(value), 0); err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		m.set[name] = value
	}
	return failed
}

// pages counts those that sockets can have, as nr_free_buffer_pages in
// mm/page_alloc.c does: plugged memory of the zone Movable is not for them.
func (m *socketMemory) pages() (uint64, error) {
	info, err := os.ReadFile(filepath.Join(m.proc, "zoneinfo"))
	if err != nil {
		return 0, err
	}
	var pages, high uint64
	ours := false
	for line := range strings.Lines(string(info)) {
		f := strings.Fields(line)
		switch {
		case len(f) == 4 && f[0] == "Node": // Node 0, zone Normal
			ours = f[3] != "Movable" && f[3] != "Device"
		case len(f) == 2 && ours && (f[0] == "high" || f[0] == "managed"):
			n, err := strconv.ParseUint(f[1], 10, 64)
			if err != nil {
				return 0, fmt.Errorf("zoneinfo: %q: %w", line, err)
			}
			if f[0] == "high" {
				high = n // comes before
			} else {
				pages += n - min(n, high)
			}
		}
	}
	if pages == 0 {
		return 0, errors.New("zoneinfo names no memory")
	}
	return pages, nil
}
