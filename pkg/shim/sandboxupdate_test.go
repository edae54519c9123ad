package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"testing"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/anypb"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
)

// Whether somebody tells of the pod before its containers change, or after, each
// change counts once.
func TestResizeToldOfThePod(t *testing.T) {
	r, f := newTestResizer(limits{quota: 200000, period: 100000, memory: 1024 * mib})
	r.come(t.Context(), "a", own(1, 512))
	r.come(t.Context(), "b", own(1, 512))
	change := func(id string, cpus, mebibytes int64) error {
		return r.change(t.Context(), id, resources(cpus, mebibytes), func() error { f.note("update"); return nil })
	}
	pod := func(cpus, mebibytes int64) error { return r.setPod(t.Context(), own(cpus, mebibytes).usage()) }
	for _, step := range []struct {
		name string
		do   func() error
		want string
	}{
		{"a container, before anybody has told of the pod", func() error { return change("a", 2, 1024) }, "vmm 3/1664, agent 3/+512, update"},
		{"what is known", func() error { return pod(3, 1536) }, ""},
		{"the pod grows", func() error { return pod(4, 2048) }, "vmm 4/2176, agent 4/+1024"},
		{"and its container", func() error { return change("b", 2, 1024) }, "update"},
		{"a container grows, and is all there is to tell of", func() error { return change("a", 3, 1536) }, "vmm 5/2688, agent 5/+1536, update"},
		{"then its pod", func() error { return pod(5, 2560) }, ""},
		{"it shrinks again", func() error { return change("a", 2, 1024) }, "update"},
		{"its pod as well", func() error { return pod(4, 2048) }, "vmm 4/2176, agent 4/+1024"},
		{"a container shrinks", func() error { return change("b", 1, 512) }, "update"},
		{"and its pod", func() error { return pod(3, 1536) }, "vmm 3/1664, agent 3/+512"},
		{"less than its containers", func() error { return pod(1, 256) }, ""},
		{"no limit", func() error { return pod(0, 0) }, ""},
		{"a container grows in a pod without limits", func() error { return change("a", 3, 1024) }, "vmm 4/1664, agent 4/+512, update"},
	} {
		if err := step.do(); err != nil {
			t.Errorf("%s: %v", step.name, err)
		}
		if got := f.did(); got != step.want {
			t.Errorf("%s: %q, want %q", step.name, got, step.want)
		}
	}
}

func TestResizeOfThePodFails(t *testing.T) {
	broken := errors.New("broken")
	for name, spoil := range map[string]func(*fakeSandbox){
		"memory": func(f *fakeSandbox) { f.maxMemory = 700 * mib },
		"VMM":    func(f *fakeSandbox) { f.vmmError = broken },
	} {
		r, f := newTestResizer(own(0, 0))
		r.come(t.Context(), "a", own(0, 0))
		spoil(f)
		if err := r.setPod(t.Context(), own(4, 2048).usage()); !errdefs.IsResourceExhausted(err) && !errors.Is(err, broken) {
			t.Errorf("%s: %v", name, err)
		}
		if r.pod != (usage{}) || r.told {
			t.Errorf("%s: the pod counts for %+v", name, r.pod)
		}
	}
}

// updated is the extension as the CRI plugin writes it.
func updated(t *testing.T, resources *cri.LinuxContainerResources) *anypb.Any {
	t.Helper()
	data, err := json.Marshal(struct{ Overhead, Resources *cri.LinuxContainerResources }{
		Overhead: &cri.LinuxContainerResources{MemoryLimitInBytes: 1 << 40, CpuQuota: 100000000}, Resources: resources,
	})
	if err != nil {
		t.Fatal(err)
	}
	return &anypb.Any{TypeUrl: "io.containerd.cri.v1/UpdatedResources", Value: data}
}

func TestUpdateSandbox(t *testing.T) {
	f := newFixture(t)
	update := func(extension *anypb.Any, fields ...string) error {
		sandbox := &types.Sandbox{SandboxID: "pod"}
		if extension != nil {
			sandbox.Extensions = map[string]*anypb.Any{"metadata": {TypeUrl: "x"}, "updated-resources": extension}
		}
		_, err := f.UpdateSandbox(t.Context(), &sandboxapi.UpdateSandboxRequest{SandboxID: "pod", Sandbox: sandbox, Fields: fields})
		return err
	}
	if err := update(nil); !errdefs.IsNotFound(err) {
		t.Errorf("no sandbox: %v", err)
	}
	f.createSandbox("pod") // 2.5 processors, 1 GiB
	if err := update(nil); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("not started: %v", err)
	}
	if err := f.startSandbox("pod"); err != nil {
		t.Fatal(err)
	}
	more := updated(t, &cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 400000, MemoryLimitInBytes: 2 << 30, CpuShares: 7})
	for _, test := range []struct {
		name string
		do   func() error
		is   func(error) bool
		size string // of the machine, if it was asked for another one
	}{
		{name: "labels", do: func() error { return update(more, "labels") }},
		{name: "nothing about resources", do: func() error { return update(nil) }},
		{name: "overhead alone", do: func() error { return update(updated(t, nil), "extensions") }},
		{name: "more", do: func() error { return update(more, "extensions") }, size: "4/2176"},
		{name: "the same", do: func() error { return update(more) }},
		{name: "less", do: func() error {
			return update(updated(t, &cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 100000, MemoryLimitInBytes: 1 << 30}), "extensions.updated-resources")
		}, size: "1/1152"},
		{name: "no limits", do: func() error {
			return update(updated(t, &cri.LinuxContainerResources{CpuPeriod: -1, CpuQuota: -1, MemoryLimitInBytes: -1}))
		}, size: "1/512"},
		{name: "no sandbox in it", is: errdefs.IsInvalidArgument, do: func() error {
			_, err := f.UpdateSandbox(t.Context(), &sandboxapi.UpdateSandboxRequest{SandboxID: "pod"})
			return err
		}},
		{name: "no JSON", is: errdefs.IsInvalidArgument, do: func() error {
			return update(&anypb.Any{TypeUrl: "io.containerd.cri.v1/UpdatedResources", Value: []byte("{")})
		}},
		{name: "another type", is: errdefs.IsNotImplemented, do: func() error {
			return update(&anypb.Any{TypeUrl: "io.containerd.cri.v2/UpdatedResources", Value: more.Value})
		}},
		{name: "too much", is: errdefs.IsResourceExhausted, do: func() error {
			f.agent.SetIntercept(func(method string, _ any) (any, error) {
				if method == "ResizeSandbox" {
					return &agentproto.ResizeSandboxResponse{Cpus: 1}, nil
				}
				return nil, nil
			})
			defer func() { f.agent.SetIntercept(nil) }()
			return update(more)
		}, size: "1/512"},
	} {
		m := f.machine()
		m.mu.Lock()
		m.sizes = nil
		m.mu.Unlock()
		err := test.do()
		if test.is == nil && err != nil || test.is != nil && !test.is(err) {
			t.Errorf("%s: error %v", test.name, err)
		}
		size := ""
		m.mu.Lock()
		if n := len(m.sizes); n > 0 {
			size = fmt.Sprintf("%d/%d", m.sizes[n-1].VCPUs, m.sizes[n-1].MemoryBytes/mib)
		}
		m.mu.Unlock()
		if size != test.size {
			t.Errorf("%s: size %q, want %q", test.name, size, test.size)
		}
		if test.size == "" {
			continue
		}
		var machine struct {
			CPUs        int
			MemoryBytes int64
		}
		info := f.sandboxStatus("pod").Info["machine"]
		if err := json.Unmarshal([]byte(info), &machine); err != nil || fmt.Sprintf("%d/%d", machine.CPUs, machine.MemoryBytes/mib) != test.size {
			t.Errorf("%s: the status has %s, want %q", test.name, info, test.size)
		}
	}
}
