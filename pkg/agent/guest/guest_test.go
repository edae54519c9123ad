package guest

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestSysctlPath(t *testing.T) {
	for name, want := range map[string]string{
		"net.ipv4.ip_forward":            "net/ipv4/ip_forward",
		"net/ipv4/ip_forward":            "net/ipv4/ip_forward",
		"net.ipv4.conf.eth0/1.rp_filter": "net/ipv4/conf/eth0.1/rp_filter",
		"net/ipv4/conf/eth0.1/rp_filter": "net/ipv4/conf/eth0.1/rp_filter",
		"kernel":                         "kernel",
		"":                               "",
		"/etc/passwd":                    "",
		"../x":                           "",
		"net/../../etc/passwd":           "",
		"net.//.x":                       "",
		"net..ipv4":                      "",
		"net/ipv4/":                      "",
		"net.ipv4./..":                   "",
	} {
		got, err := sysctlPath(name)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q is %q, %v; want %q", name, got, err, want)
		}
	}
}

func TestConsole(t *testing.T) {
	var out bytes.Buffer
	now := time.Unix(1000, 0)
	c := NewConsole(&out)
	c.now = func() time.Time { return now }
	write := func(s string) string {
		t.Helper()
		out.Reset()
		if n, err := c.Write([]byte(s)); n != len(s) || err != nil {
			t.Fatal(n, err)
		}
		return out.String()
	}
	if got := write("one\n"); got != "agent: one\n" {
		t.Errorf("%q", got)
	}
	if got := write("two\nlines\n"); got != "agent: two\\nlines\n" {
		t.Errorf("%q", got)
	}
	if got := write(strings.Repeat("x", 10*maxLine)); len(got) > maxLine+20 || !strings.HasSuffix(got, "x ...\n") {
		t.Errorf("%d bytes: %q", len(got), got)
	}
	printed := 0
	for i := range 10 * lineBurst {
		if write(fmt.Sprint(i)) != "" {
			printed++
		}
	}
	if printed != lineBurst-3 {
		t.Errorf("%d lines at once", printed+3)
	}
	now = now.Add(lineInterval)
	if got, want := write("later"), fmt.Sprintf("agent: %d lines left out\nagent: later\n", 10*lineBurst-printed); got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got := write("too soon"); got != "" {
		t.Errorf("%q", got)
	}
	now = now.Add(time.Hour)
	for i := range lineBurst {
		if write(fmt.Sprint(i)) == "" {
			t.Fatalf("only %d lines after an hour", i)
		}
	}
}
