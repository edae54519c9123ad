//go:build e2e

package k8s

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// The node's kubelet, and containerd under it, is killed at a step of a pod's life, and started again by whoever looks after it:
// the pod ends up as it should, others go on, the pod can be made again, and then the node is as before.
func TestKubelet(t *testing.T) {
	o := newOutage(t)
	for _, step := range []struct {
		name string
		run  func(t *testing.T, o *outage, pod string)
	}{
		{"creating", creating},
		{"initializing", initializing},
		{"running", func(t *testing.T, o *outage, pod string) { running(t, o, pod, "kubelet") }},
		{"exec", execing},
		{"deleting", deleting},
		{"ended-meanwhile", endedMeanwhile},
		{"containerd", func(t *testing.T, o *outage, pod string) { running(t, o, pod, "containerd") }},
	} {
		t.Run(step.name, func(t *testing.T) {
			defer o.tellFailure(t) // the pod is gone when the whole test ends
			before := o.host(t)
			o.sh(t, "lever", "rm -f /v/*")
			step.run(t, o, step.name)
			o.again(t, step.name)
			o.bystander.goesOn(t, step.name != "containerd")
			o.wantHost(t, before)
		})
	}
}

func creating(t *testing.T, o *outage, pod string) {
	// The shim is the first that the node sees of a pod's sandbox.
	back := o.kill(t, "kubelet", "[ $(pgrep -f '[c]ontainerd-shim' | wc -l) -gt $shims ]")
	o.run(t, pod, counter, 1)
	back()
	o.counts(t, pod).goesOn(t, true)
}

// The init container goes on without a kubelet, and the next one goes on from there.
func initializing(t *testing.T, o *outage, pod string) {
	o.run(t, pod, counter, 1, fmt.Sprintf(`
initContainers:
- {name: init, image: %s, volumeMounts: [{name: v, mountPath: /v}], command: [sh, -c, 'touch /v/init; until [ -e /v/go ]; do sleep 0.1; done']}
`, box))
	o.kill(t, "kubelet", "[ -e /v/init ]")()
	o.sh(t, "lever", "touch /v/go")
	o.counts(t, pod).goesOn(t, true)
	if s := o.pod(t, pod).Status.InitContainerStatuses[0]; s.RestartCount != 0 || s.State.Terminated == nil || s.State.Terminated.ExitCode != 0 {
		t.Errorf("the init container: %v", s)
	}
}

// The pod does not notice. What containerd had in its hands of the output, when it was killed, may be missing.
func running(t *testing.T, o *outage, pod, daemon string) {
	o.run(t, pod, counter, 1)
	c := o.counts(t, pod)
	o.kill(t, daemon, "true")()
	c.goesOn(t, daemon == "kubelet")
}

// The command's client is told.
func execing(t *testing.T, o *outage, pod string) {
	o.run(t, pod, counter, 1)
	c := o.counts(t, pod)
	done := make(chan result)
	go func() { done <- o.try("exec", pod, "--", "sh", "-c", "touch /v/exec; exec sleep 100000") }()
	back := o.kill(t, "kubelet", "[ -e /v/exec ]")
	if r := <-done; r.code <= 0 {
		t.Errorf("the command that was cut off: %s", r)
	} else {
		lines := strings.Split(strings.TrimSpace(r.stderr), "\n")
		t.Logf("the command that was cut off: exit code %d: %s", r.code, lines[len(lines)-1])
	}
	back()
	c.goesOn(t, true)
}

// A container that does not heed SIGTERM ends after its grace period. The kubelet that began the deletion is dead then: it is the
// next one that has to see to it.
func deleting(t *testing.T, o *outage, pod string) {
	o.run(t, pod, "trap 'touch /v/term' TERM; "+counter, 5+5*int(slow()))
	o.counts(t, pod) // and has set its trap
	o.kubectl(t, "delete", "pod", pod, "--wait=false")
	o.kill(t, "kubelet", "[ -e /v/term ]")()
	o.until(t, "the pod is gone", func() bool {
		return apierrors.IsNotFound(o.Get(t.Context(), pod, o.name, &corev1.Pod{}))
	})
}

// A container that ends while there is no kubelet: the next one finds its exit code, and starts it again.
func endedMeanwhile(t *testing.T, o *outage, pod string) {
	o.run(t, pod, "if [ ! -e /v/gone ]; then echo first; until [ -e /v/go ]; do sleep 0.1; done; echo last words; touch /v/gone; exit 7; fi; "+counter, 1)
	o.ready(t, pod)
	// It is kept away: one that was just started is killed before it has looked at any pod.
	o.kill(t, "kubelet", "kill -9 $(pidof kubelet); touch /v/go; [ -e /v/gone ]")()
	o.restarted(t, pod)
	c := o.pod(t, pod).Status.ContainerStatuses[0]
	if last := c.LastTerminationState.Terminated; last == nil || last.ExitCode != 7 || last.Reason != "Error" {
		t.Errorf("the run before: %v", last)
	}
	if got := o.logs(t, "--previous", pod); got != "first\nlast words\n" {
		t.Errorf("log of the run before: %q", got)
	}
	o.until(t, "the second run counts", func() bool { return strings.HasPrefix(o.logs(t, pod), "1\n2\n") })
}

// counter writes a number a second, without starting a process for it.
const counter = `mkfifo /tick; exec 3<>/tick; i=0; while :; do i=$((i+1)); echo $i; read -t 1 x <&3; done`

// An outage is a node on which daemons are killed, by a pod of the cluster's default runtime that may do that, and another pod
// there that has nothing to do with it. All of its pods share the directory /v.
type outage struct {
	*space
	node, dir string
	bystander *counting
}

func newOutage(t *testing.T) *outage {
	t.Helper()
	o := &outage{space: newSpace(t)}
	o.dir = o.hostDir(t)
	o.applyDefault(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: lever}
spec:
  hostPID: true
  terminationGracePeriodSeconds: 1
  volumes: [{name: v, hostPath: {path: %s, type: DirectoryOrCreate}}]
  containers:
  - name: main
    image: %s
    imagePullPolicy: IfNotPresent
    command: [sleep, infinity]
    securityContext: {privileged: true}
    volumeMounts: [{name: v, mountPath: /v}]
`, o.dir, box))
	o.ready(t, "lever")
	o.node = o.pod(t, "lever").Spec.NodeName
	o.run(t, "bystander", counter, 1)
	o.bystander = o.counts(t, "bystander")
	return o
}

// run makes a pod that runs a shell script on the node, with a grace period in seconds and what more there is to say of it.
func (o *outage) run(t *testing.T, name, text string, grace int, more ...string) {
	t.Helper()
	o.apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  nodeName: %s
  terminationGracePeriodSeconds: %d
  volumes: [{name: v, hostPath: {path: %s, type: Directory}}]
  containers:
  - name: main
    image: %s
    volumeMounts: [{name: v, mountPath: /v}]
    command:
    - sh
    - -c
    - |
%s
%s
`, name, o.node, grace, o.dir, box, indent(6, text), indent(2, strings.Join(more, "\n"))))
}

// kill has a daemon of the node killed once a condition holds there, a shell command in which $shims is how many shims there were.
// What it returns waits until the daemon serves again.
func (o *outage) kill(t *testing.T, daemon, when string) (back func()) {
	t.Helper()
	old := o.sh(t, "lever", "pidof "+daemon)
	// The connection of this very command may end with the daemon.
	r := o.try("exec", "lever", "--", "sh", "-c", fmt.Sprintf(
		"shims=$(pgrep -f '[c]ontainerd-shim' | wc -l); (until %s; do sleep 0.1; done; kill -9 $(pidof %s)) </dev/null >/dev/null 2>&1 &", when, daemon))
	return func() {
		t.Helper()
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("the command that has it killed: %s", r)
			}
		})
		o.until(t, daemon+" is back", func() bool {
			now := o.try("exec", "lever", "--", "pidof", daemon)
			return now.code == 0 && strings.TrimSpace(now.stdout) != old
		})
	}
}

// again makes a pod of a name that was used before, which it removes if it is still there, and removes it.
func (o *outage) again(t *testing.T, name string) {
	t.Helper()
	o.kubectl(t, "delete", "pod", name, "--ignore-not-found", "--timeout", patience().String())
	o.run(t, name, "exec sleep infinity", 1)
	o.ready(t, name)
	o.want(t, name, "echo hello", "hello")
	o.kubectl(t, "delete", "pod", name, "--timeout", patience().String())
}

// host is what the node has of pods: processes, mounts, cgroups and network links.
func (o *outage) host(t *testing.T) map[string]bool {
	t.Helper()
	out := o.sh(t, "lever", `p=/proc/$(pidof kubelet)
		pgrep -af '[c]ontainerd-shim|[m]icrovm-vmm' | sed 's/^/process /'
		awk '{ print "mount " $5 }' $p/mountinfo
		awk -F: 'NR > 2 { gsub(" ", "", $1); print "link " $1 }' $p/net/dev
		find $p/root/sys/fs/cgroup/ -type d -name '*pod*' | sed 's,.*/sys/fs/cgroup/,cgroup ,'`)
	found := map[string]bool{}
	for line := range strings.Lines(out) {
		found[strings.TrimSpace(line)] = true
	}
	return found
}

// wantHost waits until the node has nothing of pods any more that it had not before.
func (o *outage) wantHost(t *testing.T, before map[string]bool) {
	t.Helper()
	var left []string
	defer func() {
		if len(left) > 0 {
			t.Logf("left on the node:\n%s", strings.Join(left, "\n"))
		}
	}()
	o.until(t, "nothing is left on the node", func() bool {
		left = nil
		for _, what := range slices.Sorted(maps.Keys(o.host(t))) {
			if !before[what] {
				left = append(left, what)
			}
		}
		return len(left) == 0
	})
}

// A counting pod runs the script counter, and lives on.
type counting struct {
	*outage
	pod, container string
	last           int // of its numbers that were seen
}

// counts waits until a pod that was run with the script counter is ready and has begun to count.
func (o *outage) counts(t *testing.T, pod string) *counting {
	t.Helper()
	o.ready(t, pod)
	c := &counting{outage: o, pod: pod, container: o.pod(t, pod).Status.ContainerStatuses[0].ContainerID}
	o.until(t, pod+" counts", func() bool {
		numbers := c.numbers()
		if len(numbers) > 2 {
			c.last = numbers[len(numbers)-1]
		}
		return c.last > 0
	})
	return c
}

func (c *counting) numbers() []int {
	var found []int
	for line := range strings.Lines(c.try("logs", c.pod).stdout) {
		// What was torn in two when containerd was killed is no number.
		if i, err := strconv.Atoi(strings.TrimSpace(line)); err == nil {
			found = append(found, i)
		}
	}
	return found
}

// goesOn fails the test unless the pod is ready, runs the same container as before, which can be reached, and its output goes on:
// complete, if it is to be.
func (c *counting) goesOn(t *testing.T, complete bool) {
	t.Helper()
	var numbers []int
	c.until(t, "the output of "+c.pod+" goes on", func() bool {
		numbers = c.numbers()
		return len(numbers) > 0 && numbers[len(numbers)-1] > c.last
	})
	previous := 0
	for _, i := range numbers {
		if i != previous+1 && i > c.last && complete {
			t.Errorf("the output of %s goes from %d to %d", c.pod, previous, i)
		}
		previous = i
	}
	c.last = previous
	c.ready(t, c.pod)
	c.want(t, c.pod, "echo hello", "hello")
	if s := c.outage.pod(t, c.pod).Status.ContainerStatuses[0]; s.ContainerID != c.container || s.State.Running == nil {
		t.Errorf("%s had the container %s, and now %v", c.pod, c.container, s)
	}
}
