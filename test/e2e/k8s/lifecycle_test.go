//go:build e2e

package k8s

import (
	"fmt"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// Init containers run one after the other before the others; a sidecar is one that stays, and ends after them.
func TestInitContainers(t *testing.T) {
	s := newSpace(t)
	s.apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: p}
spec:
  restartPolicy: Never
  volumes: [{name: v, emptyDir: {}}]
  initContainers:
  - {name: first, image: %[1]s, command: [sh, -c, 'sleep 1; echo first >>/v/order'], volumeMounts: [{name: v, mountPath: /v}]}
  - name: sidecar
    image: %[1]s
    restartPolicy: Always
    command: [sh, -c, 'trap "echo sidecar ends; exit 0" TERM; echo sidecar >>/v/order; touch /tmp/up; while :; do sleep 0.1; done']
    startupProbe: {exec: {command: [test, -e, /tmp/up]}, periodSeconds: 1, failureThreshold: 100, timeoutSeconds: 60}
    volumeMounts: [{name: v, mountPath: /v}]
  - {name: second, image: %[1]s, command: [sh, -c, 'echo second >>/v/order'], volumeMounts: [{name: v, mountPath: /v}]}
  containers:
  - {name: main, image: %[1]s, command: [sh, -c, 'cat /v/order'], volumeMounts: [{name: v, mountPath: /v}]}
`, box))
	if state := s.ended(t, "p"); state.ExitCode != 0 {
		t.Errorf("the pod: %v", state)
	}
	if got := s.logs(t, "p", "-c", "main"); got != "first\nsidecar\nsecond\n" {
		t.Errorf("order: %q", got)
	}
	if got := s.logs(t, "p", "-c", "sidecar"); got != "sidecar ends\n" {
		t.Errorf("the sidecar says %q", got)
	}
}

// The hook before the stop, then SIGTERM once, then up to the grace period to end.
func TestTermination(t *testing.T) {
	s := newSpace(t)
	s.apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: p}
spec:
  terminationGracePeriodSeconds: 300
  containers:
  - name: main
    image: %s
    command:
    - sh
    - -c
    - |
      trap 'n=$((n+1)); echo TERM $n; sleep 3; echo ended; exit 0' TERM
      echo ready
      while :; do sleep 0.1; done
    lifecycle:
      postStart: {exec: {command: [sh, -c, 'echo started >/proc/1/fd/1']}}
      preStop: {exec: {command: [sh, -c, 'echo stopping >/proc/1/fd/1; sleep 1']}}
`, box))
	s.ready(t, "p")
	s.until(t, "the container is ready", func() bool { return strings.Contains(s.try("logs", "p").stdout, "ready\n") })
	log := make(chan string)
	go func() { log <- s.try("logs", "-f", "p").stdout }()
	s.kubectl(t, "delete", "pod", "p", "--timeout", patience().String())
	got := <-log
	if !strings.HasSuffix(got, "stopping\nTERM 1\nended\n") || !strings.Contains(got, "started\n") {
		t.Errorf("log: %q", got)
	}
}

// What does not end by itself is killed after the grace period.
func TestGracePeriod(t *testing.T) {
	s := newSpace(t)
	s.apply(t, script("p", "trap '' TERM; echo ready; while :; do sleep 0.1; done", "", "terminationGracePeriodSeconds: 2"))
	s.until(t, "the container is ready", func() bool { return s.try("logs", "p").stdout == "ready\n" })
	s.kubectl(t, "delete", "pod", "p", "--timeout", patience().String())
}

func TestTerminationMessage(t *testing.T) {
	s := newSpace(t)
	s.apply(t, script("file", "echo -n by file >/message; exit 4", "terminationMessagePath: /message", ""))
	s.apply(t, script("log", "echo by log; exit 5", "terminationMessagePolicy: FallbackToLogsOnError", ""))
	if state := s.ended(t, "file"); state.Message != "by file" || state.ExitCode != 4 || state.Reason != "Error" {
		t.Errorf("by file: %v", state)
	}
	if state := s.ended(t, "log"); state.Message != "by log\n" || state.ExitCode != 5 {
		t.Errorf("by log: %v", state)
	}
}

func TestOutOfMemory(t *testing.T) {
	s := newSpace(t)
	s.apply(t, script("p", "exec tail /dev/zero", "resources: {limits: {memory: 32Mi}}", ""))
	if state := s.ended(t, "p"); state.ExitCode != 137 || state.Reason != "OOMKilled" {
		t.Errorf("state: %v", state)
	}
}

// A liveness probe that fails has the container restarted.
func TestLivenessProbe(t *testing.T) {
	s := newSpace(t)
	s.apply(t, sleeper("p", `livenessProbe: {exec: {command: [test, "!", -e, /sick]}, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 60}`, ""))
	s.ready(t, "p")
	s.sh(t, "p", "touch /sick")
	s.restarted(t, "p")
}

// Containers of a pod share what a pod shares, and nothing else.
func TestSharedNamespaces(t *testing.T) {
	s := newSpace(t)
	const two = `
apiVersion: v1
kind: Pod
metadata: {name: %[1]s}
spec:
  shareProcessNamespace: %[2]t
  hostname: theirs
  terminationGracePeriodSeconds: 1
  containers:
  - {name: one, image: %[3]s, command: [sh, -c, 'httpd -p 127.0.0.1:80 -h /etc; exec sleep 1111111']}
  - {name: two, image: %[3]s, command: [sleep, infinity]}
`
	s.apply(t, fmt.Sprintf(two, "apart", false, box))
	s.apply(t, fmt.Sprintf(two, "together", true, box))
	s.ready(t, "apart", "together")
	for pod, seen := range map[string]string{"apart": "0", "together": "1"} {
		s.want(t, pod+" -c two", "pgrep -f '^sleep 1111111' | wc -l; hostname; wget -qO- -T 60 http://127.0.0.1/passwd | head -n 1", seen+"\ntheirs\nroot:x:0:0:root:/root:/bin/sh")
	}
}

// The limits of a container can be changed while it runs, and its virtual machine grows and shrinks with them.
func TestResize(t *testing.T) {
	s := newSpace(t)
	s.apply(t, sleeper("p", "resources: {requests: {cpu: 100m, memory: 64Mi}, limits: {cpu: 500m, memory: 128Mi}}", ""))
	s.ready(t, "p")
	const limits = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/cpu/cpu.cfs_quota_us"
	resized := func(cpu, memory string, quota, bytes int) {
		t.Helper()
		s.kubectl(t, "patch", "pod", "p", "--subresource", "resize", "--patch",
			fmt.Sprintf(`{"spec":{"containers":[{"name":"main","resources":{"limits":{"cpu":"%s","memory":"%s"}}}]}}`, cpu, memory))
		s.until(t, "the limits are "+cpu+" and "+memory, func() bool {
			got := strings.Fields(s.sh(t, "p", limits))
			return len(got) >= 2 && got[0] == strconv.Itoa(bytes) && got[1] == strconv.Itoa(quota)
		})
		s.until(t, "the pod's status has them", func() bool {
			p := s.pod(t, "p")
			for _, c := range p.Status.Conditions {
				if c.Type == corev1.PodResizePending || c.Type == corev1.PodResizeInProgress {
					return false
				}
			}
			r := p.Status.ContainerStatuses[0].Resources
			return r != nil && r.Limits.Memory().Value() == int64(bytes) && r.Limits.Cpu().MilliValue() == int64(quota/100)
		})
	}
	machine := func() (processors string, mib int) {
		t.Helper()
		seen := strings.Fields(s.sh(t, "p", "nproc; awk '/^MemTotal/ { print $2 }' /proc/meminfo"))
		if len(seen) != 2 {
			t.Fatalf("the machine: %q", seen)
		}
		kib, err := strconv.Atoi(seen[1])
		if err != nil {
			t.Fatal(err)
		}
		return seen[0], kib >> 10
	}
	processors, small := machine()
	resized("1500m", "256Mi", 150000, 256<<20)
	resized("2", "1Gi", 200000, 1<<30)
	if runtimeClass != "" {
		if processors != "1" || small >= 1024 {
			t.Errorf("the machine has %s processors and %d MiB to begin with", processors, small)
		}
		s.until(t, "the machine has grown", func() bool {
			processors, mib := machine()
			return processors == "2" && mib >= 1024
		})
	}
	resized("400m", "96Mi", 40000, 96<<20)
	if runtimeClass != "" {
		s.until(t, "the machine has shrunk", func() bool {
			processors, mib := machine()
			return processors == "1" && mib <= small+64
		})
	}
	if n := s.pod(t, "p").Status.ContainerStatuses[0].RestartCount; n != 0 {
		t.Errorf("restarted %d times", n)
	}
}
