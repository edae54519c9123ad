package shim

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/microvm-runtime/microvm/pkg/shim/config"
	"github.com/microvm-runtime/microvm/pkg/vmm/control"
)

// shrinkTime bounds how long it takes to make a machine smaller, for which
// nobody waits but the next change.
const shrinkTime = time.Minute

// resizer keeps a sandbox's machine as large as its containers have to have it:
// it is told of containers that come, change and go. All methods may be called
// concurrently; changes happen one after the other.
type resizer struct {
	fit func(usage) size
	// vmm asks for a size and returns the one there is, agent has the guest use
	// it and returns how many processors it uses.
	vmm   func(context.Context, control.Size) (control.Size, error)
	agent func(ctx context.Context, cpus int, plugged uint64) (int, error)
	// booted is the size that the machine has started with. The memory stays.
	booted size

	turn chan struct{} // held by the change in progress; protects the rest
	now  size          // what was last asked for
	// sure says that VMM and guest have answered to that. One that has not may do it
	// later, or not at all.
	sure bool
	// reached is what came of it, for those who do not wait for the turn.
	reached atomic.Pointer[size]
	// pod is what the pod may use as a whole, containers that are still to come
	// included; it changes as its containers do, until the first setPod: then it
	// is told of those changes too.
	pod        usage
	told       bool
	containers map[string]limits
}

// newResizer is for a machine that was started for l.
func newResizer(c *config.Config, h *host, l limits,
	vmm func(context.Context, control.Size) (control.Size, error),
	agent func(ctx context.Context, cpus int, plugged uint64) (int, error),
) *resizer {
	r := &resizer{
		fit:        func(u usage) size { return sizeFor(c, u, h.cpus, h.memory) },
		vmm:        vmm,
		agent:      agent,
		turn:       make(chan struct{}, 1),
		containers: map[string]limits{},
	}
	if !l.container {
		r.pod = l.usage()
	}
	r.booted = r.fit(l.usage())
	r.now, r.sure = r.booted, true
	r.reached.Store(&r.booted)
	return r
}

// take waits for the turn of a change.
func (r *resizer) take(ctx context.Context) error {
	select {
	case r.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("resize the sandbox: %w", context.Cause(ctx))
	}
}

// pass gives the turn to the next change.
func (r *resizer) pass() { <-r.turn }

// wanted is the size for all that is in the sandbox.
func (r *resizer) wanted() size {
	var sum usage
	for _, l := range r.containers {
		sum = sum.add(l.usage())
	}
	return r.fit(sum.max(r.pod))
}

// come makes room for a container that is about to be created. It can run with
// less, if need be.
func (r *resizer) come(ctx context.Context, id string, l limits) {
	if err := r.take(ctx); err != nil {
		return // whoever gave the context up sees it next
	}
	defer r.pass()
	r.containers[id] = l
	if err := r.grow(ctx, r.wanted()); err != nil {
		log.L.WithError(err).Warnf("container %s may not get all that it is allowed to use", id)
	}
}

// change has a container's limits changed by apply: the machine grows before
// that, and shrinks after it. If it cannot grow as far as is needed, or apply
// fails, everything stays as it was.
func (r *resizer) change(ctx context.Context, id string, resources *specs.LinuxResources, apply func() error) error {
	if err := r.take(ctx); err != nil {
		return err
	}
	old, known := r.containers[id]
	if !known {
		defer r.pass()
		return apply() // one that counts for nothing
	}
	pod := r.pod
	l := old
	l.update(resources)
	r.containers[id] = l
	if r.pod != (usage{}) && !r.told {
		r.pod = r.pod.sub(old.usage()).add(l.usage())
	}
	return r.adapt(ctx, apply, func() { r.containers[id], r.pod = old, pod })
}

// setPod changes what the pod may use as a whole; nothing is no limit. If the
// machine cannot grow as far as is needed, everything stays as it was.
func (r *resizer) setPod(ctx context.Context, pod usage) error {
	if err := r.take(ctx); err != nil {
		return err
	}
	oldPod, oldTold := r.pod, r.told
	r.pod, r.told = pod, true
	return r.adapt(ctx, func() error { return nil }, func() { r.pod, r.told = oldPod, oldTold })
}

// adapt has the machine follow what is wanted now: it grows before apply, and
// shrinks after it; then it passes the turn on. If one of them fails, undo takes
// back what was wanted, and the machine gets back to the size that it had. Who has
// waited for one that does not answer does not wait for that, too.
func (r *resizer) adapt(ctx context.Context, apply func() error, undo func()) error {
	before, want := r.now, r.wanted()
	err := r.grow(ctx, want)
	if err == nil {
		err = apply()
	}
	if err != nil {
		undo()
		want = before
	}
	shrink := func() {
		defer r.pass()
		r.shrink(want)
	}
	if r.sure {
		shrink()
	} else {
		go shrink()
	}
	return err
}

// gone takes back what was there for a container that is no more, in the
// background. A sandbox without containers is about to end, and left alone.
func (r *resizer) gone(id string) {
	go func() {
		r.turn <- struct{}{}
		defer r.pass()
		delete(r.containers, id)
		if len(r.containers) > 0 {
			r.shrink(r.wanted())
		}
	}()
}

// grow makes the machine as large as want where it is smaller. An error says
// that it is not.
func (r *resizer) grow(ctx context.Context, want size) error {
	want = size{max(want.vcpus, r.now.vcpus), max(want.memory, r.now.memory)}
	if r.sure && want == r.now {
		return nil
	}
	cpus, memory, err := r.set(ctx, want)
	switch {
	case err != nil:
		return err
	case memory < want.memory:
		return fmt.Errorf("the sandbox's virtual machine has %d MiB of memory and cannot get %d MiB: %w",
			memory>>20, want.memory>>20, errdefs.ErrResourceExhausted)
	case cpus < want.vcpus:
		return fmt.Errorf("the sandbox's virtual machine has %d processors and cannot get %d: %w",
			cpus, want.vcpus, errdefs.ErrResourceExhausted)
	}
	return nil
}

// shrink asks for a smaller machine. The guest gives back what it can.
func (r *resizer) shrink(want size) {
	want = size{min(want.vcpus, r.now.vcpus), min(want.memory, r.now.memory)}
	if r.sure && want == r.now {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), shrinkTime)
	defer cancel()
	cpus, memory, err := r.set(ctx, want)
	if err != nil {
		log.L.WithError(err).Info("the sandbox's virtual machine stays larger than it has to be")
	} else if cpus > want.vcpus || memory > max(want.memory, r.booted.memory) {
		log.L.Infof("the guest keeps %d processors of %d wanted, and %d MiB of %d MiB, for now", cpus, want.vcpus, memory>>20, want.memory>>20)
	}
}

// set asks the VMM and then the guest for a size, and returns the one there is:
// of processors the guest's count, of memory the VMM's.
func (r *resizer) set(ctx context.Context, want size) (cpus int, memory uint64, err error) {
	machine := control.Size{VCPUs: want.vcpus, MemoryBytes: want.memory}
	// From here on it may have that, at any time, also if nobody answers: the VMM
	// does one request after the other, and none is taken back but by the next.
	r.now, r.sure = want, false
	if _, err := r.vmm(ctx, machine); err != nil {
		return 0, 0, err
	}
	cpus, err = r.agent(ctx, want.vcpus, want.memory-min(want.memory, r.booted.memory))
	if err != nil {
		return 0, 0, err
	}
	now, err := r.vmm(ctx, machine)
	if err != nil {
		return 0, 0, err
	}
	r.sure = true
	r.reached.Store(&size{cpus, now.MemoryBytes})
	return cpus, now.MemoryBytes, nil
}
