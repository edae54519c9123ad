//go:build e2e

package k8s

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/e2e-framework/klient/decoder"
	"sigs.k8s.io/e2e-framework/klient/k8s"
	"sigs.k8s.io/e2e-framework/klient/k8s/resources"
	"sigs.k8s.io/e2e-framework/pkg/envconf"
)

// A space is a namespace of a test's own.
type space struct {
	name string
	*resources.Resources
}

// newSpace makes a namespace, and at the test's end removes it and waits until it is gone. If the test has failed it first logs
// what the cluster says about it.
func newSpace(t *testing.T) *space {
	t.Helper()
	s := &space{name: envconf.RandomName("e2e", 12)}
	s.Resources = client.Resources(s.name)
	if err := s.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: s.name}}); err != nil {
		t.Fatalf("make a namespace: %v", err)
	}
	t.Cleanup(func() {
		s.tellFailure(t)
		s.kubectl(t, "delete", "namespace", s.name, "--wait", "--timeout", patience().String())
	})
	// Pods are refused before this is there.
	s.until(t, "the namespace has its service account", func() bool {
		return s.Get(context.Background(), "default", s.name, &corev1.ServiceAccount{}) == nil
	})
	return s
}

// tellFailure logs what the cluster says about the namespace, if the test has failed.
func (s *space) tellFailure(t *testing.T) {
	t.Helper()
	if !t.Failed() {
		return
	}
	for _, args := range [][]string{{"describe", "pods"}, {"get", "events", "--sort-by=.lastTimestamp"}, {"get", "all", "-o", "wide"}} {
		t.Logf("kubectl %v:\n%s", args, s.try(args...))
	}
}

// apply creates what a manifest says, with the RuntimeClass under test in every pod.
func (s *space) apply(t *testing.T, manifest string) {
	t.Helper()
	err := decoder.DecodeEach(t.Context(), strings.NewReader(manifest), func(ctx context.Context, o k8s.Object) error {
		o.SetNamespace(s.name)
		switch o := o.(type) {
		case *corev1.Pod:
			prepare(&o.Spec)
		case *appsv1.Deployment:
			prepare(&o.Spec.Template.Spec)
		case *appsv1.StatefulSet:
			prepare(&o.Spec.Template.Spec)
		}
		if err := s.Create(ctx, o); err != nil {
			return fmt.Errorf("%s: %w", o.GetName(), err)
		}
		return nil
	})
	if err != nil {
		t.Fatalf("create %s: %v", manifest, err)
	}
}

// applyDefault creates what a manifest says, with the cluster's default runtime.
func (s *space) applyDefault(t *testing.T, manifest string) {
	t.Helper()
	if r := s.tryInput(manifest, "create", "-f", "-"); r.code != 0 {
		t.Fatalf("create %s: %s", manifest, r)
	}
}

// prepare puts the RuntimeClass under test into a pod, and has the images taken from the node: "latest" would be pulled.
func prepare(p *corev1.PodSpec) {
	p.RuntimeClassName = nil
	if runtimeClass != "" {
		p.RuntimeClassName = &runtimeClass
	}
	for _, containers := range [][]corev1.Container{p.InitContainers, p.Containers} {
		for i := range containers {
			if containers[i].ImagePullPolicy == "" {
				containers[i].ImagePullPolicy = corev1.PullIfNotPresent
			}
		}
	}
}

// A result is what a command has said and how it ended.
type result struct {
	stdout, stderr string
	code           int
}

func (r result) String() string {
	return fmt.Sprintf("exit code %d\nstdout: %s\nstderr: %s", r.code, r.stdout, r.stderr)
}

// command is kubectl with arguments, in the test's namespace.
func (s *space) command(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "kubectl", append([]string{"--kubeconfig", os.Getenv("KUBECONFIG"), "--namespace", s.name}, args...)...)
}

// try runs kubectl.
func (s *space) try(args ...string) result { return s.tryInput("", args...) }

// tryInput is try with something on its standard input.
func (s *space) tryInput(input string, args ...string) result {
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience())
	defer cancel()
	cmd := s.command(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &stdout, &stderr
	err := cmd.Run()
	r := result{stdout: stdout.String(), stderr: stderr.String(), code: cmd.ProcessState.ExitCode()}
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		r.stderr += err.Error()
	}
	return r
}

// kubectl runs kubectl, which must succeed, and returns what it said.
func (s *space) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	r := s.try(args...)
	if r.code != 0 {
		t.Fatalf("kubectl %s: %s", strings.Join(args, " "), r)
	}
	return r.stdout
}

// sh runs a shell script in a pod's (first, or given by "pod -c container") container, and returns what it said without the last newline.
func (s *space) sh(t *testing.T, pod, script string) string {
	t.Helper()
	args := append(append([]string{"exec"}, strings.Fields(pod)...), "--", "sh", "-c", script)
	return strings.TrimSuffix(s.kubectl(t, args...), "\n")
}

// want is sh that must say something.
func (s *space) want(t *testing.T, pod, script, want string) {
	t.Helper()
	if got := s.sh(t, pod, script); got != want {
		t.Errorf("%q in %s says %q, want %q", script, pod, got, want)
	}
}

// until waits for a condition, with a limit that only a hang exceeds.
func (s *space) until(t *testing.T, what string, condition func() bool) {
	t.Helper()
	s.within(t, patience(), what, condition)
}

// within is until with another limit, for what others do at their own pace.
func (s *space) within(t *testing.T, limit time.Duration, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !condition(); time.Sleep(200 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("did not happen: %s", what)
		}
	}
}

func (s *space) pod(t *testing.T, name string) *corev1.Pod {
	t.Helper()
	p := &corev1.Pod{}
	if err := s.Get(t.Context(), name, s.name, p); err != nil {
		t.Fatal(err)
	}
	return p
}

// ready waits until pods are ready.
func (s *space) ready(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		s.until(t, name+" is ready", func() bool {
			for _, c := range s.pod(t, name).Status.Conditions {
				if c.Type == corev1.PodReady {
					return c.Status == corev1.ConditionTrue
				}
			}
			return false
		})
	}
}

// restarted waits until a pod's only container has been restarted, once, and is ready again.
func (s *space) restarted(t *testing.T, name string) {
	t.Helper()
	s.until(t, "the container was restarted", func() bool {
		c := s.pod(t, name).Status.ContainerStatuses
		return len(c) == 1 && c[0].RestartCount == 1 && c[0].State.Running != nil
	})
	s.ready(t, name)
}

// ended waits until all of a pod's containers have ended for good, and returns the first one's state.
func (s *space) ended(t *testing.T, name string) corev1.ContainerStateTerminated {
	t.Helper()
	var state corev1.ContainerStateTerminated
	s.until(t, name+" has ended", func() bool {
		p := s.pod(t, name)
		if p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed {
			return false
		}
		if len(p.Status.ContainerStatuses) > 0 && p.Status.ContainerStatuses[0].State.Terminated != nil {
			state = *p.Status.ContainerStatuses[0].State.Terminated
		}
		return true
	})
	return state
}

// logs of a pod that has ended, or up to now.
func (s *space) logs(t *testing.T, args ...string) string {
	t.Helper()
	return s.kubectl(t, append([]string{"logs"}, args...)...)
}

// available waits until a Deployment has all its replicas.
func (s *space) available(t *testing.T, name string) {
	t.Helper()
	s.kubectl(t, "rollout", "status", "deployment", name, "--timeout", patience().String())
}

// running are the names of the pods with a label that are not on their way out.
func (s *space) running(t *testing.T, label string) []string {
	t.Helper()
	var pods corev1.PodList
	if err := s.List(t.Context(), &pods, resources.WithLabelSelector(label)); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, p := range pods.Items {
		if p.DeletionTimestamp == nil {
			names = append(names, p.Name)
		}
	}
	return names
}

// sleeper is a pod of busybox that does nothing, with what more there is to say of its container and of itself.
func sleeper(name, container, pod string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, labels: {app: %s}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: %s
    command: [sleep, infinity]
%s
%s
`, name, name, box, indent(4, container), indent(2, pod))
}

// script is a pod that runs a shell script to its end.
func script(name, text, container, pod string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: %s
    command:
    - sh
    - -c
    - |
%s
%s
%s
`, name, box, indent(6, text), indent(4, container), indent(2, pod))
}

func indent(n int, text string) string {
	lines := strings.Split(strings.Trim(text, "\n"), "\n")
	for i := range lines {
		lines[i] = strings.Repeat(" ", n) + lines[i]
	}
	return strings.Join(lines, "\n")
}

// The images made by hack/images.
const (
	box      = "docker.io/microvm/box:latest"
	web      = "docker.io/microvm/web:latest"
	programs = "docker.io/microvm/programs:bookworm"
)
