//go:build e2e

package k8s

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

func TestExec(t *testing.T) {
	s := newSpace(t)
	s.apply(t, sleeper("p", "", ""))
	s.ready(t, "p")
	if r := s.try("exec", "p", "--", "sh", "-c", "echo out; echo err >&2; exit 7"); r.stdout != "out\n" ||
		!strings.HasPrefix(r.stderr, "err\n") || r.code != 7 {
		t.Errorf("output and exit code: %s", r)
	}
	if r := s.tryInput("one\ntwo\n", "exec", "-i", "p", "--", "wc", "-l"); r.stdout != "2\n" || r.code != 0 {
		t.Errorf("standard input: %s", r)
	}
	if r := s.try("exec", "p", "--", "/no/such/program"); r.code == 0 || !strings.Contains(r.stderr, "/no/such/program") {
		t.Errorf("a program that is not there: %s", r)
	}
	large := make([]byte, 4<<20)
	_, _ = rand.Read(large)
	if r := s.tryInput(string(large), "exec", "-i", "p", "--", "cat"); r.stdout != string(large) || r.code != 0 {
		t.Errorf("4 MiB there and back: %d bytes, exit code %d, %s", len(r.stdout), r.code, r.stderr)
	}
}

// terminal runs kubectl on a terminal of its own, with what is typed into it.
func (s *space) terminal(t *testing.T, typed string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience())
	defer cancel()
	kubectl := s.command(ctx, args...)
	cmd := exec.CommandContext(ctx, "script", "-qefc", "stty rows 33 cols 111; "+quote(kubectl.Args), "/dev/null")
	cmd.Stdin = strings.NewReader(typed)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("kubectl %v on a terminal: %v: %s", args, err, out)
	}
	return string(out)
}

func quote(args []string) string {
	var b strings.Builder
	for _, a := range args {
		fmt.Fprintf(&b, "'%s' ", strings.ReplaceAll(a, "'", `'\''`))
	}
	return b.String()
}

func TestExecTerminal(t *testing.T) {
	s := newSpace(t)
	s.apply(t, sleeper("p", "", ""))
	s.ready(t, "p")
	// The size arrives shortly after the start.
	out := s.terminal(t, "until [ \"$(stty size)\" = '33 111' ]; do sleep 0.1; done; echo size $(stty size); tty; exit\n", "exec", "-it", "p", "--", "sh")
	if !strings.Contains(out, "size 33 111") || !strings.Contains(out, "/dev/pts/") {
		t.Errorf("on a terminal: %q", out)
	}
}

func TestAttach(t *testing.T) {
	s := newSpace(t)
	s.apply(t, script("p", "read line; echo got $line; read line; echo then $line", "stdin: true\nstdinOnce: true", ""))
	s.ready(t, "p")
	r := s.tryInput("first\nsecond\n", "attach", "-i", "p")
	if r.code != 0 {
		t.Errorf("attach: %s", r)
	}
	if state := s.ended(t, "p"); state.ExitCode != 0 {
		t.Errorf("after its input: %v", state)
	}
	if log := s.logs(t, "p"); log != "got first\nthen second\n" {
		t.Errorf("log: %q", log)
	}
}

func TestLogs(t *testing.T) {
	s := newSpace(t)
	s.apply(t, sleeper("p", "", ""))
	s.apply(t, script("talker", "for i in $(seq 5); do echo line $i; sleep 0.5; done; echo to stderr >&2", "", ""))
	s.until(t, "the talker has started", func() bool { return strings.Contains(s.try("logs", "talker").stdout, "line 1") })
	// Until the container ends.
	if got := s.logs(t, "-f", "talker"); got != "line 1\nline 2\nline 3\nline 4\nline 5\nto stderr\n" {
		t.Errorf("logs -f: %q", got)
	}
	if got := s.logs(t, "--tail=2", "talker"); got != "line 5\nto stderr\n" {
		t.Errorf("logs --tail: %q", got)
	}
	if got := s.logs(t, "--timestamps", "--tail=1", "talker"); !strings.HasPrefix(got, "20") || !strings.HasSuffix(got, "Z to stderr\n") {
		t.Errorf("logs --timestamps: %q", got)
	}
}

// A container that fails is started again, in the pod it was in, and the log of the one before is still there.
func TestRestart(t *testing.T) {
	s := newSpace(t)
	s.apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: p}
spec:
  terminationGracePeriodSeconds: 1
  volumes: [{name: v, emptyDir: {}}]
  containers:
  - name: main
    image: %s
    volumeMounts: [{name: v, mountPath: /v}]
    command: [sh, -c, 'echo run >>/v/runs; n=$(wc -l </v/runs); echo run $n; [ $n -gt 1 ] || exit 3; exec sleep infinity']
`, box))
	s.restarted(t, "p")
	c := s.pod(t, "p").Status.ContainerStatuses[0]
	if last := c.LastTerminationState.Terminated; last == nil || last.ExitCode != 3 || last.Reason != "Error" {
		t.Errorf("the run before: %v", last)
	}
	s.until(t, "the second run has spoken", func() bool { return s.logs(t, "p") == "run 2\n" })
	if got := s.logs(t, "--previous", "p"); got != "run 1\n" {
		t.Errorf("log of the run before: %q", got)
	}
}

func TestCopy(t *testing.T) {
	s := newSpace(t)
	s.apply(t, sleeper("p", "", ""))
	s.ready(t, "p")
	contents := make([]byte, 3<<20)
	_, _ = rand.Read(contents)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "there"), contents, 0o644); err != nil {
		t.Fatal(err)
	}
	s.kubectl(t, "cp", filepath.Join(dir, "there"), "p:/tmp/there")
	s.kubectl(t, "cp", "p:/tmp/there", filepath.Join(dir, "back"))
	if back, err := os.ReadFile(filepath.Join(dir, "back")); err != nil || !bytes.Equal(back, contents) {
		t.Errorf("a file there and back: %d bytes, %v", len(back), err)
	}
}

// Ports on all addresses, on IPv6 ones, and on the pod's loopback are reached alike.
func TestPortForward(t *testing.T) {
	s := newSpace(t)
	s.apply(t, sleeper("p", "", ""))
	s.ready(t, "p")
	s.sh(t, "p", `mkdir /w && cd /w && for a in 0.0.0.0:81 127.0.0.1:82 [::]:83; do echo at $a >index-${a##*:}; httpd -p $a -h /w; done`)
	for _, port := range []string{"81", "82", "83"} {
		if got := s.forward(t, "pod/p", port, "/index-"+port); !strings.HasSuffix(got, ":"+port+"\n") {
			t.Errorf("port %s says %q", port, got)
		}
	}
}

// forward fetches a page by kubectl port-forward.
func (s *space) forward(t *testing.T, from, port, path string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience())
	defer cancel()
	cmd := s.command(ctx, "port-forward", "--address", "127.0.0.1", from, ":"+port)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	line, _ := bufio.NewReader(stdout).ReadString('\n')
	var local, remote int
	if _, err := fmt.Sscanf(line, "Forwarding from 127.0.0.1:%d -> %d", &local, &remote); err != nil {
		t.Fatalf("port-forward says %q (%v): %s", line, err, stderr.String())
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d%s", local, path), nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatalf("port %s: %v: %s", port, err, stderr.String())
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// An ephemeral container joins a pod that runs, and sees the processes of the container it is to look at.
func TestDebug(t *testing.T) {
	s := newSpace(t)
	s.apply(t, sleeper("p", "", ""))
	s.ready(t, "p")
	s.kubectl(t, "debug", "p", "--image", box, "--image-pull-policy", "Never", "--container", "look", "--target", "main", "--profile", "general", "--",
		"sh", "-c", "until pgrep -x sleep; do sleep 0.1; done; echo found; cat /proc/$(pgrep -x -o sleep)/root/etc/passwd | head -n 1")
	s.until(t, "the ephemeral container has looked", func() bool {
		return strings.HasSuffix(s.try("logs", "p", "-c", "look").stdout, "found\nroot:x:0:0:root:/root:/bin/sh\n")
	})
	s.want(t, "p", "echo still here", "still here")
}

// What kubectl top is made of: the kubelet's summary has the processor time, memory and disk of a pod and its container. (The pod's
// network is cAdvisor's there, which looks at processes of the host.)
func TestStats(t *testing.T) {
	s := newSpace(t)
	s.apply(t, sleeper("p", "", ""))
	s.ready(t, "p")
	s.sh(t, "p", "dd if=/dev/zero of=/file bs=1M count=3 2>/dev/null; head -c 20000000 /dev/zero | md5sum")
	type usage struct{ UsageNanoCores, UsageCoreNanoSeconds, WorkingSetBytes, UsedBytes *uint64 }
	type summary struct {
		Pods []struct {
			PodRef     struct{ Name, Namespace string }
			Containers []struct {
				Name                string
				CPU, Memory, Rootfs usage
			}
			CPU, Memory usage
		}
	}
	above := func(v *uint64, least uint64) bool { return v != nil && *v >= least }
	node := s.pod(t, "p").Spec.NodeName
	var raw string
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the last summary: %s", raw)
		}
	})
	s.until(t, "the summary has the pod", func() bool {
		raw = s.kubectl(t, "get", "--raw", "/api/v1/nodes/"+node+"/proxy/stats/summary")
		var sum summary
		if err := json.Unmarshal([]byte(raw), &sum); err != nil {
			t.Fatalf("%v: %s", err, raw)
		}
		for _, p := range sum.Pods {
			if p.PodRef.Name != "p" || p.PodRef.Namespace != s.name || len(p.Containers) != 1 {
				continue
			}
			c := p.Containers[0]
			return above(c.CPU.UsageCoreNanoSeconds, 1e6) && c.CPU.UsageNanoCores != nil && above(c.Memory.WorkingSetBytes, 4096) &&
				above(c.Rootfs.UsedBytes, 3<<20) && above(p.CPU.UsageCoreNanoSeconds, 1e6) && above(p.Memory.WorkingSetBytes, 4096)
		}
		return false
	})
}

// What metrics-server reads of a node, and kubectl top of that: the pod and its container are in it.
func TestResourceMetrics(t *testing.T) {
	s := newSpace(t)
	s.apply(t, sleeper("p", "", ""))
	s.ready(t, "p")
	s.sh(t, "p", "head -c 20000000 /dev/zero | md5sum")
	node := s.pod(t, "p").Spec.NodeName
	var raw string
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the last metrics: %s", raw)
		}
	})
	ofPod := fmt.Sprintf(`namespace="%s",pod="p"}`, s.name)
	ofContainer := `container="main",` + ofPod
	s.until(t, "the metrics have the pod", func() bool {
		raw = s.kubectl(t, "get", "--raw", "/api/v1/nodes/"+node+"/proxy/metrics/resource")
		for metric, least := range map[string]float64{
			"container_cpu_usage_seconds_total{" + ofContainer:  0.001,
			"container_memory_working_set_bytes{" + ofContainer: 4096,
			"container_start_time_seconds{" + ofContainer:       1e9, // since 1970
			"pod_cpu_usage_seconds_total{" + ofPod:              0.001,
			"pod_memory_working_set_bytes{" + ofPod:             4096,
		} {
			// A line is "NAME{LABELS} VALUE", most also have a time behind it.
			_, rest, _ := strings.Cut(raw, "\n"+metric+" ")
			fields := strings.Fields(rest)
			if len(fields) == 0 {
				return false
			}
			if value, err := strconv.ParseFloat(fields[0], 64); err != nil || value < least {
				return false
			}
		}
		return true
	})
}
