package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	iperfSeconds = 8
	iperfPort    = "5201" // iperf3's own
	pings        = 100
	wrkSeconds   = 10
)

// podNetwork measures the way from a pod to the host and back, and to another
// pod of the same kind, with iperf3 and ping.
func (b *bench) podNetwork(n *node, handler string) (err error) {
	var pods [2]*pod
	var tools, boxes [2]string // containers with iperf3, and with ping
	for i := range pods {
		if pods[i], err = n.run(handler); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, pods[i].remove()) }()
		if tools[i], err = pods[i].start(debian, "iperf3", &cri.ContainerConfig{Command: []string{"iperf3", "--server"}}); err != nil {
			return err
		}
		if boxes[i], err = pods[i].start(box, "ping", &cri.ContainerConfig{Command: []string{"sleep", "1000000"}}); err != nil {
			return err
		}
	}
	other, err := pods[1].address()
	if err != nil {
		return err
	}
	host := exec.Command("iperf3", "--server", "--bind", hostAddress)
	if err := host.Start(); err != nil {
		return err
	}
	defer func() {
		_ = host.Process.Kill()
		_ = host.Wait()
	}()
	servers := []string{net.JoinHostPort(hostAddress, iperfPort), net.JoinHostPort(other, iperfPort)}
	for _, address := range servers {
		if err := awaitServer(address); err != nil {
			return err
		}
	}
	for _, way := range []struct {
		name, address string
		options       []string
	}{
		{"pod to host", hostAddress, nil},
		{"host to pod", hostAddress, []string{"--reverse"}},
		{"pod to pod", other, nil},
	} {
		begin, err := cpuSeconds()
		if err != nil {
			return err
		}
		out, err := n.execute(tools[0], append([]string{"iperf3", "--json", "--client", way.address, "--time", strconv.Itoa(iperfSeconds)}, way.options...)...)
		if err != nil {
			return fmt.Errorf("%s: %w", way.name, err)
		}
		end, err := cpuSeconds()
		if err != nil {
			return err
		}
		var report struct {
			End struct {
				Received struct {
					Bytes         float64 `json:"bytes"`
					BitsPerSecond float64 `json:"bits_per_second"`
				} `json:"sum_received"`
			} `json:"end"`
		}
		if err := json.Unmarshal([]byte(out), &report); err != nil {
			return fmt.Errorf("%s: iperf3: %w", way.name, err)
		}
		received := report.End.Received
		if received.Bytes == 0 {
			return fmt.Errorf("%s: iperf3 has transferred nothing", way.name)
		}
		b.add("pod network", way.name, handler, "Mbit/s", received.BitsPerSecond/1e6)
		b.add("pod network", way.name+": the host's processors", handler, "s/GB", (end-begin)/received.Bytes*1e9)
	}
	for _, way := range []struct{ name, address string }{{"pod to host", hostAddress}, {"pod to pod", other}} {
		out, err := n.execute(boxes[0], "ping", "-q", "-i", "0.02", "-c", strconv.Itoa(pings), way.address)
		if err != nil {
			return err
		}
		// round-trip min/avg/max = 0.1/0.2/0.3 ms
		times := regexp.MustCompile(`min/avg/max = ([0-9.]+)/([0-9.]+)/`).FindStringSubmatch(out)
		if times == nil {
			return fmt.Errorf("ping said: %q", out)
		}
		average, err := strconv.ParseFloat(times[2], 64)
		if err != nil {
			return err
		}
		b.add("pod network", way.name+": round trip", handler, "ms", average)
	}
	return nil
}

// podWeb measures nginx in a pod, by a port of the host's: the node translates
// the address, as it does for a Service.
func (b *bench) podWeb(n *node, handler string) (err error) {
	p, err := n.run(handler, &cri.PortMapping{Protocol: cri.Protocol_TCP, ContainerPort: 80, HostPort: webPort})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.remove()) }()
	if _, err := p.start(web, "nginx", &cri.ContainerConfig{}); err != nil {
		return err
	}
	address := net.JoinHostPort(hostAddress, strconv.Itoa(webPort))
	if err := awaitServer(address); err != nil {
		return err
	}
	out, err := exec.Command("wrk", "--threads", "1", "--connections", "8", "--duration", fmt.Sprintf("%ds", wrkSeconds),
		"--latency", "http://"+address+"/").CombinedOutput()
	if err != nil {
		return fmt.Errorf("wrk: %w: %s", err, out)
	}
	rate := regexp.MustCompile(`Requests/sec:\s*([0-9.]+)`).FindSubmatch(out)
	if rate == nil || strings.Contains(string(out), "Non-2xx") {
		return fmt.Errorf("wrk said: %q", out)
	}
	requests, err := strconv.ParseFloat(string(rate[1]), 64)
	if err != nil {
		return err
	}
	b.add("pod network", "nginx behind a port of the host's, under wrk", handler, "1/s", requests)
	return nil
}

// awaitServer waits until somebody listens.
func awaitServer(address string) error {
	for begin := time.Now(); ; time.Sleep(100 * time.Millisecond) {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			return conn.Close()
		}
		if time.Since(begin) > startTimeout {
			return err
		}
	}
}

// cpuSeconds is how long the host's processors were busy so far, guests included.
func cpuSeconds() (float64, error) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	// cpu user nice system idle iowait irq softirq steal guest guest_nice, in
	// hundredths of a second; user has the guests' time in it, proc(5).
	line, _, _ := strings.Cut(string(text), "\n")
	fields := strings.Fields(line)
	if len(fields) < 9 || fields[0] != "cpu" {
		return 0, fmt.Errorf("/proc/stat begins with %q", line)
	}
	var busy float64
	for i, f := range fields[1:9] {
		v, err := strconv.ParseFloat(f, 64)
		if err != nil {
			return 0, err
		}
		if i != 3 && i != 4 {
			busy += v / 100
		}
	}
	return busy, nil
}
