package vmm

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/microvm-runtime/microvm/pkg/kvm"
)

// kickSignal takes a vCPU's thread out of KVM_RUN. The Go runtime has a handler
// for every signal and does nothing for one that nobody asked to be notified
// of; numbers up to 34 belong to the runtime and the C library.
const kickSignal = unix.Signal(36)

// vcpu is a virtual processor and the goroutine that runs it.
type vcpu struct {
	m   *Machine
	id  int
	kvm *kvm.VCPU

	stats *kvm.Stats // nil: the kernel has none
	exits [numExitCounters]atomic.Uint64

	// Protected by Machine.mu.
	tid    int  // of its thread, 0 while there is none
	parked bool // it has left the guest and waits for Machine.want to change
}

// StartVCPUs makes processors until there are n, up to Config.MaxVCPUs, and runs
// them if the machine runs. One that is there stays: KVM cannot take it back.
// The guest starts a processor as any PC's, by an IPI, which nobody hears
// before this.
//
// A processor that the guest may have some day costs the host nothing before it
// is made; after that some 75 KiB in KVM, and a thread.
func (m *Machine) StartVCPUs(n int) error {
	if n > m.maxVCPU {
		return fmt.Errorf("%d vCPUs: this machine has at most %d", n, m.maxVCPU)
	}
	m.plug.Lock()
	defer m.plug.Unlock()
	for {
		m.mu.Lock()
		id, ended := len(m.vcpus), m.want == wantEnded
		m.mu.Unlock()
		if ended {
			return errEnded
		}
		if id >= n {
			return nil
		}
		v, err := m.newVCPU(id)
		if err != nil {
			return err
		}
		m.mu.Lock()
		m.vcpus = append(m.vcpus, v)
		if m.launched && m.want != wantEnded {
			m.running.Go(v.run)
		}
		m.mu.Unlock()
	}
}

// close gives back what createVCPU took.
func (v *vcpu) close() error {
	var err error
	if v.stats != nil {
		err = v.stats.Close()
	}
	return errors.Join(err, v.kvm.Close())
}

// Exit counters: one for each KVM exit reason, those of ports and MMIO by
// direction.
const (
	countPortRead = iota
	countPortWrite
	countMMIORead
	countMMIOWrite
	countConfigWrite
	countSignal
	countOther
	numExitCounters
)

var exitCounterNames = [numExitCounters]string{
	"port-read", "port-write", "mmio-read", "mmio-write", "config-write", "signal", "other",
}

// run is the vCPU's goroutine. KVM wants one thread for a vCPU's whole life, so
// the goroutine never unlocks: its thread ends with it.
func (v *vcpu) run() {
	runtime.LockOSThread()
	m := v.m
	if m.vcpuFilter != nil {
		if err := m.vcpuFilter.Install(); err != nil {
			m.finish(Exit{ExitError, fmt.Sprintf("vCPU %d: %v", v.id, err)})
			return
		}
	}
	m.mu.Lock()
	v.tid = unix.Gettid()
	m.mu.Unlock()
	for v.mayRun() {
		// Machine.want is looked at only when KVM_RUN was interrupted. An access
		// to a port or to MMIO is completed by the next KVM_RUN (api.rst, 5,
		// KVM_EXIT_IO): a vCPU that is to stop goes in once more, and with
		// immediate_exit set KVM completes the access and returns EINTR at once.
		for {
			err := v.kvm.Run()
			if err == nil {
				if v.handleExit() {
					continue
				}
				break
			}
			if errors.Is(err, unix.EINTR) {
				v.exits[countSignal].Add(1)
				break
			}
			if errors.Is(err, unix.EAGAIN) {
				// Not runnable yet: it waits for its start-up IPI.
				continue
			}
			m.finish(Exit{ExitError, fmt.Sprintf("vCPU %d: KVM_RUN: %v%s", v.id, err, v.where())})
			break
		}
	}
}

// mayRun parks the vCPU while the machine is paused. It says false when the
// machine is at its end.
func (v *vcpu) mayRun() bool {
	m := v.m
	m.mu.Lock()
	defer m.mu.Unlock()
	paused := false
	for m.want == wantPaused {
		paused, v.parked = true, true
		m.ack()
		m.resumed.Wait()
	}
	v.parked = false
	if m.want == wantEnded {
		v.tid = 0
		m.ack()
		return false
	}
	v.kvm.SetImmediateExit(false)
	if paused {
		// Tell the guest's watchdogs. EINVAL: the guest has no kvmclock yet.
		if err := v.kvm.KVMClockCtrl(); err != nil && !errors.Is(err, unix.EINVAL) {
			m.log.Warn("guest does not know that it was paused", "error", err)
		}
	}
	return true
}

// handleExit does what the guest exited for. It says false when the machine has
// come to its end.
func (v *vcpu) handleExit() bool {
	m := v.m
	switch reason := v.kvm.ExitReason(); reason {
	case kvm.ExitIO:
		io := v.kvm.IO()
		for data := io.Data; len(data) > 0; data = data[io.Size:] {
			if io.Write {
				v.exits[countPortWrite].Add(1)
				m.writePort(io.Port, data[:io.Size])
			} else {
				v.exits[countPortRead].Add(1)
				m.readPort(io.Port, data[:io.Size])
			}
		}
		return true
	case kvm.ExitMMIO:
		v.exits[m.accessMemory(v.kvm.MMIO())].Add(1)
		return true
	case kvm.ExitIntr:
		v.exits[countOther].Add(1)
		return true
	case kvm.ExitShutdown:
		m.finish(Exit{ExitTripleFault, fmt.Sprintf("vCPU %d%s", v.id, v.where())})
	case kvm.ExitInternalError:
		suberror, data := v.kvm.InternalError()
		m.finish(Exit{ExitError, fmt.Sprintf("vCPU %d: KVM internal error %d, data %#x%s", v.id, suberror, data, v.where())})
	case kvm.ExitFailEntry:
		m.finish(Exit{ExitError, fmt.Sprintf("vCPU %d: cannot enter the guest, hardware reason %#x%s", v.id, v.kvm.FailEntryReason(), v.where())})
	default:
		m.finish(Exit{ExitError, fmt.Sprintf("vCPU %d: unexpected KVM exit reason %d%s", v.id, reason, v.where())})
	}
	v.exits[countOther].Add(1)
	return false
}

// where says where the vCPU is, for an error.
func (v *vcpu) where() string {
	regs, err := v.kvm.GetRegs()
	if err != nil {
		return ""
	}
	return fmt.Sprintf(" at rip %#x", regs.RIP)
}

// VCPUStats counts what brought a vCPU out of the guest.
type VCPUStats struct {
	// Exits to us, by kind. They are counted from the start and never reset.
	Exits map[string]uint64
	// KVM is the kernel's own statistics of the vCPU by the kernel's names; nil
	// where it keeps none.
	KVM map[string]uint64
}

func (v *vcpu) readStats() (VCPUStats, error) {
	s := VCPUStats{Exits: make(map[string]uint64, numExitCounters)}
	for i, name := range exitCounterNames {
		s.Exits[name] = v.exits[i].Load()
	}
	if v.stats == nil {
		return s, nil
	}
	var err error
	s.KVM, err = v.stats.Read()
	return s, err
}
