package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/microvm-runtime/microvm/pkg/agentproto"
	"github.com/microvm-runtime/microvm/pkg/shim/config"
	"github.com/microvm-runtime/microvm/pkg/vmm/control"
)

const mib = 1 << 20

// fakeSandbox is what a resizer works on. It notes what happens, sizes as
// processors and MiB.
type fakeSandbox struct {
	mu    sync.Mutex
	steps []string
	now   control.Size
	// maxMemory is what the guest plugs at most, minMemory what it keeps; zero
	// for all and nothing.
	maxMemory, minMemory uint64
	maxCPUs              int
	vmmError, agentError error
}

func (f *fakeSandbox) note(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.steps = append(f.steps, fmt.Sprintf(format, args...))
}

// did returns the steps since it was last called.
func (f *fakeSandbox) did() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := strings.Join(f.steps, ", ")
	f.steps = nil
	return s
}

func (f *fakeSandbox) vmm(_ context.Context, s control.Size) (control.Size, error) {
	if f.vmmError != nil {
		return control.Size{}, f.vmmError
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now = s
	if f.maxMemory > 0 {
		f.now.MemoryBytes = min(f.now.MemoryBytes, f.maxMemory)
	}
	f.now.MemoryBytes = max(f.now.MemoryBytes, f.minMemory)
	step := fmt.Sprintf("vmm %d/%d", s.VCPUs, s.MemoryBytes/mib)
	if !slices.Contains(f.steps, step) { // it is asked twice
		f.steps = append(f.steps, step)
	}
	return f.now, nil
}

func (f *fakeSandbox) agent(_ context.Context, cpus int, plugged uint64) (int, error) {
	if f.agentError != nil {
		return 0, f.agentError
	}
	f.note("agent %d/+%d", cpus, plugged/mib)
	if f.maxCPUs > 0 {
		return min(cpus, f.maxCPUs), nil
	}
	return cpus, nil
}

func newTestResizer(l limits) (*resizer, *fakeSandbox) {
	f := &fakeSandbox{}
	conf := &config.Config{DefaultVCPUs: 1, DefaultMemory: 512 * mib}
	return newResizer(conf, &host{cpus: 8, memory: 16384 * mib}, l, f.vmm, f.agent), f
}

// own are a container's limits; zero is none.
func own(cpus, mebibytes int64) limits {
	return limits{quota: cpus * 100000, period: 100000, memory: mebibytes * mib, container: true}
}

func resources(cpus, mebibytes int64) *specs.LinuxResources {
	quota, period, memory := cpus*100000, uint64(100000), mebibytes*mib
	return &specs.LinuxResources{
		CPU: &specs.LinuxCPU{Quota: &quota, Period: &period}, Memory: &specs.LinuxMemory{Limit: &memory},
	}
}

// settle waits until the end of a container was seen, and what follows from it.
func (r *resizer) settle(id string) {
	for {
		r.turn <- struct{}{}
		_, known := r.containers[id]
		<-r.turn
		if !known {
			return
		}
		runtime.Gosched()
	}
}

// rest waits until no change is in progress.
func (r *resizer) rest() {
	r.turn <- struct{}{}
	r.pass()
}

func TestResizeAsContainersComeAndGo(t *testing.T) {
	r, f := newTestResizer(own(1, 1024))
	if r.booted != (size{1, 1152 * mib}) {
		t.Fatalf("booted with %+v", r.booted)
	}
	for _, step := range []struct {
		name string
		do   func()
		want string
	}{
		{"the first", func() { r.come(t.Context(), "a", own(1, 1024)) }, ""},
		{"one without limits", func() { r.come(t.Context(), "b", own(0, 0)) }, ""},
		{"one with memory", func() { r.come(t.Context(), "c", own(0, 1024)) }, "vmm 1/2176, agent 1/+1024"},
		{"one with processors", func() { r.come(t.Context(), "d", own(2, 0)) }, "vmm 3/2176, agent 3/+1024"},
		{"half a processor more", func() {
			r.come(t.Context(), "e", limits{quota: 50000, period: 100000, container: true})
		}, "vmm 4/2176, agent 4/+1024"},
		{"and another", func() {
			r.come(t.Context(), "f", limits{quota: 5000, period: 10000, container: true})
		}, ""},
		{"an end", func() { r.gone("d"); r.settle("d") }, "vmm 2/2176, agent 2/+1024"},
		{"an end that frees memory", func() { r.gone("a"); r.settle("a") }, "vmm 1/1152, agent 1/+0"},
		{"an end that frees nothing", func() { r.gone("b"); r.settle("b") }, ""},
		{"an end of no container", func() { r.gone("x"); r.settle("x") }, ""},
		{"below what was booted with", func() { r.gone("c"); r.settle("c") }, "vmm 1/512, agent 1/+0"},
		{"nearly the last", func() { r.gone("e"); r.settle("e") }, ""},
		{"the last", func() { r.gone("f"); r.settle("f") }, ""},
	} {
		step.do()
		if got := f.did(); got != step.want {
			t.Errorf("%s: %q, want %q", step.name, got, step.want)
		}
	}
}

// A pod's own size is there from the start, and follows its containers'.
func TestResizeOfAPod(t *testing.T) {
	r, f := newTestResizer(limits{quota: 300000, period: 100000, memory: 2048 * mib})
	r.come(t.Context(), "pause", own(0, 0))
	r.come(t.Context(), "a", own(1, 1024))
	if got := f.did(); got != "" {
		t.Errorf("what was there is asked for: %s", got)
	}
	apply := func() error { f.note("update"); return nil }
	for _, step := range []struct {
		name      string
		resources *specs.LinuxResources
		want      string
	}{
		{"up", resources(2, 2048), "vmm 4/3200, agent 4/+1024, update"},
		{"the same", resources(2, 2048), "update"},
		{"down", resources(1, 1536), "update, vmm 3/2688, agent 3/+512"},
		{"up and down", resources(3, 1024), "vmm 5/2688, agent 5/+512, update, vmm 5/2176, agent 5/+0"},
		{"nothing of the kind", &specs.LinuxResources{}, "update"},
	} {
		if err := r.change(t.Context(), "a", step.resources, apply); err != nil {
			t.Errorf("%s: %v", step.name, err)
		}
		if got := f.did(); got != step.want {
			t.Errorf("%s: %q, want %q", step.name, got, step.want)
		}
	}
	// Its other container was counted all the time.
	r.come(t.Context(), "b", own(2, 1024))
	if got := f.did(); got != "" {
		t.Errorf("the other container: %s", got)
	}
	if err := r.change(t.Context(), "x", resources(8, 8192), apply); err != nil || f.did() != "update" {
		t.Errorf("a container that nobody knows: %v", err)
	}
}

func TestResizeFails(t *testing.T) {
	broken := errors.New("broken")
	applied := func() error { return nil }
	for _, test := range []struct {
		name  string
		spoil func(*fakeSandbox)
		apply func() error
		is    func(error) bool
		want  string
	}{
		{"not enough memory", func(f *fakeSandbox) { f.maxMemory = 700 * mib }, applied, errdefs.IsResourceExhausted,
			"vmm 4/2176, agent 4/+1664, vmm 1/512, agent 1/+0"},
		{"not enough processors", func(f *fakeSandbox) { f.maxCPUs = 2 }, applied, errdefs.IsResourceExhausted,
			"vmm 4/2176, agent 4/+1664, vmm 1/512, agent 1/+0"},
		{"no VMM", func(f *fakeSandbox) { f.vmmError = broken }, applied, func(err error) bool { return errors.Is(err, broken) }, ""},
		{"no agent", func(f *fakeSandbox) { f.agentError = broken }, applied, func(err error) bool { return errors.Is(err, broken) },
			"vmm 4/2176, vmm 1/512"},
		{"no update", func(*fakeSandbox) {}, func() error { return broken }, func(err error) bool { return errors.Is(err, broken) },
			"vmm 4/2176, agent 4/+1664, vmm 1/512, agent 1/+0"},
	} {
		r, f := newTestResizer(own(0, 0))
		r.come(t.Context(), "a", own(0, 0))
		test.spoil(f)
		did := false
		err := r.change(t.Context(), "a", resources(4, 2048), func() error { did = true; return test.apply() })
		if err == nil || !test.is(err) {
			t.Errorf("%s: %v", test.name, err)
		}
		if want := test.name == "no update"; did != want {
			t.Errorf("%s: applied %v", test.name, did)
		}
		r.rest()
		if got := f.did(); got != test.want {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
		if r.containers["a"] != own(0, 0) || r.pod != (usage{}) {
			t.Errorf("%s: the container counts for %+v", test.name, r.containers["a"])
		}
		// A container that comes runs with what there is.
		r.come(t.Context(), "b", own(4, 2048))
		if r.containers["b"] != own(4, 2048) {
			t.Errorf("%s: a container that came is not counted", test.name)
		}
	}
}

// Less is no failure, also if the guest does not give up all.
func TestShrinkIsAsGoodAsItGets(t *testing.T) {
	r, f := newTestResizer(own(0, 0))
	r.come(t.Context(), "a", own(2, 2048))
	f.did()
	f.minMemory, f.maxCPUs = 1500*mib, 0
	if err := r.change(t.Context(), "a", resources(1, 256), func() error { return nil }); err != nil {
		t.Error(err)
	}
	if got := f.did(); got != "vmm 1/512, agent 1/+0" {
		t.Error(got)
	}
	f.agentError = errors.New("busy")
	if err := r.change(t.Context(), "a", resources(1, 100), func() error { return nil }); err != nil {
		t.Error(err)
	}
}

// lateVMM does what it is asked in order, but gets to some of it when nobody waits
// for the answer any more.
type lateVMM struct {
	*fakeSandbox
	late bool // with the next request
	todo []control.Size
}

func (v *lateVMM) vmm(ctx context.Context, s control.Size) (control.Size, error) {
	if v.late {
		v.late, v.todo = false, append(v.todo, s)
		return control.Size{}, errHangs
	}
	v.catchUp()
	return v.fakeSandbox.vmm(ctx, s)
}

func (v *lateVMM) catchUp() {
	for _, s := range v.todo {
		v.fakeSandbox.vmm(context.Background(), s)
	}
	v.todo = nil
}

// The machine ends with the size that the containers were told of, also if it does
// what was asked of it too late.
func TestResizeAnsweredLate(t *testing.T) {
	start := func() (*resizer, *lateVMM) {
		r, f := newTestResizer(own(0, 0))
		v := &lateVMM{fakeSandbox: f}
		r.vmm = v.vmm
		r.come(t.Context(), "a", own(0, 0))
		return r, v
	}
	change := func(r *resizer, cpus, mebibytes int64) error {
		t.Helper()
		err := r.change(t.Context(), "a", resources(cpus, mebibytes), func() error { return nil })
		r.rest()
		return err
	}
	has := func(v *lateVMM, vcpus int, mebibytes uint64) {
		t.Helper()
		v.catchUp()
		if v.now.VCPUs != vcpus || v.now.MemoryBytes != mebibytes*mib {
			t.Errorf("the machine has %d/%d, want %d/%d", v.now.VCPUs, v.now.MemoryBytes/mib, vcpus, mebibytes)
		}
	}

	r, v := start()
	v.late = true
	if err := change(r, 4, 2048); !errors.Is(err, errHangs) {
		t.Errorf("growing: %v", err)
	}
	has(v, 1, 512)

	r, v = start()
	if err := change(r, 4, 2048); err != nil {
		t.Fatal(err)
	}
	v.late = true
	if err := change(r, 1, 256); err != nil {
		t.Errorf("shrinking: %v", err)
	}
	if err := change(r, 4, 2048); err != nil {
		t.Errorf("growing again: %v", err)
	}
	has(v, 4, 2176)

	// Who has waited long enough does not wait for what is taken back.
	r, v = start()
	answers := make(chan struct{})
	r.vmm = func(ctx context.Context, s control.Size) (control.Size, error) {
		if s.VCPUs == 4 {
			return control.Size{}, errHangs
		}
		<-answers
		return v.vmm(ctx, s)
	}
	if err := r.change(t.Context(), "a", resources(4, 2048), func() error { return nil }); !errors.Is(err, errHangs) {
		t.Errorf("growing: %v", err)
	}
	close(answers)
	r.rest()
	has(v, 1, 512)
}

// A guest that has not answered is asked again before somebody is told that he has
// got what it was asked for.
func TestResizeNotAnsweredByTheGuest(t *testing.T) {
	r, f := newTestResizer(own(0, 0))
	f.agentError = errors.New("busy")
	r.come(t.Context(), "a", own(4, 2048))
	update := func() error {
		err := r.change(t.Context(), "a", resources(4, 2048), func() error { f.note("update"); return nil })
		r.rest()
		return err
	}
	if err := update(); !errors.Is(err, f.agentError) {
		t.Errorf("update: %v", err)
	}
	if got := f.did(); got != "vmm 4/2176" {
		t.Error(got)
	}
	f.agentError = nil
	for _, want := range []string{"vmm 4/2176, agent 4/+1664, update", "update"} {
		if err := update(); err != nil {
			t.Error(err)
		}
		if got := f.did(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestResizeGivenUp(t *testing.T) {
	r, f := newTestResizer(own(0, 0))
	r.come(t.Context(), "a", own(0, 0))
	r.turn <- struct{}{} // another change takes its time
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.change(ctx, "a", resources(4, 2048), func() error { t.Error("applied"); return nil }); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	r.come(ctx, "b", own(4, 2048))
	<-r.turn
	if got := f.did(); got != "" {
		t.Error(got)
	}
}

func TestConcurrentResizes(t *testing.T) {
	r, f := newTestResizer(own(0, 0))
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			id := fmt.Sprint(i)
			r.come(t.Context(), id, own(1, 256))
			for n := range int64(5) {
				if err := r.change(t.Context(), id, resources(n, 256*n), func() error { return nil }); err != nil {
					t.Error(err)
				}
			}
			r.gone(id)
			r.settle(id)
		})
	}
	all.Wait()
	r.turn <- struct{}{}
	defer func() { <-r.turn }()
	if f.now.VCPUs != r.now.vcpus || f.now.MemoryBytes != r.now.memory {
		t.Errorf("the machine has %+v, the resizer thinks %+v", f.now, r.now)
	}
}

// The service grows the machine before a container is updated, and shrinks it
// when one is deleted.
func TestServiceResizes(t *testing.T) {
	f := newFixture(t)
	f.create("c1", "sleep")
	if _, err := f.Create(t.Context(), &taskapi.CreateTaskRequest{ID: "c2", Bundle: f.bundle(func(s *specs.Spec) {
		s.Linux.Resources = resources(2, 1024)
	}, "sleep")}); err != nil {
		t.Fatal(err)
	}
	update := func(r *specs.LinuxResources) error {
		data, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.Update(t.Context(), &taskapi.UpdateTaskRequest{ID: "c1", Resources: &anypb.Any{Value: data}})
		return err
	}
	if err := update(resources(2, 1024)); err != nil {
		t.Fatal(err)
	}
	f.agent.SetIntercept(func(method string, _ any) (any, error) {
		if method == "ResizeSandbox" {
			return &agentproto.ResizeSandboxResponse{Cpus: 1}, nil
		}
		return nil, nil
	})
	if err := update(resources(4, 2048)); !errdefs.IsResourceExhausted(err) {
		t.Errorf("update that needs more than there is: %v", err)
	}
	f.agent.SetIntercept(nil)
	if err := f.delete("c2", ""); err != nil {
		t.Fatal(err)
	}
	f.sandbox.resizer.settle("c2")
	if err := f.delete("c1", ""); err != nil {
		t.Fatal(err)
	}
	m := f.machine()
	m.mu.Lock()
	defer m.mu.Unlock()
	var got []string
	for _, s := range m.sizes {
		if step := fmt.Sprintf("%d/%d", s.VCPUs, s.MemoryBytes/mib); len(got) == 0 || got[len(got)-1] != step {
			got = append(got, step)
		}
	}
	if want := "2/1152 4/2176 4/3200 4/2176 2/1152"; strings.Join(got, " ") != want {
		t.Errorf("sizes %v, want %s", got, want)
	}
	calls := f.agent.Calls()
	resize, update1 := slices.Index(calls, "ResizeSandbox"), slices.Index(calls, "UpdateContainer")
	if resize > update1 || slices.Contains(calls[update1+1:], "UpdateContainer") {
		t.Errorf("calls %v", calls)
	}
}
