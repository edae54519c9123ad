package agent

import "testing"

func TestSocketMemory(t *testing.T) {
	proc := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		writeBelow(t, proc, name, text)
	}
	const (
		tcp, udp = "sys/net/ipv4/tcp_mem", "sys/net/ipv4/udp_mem"
		// As Linux 6.12 has it, shortened.
		boot = `Node 0, zone      DMA
  pages free     0
        boost    0
        min      0
        low      0
        high     0
        spanned  0
        managed  0
        cma      0
Node 0, zone    DMA32
  pages free     116000
        high     1000
        managed  123800
        protection: (0, 0, 0, 0)
  pagesets
    cpu: 0
              count:    0
              high:     880
              high_min: 880
Node 0, zone  Movable
        high     0
        managed  0
`
		grown = boot + `Node 0, zone   Normal
        high     2000
        managed  124800
Node 0, zone  Movable
        high     5000
        managed  900000
`
	)
	write("zoneinfo", boot)
	write(tcp, "5754\t7675\t11508\n")
	write(udp, "11511\t15350\t23022\n")
	m, err := newSocketMemory(proc)
	if err != nil {
		t.Fatal(err)
	}
	check := func(what, wantTCP, wantUDP string) {
		t.Helper()
		if err := m.follow(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		for name, want := range map[string]string{"tcp_mem": wantTCP, "udp_mem": wantUDP} {
			got, err := m.read(name)
			if err != nil || got != want {
				t.Errorf("%s: %s is %q, %v, want %q", what, name, got, err, want)
			}
		}
	}
	check("as at the start", "5754 7675 11508", "11511 15350 23022")
	write("zoneinfo", grown)
	check("grown", "11511 15350 23022", "23025 30700 46050")
	write(tcp, "1 2 3\n")
	write("zoneinfo", boot)
	check("somebody wants something else", "1 2 3", "11511 15350 23022")

	for _, bad := range []string{"", "Node 0, zone Normal\n high x\n", "Node 0, zone Movable\n managed 5\n"} {
		write("zoneinfo", bad)
		if err := m.follow(); err == nil {
			t.Errorf("zoneinfo %q was understood", bad)
		}
	}
	if _, err := newSocketMemory(t.TempDir()); err == nil {
		t.Error("there are limits where there is nothing")
	}
}
