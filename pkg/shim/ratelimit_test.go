package shim

import (
	"context"
	"strings"
	"testing"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/pkg/vmm/control"
	"github.com/microvm-runtime/microvm/pkg/vmm/ratelimit"
)

// Annotations limit a machine however the pod is made: by its first container,
// the pause container included, or by the sandbox API.
func TestRateLimitAnnotations(t *testing.T) {
	const name = "io.microvm.disk-operations-per-second"
	for how, create := range map[string]func(f *fixture, annotations map[string]string) error{
		"container": func(f *fixture, annotations map[string]string) error {
			bundle := f.bundle(func(s *specs.Spec) { s.Annotations = annotations }, "sleep")
			_, err := f.Create(context.Background(), &taskapi.CreateTaskRequest{ID: "c1", Bundle: bundle})
			return err
		},
		"pause container": func(f *fixture, annotations map[string]string) error {
			bundle := f.bundle(func(s *specs.Spec) {
				s.Annotations = annotations
				s.Annotations["io.kubernetes.cri.container-type"] = "sandbox"
			})
			_, err := f.Create(context.Background(), &taskapi.CreateTaskRequest{ID: "c1", Bundle: bundle})
			return err
		},
		"sandbox API": func(f *fixture, annotations map[string]string) error {
			_, err := f.CreateSandbox(context.Background(), &sandboxapi.CreateSandboxRequest{
				SandboxID: "pod", BundlePath: f.t.TempDir(), Options: podConfig(f.t, &cri.PodSandboxConfig{Annotations: annotations}),
			})
			if err != nil {
				return err
			}
			return f.startSandbox("pod")
		},
	} {
		t.Run(how, func(t *testing.T) {
			f := newFixture(t)
			f.conf.RateLimits.NetworkReceive.Bytes = ratelimit.Rate{PerSecond: 1 << 20, Burst: 1 << 20}
			if err := create(f, map[string]string{name: "1000 burst 50"}); err != nil {
				t.Fatal(err)
			}
			want := control.RateLimits{
				Disk:           ratelimit.Limits{Operations: ratelimit.Rate{PerSecond: 1000, Burst: 50}},
				NetworkReceive: f.conf.RateLimits.NetworkReceive,
			}
			if got := f.requests[0].rates; got != want {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
			if how == "container" {
				f.delete("c1", "")
			}
		})
		t.Run(how+", nonsense", func(t *testing.T) {
			f := newFixture(t)
			err := create(f, map[string]string{name: "fast"})
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), name) {
				t.Errorf("error %v", err)
			}
			if len(f.requests) > 0 {
				t.Error("a machine was launched")
			}
		})
	}
}

// A container that comes to a running machine changes nothing about it.
func TestRateLimitOfALaterContainer(t *testing.T) {
	f := newFixture(t)
	f.create("c1", "sleep")
	bundle := f.bundle(func(s *specs.Spec) { s.Annotations = map[string]string{"io.microvm.disk-bytes-per-second": "fast"} }, "sleep")
	if _, err := f.Create(context.Background(), &taskapi.CreateTaskRequest{ID: "c2", Bundle: bundle}); err != nil {
		t.Error(err)
	}
	if n := len(f.requests); n != 1 || f.requests[0].rates != (control.RateLimits{}) {
		t.Errorf("%d machines, the first with %+v", n, f.requests[0].rates)
	}
	f.delete("c2", "")
	f.delete("c1", "")
}
